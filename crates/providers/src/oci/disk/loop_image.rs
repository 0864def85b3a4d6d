//! A file system in a sparse file of its own, behind a loop device.
//!
//! The file has no name from the start, the device frees itself, and the mount
//! is attached nowhere but in its sandbox. So all three live exactly as long as
//! the sandbox (or, before there is one, the descriptor in this process), and
//! no crash can leave any of them behind. The guest gets at what is *in* the
//! file system only: the image that the kernel reads was made here, and no
//! guest can write to its bytes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use tokio::process::Command;

use super::{BYTES_PER_INODE, sys};

/// Longest a file system may take to make: 1 TiB takes a quarter of a second.
const FORMAT_LIMIT: Duration = Duration::from_secs(15);

/// How often somebody else on this host may be faster with a free device.
const ATTACH_ATTEMPTS: u32 = 64;

/// Least run of free blocks that is given back to the host.
const TRIM_MIN_BYTES: u64 = 64 << 10;

const CONTROL: &str = "/dev/loop-control";
const KIND: &str = "ext4";

/// Where e2fsprogs may be installed.
const FORMATTERS: [&str; 2] = ["/usr/sbin/mke2fs", "/sbin/mke2fs"];

/// Only one task of this process looks for a free device at a time, or they
/// would all find the same one.
static ATTACHING: Mutex<()> = Mutex::new(());

/// One disk that is ready for a sandbox.
pub(super) struct LoopImage {
    pub(super) size_bytes: u64,
    pub(super) name: LoopName,
    /// Attached nowhere yet; everything ends with it.
    pub(super) mount: OwnedFd,
}

/// Which loop device it is. The number alone may be somebody else's tomorrow.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(in crate::oci) struct LoopName {
    device: u32,
    label: String,
}

/// Finds what is needed, or says what is missing.
pub(super) fn find_formatter() -> Result<PathBuf, String> {
    open(CONTROL, OFlags::RDWR).map_err(|error| format!("{CONTROL} cannot be opened ({error})"))?;
    rustix::mount::fsopen(KIND, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|error| format!("the kernel offers no {KIND} ({error})"))?;
    let found = FORMATTERS.iter().map(PathBuf::from).find(|path| path.is_file());
    found.ok_or_else(|| "mke2fs is not installed (e2fsprogs)".to_owned())
}

impl LoopImage {
    /// Makes one; its file is in `directory`, without a name.
    pub(super) async fn make(formatter: &Path, directory: &Path, size_bytes: u64) -> io::Result<Self> {
        let file = tempfile::tempfile_in(directory)?;
        file.set_len(size_bytes)?;
        format(formatter, &file).await?;
        let attached = tokio::task::spawn_blocking(move || attach(&file)).await;
        let (name, mount) = attached.map_err(io::Error::other)??;
        Ok(Self { size_bytes, name, mount })
    }
}

impl LoopName {
    /// Gives the host back what was deleted inside. One that is gone has
    /// nothing to give.
    pub(super) fn trim(&self) -> io::Result<()> {
        let path = device_path(self.device);
        // Held until it is mounted: a device in use is not given to others.
        let device = open(&path, OFlags::RDONLY)?;
        match sys::loop_label(device.as_fd()) {
            Ok(label) if label == self.label => {}
            Ok(_) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
            Err(error) => return Err(error),
        }
        // The same file system once more, attached nowhere.
        let mount = mount(&path)?;
        let root = rustix::fs::openat(mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        sys::trim(root.as_fd(), TRIM_MIN_BYTES)
    }
}

/// Makes the file system. No journal, because nothing in it has to survive a
/// crash of the host; tables are not cleared, because a new file reads as
/// zeros; no blocks are reserved for a root who is not the sandbox's.
async fn format(formatter: &Path, file: &File) -> io::Result<()> {
    let inodes = BYTES_PER_INODE.to_string();
    let mut command = Command::new(formatter);
    command
        .args(["-t", KIND, "-q", "-F", "-m", "0", "-b", "4096", "-I", "256", "-i", &inodes])
        .args(["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", "/proc/self/fd/0"])
        .env_clear()
        .stdin(Stdio::from(file.try_clone()?))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let output = tokio::time::timeout(FORMAT_LIMIT, command.output()).await.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, format!("mke2fs took longer than {} s", FORMAT_LIMIT.as_secs()))
    })??;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("mke2fs: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}

/// Puts the file behind a free loop device and mounts that.
fn attach(file: &File) -> io::Result<(LoopName, OwnedFd)> {
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let label = format!("stacyvm-{:032x}", u128::from_ne_bytes(random));
    let (device, held) = attach_device(file, &label)?;
    let mount = mount(&device_path(device))?;
    drop(held);
    warm_up(mount.as_fd())?;
    Ok((LoopName { device, label }, mount))
}

/// The device, and a descriptor that keeps it until something is mounted.
fn attach_device(file: &File, label: &str) -> io::Result<(u32, OwnedFd)> {
    let control = open(CONTROL, OFlags::RDWR)?;
    let _one_at_a_time = ATTACHING.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..ATTACH_ATTEMPTS {
        let number = sys::free_loop_device(control.as_fd())?;
        let device = open(&device_path(number), OFlags::RDWR)?;
        match sys::configure_loop(device.as_fd(), file.as_fd(), label) {
            // Some kernels refuse to mount a device that is open for writing.
            Ok(()) => return Ok((number, open(&device_path(number), OFlags::RDONLY)?)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "others on this host take every free loop device"))
}

/// A mount of the device that is attached nowhere.
fn mount(device: &str) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(KIND, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", device)?;
    // The file is gone after a crash of the host, so that waiting for the disk
    // helps nobody; and clearing tables would only fill the file.
    for flag in ["nobarrier", "noinit_itable"] {
        rustix::mount::fsconfig_set_flag(context.as_fd(), flag)?;
    }
    rustix::mount::fsconfig_set_string(context.as_fd(), "errors", "remount-ro")?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok(rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Makes and removes a directory, so that the first one of a sandbox does not
/// wait until maps of free blocks are read.
fn warm_up(mount: BorrowedFd<'_>) -> rustix::io::Result<()> {
    rustix::fs::mkdirat(mount, "warm-up", Mode::RWXU)?;
    rustix::fs::unlinkat(mount, "warm-up", AtFlags::REMOVEDIR)
}

fn device_path(number: u32) -> String {
    format!("/dev/loop{number}")
}

fn open(path: &str, access: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, access | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
}
