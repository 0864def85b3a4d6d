#!/bin/bash
# Runs every test there is. `make test` installs what they need first.
#
# Sandbox tests make real namespaces, mounts and control groups, so they need
# root; one that cannot run fails and says why. Docker is tested with a daemon of
# the tests' own in any case; with
#
#   STACYVM_DOCKER_INTEGRATION=1 STACYVM_PROVIDERS_DEFAULT=docker make test
#
# the contract suite and the published SDK run once more, on docker.
set -euo pipefail

root="$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
cd "$root"
PATH="$HOME/.cargo/bin:$PATH"
target_dir="${CARGO_TARGET_DIR:-$root/target}"
started=$SECONDS
# An older result says nothing about this run.
rm -f "$target_dir/test-result.json"

step() { printf '\n== %s\n' "$*"; }

step "Rust: unit, integration and end-to-end tests"
# One build for all of them, the program included: a build without the tests
# would have other features, and be made twice.
cargo test --workspace --locked --no-run
# One process per test binary: tests of one binary share what is expensive, such
# as a registry or a router namespace.
cargo test --workspace --locked --no-fail-fast

program="$target_dir/debug/stacyvm"
image="$target_dir/test-image.tar"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

step "Contract suite on oci"
scripts/make-test-image.sh "$image"
"$program" image import "$image" --data-dir "$work/data"
"$program" conformance --provider oci --data-dir "$work/data"

step "The published Python SDK"
scripts/test-sdk-python.sh "$program" "$image"

if [ "${STACYVM_DOCKER_INTEGRATION:-}" = 1 ]; then
    step "Docker: contract suite and the published Python SDK"
    mkfifo "$work/commands"
    # In a process group of its own, so that it outlives a Ctrl-C to clean up.
    setsid crates/providers/tests/dockerd.sh "$work/docker" <"$work/commands" >"$work/answers" 2>&1 &
    daemon=$!
    exec 3>"$work/commands"
    echo start >&3
    until [ -s "$work/answers" ] || ! kill -0 "$daemon" 2>/dev/null; do sleep 0.2; done
    grep -qx ok "$work/answers" || { cat "$work/answers" >&2; exit 1; }
    export DOCKER_HOST="unix://$work/docker/docker.sock"
    docker load --quiet --input "$image"
    "$program" conformance --provider docker --data-dir "$work/docker-data"
    STACYVM_TEST_PROVIDER=docker scripts/test-sdk-python.sh "$program" "$image"
    exec 3>&-
    wait "$daemon"
fi

# What `stacyvm certify --test-result` shows: of which commit this is true.
printf '{"commit":"%s","status":"passed","finished_at":"%s","docker_integration":%s}\n' \
    "$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" \
    "$([ "${STACYVM_DOCKER_INTEGRATION:-}" = 1 ] && echo true || echo false)" > "$target_dir/test-result.json"

printf '\nAll tests passed in %d s; see %s.\n' "$((SECONDS - started))" "$target_dir/test-result.json"
