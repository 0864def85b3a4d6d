#!/bin/bash
# A docker daemon of its own for tests: its socket, data, containerd, bridge and
# TLS port are nobody else's, and none of it is left when this script ends.
#
#   dockerd.sh DIRECTORY
#
# Reads commands from standard input, one a line, and answers each with `ok` or
# a reason:
#
#   start   starts the daemon (again) and waits until it answers
#   kill    kills it as a crash would; containers keep running
#
# At the end of its input, which is also when the test that started it dies,
# it removes every container and everything else it made. Start it in a process
# group of its own, so that Ctrl-C reaches only the test.
#
# In DIRECTORY: docker.sock, port (of TCP with TLS), tls/{ca,cert,key}.pem,
# dockerd.log. Runtimes: runc, crun, runsc (no network), runsc-net, and
# kata-fake, gvisor-fake, crun-fake, which are not what their names say, and
# broken, which starts nothing.
set -u

dir=${1:?usage: dockerd.sh DIRECTORY}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
socket=$dir/docker.sock
bridge=svmt$$
daemon=
export DOCKER_HOST=unix://$socket
export DOCKER_CONFIG=$dir/client
unset DOCKER_CONTEXT DOCKER_TLS_VERIFY DOCKER_CERT_PATH

trap clean_up EXIT

need() {
    for program in "$@"; do
        if ! command -v "$program" >/dev/null; then
            echo "$program is missing: apt-get install docker.io runc crun runsc openssl iproute2"
            exit 1
        fi
    done
}

# A subnet of the shared address space (RFC 6598) that nobody here routes.
make_bridge() {
    local first=$(($$ % 64)) offset subnet
    ip link add "$bridge" type bridge || return 1
    for offset in $(seq 0 63); do
        subnet=100.127.$((first + offset & 63 | 128))
        if [ -z "$(ip route show "$subnet.0/24")" ]; then
            ip address add "$subnet.1/24" dev "$bridge" && ip link set "$bridge" up
            return
        fi
    done
    return 1
}

make_certificates() {
    mkdir -p "$dir/tls"
    (
        cd "$dir/tls" || exit 1
        key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }
        key ca-key.pem && key server-key.pem && key key.pem || exit 1
        openssl req -new -x509 -key ca-key.pem -subj /CN=test-ca -days 2 -out ca.pem || exit 1
        sign() {
            openssl req -new -key "$1" -subj "/CN=$2" -out request.pem &&
                openssl x509 -req -in request.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
                    -extfile <(printf '%s\n' "$3") -out "$4"
        }
        sign server-key.pem daemon 'subjectAltName=IP:127.0.0.1' server.pem &&
            sign key.pem client 'extendedKeyUsage=clientAuth' cert.pem
    ) >"$dir/openssl.log" 2>&1
}

# crun of Debian 12 refuses hosts with both kinds of control groups; in a mount
# namespace of its own it sees one.
make_runtimes() {
    cat >"$dir/crun" <<'SCRIPT'
#!/bin/sh
if [ -d /sys/fs/cgroup/unified ]; then
    exec unshare -m sh -c 'umount /sys/fs/cgroup/unified; exec crun "$@"' sh "$@"
fi
exec crun "$@"
SCRIPT
    printf '#!/bin/sh\necho "this runtime is broken" >&2\nexit 1\n' >"$dir/broken"
    chmod +x "$dir/crun" "$dir/broken"
    cat >"$dir/daemon.json" <<JSON
{
  "live-restore": true,
  "runtimes": {
    "broken": {"path": "$dir/broken"},
    "crun": {"path": "$dir/crun"},
    "runsc": {"path": "$(command -v runsc)", "runtimeArgs": ["--platform=ptrace", "--network=none"]},
    "runsc-net": {"path": "$(command -v runsc)", "runtimeArgs": ["--platform=ptrace", "--network=host"]},
    "kata-fake": {"path": "$(command -v runc)"},
    "gvisor-fake": {"path": "$(command -v runc)"},
    "crun-fake": {"path": "$(command -v runsc)", "runtimeArgs": ["--platform=ptrace", "--network=none"]}
  }
}
JSON
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_daemon() {
    rm -f "$dir/docker.pid"
    dockerd --config-file="$dir/daemon.json" --data-root="$dir/data" --exec-root="$dir/exec" \
        --pidfile="$dir/docker.pid" --host="unix://$socket" --host="tcp://127.0.0.1:$(cat "$dir/port")" \
        --tlsverify --tlscacert="$dir/tls/ca.pem" --tlscert="$dir/tls/server.pem" --tlskey="$dir/tls/server-key.pem" \
        --bridge="$bridge" --iptables=false --ip6tables=false --ip-masq=false --ip-forward=false \
        --userland-proxy=false --shutdown-timeout=5 </dev/null >>"$dir/dockerd.log" 2>&1 &
    daemon=$!
    local tries
    for tries in $(seq 600); do
        if docker version >/dev/null 2>&1; then
            echo ok
            return
        fi
        if ! kill -0 "$daemon" 2>/dev/null; then
            break
        fi
        sleep 0.05
    done
    echo "dockerd does not answer: $(tail -n 3 "$dir/dockerd.log" | tr '\n' ' ')"
}

kill_daemon() {
    local containerd tries
    containerd=$(cat "$dir/exec/containerd/containerd.pid" 2>/dev/null)
    kill -KILL "$daemon"
    wait "$daemon" 2>/dev/null
    daemon=
    # It dies with the daemon; one that the next daemon still sees dying is
    # waited for in vain.
    for tries in $(seq 200); do
        [ -n "$containerd" ] && kill -0 "$containerd" 2>/dev/null || break
        sleep 0.05
    done
    echo ok
}

clean_up() {
    trap - EXIT
    if [ -n "$daemon" ] || start_daemon >/dev/null; then
        docker ps --all --quiet 2>/dev/null | xargs --no-run-if-empty docker rm --force --volumes >/dev/null 2>&1
        docker network ls --quiet --filter type=custom 2>/dev/null |
            xargs --no-run-if-empty docker network rm >/dev/null 2>&1
    fi
    local containerd
    containerd=$(cat "$dir/exec/containerd/containerd.pid" 2>/dev/null)
    if [ -n "$daemon" ]; then
        kill -TERM "$daemon"
        timeout 20 tail --pid="$daemon" -f /dev/null || kill -KILL "$daemon"
        wait "$daemon" 2>/dev/null
    fi
    [ -z "$containerd" ] || kill -KILL "$containerd" 2>/dev/null
    # A create that a crash cut off leaves a shim that nobody knows of.
    local process
    for process in /proc/[0-9]*; do
        if tr '\0' ' ' 2>/dev/null <"$process/cmdline" | grep -q -- "-address $dir/exec/"; then
            kill -KILL "${process#/proc/}"
        fi
    done
    ip link delete "$bridge" 2>/dev/null
    grep -o " $dir/[^ ]*" /proc/self/mounts | sort -r | xargs --no-run-if-empty umount -l 2>/dev/null
    rm -rf "$dir"
}

need dockerd containerd docker runc crun runsc openssl ip python3
make_bridge || { echo "a bridge cannot be made: run as root"; exit 1; }
make_certificates || { echo "certificates cannot be made: $(tail -n 1 "$dir/openssl.log")"; exit 1; }
make_runtimes
free_port >"$dir/port"
while read -r command; do
    case $command in
        start) start_daemon ;;
        kill) kill_daemon ;;
        *) echo "unknown command: $command" ;;
    esac
done
