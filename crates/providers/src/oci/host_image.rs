//! Image `host`: the host's own programs, and nothing else of the host.
//!
//! `/usr` is shown read-only, nosuid, nodev and with owners *not* shifted: the
//! host's root appears as nobody, so that only what every user of the host may
//! read can be read. Around it stands a skeleton of our own, built once per
//! server start as an ordinary read-only layer: a synthetic `/etc` from an
//! allow-list, empty homes, the usual links.
//!
//! `/usr/local` (where people keep their own things) is replaced by a private,
//! writable directory, `/usr/src` by an empty one, unless the configuration
//! includes them.

use crate::host::is_ordinary_user;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use super::spawner::protocol::HostPlan;

/// Name by which the image is asked for.
pub(super) const REFERENCE: &str = "host";

/// Longest single file copied out of `/etc`, and all of them together.
const MAX_FILE_BYTES: u64 = 8 << 20;
const MAX_TOTAL_BYTES: u64 = 64 << 20;

/// Most entries copied out of `/etc`.
const MAX_ENTRIES: usize = 20_000;

/// How deep directories below `/etc` are followed.
const MAX_DEPTH: usize = 8;

/// What of the host's `/etc` a sandbox gets a copy of. None of it is secret
/// (each is readable by everybody on any distribution), and programs in `/usr`
/// do not work without.
const COPIED: [&str; 14] = [
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "ssl/certs",
    "ssl/openssl.cnf",
    "ca-certificates.conf",
    "pki/tls/certs",
    "pki/ca-trust/extracted",
    "default/locale",
    "locale.conf",
    "localtime",
    "protocols",
    "services",
];

/// Directories of the skeleton with their modes and owners.
const DIRECTORIES: [(&str, u32, u32); 20] = [
    ("etc", 0o755, 0),
    ("home", 0o755, 0),
    ("home/user", 0o755, USER),
    ("root", 0o700, 0),
    ("run", 0o755, 0),
    ("run/lock", 0o1777, 0),
    ("usr", 0o755, 0),
    ("var", 0o755, 0),
    ("var/cache", 0o755, 0),
    ("var/lib", 0o755, 0),
    ("var/log", 0o755, 0),
    ("var/tmp", 0o1777, 0),
    ("var/usrlocal", 0o755, 0),
    ("var/usrlocal/bin", 0o755, 0),
    ("var/usrlocal/lib", 0o755, 0),
    ("var/usrlocal/sbin", 0o755, 0),
    ("var/usrlocal/share", 0o755, 0),
    ("opt", 0o755, 0),
    ("mnt", 0o755, 0),
    ("srv", 0o755, 0),
];

/// The ordinary user, by the name and number E2B's templates have.
const USER: u32 = 1000;

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
user:x:1000:1000:user:/home/user:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
";

const GROUP: &str = "\
root:x:0:
daemon:x:1:
adm:x:4:
tty:x:5:
mail:x:8:
www-data:x:33:
staff:x:50:
users:x:100:
user:x:1000:
nogroup:x:65534:
";

const NSSWITCH: &str = "\
passwd: files
group: files
shadow: files
hosts: files dns
services: files
protocols: files
networks: files
";

const SHELLS: &str = "/bin/sh\n/bin/bash\n";

/// Short on purpose: a login shell reads it for every command.
const PROFILE: &str = "\
export PATH=\"${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}\"
if [ \"${PS1-}\" ]; then PS1='\\u@\\h:\\w\\$ '; fi
";

/// What the operator may change.
#[derive(Debug, Clone, Default)]
pub struct HostImageOptions {
    /// Directories of the host to show read-only besides `/usr`, such as
    /// `/opt`; `/usr/local` and `/usr/src` are shown instead of hidden.
    pub include: Vec<PathBuf>,
}

/// The built image.
#[derive(Debug, Clone)]
pub(super) struct HostImage {
    pub(super) skeleton: PathBuf,
    pub(super) digest: String,
    pub(super) plan: HostPlan,
}

impl HostImage {
    /// Builds the skeleton below `dir` unless one with this content is there.
    pub(super) fn build(dir: &Path, options: &HostImageOptions) -> io::Result<Self> {
        let plan = plan(options)?;
        std::fs::create_dir_all(dir)?;
        let fresh = tempfile::Builder::new().prefix("new-").tempdir_in(dir)?;
        let root = fresh.path().join("root");
        std::fs::create_dir(&root)?;
        let mut copy = Copy { digest: Sha256::new(), entries: 0, bytes: 0 };
        fill(&root, &plan, &mut copy)?;
        let digest =
            copy.digest.finalize().iter().take(16).fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        let skeleton = dir.join(&digest);
        match std::fs::rename(&root, &skeleton) {
            Ok(()) => {}
            // Somebody built the same before.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EEXIST)) => {}
            Err(error) => return Err(error),
        }
        Ok(Self { skeleton, digest: format!("host:{digest}"), plan })
    }
}

fn plan(options: &HostImageOptions) -> io::Result<HostPlan> {
    let mut plan = HostPlan { shown: vec!["/usr".into()], hidden: Vec::new(), private: Vec::new(), owned: Vec::new() };
    if is_ordinary_user() {
        let of_others = DIRECTORIES.iter().filter(|(_, _, owner)| *owner != 0);
        plan.owned = of_others.map(|(path, _, owner)| (Path::new("/").join(path), *owner)).collect();
    }
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let path = Path::new("/").join(name);
        // A directory of its own on hosts that have not merged it into /usr.
        if std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
            plan.shown.push(path);
        }
    }
    let included = |path: &str| options.include.iter().any(|include| Path::new(path) == include);
    if Path::new("/usr/local").is_dir() && !included("/usr/local") {
        plan.private.push(("/usr/local".into(), "/var/usrlocal".into()));
    }
    if Path::new("/usr/src").is_dir() && !included("/usr/src") {
        plan.hidden.push("/usr/src".into());
    }
    for path in &options.include {
        check_include(path)?;
        if !path.starts_with("/usr") {
            plan.shown.push(path.clone());
        }
    }
    Ok(plan)
}

/// Only plain directories outside of what a sandbox has of its own.
fn check_include(path: &Path) -> io::Result<()> {
    const OWN: [&str; 12] =
        ["dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var", "workspace", "boot", "lost+found"];
    let mut components = path.components();
    let plain = components.next() == Some(Component::RootDir)
        && path.components().skip(1).all(|component| matches!(component, Component::Normal(_)));
    let first = components.next().map(|component| component.as_os_str().to_owned());
    let allowed = first.as_ref().is_some_and(|first| !OWN.iter().any(|own| first == own));
    let is_dir = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    if plain && allowed && is_dir {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!(
            "{} cannot be included in image `host`: it must be a directory such as /opt or /usr/local",
            path.display()
        ),
    ))
}

struct Copy {
    digest: Sha256,
    entries: usize,
    bytes: u64,
}

fn fill(root: &Path, plan: &HostPlan, copy: &mut Copy) -> io::Result<()> {
    for (path, mode, owner) in DIRECTORIES {
        copy.directory(&root.join(path), path, mode, owner)?;
    }
    for path in plan.shown.iter().filter(|path| path.components().count() > 1 && !path.starts_with("/usr")) {
        let inside = path.strip_prefix("/").unwrap_or(path);
        std::fs::create_dir_all(root.join(inside))?;
        copy.note(&inside.to_string_lossy(), 0o755, b"");
    }
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        if let Ok(target) = std::fs::read_link(Path::new("/").join(name)) {
            copy.link(&root.join(name), name, &target)?;
        }
    }
    copy.link(&root.join("var/run"), "var/run", Path::new("/run"))?;
    copy.link(&root.join("var/lock"), "var/lock", Path::new("/run/lock"))?;
    copy.link(&root.join("etc/mtab"), "etc/mtab", Path::new("/proc/self/mounts"))?;
    copy.link(&root.join("etc/os-release"), "etc/os-release", Path::new("../usr/lib/os-release"))?;
    for (name, text) in [
        ("etc/passwd", PASSWD),
        ("etc/group", GROUP),
        ("etc/nsswitch.conf", NSSWITCH),
        ("etc/shells", SHELLS),
        ("etc/profile", PROFILE),
    ] {
        copy.file(&root.join(name), name, text.as_bytes(), 0o644)?;
    }
    for name in COPIED {
        let (from, inside) = (Path::new("/etc").join(name), format!("etc/{name}"));
        if let Some(parent) = root.join(&inside).parent() {
            std::fs::create_dir_all(parent)?;
        }
        copy.tree(&from, &root.join(&inside), &inside, 0)?;
    }
    Ok(())
}

impl Copy {
    /// Copies what is there and readable by everybody; the rest is left out.
    fn tree(&mut self, from: &Path, to: &Path, name: &str, depth: usize) -> io::Result<()> {
        let Ok(metadata) = std::fs::symlink_metadata(from) else { return Ok(()) };
        self.entries += 1;
        if self.entries > MAX_ENTRIES || depth > MAX_DEPTH {
            return Ok(());
        }
        if metadata.is_symlink() {
            return self.link(to, name, &std::fs::read_link(from)?);
        }
        let for_everybody = metadata.mode() & 0o004 != 0;
        if metadata.is_file() && for_everybody && metadata.len() <= MAX_FILE_BYTES {
            self.bytes += metadata.len();
            if self.bytes > MAX_TOTAL_BYTES {
                return Ok(());
            }
            let mut content = Vec::new();
            std::fs::File::open(from)?.take(MAX_FILE_BYTES).read_to_end(&mut content)?;
            return self.file(to, name, &content, 0o644 | (metadata.mode() & 0o111));
        }
        if metadata.is_dir() && for_everybody {
            self.directory(to, name, 0o755, 0)?;
            let mut names: Vec<_> = std::fs::read_dir(from)?.flatten().map(|entry| entry.file_name()).collect();
            names.sort_unstable();
            for entry in names {
                let inside = format!("{name}/{}", entry.to_string_lossy());
                self.tree(&from.join(&entry), &to.join(&entry), &inside, depth + 1)?;
            }
        }
        Ok(())
    }

    fn directory(&mut self, to: &Path, name: &str, mode: u32, owner: u32) -> io::Result<()> {
        match std::fs::create_dir(to) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        std::fs::set_permissions(to, PermissionsExt::from_mode(mode))?;
        if owner != 0 && !is_ordinary_user() {
            lchown(to, Some(owner), Some(owner))?;
        }
        self.note(name, mode, &owner.to_le_bytes());
        Ok(())
    }

    fn file(&mut self, to: &Path, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
        let mut file = std::fs::File::create_new(to)?;
        file.write_all(content)?;
        file.set_permissions(PermissionsExt::from_mode(mode))?;
        self.note(name, mode, content);
        Ok(())
    }

    fn link(&mut self, to: &Path, name: &str, target: &Path) -> io::Result<()> {
        symlink(target, to)?;
        self.note(name, 0o777, target.as_os_str().as_encoded_bytes());
        Ok(())
    }

    /// Enters one entry into the digest, unambiguously.
    fn note(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.digest.update((name.len() as u64).to_le_bytes());
        self.digest.update(name);
        self.digest.update(mode.to_le_bytes());
        self.digest.update((content.len() as u64).to_le_bytes());
        self.digest.update(content);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skeleton_holds_no_account_of_the_host_and_is_built_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = HostImage::build(dir.path(), &HostImageOptions::default()).unwrap();
        let again = HostImage::build(dir.path(), &HostImageOptions::default()).unwrap();
        assert_eq!(first.skeleton, again.skeleton);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing half-built stays");

        let etc = first.skeleton.join("etc");
        assert_eq!(std::fs::read_to_string(etc.join("passwd")).unwrap(), PASSWD);
        assert!(!etc.join("shadow").exists() && !etc.join("ssh").exists() && !etc.join("ssl/private").exists());
        assert_eq!(std::fs::symlink_metadata(first.skeleton.join("root")).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn only_plain_directories_can_be_included() {
        for path in ["/", "/etc", "/root/x", "relative", "/usr/../etc", "/proc", "/var/lib", "/nowhere-at-all"] {
            assert!(check_include(Path::new(path)).is_err(), "{path}");
        }
        assert!(check_include(Path::new("/usr/share")).is_ok());
        let options = HostImageOptions { include: vec!["/usr/local".into()] };
        assert!(plan(&options).unwrap().private.is_empty());
    }
}
