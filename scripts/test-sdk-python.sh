#!/bin/sh
# Runs the tests of the published Python SDK against a `stacyvm` program.
#
#   scripts/test-sdk-python.sh PROGRAM [IMAGE-ARCHIVE] [pytest options]
#
# IMAGE-ARCHIVE is a docker-archive that is imported as alpine:latest; without
# it scripts/make-test-image.sh makes one. The SDK comes from PyPI, pinned in
# tests/sdk-python/requirements.txt, into a venv below target/ that is kept.
set -eu

root="$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
tests="$root/tests/sdk-python"
program="${1:?usage: scripts/test-sdk-python.sh PROGRAM [IMAGE-ARCHIVE] [pytest options]}"
program="$(CDPATH= cd -- "$(dirname -- "$program")" && pwd)/$(basename -- "$program")"
shift
image=
if [ $# -gt 0 ] && [ -f "$1" ]; then
    image="$(CDPATH= cd -- "$(dirname -- "$1")" && pwd)/$(basename -- "$1")"
    shift
fi

venv="${CARGO_TARGET_DIR:-$root/target}/sdk-python"
wanted="$(cksum <"$tests/requirements.txt")"
if [ "$(cat "$venv/requirements.cksum" 2>/dev/null || true)" != "$wanted" ]; then
    rm -rf "$venv"
    if ! python3 -m venv "$venv"; then
        echo "cannot make a Python venv; on Debian: apt-get install python3-venv" >&2
        exit 1
    fi
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$tests/requirements.txt"
    printf '%s\n' "$wanted" >"$venv/requirements.cksum"
fi

if [ -z "$image" ] && [ "${STACYVM_TEST_PROVIDER:-}" != mock ]; then
    image="${CARGO_TARGET_DIR:-$root/target}/test-image.tar"
    [ -f "$image" ] || "$root/scripts/make-test-image.sh" "$image"
fi

cd "$tests"
STACYVM_BIN="$program" STACYVM_TEST_IMAGE="$image" \
    exec "$venv/bin/python" -B -m pytest -p no:cacheprovider "$@"
