#!/bin/sh
# Tests a program on another kind of host: Debian's own kernel and systemd, with
# control groups v2 alone, in a machine that QEMU emulates. Needs no KVM.
#
#   tests/vm/run.sh PROGRAM [RUNTIME...]
#
# RUNTIME is builtin, crun or runc (all three unless given). What the machine
# does is in guest.sh beside this; it ends with how many checks failed. Needs
# root and Debian. The root file system is kept in target/vm.
set -eu

here="$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)"
root="$(CDPATH= cd -- "$here/../.." && pwd)"
program="${1:?usage: tests/vm/run.sh PROGRAM [RUNTIME...]}"
program="$(CDPATH= cd -- "$(dirname -- "$program")" && pwd)/$(basename -- "$program")"
shift
runtimes="${*:-builtin crun runc}"

BOOT_LIMIT=1800
PACKAGES=kmod,nftables,iproute2,e2fsprogs,procps,python3-minimal,systemd,systemd-sysv,crun,runc
# What the kernel needs before it can read its disk, in this order.
MODULES="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk"

if [ "$(id -u)" != 0 ] || [ "$(uname -m)" != x86_64 ]; then
    echo "vm: this needs root, on x86-64" >&2
    exit 1
fi
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    qemu-system-x86 debootstrap busybox-static cpio >/dev/null </dev/null

vm="${CARGO_TARGET_DIR:-$root/target}/vm"
mkdir -p "$vm"
work="$(mktemp -d "$vm/work-XXXXXX")"
trap 'rm -rf "$work"' EXIT

if [ ! -d "$vm/root" ]; then
    echo "vm: making a root file system"
    rm -rf "$vm/root.new"
    debootstrap --variant=minbase --include="$PACKAGES" bookworm "$vm/root.new" >"$vm/debootstrap.log" 2>&1
    kernel="$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p' | head -n 1)"
    (cd "$work" && apt-get download -qq "$kernel" 2>/dev/null)
    dpkg-deb --fsys-tarfile "$work"/linux-image-*.deb | tar -x -C "$work"
    cp "$work"/boot/vmlinuz-* "$vm/vmlinuz"
    mkdir -p "$vm/root.new/usr/lib/modules"
    cp -a "$work"/lib/modules/. "$vm/root.new/usr/lib/modules/"
    chroot "$vm/root.new" depmod "${kernel#linux-image-}"
    mv "$vm/root.new" "$vm/root"
fi

# Finds the disk, and starts systemd from it.
mkdir -p "$work/initramfs/bin" "$work/initramfs/modules" "$work/initramfs/dev" "$work/initramfs/root"
cp "$(command -v busybox)" "$work/initramfs/bin/busybox"
for module in $MODULES; do
    find "$vm/root/usr/lib/modules" -name "$module.ko" -exec cp {} "$work/initramfs/modules/" \;
done
cat >"$work/initramfs/init" <<END
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in $MODULES; do /bin/busybox insmod /modules/\$module.ko; done
until [ -b /dev/vda ]; do /bin/busybox sleep 0.2; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
END
chmod +x "$work/initramfs/init"
(cd "$work/initramfs" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initramfs.gz"

# The machine's disk: the root, this program, the unit, and what to do.
cp -a "$vm/root" "$work/disk"
image="$vm/test-image.tar"
[ -f "$image" ] || "$root/scripts/make-test-image.sh" "$image"
install -m 0755 "$program" "$work/disk/usr/local/bin/stacyvm"
install -m 0644 "$image" "$work/disk/root/test-image.tar"
install -m 0755 "$here/guest.sh" "$work/disk/root/guest.sh"
install -D -m 0600 "$root/deploy/production.yaml" "$work/disk/etc/stacyvm/stacyvm.yaml"
install -m 0644 "$root/deploy/systemd/stacyvm.service" "$work/disk/etc/systemd/system/stacyvm.service"
for key in api admin; do
    (umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$work/disk/etc/stacyvm/$key.key")
done
cat >"$work/disk/etc/systemd/system/guest.service" <<END
[Unit]
After=multi-user.target
[Service]
Type=oneshot
Environment="RUNTIMES=$runtimes"
ExecStart=/root/guest.sh
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
END
for unit in stacyvm guest; do
    mkdir -p "$work/disk/etc/systemd/system/multi-user.target.wants"
    ln -sf "../$unit.service" "$work/disk/etc/systemd/system/multi-user.target.wants/$unit.service"
done
truncate -s 3G "$work/disk.img"
mkfs.ext4 -q -d "$work/disk" "$work/disk.img"

echo "vm: starting; a processor is emulated, so that everything takes long"
timeout "$BOOT_LIMIT" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 3072 -nographic -no-reboot -nic none \
    -kernel "$vm/vmlinuz" -initrd "$work/initramfs.gz" \
    -append "console=ttyS0 quiet panic=-1 systemd.show_status=0 mitigations=off" \
    -drive "file=$work/disk.img,format=raw,if=virtio,cache=unsafe" </dev/null |
    tr -d '\r' | tee "$vm/console.log" | sed -n 's/^vm: //p'
result="$(sed -n 's/^vm: failed checks: //p' "$vm/console.log")"
if [ "$result" != 0 ]; then
    echo "vm: ${result:-the machine did not come to its end}; all it said is in $vm/console.log" >&2
    exit 1
fi
