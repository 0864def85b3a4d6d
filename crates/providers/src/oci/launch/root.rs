//! The sandbox's file tree: layers below, its own files above.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::mount::{MountFlags, UnmountFlags};

use super::{ReadyMounts, devices, kernel_files, mounts};
use crate::oci::rootless::Authority;
use crate::oci::spawner::protocol::{DiskPlan, Failure, FailureKind, HostPlan, LaunchPlan, RootPlan, Step};

/// Directories every sandbox has, whatever its image: mount points first. They
/// lie in a layer of its own above the image's, so that a symlink an image has
/// in such a place is covered instead of followed.
const OWN_DIRECTORIES: [(&str, u32); 6] =
    [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("etc", 0o755), ("tmp", 0o1777), ("workspace", 0o755)];

/// Where the writable file system is mounted while the tree is built.
const DISK: &str = "disk";

/// The sandbox's own layer, in scratch memory: a dozen files there cost a
/// fraction of what they cost on the host's disk, and most sandboxes never
/// change them.
const OWN_LAYER: &str = "own";

/// Builds the tree and makes it `/`. Runs with the spawner's rights in
/// namespaces of its own; `user_namespace` says whose files they shall be.
pub(super) fn build(
    launch: &LaunchPlan,
    user_namespace: BorrowedFd<'_>,
    disk: Option<OwnedFd>,
    ready: Option<ReadyMounts>,
    authority: &Authority,
) -> Result<(), Failure> {
    assemble(launch, user_namespace, disk, authority)?;
    rustix::process::chdir("root").step("enter the root")?;
    if let Some(ready) = ready {
        ready.attach()?;
    } else {
        devices::mount(launch.root.uid_base, authority).step("mount /dev")?;
        kernel_files::mount_sys()?;
    }
    kernel_files::mount_proc()?;
    make_root()
}

/// Makes the current directory, which is a mount, `/`.
pub(in crate::oci) fn make_root() -> Result<(), Failure> {
    rustix::process::pivot_root(".", ".").step("change the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step("leave the host's root")?;
    rustix::process::chdir("/").step("enter the root")
}

/// Builds the files of the tree at `root` in the scratch directory, which is
/// the current one then. What the kernel shows of itself is still missing.
pub(in crate::oci) fn assemble(
    launch: &LaunchPlan,
    user_namespace: BorrowedFd<'_>,
    disk: Option<OwnedFd>,
    authority: &Authority,
) -> Result<(), Failure> {
    let plan = &launch.root;
    enter_scratch(&plan.scratch)?;
    place_disk(plan, disk)?;
    prepare_writable(plan).step("prepare the writable layer")?;
    prepare_own_layer(plan, &launch.hostname).step("prepare the sandbox's own files")?;
    // An ordinary user's layers have the right owners as they are.
    let owners = (*authority == Authority::Root).then_some(user_namespace);
    let lower = place_layers(plan, owners)?;
    mounts::make_dir("root", 0o755).step("mount the root")?;
    // `volatile`: syncing the layer at the end of a sandbox would stall on the
    // host's disk for files that are deleted right after. Redirects and
    // metadata-only copies are off because layers are somebody else's bytes.
    let mut options = format!(
        "lowerdir={OWN_LAYER}:{lower},upperdir={DISK}/upper,workdir={DISK}/work,\
         volatile,index=off,metacopy=off,redirect_dir=nofollow,xino=off"
    );
    if *authority != Authority::Root {
        // Only root may keep the overlay's notes where no guest can write.
        options.push_str(",userxattr");
    }
    mounts::mount_new("overlay", "root", MountFlags::NODEV | MountFlags::NOSUID, &options).step("mount the root")?;

    make_empty()?;
    if let Some(host) = &plan.host {
        show_host(host).step("show the host's programs")?;
        give_away(host, authority).step("give homes to their users")?;
    }
    Ok(())
}

/// Separates this process's mounts from the host's, and makes an empty file
/// system at `path` the current directory.
pub(super) fn enter_scratch(path: &Path) -> Result<(), Failure> {
    mounts::separate_from_host().step("separate mounts from the host")?;
    // Whoever runs the sandbox's root may pass through, but not look around.
    let scratch = mounts::detached_tmpfs(&[("mode", "0711".into()), ("size", "1m".into())]).step("mount scratch")?;
    let path = path.to_str().ok_or_else(|| not_text(path))?;
    mounts::attach(scratch.as_fd(), path).step("mount scratch")?;
    rustix::process::chdir(path).step("enter scratch")
}

/// Makes what hidden directories show, in the current one.
pub(super) fn make_empty() -> Result<(), Failure> {
    mounts::make_dir("empty", 0o555).step("make an empty directory")
}

/// Puts the writable file system at [`DISK`]. Whatever it is, it gets a mount
/// of its own, without setuid programs and devices, and the guest does not see
/// in its mount table where the host keeps it.
fn place_disk(plan: &RootPlan, disk: Option<OwnedFd>) -> Result<(), Failure> {
    const STEP: &str = "mount the writable layer";
    let disk = match &plan.disk {
        DiskPlan::Directory(path) => mounts::writable_copy(path).step(STEP)?,
        DiskPlan::Mounted => disk.ok_or_else(|| Failure::system(STEP, &"no mount came along"))?,
        DiskPlan::Memory { size_bytes, inodes } => {
            let mut options = vec![("mode", "0700".to_owned())];
            options.extend(size_bytes.map(|bytes| ("size", bytes.to_string())));
            options.extend(inodes.map(|inodes| ("nr_inodes", inodes.to_string())));
            mounts::detached_tmpfs(&options).step(STEP)?
        }
    };
    mounts::make_dir(DISK, 0o700).step(STEP)?;
    mounts::attach(disk.as_fd(), DISK).step(STEP)
}

/// Makes the overlay's two directories.
fn prepare_writable(plan: &RootPlan) -> io::Result<()> {
    let base = open_directory(CWD, DISK)?;
    for name in ["upper", "work"] {
        make_owned_directory(base.as_fd(), name, 0o755, plan.uid_base)?;
    }
    Ok(())
}

/// Makes what every sandbox finds in its own layer: mount points, `/tmp`,
/// `/workspace`, and the names it goes by.
fn prepare_own_layer(plan: &RootPlan, hostname: &str) -> io::Result<()> {
    make_owned_directory(CWD, OWN_LAYER, 0o755, plan.uid_base)?;
    let layer = open_directory(CWD, OWN_LAYER)?;
    for (name, mode) in OWN_DIRECTORIES {
        make_owned_directory(layer.as_fd(), name, mode, plan.uid_base)?;
    }
    let hostname_line = format!("{hostname}\n");
    for (name, text) in
        [("etc/hostname", &hostname_line), ("etc/hosts", &plan.hosts), ("etc/resolv.conf", &plan.resolv_conf)]
    {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&layer, name, flags, Mode::from_raw_mode(0o644))?;
        rustix::fs::fchown(&file, Some(Uid::from_raw(plan.uid_base)), Some(Gid::from_raw(plan.uid_base)))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
        std::fs::File::from(file).write_all(text.as_bytes())?;
    }
    Ok(())
}

fn open_directory(at: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(at, name, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes a directory with exactly this mode, of the sandbox's root.
fn make_owned_directory(at: BorrowedFd<'_>, name: &str, mode: u32, owner: u32) -> io::Result<()> {
    use rustix::fs::AtFlags;
    rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o700))?;
    rustix::fs::chmodat(at, name, Mode::from_raw_mode(mode), AtFlags::empty())?;
    let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
    Ok(rustix::fs::chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Puts every layer in reach, with its owners shifted into the sandbox's range
/// if that is asked, and returns the overlay's list of them, top first.
fn place_layers(plan: &RootPlan, owners: Option<BorrowedFd<'_>>) -> Result<String, Failure> {
    let mut names = Vec::with_capacity(plan.layers.len());
    for (index, layer) in plan.layers.iter().enumerate() {
        let name = format!("l{index}");
        let mount = mounts::detached_copy(layer, false).step("open a layer of the image")?;
        restrict_layer(mount.as_fd(), owners)?;
        mounts::make_dir(&name, 0o755).step("mount a layer")?;
        mounts::attach(mount.as_fd(), &name).step("mount a layer")?;
        names.push(name);
    }
    names.reverse();
    Ok(names.join(":"))
}

fn restrict_layer(mount: BorrowedFd<'_>, owners: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
    const STEP: &str = "shift the owners of a layer";
    mounts::restrict(mount, false, owners).map_err(|error| {
        let kind = if mounts::is_owners_fixed(&error) { FailureKind::OwnersFixed } else { FailureKind::System };
        Failure { kind, ..Failure::system(STEP, &error) }
    })
}

/// Shows parts of the host read-only, owned by nobody: the host's root is not
/// mapped, so that only what every user may read can be read.
fn show_host(host: &HostPlan) -> io::Result<()> {
    let inside = |path: &Path| -> io::Result<String> {
        let text = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        Ok(format!("root/{}", text.trim_start_matches('/')))
    };
    for path in &host.shown {
        let tree = mounts::detached_copy(path, true)?;
        mounts::restrict(tree.as_fd(), true, None)?;
        mounts::attach(tree.as_fd(), &inside(path)?)?;
    }
    for path in &host.hidden {
        mounts::bind("empty", &inside(path)?, true)?;
    }
    for (path, own) in &host.private {
        mounts::bind(&inside(own)?, &inside(path)?, false)?;
    }
    Ok(())
}

/// Homes whose owner the builder of the skeleton had no right to set.
fn give_away(host: &HostPlan, authority: &Authority) -> io::Result<()> {
    for (path, owner) in host.owned.iter().filter(|(_, owner)| *owner < authority.ids()) {
        let (uid, gid) = (Uid::from_raw(*owner), Gid::from_raw(*owner));
        let inside = Path::new("root").join(path.strip_prefix("/").unwrap_or(path));
        rustix::fs::chownat(CWD, &inside, Some(uid), Some(gid), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

fn not_text(path: &Path) -> Failure {
    Failure {
        kind: FailureKind::System,
        step: "name a directory".into(),
        message: format!("{} is not UTF-8", path.display()),
    }
}
