#!/bin/sh
# Inside the emulated machine: the unit, its restart, limits on control groups
# v2, and the contract suite by each runtime. Lines with `vm:` are for run.sh.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
STACYVM_API_KEY="$(cat /etc/stacyvm/api.key)"
export STACYVM_API_KEY
failed=0

say() { echo "vm: $*"; }

# check WHAT EXPECTED ACTUAL
check() {
    if [ "$2" = "$3" ]; then
        say "ok    $1"
    else
        say "FAIL  $1: expected '$2', not '$3'"
        failed=$((failed + 1))
    fi
}

until_ready() {
    for _ in $(seq 60); do
        stacyvm list >/dev/null 2>&1 && return
        sleep 1
    done
}

say "Linux $(uname -r), $(systemctl --version | sed -n 1p), $(stat -f -c %T /sys/fs/cgroup)"
check "control groups are v2 alone" cgroup2fs "$(stat -f -c %T /sys/fs/cgroup)"
stacyvm image import /root/test-image.tar >/dev/null 2>&1
until_ready
check "the unit runs" active "$(systemctl is-active stacyvm)"

id="$(stacyvm spawn --quiet --image alpine:latest --memory 128)"
groups="$(echo /sys/fs/cgroup/stacyvm/*/"$id")"
limits() { cat "$groups/memory.max" "$groups/pids.max" "$groups/cpu.max" | tr '\n' ' '; }
expected="134217728 1024 100000 100000 "
check "limits are set" "$expected" "$(limits)"
stacyvm exec "$id" -- sh -c '(sleep 5; echo survived >/tmp/mark) >/dev/null 2>&1 &'
# systemd takes stock of the controllers that its own units need.
systemctl daemon-reload
systemd-run --quiet --scope -p CPUQuota=50% -p MemoryMax=100M -- true
systemctl restart stacyvm
until_ready
sleep 6
check "a command survives the unit's restart" survived "$(stacyvm exec "$id" -- cat /tmp/mark)"
check "limits are still set" "$expected" "$(limits)"
said="$(stacyvm exec --json "$id" -- sh -c 'tail /dev/zero' 2>&1)"
check "memory is limited" SANDBOX_OOM "$(echo "$said" | grep -o SANDBOX_OOM | head -n 1)"
stacyvm exec "$id" -- true
check "its sandbox goes on" 0 "$?"
stacyvm kill --all >/dev/null 2>&1
systemctl stop stacyvm
check "no group is left" 0 "$(find /sys/fs/cgroup/stacyvm -name 'sb-*' 2>/dev/null | wc -l)"
check "no directory is left" 0 "$(find /var/lib/stacyvm/oci/sandboxes -mindepth 1 | wc -l)"

for runtime in $RUNTIMES; do
    STACYVM_PROVIDERS_OCI_RUNTIME=$runtime stacyvm conformance --provider oci --data-dir /var/lib/stacyvm \
        --image alpine:latest >/tmp/conformance 2>&1
    status=$?
    grep -v ^PASS /tmp/conformance
    check "contract suite, runtime $runtime: $(tail -n 1 /tmp/conformance)" 0 "$status"
done
say "failed checks: $failed"
systemctl poweroff --force --force
