//! Mounting, in the words this launcher needs.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
};

use crate::host::sys::{self, MountAttributes};

/// Nothing mounted here from now on is seen by the host, nor the other way.
pub(in crate::oci) fn separate_from_host() -> io::Result<()> {
    Ok(rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
}

/// A file system of its own at `target`.
pub(super) fn mount_new(kind: &str, target: &str, flags: MountFlags, options: &str) -> io::Result<()> {
    let options = CString::new(options)?;
    Ok(rustix::mount::mount(kind, target, kind, flags, options.as_c_str())?)
}

/// A tmpfs that is not attached anywhere yet.
pub(super) fn detached_tmpfs(options: &[(&str, String)]) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(context.as_fd(), *key, value.as_str())?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok(rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// A copy of the mount tree at `source`, not attached anywhere yet.
pub(in crate::oci) fn detached_copy(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(CWD, source, flags)?)
}

/// A directory of the host as a writable mount without devices and setuid.
pub(super) fn writable_copy(source: &Path) -> io::Result<OwnedFd> {
    let copy = detached_copy(source, false)?;
    let set = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    sys::mount_setattr(copy.as_fd(), &MountAttributes { set: set.bits().into(), ..MountAttributes::default() })?;
    Ok(copy)
}

/// Makes a detached tree read-only and harmless, optionally with owners
/// shifted by a user namespace.
pub(in crate::oci) fn restrict(
    mount: BorrowedFd<'_>,
    recursive: bool,
    idmap: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let set = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    sys::mount_setattr(mount, &MountAttributes { set: set.bits().into(), recursive, idmap })
}

/// Whether a file system knows no shifting of owners, as overlayfs.
pub(in crate::oci) fn is_owners_fixed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// Attaches a detached tree.
pub(super) fn attach(mount: BorrowedFd<'_>, target: &str) -> io::Result<()> {
    Ok(rustix::mount::move_mount(mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Shows `source` at `target` too, read-only if so asked.
pub(in crate::oci) fn bind(source: &str, target: &str, read_only: bool) -> io::Result<()> {
    let copy = detached_copy(Path::new(source), false)?;
    if read_only {
        restrict(copy.as_fd(), false, None)?;
    }
    attach(copy.as_fd(), target)
}

/// Shows a device of the host. Only what it does is wanted of it.
pub(super) fn bind_device(source: &str, target: &str) -> io::Result<()> {
    let copy = detached_copy(Path::new(source), false)?;
    let set = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    sys::mount_setattr(copy.as_fd(), &MountAttributes { set: set.bits().into(), ..MountAttributes::default() })?;
    attach(copy.as_fd(), target)
}

pub(in crate::oci) fn make_dir(path: &str, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::mkdir(path, Mode::from_raw_mode(mode))?)
}
