#!/bin/sh
# Installs what building, running or testing needs and this machine lacks.
#
#   scripts/setup.sh build   compiler and Rust
#   scripts/setup.sh run     also what sandboxes use
#   scripts/setup.sh bench   also what benches need
#   scripts/setup.sh test    also what tests use
#
# On Debian and Ubuntu packages come through apt, with sudo where needed.
# Elsewhere it says what is missing and goes on.
set -eu

root="$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
what="${1:-build}"
wanted_rust="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")"

building="build-essential ca-certificates curl git"
running="$building e2fsprogs iproute2 iptables nftables python3"
case "$what" in
    build) packages="$building" ;;
    run) packages="$running" ;;
    bench) packages="$running busybox-static" ;;
    test)
        packages="$running python3-venv"
        packages="$packages $(grep -v '^#' "$root/scripts/test-packages.txt" | tr '\n' ' ')"
        # A kernel with disk quotas, for hosts whose own has none. There is one for this architecture only.
        [ "$(uname -m)" != x86_64 ] || packages="$packages user-mode-linux"
        ;;
    *)
        sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        echo "setup: this needs root: $*" >&2
        return 1
    fi
}

missing_packages() {
    for package in $packages; do
        state="$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)"
        [ "$state" = installed ] || printf '%s ' "$package"
    done
}

if command -v apt-get >/dev/null 2>&1; then
    missing="$(missing_packages)"
    if [ -n "$missing" ]; then
        echo "setup: installing $missing"
        export DEBIAN_FRONTEND=noninteractive
        # Lists on a fresh machine are empty, on an old one outdated.
        as_root apt-get update -qq || echo "setup: apt-get update failed; trying with the lists there are" >&2
        # shellcheck disable=SC2086  # a list of names
        as_root apt-get install -y -qq --no-install-recommends $missing </dev/null
    fi
else
    echo "setup: no apt here; these are needed under their names of this system: $packages" >&2
fi

# Succeeds when the Rust there is, is new enough.
rust_is_there() {
    command -v cargo >/dev/null 2>&1 || return 1
    have="$(rustc --version 2>/dev/null | sed -n 's/^rustc \([0-9]*\.[0-9]*\).*/\1/p')"
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$wanted_rust" "$have" | sort -V | head -n 1)" = "$wanted_rust" ]
}

PATH="$HOME/.cargo/bin:$PATH"
if ! rust_is_there; then
    echo "setup: installing Rust (at least $wanted_rust)"
    if ! command -v rustup >/dev/null 2>&1; then
        if apt-cache policy rustup 2>/dev/null | grep -q 'Candidate: [0-9]'; then
            as_root apt-get install -y -qq --no-install-recommends rustup </dev/null
        else
            curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --no-modify-path --profile minimal
        fi
    fi
    rustup toolchain install stable --profile minimal --component clippy --component rustfmt
    rustup default stable
    if ! rust_is_there; then
        echo "setup: Rust $wanted_rust or newer is needed; $(rustc --version 2>&1) was found" >&2
        exit 1
    fi
fi
