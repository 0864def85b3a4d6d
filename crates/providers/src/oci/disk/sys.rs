//! The system calls of disks: loop devices, project quotas, discarding.
//!
//! Thin covers over one call each, as in [`crate::host::sys`], with the kernel's
//! structures as its headers have them.

#![expect(unsafe_code, reason = "raw system calls: ioctl on loop devices and directories, quotactl_fd")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::opcode;

/// `linux/loop.h`
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// Longest name a loop device can carry, without the zero after it.
pub(super) const MAX_LABEL_BYTES: usize = 63;

/// `linux/fs.h`
const FS_IOC_FSGETXATTR: libc::Ioctl = opcode::read::<FileAttributes>(b'X', 31) as libc::Ioctl;
const FS_IOC_FSSETXATTR: libc::Ioctl = opcode::write::<FileAttributes>(b'X', 32) as libc::Ioctl;
const FITRIM: libc::Ioctl = opcode::read_write::<TrimRange>(b'X', 121) as libc::Ioctl;
const FS_XFLAG_PROJINHERIT: u32 = 0x200;

/// `linux/dqblk_xfs.h`. Every file system with quotas answers these, not only
/// XFS.
const Q_XGETQUOTA: u32 = ((b'X' as u32) << 8) + 3;
const Q_XSETQLIM: u32 = ((b'X' as u32) << 8) + 4;
const Q_XGETQSTATV: u32 = ((b'X' as u32) << 8) + 8;
const PROJECT: u32 = 2;
const FS_DQUOT_VERSION: i8 = 1;
const FS_QSTATV_VERSION1: i8 = 1;
const FS_PROJ_QUOTA: i8 = 2;
const FS_QUOTA_PDQ_ENFD: u16 = 1 << 5;
const FS_DQ_LIMIT_MASK: u16 = 0b1111;
/// Unit of the kernel's block counts here.
const BASIC_BLOCK_BYTES: u64 = 512;

#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

#[repr(C)]
struct FileAttributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    least_bytes: u64,
}

#[repr(C)]
struct Quota {
    version: i8,
    flags: i8,
    field_mask: u16,
    id: u32,
    block_hard_limit: u64,
    block_soft_limit: u64,
    inode_hard_limit: u64,
    inode_soft_limit: u64,
    blocks: u64,
    inodes: u64,
    timers: [i32; 2],
    warnings: [u16; 2],
    more_timers: [i8; 4],
    realtime: [u64; 3],
    realtime_timer: i32,
    realtime_warnings: u16,
    padding: [u8; 10],
}

#[repr(C)]
struct QuotaState {
    version: i8,
    padding: u8,
    flags: u16,
    /// Files, timers and room that nobody here looks at.
    rest: [u64; 20],
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);
const _: () = assert!(size_of::<FileAttributes>() == 28 && size_of::<Quota>() == 112);

/// Number of a loop device that is free at this moment.
pub(super) fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the call takes no argument and touches no memory.
    let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) }.into())?;
    u32::try_from(number).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Puts a file behind a loop device, under a name of our choice. The device
/// frees itself when nothing uses it any more.
pub(super) fn configure_loop(device: BorrowedFd<'_>, file: BorrowedFd<'_>, label: &str) -> io::Result<()> {
    // SAFETY: an all-zero loop_config is valid; it is plain old data.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd().cast_unsigned();
    config.info.flags = LO_FLAGS_AUTOCLEAR;
    for (to, from) in config.info.file_name[..MAX_LABEL_BYTES].iter_mut().zip(label.bytes()) {
        *to = from;
    }
    // SAFETY: the kernel reads one loop_config, which outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }.into()).map(drop)
}

/// The name a loop device was given; `ENXIO` when it is free.
pub(super) fn loop_label(device: BorrowedFd<'_>) -> io::Result<String> {
    // SAFETY: an all-zero loop_info64 is valid; it is plain old data.
    let mut info: LoopInfo = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in one loop_info64, which is as large as ours.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) }.into())?;
    let length = info.file_name.iter().position(|byte| *byte == 0).unwrap_or(info.file_name.len());
    Ok(String::from_utf8_lossy(&info.file_name[..length]).into_owned())
}

/// Tells the disk below a file system which of its blocks are free.
pub(super) fn trim(directory: BorrowedFd<'_>, least_bytes: u64) -> io::Result<()> {
    let mut range = TrimRange { start: 0, length: u64::MAX, least_bytes };
    // SAFETY: the kernel reads and writes one fstrim_range, which is as large
    // as ours.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FITRIM, &raw mut range) }.into()).map(drop)
}

/// Counts a directory, and all that is made in it from now on, to a project.
pub(super) fn set_project(directory: BorrowedFd<'_>, project: u32) -> io::Result<()> {
    // SAFETY: an all-zero fsxattr is valid; it is plain old data.
    let mut attributes: FileAttributes = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in one fsxattr, which is as large as ours.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) }.into())?;
    attributes.flags |= FS_XFLAG_PROJINHERIT;
    attributes.project = project;
    // SAFETY: the kernel reads one fsxattr, which outlives the call.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) }.into()).map(drop)
}

/// Whether the file system of `directory` holds projects to their limits.
pub(super) fn enforces_project_quota(directory: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: an all-zero fs_quota_statv is valid; it is plain old data.
    let mut state: QuotaState = unsafe { std::mem::zeroed() };
    state.version = FS_QSTATV_VERSION1;
    // SAFETY: the kernel fills in one fs_quota_statv, for which there is room.
    unsafe { quotactl(directory, Q_XGETQSTATV, 0, (&raw mut state).cast()) }?;
    Ok(state.flags & FS_QUOTA_PDQ_ENFD != 0)
}

/// Most a project may have; zero is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ProjectLimit {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

/// What a project has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ProjectUsage {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

pub(super) fn limit_project(directory: BorrowedFd<'_>, project: u32, limit: ProjectLimit) -> io::Result<()> {
    // SAFETY: an all-zero fs_disk_quota is valid; it is plain old data.
    let mut quota: Quota = unsafe { std::mem::zeroed() };
    quota.version = FS_DQUOT_VERSION;
    quota.flags = FS_PROJ_QUOTA;
    quota.field_mask = FS_DQ_LIMIT_MASK;
    quota.id = project;
    quota.block_hard_limit = limit.bytes / BASIC_BLOCK_BYTES;
    quota.inode_hard_limit = limit.inodes;
    // SAFETY: the kernel reads one fs_disk_quota, which outlives the call.
    unsafe { quotactl(directory, Q_XSETQLIM, project, (&raw mut quota).cast()) }
}

pub(super) fn project_usage(directory: BorrowedFd<'_>, project: u32) -> io::Result<ProjectUsage> {
    // SAFETY: an all-zero fs_disk_quota is valid; it is plain old data.
    let mut quota: Quota = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in one fs_disk_quota, which is as large as ours.
    match unsafe { quotactl(directory, Q_XGETQUOTA, project, (&raw mut quota).cast()) } {
        Ok(()) => Ok(ProjectUsage { bytes: quota.blocks.saturating_mul(BASIC_BLOCK_BYTES), inodes: quota.inodes }),
        // A project nobody ever counted to.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ProjectUsage::default()),
        Err(error) => Err(error),
    }
}

/// # Safety
///
/// `data` has to point to the structure that `command` reads or fills in.
unsafe fn quotactl(directory: BorrowedFd<'_>, command: u32, id: u32, data: *mut libc::c_void) -> io::Result<()> {
    let command = (command << 8) | PROJECT;
    // SAFETY: the caller vouches for `data`; the rest are numbers.
    check(unsafe { libc::syscall(libc::SYS_quotactl_fd, directory.as_raw_fd(), command, id, data) }).map(drop)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
