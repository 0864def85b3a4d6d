#!/bin/sh
# Writes a small test image, made from busybox-static, as a docker archive that
# `stacyvm image import` and `docker load` read. Needs no network and no root.
#
#   scripts/make-test-image.sh OUTPUT.tar [NAME]      docker archive
#   scripts/make-test-image.sh --rootfs OUTPUT.tar    root file system only
#
# NAME is alpine:latest unless given. The same busybox gives the same bytes.
set -eu

form=archive
if [ "${1:-}" = --rootfs ]; then
    form=rootfs
    shift
fi
if [ $# -lt 1 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
output=$1
name=${2:-alpine:latest}

busybox=${BUSYBOX:-/bin/busybox}
if [ ! -x "$busybox" ]; then
    echo "make-test-image: $busybox is missing: apt-get install busybox-static" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root/bin" "$root/etc" "$root/home" "$root/root" "$root/tmp" "$root/usr/bin" "$root/var/tmp" \
    "$root/proc" "$root/sys" "$root/dev"
cp "$busybox" "$root/bin/busybox"
chmod 755 "$root/bin/busybox"
# Every applet this busybox has, where scripts look for them.
for applet in $("$busybox" --list); do
    if [ "$applet" != busybox ]; then
        ln -s busybox "$root/bin/$applet"
    fi
done
ln -s ../../bin/env "$root/usr/bin/env"
cat >"$root/etc/passwd" <<'PASSWD'
root:x:0:0:root:/root:/bin/sh
bin:x:1:1:bin:/bin:/sbin/nologin
daemon:x:2:2:daemon:/sbin:/sbin/nologin
guest:x:405:100:guest:/dev/null:/sbin/nologin
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/:/sbin/nologin
PASSWD
cat >"$root/etc/group" <<'GROUP'
root:x:0:root
bin:x:1:root,bin,daemon
daemon:x:2:root,bin,daemon
users:x:100:
user:x:1000:
nobody:x:65534:
GROUP
cat >"$root/etc/os-release" <<'RELEASE'
NAME="StacyVM test image"
ID=stacyvm-test
VERSION_ID=1
PRETTY_NAME="StacyVM test image (busybox)"
RELEASE
mkdir -p "$work/user/home/user"
find "$root" -type d -exec chmod 755 {} +
chmod 644 "$root/etc/passwd" "$root/etc/group" "$root/etc/os-release"
chmod 700 "$root/root"
chmod 1777 "$root/tmp" "$root/var/tmp"
chmod 755 "$work/user/home/user"

pack() {
    tar --format=ustar --sort=name --mtime=@0 --numeric-owner "$@"
}

pack --create --owner=0 --group=0 --directory="$root" --file="$work/layer.tar" .
pack --append --owner=1000 --group=1000 --directory="$work/user" --file="$work/layer.tar" ./home/user
if [ "$form" = rootfs ]; then
    mv "$work/layer.tar" "$output"
    exit 0
fi

case $(uname -m) in
x86_64) arch=amd64 ;;
aarch64) arch=arm64 ;;
*) arch=$(uname -m) ;;
esac
layer=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
cat >"$work/config.json" <<CONFIG
{
  "created": "1970-01-01T00:00:00Z",
  "architecture": "$arch",
  "os": "linux",
  "config": {"Env": ["PATH=$path"], "Cmd": ["/bin/sh"]},
  "rootfs": {"type": "layers", "diff_ids": ["sha256:$layer"]},
  "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "scripts/make-test-image.sh"}]
}
CONFIG
config=$(sha256sum "$work/config.json" | cut -d' ' -f1)
mkdir -p "$work/archive/$layer"
mv "$work/layer.tar" "$work/archive/$layer/layer.tar"
mv "$work/config.json" "$work/archive/$config.json"
cat >"$work/archive/manifest.json" <<MANIFEST
[{"Config": "$config.json", "RepoTags": ["$name"], "Layers": ["$layer/layer.tar"]}]
MANIFEST
pack --create --owner=0 --group=0 --directory="$work/archive" --file="$work/image.tar" \
    manifest.json "$config.json" "$layer"
mv "$work/image.tar" "$output"
