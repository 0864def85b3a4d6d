#!/bin/sh
# Measures a `stacyvm` program beside other runtimes on this machine.
#
#   scripts/bench.sh PROGRAM [options of stacyvm-bench]
#
# Installs the runtimes it measures beside; docker is measured when its daemon
# is installed. Needs root.
set -eu

root="$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
program="${1:?usage: scripts/bench.sh PROGRAM [options]}"
program="$(CDPATH= cd -- "$(dirname -- "$program")" && pwd)/$(basename -- "$program")"
shift
cd "$root"
PATH="$HOME/.cargo/bin:$PATH"
target_dir="${CARGO_TARGET_DIR:-$root/target}"

if [ "$(id -u)" != 0 ]; then
    echo "bench: sandboxes with a network, crun and runc need root: sudo make bench" >&2
    exit 1
fi
scripts/setup.sh bench
# Not needed: what is not there is printed as not available.
for runtime in crun runc proot; do
    if ! command -v "$runtime" >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
        echo "bench: installing $runtime"
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$runtime" </dev/null ||
            echo "bench: cannot install $runtime; going on without it" >&2
    fi
done

# ext4 without a journal looks at every recently deleted file before it makes a
# new one. Hardly any host has it, some build machines do, and everything that
# makes and deletes files is several times slower there.
work="${TMPDIR:-/tmp}"
device="$(basename "$(df --output=source "$work" | tail -n 1)")"
if [ -d "/proc/fs/ext4/$device" ] && ! ls -d "/proc/fs/jbd2/$device"* >/dev/null 2>&1; then
    echo "bench: $work is on ext4 without a journal; measuring on one with a journal, in a loop device"
    disk="$(mktemp -d)"
    chmod 711 "$disk"
    truncate -s 8G "$disk/image"
    mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$disk/image"
    mkdir "$disk/work"
    mount -o loop "$disk/image" "$disk/work"
    trap 'umount "$disk/work" && rm -rf "$disk"' EXIT
    export TMPDIR="$disk/work"
fi

image="$target_dir/test-image.tar"
[ -f "$image" ] || scripts/make-test-image.sh "$image"
# As the program is built, so that they share what they have in common.
scripts/build.sh stacyvm-bench
"$(dirname -- "$program")/stacyvm-bench" --stacyvm "$program" --image "$image" "$@"
