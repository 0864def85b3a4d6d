#!/bin/sh
# Builds the one static program, target/<host>/release/stacyvm.
#
#   scripts/build.sh [PROGRAM]
#
# PROGRAM is `stacyvm` unless given; `stacyvm-bench` measures it.
set -eu

root="$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
cd "$root"
PATH="$HOME/.cargo/bin:$PATH"
program="${1:-stacyvm}"
target="$(rustc -vV | sed -n 's/^host: //p')"
commit="$(git rev-parse --short=12 HEAD 2>/dev/null || true)"
[ -z "$commit" ] || export STACYVM_BUILD_COMMIT="$commit"

# The target is named although it is this machine: without it the flag would
# also reach procedural macros, which cannot be static.
RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
    cargo build --release --locked --package "$program" --bin "$program" --target "$target"
