#!/bin/sh
# Asks a running StacyVM whether it is up: four requests, nothing is changed.
#
#   scripts/smoke-deployment.sh [base URL] [api key]
#
# STACYVM_SMOKE_URL      wins over the first argument (default http://127.0.0.1:7423)
# STACYVM_API_KEY        wins over the second argument; empty means no key
# STACYVM_SMOKE_TIMEOUT  seconds per request (default 5)
set -eu

base_url="${STACYVM_SMOKE_URL:-${1:-http://127.0.0.1:7423}}"
base_url="${base_url%/}"
api_key="${STACYVM_API_KEY:-${2:-}}"
timeout="${STACYVM_SMOKE_TIMEOUT:-5}"

if ! command -v curl >/dev/null 2>&1; then
    echo "this script needs curl: apt-get install curl" >&2
    exit 1
fi

# The key goes through a configuration on standard input: arguments show in
# the list of processes.
fetch() {
    if [ -n "$api_key" ]; then
        printf 'header = "X-API-Key: %s"\n' "$(printf '%s' "$api_key" | sed 's/[\\"]/\\&/g')"
    fi | curl --silent --show-error --max-time "$timeout" --config - "$1" 2>&1
}

check() {
    printf 'Checking %s ... ' "$base_url$1"
    if ! body="$(fetch "$base_url$1")"; then
        echo failed
        printf 'expected the answer to contain: %s\ngot: %s\n' "$2" "$body" >&2
        exit 1
    fi
    case "$body" in
        *"$2"*) echo ok ;;
        *)
            echo failed
            printf 'expected the answer to contain: %s\ngot: %s\n' "$2" "$body" >&2
            exit 1
            ;;
    esac
}

check /api/v1/live '"status":"alive"'
check /api/v1/health '"status":"ok"'
check /api/v1/ready '"status":"ready"'
check /api/v1/metrics/prometheus 'stacyvm_uptime_seconds'

echo "StacyVM deployment smoke checks passed for $base_url"
