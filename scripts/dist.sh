#!/bin/sh
# Makes what a release consists of: one archive, its SBOM and their checksums.
#
#   scripts/dist.sh [DIRECTORY] [PROGRAM]
#
# DIRECTORY is `dist` unless given. PROGRAM is built first unless given.
#
#   stacyvm-VERSION-ARCH-linux.tar.gz   program, completions, manual pages, docs, deploy files
#   stacyvm-VERSION-ARCH-linux.cdx.json what is built into the program (CycloneDX)
#   SHA256SUMS
#
# The same program gives the same archive, byte for byte: names are sorted, and
# times are those of the commit.
set -eu

root="$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
mkdir -p "${1:-dist}"
out="$(CDPATH= cd -- "${1:-dist}" && pwd)"
program="${2:-}"
if [ -z "$program" ]; then
    "$root/scripts/build.sh"
    PATH="$HOME/.cargo/bin:$PATH"
    program="$root/target/$(rustc -vV | sed -n 's/^host: //p')/release/stacyvm"
fi
program="$(CDPATH= cd -- "$(dirname -- "$program")" && pwd)/$(basename -- "$program")"

version="$("$program" --version | sed 's/^stacyvm //')"
name="stacyvm-$version-$(uname -m)-linux"
epoch="${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 0)}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
stage="$work/$name"

mkdir -p "$stage/completions" "$stage/man" "$stage/docs" "$stage/deploy" "$stage/scripts"
install -m 0755 "$program" "$stage/stacyvm"
install -m 0644 "$root/LICENSE" "$root/README.md" "$root/CHANGELOG.md" "$stage/"
cp -R "$root/docs/." "$stage/docs/"
cp -R "$root/deploy/." "$stage/deploy/"
install -m 0755 "$root/scripts/smoke-deployment.sh" "$root/scripts/certify-runtime.sh" "$stage/scripts/"
"$program" completion bash > "$stage/completions/stacyvm.bash"
"$program" completion zsh > "$stage/completions/_stacyvm"
"$program" completion fish > "$stage/completions/stacyvm.fish"
"$program" man "$stage/man" >/dev/null
python3 "$root/scripts/sbom.py" "$root" "$version" "$epoch" > "$stage/sbom.cdx.json"
chmod -R u=rwX,go=rX "$stage"

tar --create --directory "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$epoch" \
    --format=ustar "$name" | gzip -n > "$out/$name.tar.gz"
cp "$stage/sbom.cdx.json" "$out/$name.cdx.json"
(cd "$out" && sha256sum "$name.tar.gz" "$name.cdx.json" > SHA256SUMS)
echo "$out/$name.tar.gz"
