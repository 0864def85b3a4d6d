//! `/dev`: the harmless devices, terminals and shared memory.

use std::io;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, makedev};
use rustix::mount::MountFlags;

use super::mounts;
use crate::oci::rootless::Authority;

/// Name, major and minor (kernel `Documentation/admin-guide/devices.txt`).
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "dev/fd"),
    ("/proc/self/fd/0", "dev/stdin"),
    ("/proc/self/fd/1", "dev/stdout"),
    ("/proc/self/fd/2", "dev/stderr"),
    ("pts/ptmx", "dev/ptmx"),
];

/// Group `tty` in practically every image.
pub(in crate::oci) const TTY_GROUP: u32 = 5;

/// Size of `/dev/shm`, as Docker has it.
pub(in crate::oci) const SHARED_MEMORY_MIB: u32 = 64;

/// Builds `dev` below the current directory, owned by the sandbox's root.
pub(super) fn mount(uid_base: u32, authority: &Authority) -> io::Result<()> {
    let owner = format!("uid={uid_base},gid={uid_base}");
    let (uid, gid) = (Uid::from_raw(uid_base), Gid::from_raw(uid_base));
    mount_nodes(uid_base, authority)?;
    for directory in ["dev/pts", "dev/shm"] {
        mounts::make_dir(directory, 0o755)?;
        rustix::fs::chown(directory, Some(uid), Some(gid))?;
    }
    let mut terminals = "newinstance,ptmxmode=0666,mode=0620".to_owned();
    if TTY_GROUP < authority.ids() {
        terminals = format!("{terminals},gid={}", uid_base + TTY_GROUP);
    }
    mounts::mount_new("devpts", "dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, &terminals)?;
    mounts::mount_new(
        "tmpfs",
        "dev/shm",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        &format!("mode=1777,size={SHARED_MEMORY_MIB}m,{owner}"),
    )
}

/// Only the devices and links of it.
pub(in crate::oci) fn mount_nodes(uid_base: u32, authority: &Authority) -> io::Result<()> {
    let owner = format!("uid={uid_base},gid={uid_base}");
    // Not `nodev`: this is the one place where devices work, and nobody inside
    // can make more of them (CAP_MKNOD counts only in the host's namespace).
    mounts::mount_new(
        "tmpfs",
        "dev",
        MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::STRICTATIME,
        &format!("mode=755,size=64k,nr_inodes=256,{owner}"),
    )?;
    let (uid, gid) = (Uid::from_raw(uid_base), Gid::from_raw(uid_base));
    for (name, major, minor) in DEVICES {
        let path = format!("dev/{name}");
        if *authority != Authority::Root {
            show_of_host(&path)?;
            continue;
        }
        rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(major, minor))?;
        rustix::fs::chmod(&path, Mode::from_raw_mode(0o666))?;
        rustix::fs::chown(&path, Some(uid), Some(gid))?;
    }
    for (target, path) in LINKS {
        rustix::fs::symlink(target, path)?;
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// The host's own device, for those who cannot make one.
fn show_of_host(path: &str) -> io::Result<()> {
    rustix::fs::open(path, OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC, Mode::from_raw_mode(0o666))?;
    mounts::bind_device(&format!("/{path}"), path)
}
