#!/bin/sh
# Certifies a runtime on this host: a thin wrapper around `stacyvm certify`.
#
#   scripts/certify-runtime.sh [all|oci|docker|gvisor|kata|firecracker|qemu|proot|e2b|custom]
#       [--format text|json|markdown] [--output PATH]
#       [--stacyvm-url URL] [--stacyvm-api-key KEY] [--stacyvm-bin PATH]
#
# Everything else that `stacyvm certify --help` lists is passed on. STACYVM_BIN,
# then --stacyvm-bin, then a program built here, then one in PATH is used.
#
# STACYVM_FIRECRACKER_KERNEL, STACYVM_PROOT_ROOTFS and
# STACYVM_PROOT_WORKSPACE_BASE say where those are.
#
# Exit status: 0 when everything passed, 1 when something failed or could not be
# looked at, 2 for wrong arguments.
set -eu

root="$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"

usage() {
    sed -n '2,15s/^# \{0,1\}//p' "$0"
}

target=
bin="${STACYVM_BIN:-}"
expects=
for argument in "$@"; do
    if [ -n "$expects" ]; then
        [ "$expects" != --stacyvm-bin ] || bin="$argument"
        expects=
        continue
    fi
    case "$argument" in
        -h | --help)
            usage
            exit 0
            ;;
        --stacyvm-bin=*) bin="${argument#*=}" ;;
        --*=*) ;;
        --json) ;;
        --*) expects="$argument" ;;
        *) target="$argument" ;;
    esac
done
[ -n "$target" ] || set -- all "$@"

if [ -z "$bin" ]; then
    for found in "$root"/stacyvm "$root"/target/*/release/stacyvm "$(command -v stacyvm || true)"; do
        if [ -f "$found" ] && [ -x "$found" ]; then
            bin="$found"
            break
        fi
    done
fi
if [ -z "$bin" ] || [ ! -x "$bin" ]; then
    echo "certify-runtime: there is no program to certify with: make build, or pass --stacyvm-bin PATH" >&2
    exit 2
fi
exec "$bin" certify "$@"
