//! Image `host`: the host's own programs, and nothing else of the host.
//!
//! `/usr` is shown read-only, nosuid, nodev and with owners *not* shifted: the
//! host's root appears as nobody, so that only what every user of the host may
//! read can be read. Around it stands a skeleton of our own, an ordinary
//! read-only layer that is built when its content is new: a synthetic `/etc`
//! from an allow-list, empty homes, the usual links.
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
        let content = Content::of_host(&plan)?;
        let digest = content.digest();
        let skeleton = dir.join(&digest);
        if !skeleton.is_dir() {
            std::fs::create_dir_all(dir)?;
            let fresh = tempfile::Builder::new().prefix("new-").tempdir_in(dir)?;
            let root = fresh.path().join("root");
            std::fs::create_dir(&root)?;
            content.write(&root)?;
            std::fs::rename(&root, &skeleton)?;
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

/// What the skeleton holds, parents before what is in them.
#[derive(Default)]
struct Content {
    entries: Vec<Entry>,
    /// Looked at and read in the host's `/etc`.
    seen: usize,
    bytes: u64,
}

struct Entry {
    /// Relative to the root.
    path: String,
    node: Node,
}

enum Node {
    Directory { mode: u32, owner: u32 },
    File { mode: u32, content: Vec<u8> },
    Link { target: PathBuf },
}

impl Content {
    fn of_host(plan: &HostPlan) -> io::Result<Self> {
        let mut content = Self::default();
        for (path, mode, owner) in DIRECTORIES {
            content.add(path, Node::Directory { mode, owner });
        }
        for path in plan.shown.iter().filter(|path| path.components().count() > 1 && !path.starts_with("/usr")) {
            let inside = path.strip_prefix("/").unwrap_or(path);
            content.add(&inside.to_string_lossy(), Node::Directory { mode: 0o755, owner: 0 });
        }
        for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
            if let Ok(target) = std::fs::read_link(Path::new("/").join(name)) {
                content.add(name, Node::Link { target });
            }
        }
        for (path, target) in [
            ("var/run", "/run"),
            ("var/lock", "/run/lock"),
            ("etc/mtab", "/proc/self/mounts"),
            ("etc/os-release", "../usr/lib/os-release"),
        ] {
            content.add(path, Node::Link { target: target.into() });
        }
        for (path, text) in [
            ("etc/passwd", PASSWD),
            ("etc/group", GROUP),
            ("etc/nsswitch.conf", NSSWITCH),
            ("etc/shells", SHELLS),
            ("etc/profile", PROFILE),
        ] {
            content.add(path, Node::File { mode: 0o644, content: text.into() });
        }
        for name in COPIED {
            content.add_tree(&Path::new("/etc").join(name), &format!("etc/{name}"), 0)?;
        }
        Ok(content)
    }

    /// Adds what is there and readable by everybody; the rest is left out.
    fn add_tree(&mut self, from: &Path, path: &str, depth: usize) -> io::Result<()> {
        let Ok(metadata) = std::fs::symlink_metadata(from) else { return Ok(()) };
        self.seen += 1;
        if self.seen > MAX_ENTRIES || depth > MAX_DEPTH {
            return Ok(());
        }
        if metadata.is_symlink() {
            self.add(path, Node::Link { target: std::fs::read_link(from)? });
            return Ok(());
        }
        let for_everybody = metadata.mode() & 0o004 != 0;
        if metadata.is_file() && for_everybody && metadata.len() <= MAX_FILE_BYTES {
            self.bytes += metadata.len();
            if self.bytes > MAX_TOTAL_BYTES {
                return Ok(());
            }
            let mut content = Vec::new();
            std::fs::File::open(from)?.take(MAX_FILE_BYTES).read_to_end(&mut content)?;
            self.add(path, Node::File { mode: 0o644 | (metadata.mode() & 0o111), content });
        } else if metadata.is_dir() && for_everybody {
            self.add(path, Node::Directory { mode: 0o755, owner: 0 });
            let mut names: Vec<_> = std::fs::read_dir(from)?.flatten().map(|entry| entry.file_name()).collect();
            names.sort_unstable();
            for name in names.iter().filter_map(|name| name.to_str()) {
                self.add_tree(&from.join(name), &format!("{path}/{name}"), depth + 1)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &str, node: Node) {
        self.entries.push(Entry { path: path.to_owned(), node });
    }

    /// Names the content, unambiguously.
    fn digest(&self) -> String {
        let mut digest = Sha256::new();
        for Entry { path, node } in &self.entries {
            let owner;
            let (mode, content) = match node {
                Node::Directory { mode, owner: number } => {
                    owner = number.to_le_bytes();
                    (*mode, owner.as_slice())
                }
                Node::File { mode, content } => (*mode, content.as_slice()),
                Node::Link { target } => (0o777, target.as_os_str().as_encoded_bytes()),
            };
            digest.update((path.len() as u64).to_le_bytes());
            digest.update(path);
            digest.update(mode.to_le_bytes());
            digest.update((content.len() as u64).to_le_bytes());
            digest.update(content);
        }
        digest.finalize().iter().take(16).fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
    }

    fn write(&self, root: &Path) -> io::Result<()> {
        for Entry { path, node } in &self.entries {
            let to = root.join(path);
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent)?;
            }
            match node {
                Node::Directory { mode, owner } => {
                    std::fs::create_dir_all(&to)?;
                    std::fs::set_permissions(&to, PermissionsExt::from_mode(*mode))?;
                    if *owner != 0 && !is_ordinary_user() {
                        lchown(&to, Some(*owner), Some(*owner))?;
                    }
                }
                Node::File { mode, content } => {
                    let mut file = std::fs::File::create_new(&to)?;
                    file.write_all(content)?;
                    file.set_permissions(PermissionsExt::from_mode(*mode))?;
                }
                Node::Link { target } => symlink(target, &to)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skeleton_holds_no_account_of_the_host_and_is_built_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = HostImage::build(dir.path(), &HostImageOptions::default()).unwrap();
        let made = std::fs::metadata(first.skeleton.join("etc")).unwrap();
        let again = HostImage::build(dir.path(), &HostImageOptions::default()).unwrap();
        assert_eq!(first.skeleton, again.skeleton);
        assert_eq!(std::fs::metadata(again.skeleton.join("etc")).unwrap().ino(), made.ino(), "not built again");
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
