#!/bin/bash
# The first thing a newcomer sees: starts the server, runs Python in a sandbox,
# says how to go on, and keeps serving until Ctrl-C.
#
#   scripts/demo.sh PROGRAM
#
# ONCE=1   stop after the demonstration
# PORT     port of the server (default 7423)
set -euo pipefail

program="$(realpath "${1:?usage: scripts/demo.sh PROGRAM}")"
port="${PORT:-7423}"
export STACYVM_URL="http://127.0.0.1:$port"
unset STACYVM_API_KEY

# Sandboxes of root get a network and limits; an ordinary user's do with less.
elevate=()
if [ "$(id -u)" != 0 ] && command -v sudo >/dev/null 2>&1; then
    elevate=(sudo --preserve-env)
fi

work="$(mktemp -d)"
server=
finish() {
    trap - EXIT INT TERM
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

now_ms() { echo "$(($(date +%s%N) / 1000000))"; }

"${elevate[@]}" "$program" serve --port "$port" --destroy-on-exit --log-level warn \
    >"$work/announce" 2> >(tee "$work/log" >&2) &
server=$!

deadline=$((SECONDS + 60))
until "$program" health >/dev/null 2>&1 && [ -s "$work/announce" ]; do
    if ! kill -0 "$server" 2>/dev/null; then
        wait "$server" || status=$?
        server=
        echo "The server could not start." >&2
        exit "${status:-1}"
    fi
    if [ $SECONDS -ge $deadline ]; then
        echo "The server is not ready:" >&2
        "$program" health >&2 || true
        exit 1
    fi
    sleep 0.05
done
cat "$work/announce"

cat >"$work/pi.py" <<'PYTHON'
def arctan_of_one_over(x, one):
    total = power = one // x
    sign, n = -1, 3
    while power:
        power //= x * x
        total += sign * (power // n)
        sign, n = -sign, n + 2
    return total

digits = 100
one = 10 ** (digits + 10)
pi = 4 * (4 * arctan_of_one_over(5, one) - arctan_of_one_over(239, one)) // 10 ** 10
import os, platform
print(f"pi = 3.{str(pi)[1:]}")
print(f"computed by Python {platform.python_version()} as process {os.getpid()} of host {platform.node()}")
PYTHON

echo
echo '$ stacyvm spawn --image host'
before=$(now_ms)
sandbox="$("$program" spawn --quiet --image host --ttl 1h)"
created=$(now_ms)
echo "$sandbox"
echo
echo "\$ stacyvm exec $sandbox -- python3 - < pi.py"
"$program" exec "$sandbox" -- python3 - <"$work/pi.py"
after=$(now_ms)
echo
echo "The sandbox was ready after $((created - before)) ms, the result there $((after - created)) ms later."

if [ "${ONCE:-}" = 1 ]; then
    exit 0
fi

cat <<TEXT

Go on in another terminal:

  alias stacyvm=$program
  stacyvm shell $sandbox
  stacyvm run --image host -- python3 -c 'print(6*7)'
  stacyvm run --image python:3.12 -- python3 --version
  stacyvm --help

From Python, with the published SDK (pip install stacyvm):

  from stacyvm import Client
  with Client("$STACYVM_URL").spawn(image="host") as sandbox:
      print(sandbox.exec("python3 -c 'print(6*7)'").stdout)

The API explains itself at $STACYVM_URL/swagger/

Ctrl-C stops the server and destroys its sandboxes.
TEXT
wait "$server" || true
server=
