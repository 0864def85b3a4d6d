#!/bin/sh
# Measures a `stacyvm` program beside other runtimes on this machine.
#
#   scripts/bench.sh PROGRAM [options of stacyvm-bench]
#
# Installs crun and runc when apt has them and they are missing; docker is
# measured when its daemon is installed. Needs root.
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
for runtime in crun runc; do
    if ! command -v "$runtime" >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
        echo "bench: installing $runtime"
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$runtime" </dev/null ||
            echo "bench: cannot install $runtime; going on without it" >&2
    fi
done

image="$target_dir/test-image.tar"
[ -f "$image" ] || scripts/make-test-image.sh "$image"
# As the program is built, so that they share what they have in common.
scripts/build.sh stacyvm-bench
exec "$(dirname -- "$program")/stacyvm-bench" --stacyvm "$program" --image "$image" "$@"
