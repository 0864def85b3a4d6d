//! What a sandbox's root is made of, and making it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use stacyvm_image::{Image, ImageStore};
use stacyvm_sandbox::{ProgressSink, ProviderError};

use super::copy;

/// Image that is the configured directory.
pub(super) const REFERENCE: &str = "rootfs";

/// Image of the host's own files, which this runtime cannot hide well enough.
const HOST: &str = "host";

/// Search path of commands in an image that sets none (moby's default).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the agent's program is shown inside.
pub(super) const AGENT: &str = ".stacyvm-agent";

/// Devices that every program may expect; no other of the host's is shown.
const DEVICES: [&str; 7] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx"];

/// Directories every sandbox has.
const DIRECTORIES: [(&str, u32); 8] = [
    ("proc", 0o755),
    ("sys", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("tmp", 0o1777),
    ("root", 0o700),
    ("run", 0o755),
    ("workspace", 0o755),
];

/// An image, ready to be copied.
pub(super) struct Source {
    pub(super) layers: Vec<PathBuf>,
    pub(super) digest: Option<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) user: Option<String>,
    pub(super) workdir: Option<String>,
    /// Keeps the layers on disk until they are copied.
    _stored: Option<Image>,
}

/// Finds an image; pulls it if need be.
pub(super) async fn resolve(
    rootfs: &Path,
    images: Option<&ImageStore>,
    reference: &str,
    progress: &dyn ProgressSink,
) -> Result<Source, ProviderError> {
    let refused = |message: &str, hint: &str| ProviderError::Image {
        image: reference.to_owned(),
        message: message.to_owned(),
        hint: Some(hint.to_owned()),
        cause: None,
    };
    match reference {
        REFERENCE if rootfs.is_dir() => Ok(Source {
            layers: vec![rootfs.to_owned()],
            digest: None,
            env: with_path(BTreeMap::new()),
            user: None,
            workdir: None,
            _stored: None,
        }),
        REFERENCE => Err(refused(
            "the directory of providers.proot.rootfs_path is not there",
            "make it with `stacyvm rootfs build`, or use an image of a registry",
        )),
        HOST => Err(refused("the proot runtime has no image `host`", "use `rootfs`, or an image of a registry")),
        _ => {
            let Some(store) = images else {
                return Err(refused("this server has no image store", "use the image `rootfs`"));
            };
            let image = store.get(reference, progress).await.map_err(|error| error.into_provider_error(reference))?;
            Ok(Source {
                layers: image.layers.clone(),
                digest: Some(image.digest.clone()),
                env: with_path(image.config.env.iter().cloned().collect()),
                user: image.config.user.clone().filter(|user| !user.is_empty()),
                workdir: image.config.workdir.clone().filter(|workdir| workdir != "/"),
                _stored: Some(image),
            })
        }
    }
}

fn with_path(mut env: BTreeMap<String, String>) -> BTreeMap<String, String> {
    env.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
    env
}

/// What a root says about its place in the world.
pub(super) struct Place<'a> {
    pub(super) hostname: &'a str,
    pub(super) shares_network: bool,
    /// Uid and gid of everything in it, where root gives them.
    pub(super) owner: Option<u32>,
    /// Where commands start; made where the image lacks it.
    pub(super) workdir: Option<&'a str>,
    /// Its files together, at most.
    pub(super) most_bytes: Option<u64>,
}

/// Makes a private root at `root`, which must not exist.
pub(super) fn build(layers: &[PathBuf], root: &Path, place: &Place<'_>) -> io::Result<()> {
    std::fs::create_dir(root)?;
    copy::copy_layers(layers, root, place.owner, place.most_bytes)?;
    let root = copy::open_directory(rustix::fs::CWD, root)?;
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))?;
    let seed = Seed { owner: place.owner };
    for (name, mode) in DIRECTORIES {
        seed.directory(root.as_fd(), name, mode)?;
    }
    let dev = copy::open_directory(&root, "dev")?;
    for name in DEVICES {
        seed.file(dev.as_fd(), name, "")?;
    }
    for (name, mode) in [("pts", 0o755), ("shm", 0o1777)] {
        seed.directory(dev.as_fd(), name, mode)?;
    }
    for (name, to) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        Seed::link(dev.as_fd(), name, &format!("/proc/self/{to}"))?;
    }
    let etc = copy::open_directory(&root, "etc")?;
    let name = place.hostname;
    seed.file(etc.as_fd(), "hostname", &format!("{name}\n"))?;
    seed.file(etc.as_fd(), "hosts", &format!("127.0.0.1\tlocalhost {name}\n::1\tlocalhost\n"))?;
    let resolv_conf = if place.shares_network {
        std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()
    } else {
        "# This sandbox has no network.\n".to_owned()
    };
    seed.file(etc.as_fd(), "resolv.conf", &resolv_conf)?;
    if let Some(workdir) = place.workdir {
        seed.directories(root.as_fd(), workdir)?;
    }
    seed.file(root.as_fd(), AGENT, "")
}

/// Unpacks an image into an empty directory, as a root for later sandboxes.
pub fn unpack(layers: &[PathBuf], root: &Path) -> io::Result<()> {
    copy::copy_layers(layers, root, None, None)?;
    let root = copy::open_directory(rustix::fs::CWD, root)?;
    Ok(rustix::fs::fchmod(root, Mode::from_raw_mode(0o755))?)
}

/// What of the host is shown where, each at its own path: for reading.
pub(super) fn read_binds() -> impl Iterator<Item = PathBuf> {
    ["/proc", "/sys"].into_iter().map(PathBuf::from).filter(|path| path.exists())
}

/// As above, for writing too.
pub(super) fn device_binds() -> impl Iterator<Item = PathBuf> {
    let devices = DEVICES.iter().map(|name| Path::new("/dev").join(name));
    std::iter::once(PathBuf::from("/dev/pts")).chain(devices).filter(|path| path.exists())
}

/// Which of these programs a root has, by the usual places; links are not
/// followed out of it.
pub(super) fn programs<'a>(root: &Path, names: &'a [String]) -> (Vec<&'a str>, Vec<&'a str>) {
    let is_there = |name: &&str| {
        let dirs = ["usr/local/bin", "usr/bin", "bin"];
        !name.contains('/') && dirs.iter().any(|dir| root.join(dir).join(name).symlink_metadata().is_ok())
    };
    names.iter().map(String::as_str).partition(is_there)
}

/// Puts things at fixed places, whatever an image has there.
struct Seed {
    owner: Option<u32>,
}

impl Seed {
    fn directory(&self, parent: BorrowedFd<'_>, name: &str, mode: u32) -> io::Result<()> {
        let c_name = c_string(name)?;
        let existing = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).ok();
        if existing.is_none_or(|old| FileType::from_raw_mode(old.st_mode) != FileType::Directory) {
            copy::remove(parent, &c_name)?;
            rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
        }
        let opened = copy::open_directory(parent, name)?;
        rustix::fs::fchmod(&opened, Mode::from_raw_mode(mode))?;
        self.own(&opened)
    }

    /// One below the other. What is in the way stays, and ends it: an image may
    /// well have a link there.
    fn directories(&self, root: BorrowedFd<'_>, path: &str) -> io::Result<()> {
        let mut at = root.try_clone_to_owned()?;
        for name in path.split('/').filter(|name| !matches!(*name, "" | "." | "..")) {
            match rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => self.own(&copy::open_directory(&at, name)?)?,
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            let Ok(next) = copy::open_directory(&at, name) else { return Ok(()) };
            at = next;
        }
        Ok(())
    }

    fn file(&self, parent: BorrowedFd<'_>, name: &str, text: &str) -> io::Result<()> {
        copy::remove(parent, &c_string(name)?)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644))?;
        self.own(&made)?;
        File::from(made).write_all(text.as_bytes())
    }

    fn link(parent: BorrowedFd<'_>, name: &str, to: &str) -> io::Result<()> {
        copy::remove(parent, &c_string(name)?)?;
        Ok(rustix::fs::symlinkat(to, parent, name)?)
    }

    fn own(&self, file: &OwnedFd) -> io::Result<()> {
        match self.owner {
            Some(owner) => Ok(rustix::fs::fchown(file, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?),
            None => Ok(()),
        }
    }
}

fn c_string(name: &str) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(name).map_err(io::Error::from)
}
