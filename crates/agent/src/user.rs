//! Who commands run as and who owns files: the guest's `/etc/passwd` and
//! `/etc/group`, read by ourselves.
//!
//! The C library's lookup is not used: it loads plugins of the host's libc and
//! may ask the network.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Failure;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// `PATH_MAX`.
const MAX_PATH_BYTES: usize = 4096;

/// Most are no longer than this, and are read by one call.
const USUAL_DATABASE_BYTES: usize = 4096;

/// No more than this of either file is read.
const MAX_DATABASE_BYTES: u64 = 1 << 20;

/// More than the grain of a clock that counts parts of a second: the kernel's
/// tick, 10 ms at most.
const SETTLING_TIME: Duration = Duration::from_millis(100);

/// The same of clocks that count whole seconds (FAT: two).
const COARSE_SETTLING_TIME: Duration = Duration::from_secs(3);

/// A process has at most this many further groups.
const MAX_GROUPS: usize = 256;

/// Somebody a command can run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

impl Identity {
    /// An absolute path; relative ones and `~` start at the user's home.
    pub(crate) fn resolve_path(&self, path: &str) -> Result<PathBuf, Failure> {
        if path.is_empty() {
            return Err(Failure::InvalidArgument("the path is empty".to_owned()));
        }
        if path.len() > MAX_PATH_BYTES || path.contains('\0') {
            return Err(Failure::InvalidArgument("the path is too long or contains a zero byte".to_owned()));
        }
        let home = Path::new(&self.home);
        Ok(match path.strip_prefix('~') {
            Some("") => home.to_owned(),
            Some(below) if below.starts_with('/') => home.join(below.trim_start_matches('/')),
            _ => home.join(path),
        })
    }
}

/// Finds a user by `name`, `uid`, `name:group` or `uid:gid`. A uid needs no entry.
pub(crate) fn resolve(user: &str) -> Result<Identity, Failure> {
    Database::current().resolve(user)
}

/// Does something on this thread with the file rights of a user.
#[expect(unsafe_code, reason = "there is no safe way to change one thread's rights")]
pub(crate) fn acting_as<T>(identity: &Identity, step: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = rustix::process::geteuid().as_raw();
    if identity.uid == own {
        return step();
    }
    if own != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let restore = Restore { groups: rustix::process::getgroups().unwrap_or_default() };
    // SAFETY: these calls change only the calling thread (the raw ones do not
    // tell the others, unlike the C library's); `restore` undoes them. Leaving
    // uid 0 also takes the thread's right to ignore permissions.
    unsafe {
        if libc::syscall(libc::SYS_setgroups, identity.groups.len(), identity.groups.as_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(libc::SYS_setfsgid, identity.gid);
        libc::syscall(libc::SYS_setfsuid, identity.uid);
        // The call reports no failure: it is asked with a number that changes nothing.
        if libc::syscall(libc::SYS_setfsuid, u32::MAX) != i64::from(identity.uid) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
    }
    let result = step();
    drop(restore);
    result
}

/// Gives a thread its rights back, also after a panic.
struct Restore {
    groups: Vec<rustix::process::Gid>,
}

#[expect(unsafe_code, reason = "as above")]
impl Drop for Restore {
    fn drop(&mut self) {
        let groups: Vec<u32> = self.groups.iter().map(|group| group.as_raw()).collect();
        // SAFETY: as above; returning to the thread's effective ids cannot be refused.
        unsafe {
            libc::syscall(libc::SYS_setfsuid, rustix::process::geteuid().as_raw());
            libc::syscall(libc::SYS_setfsgid, rustix::process::getegid().as_raw());
            libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr());
        }
    }
}

/// What both files say.
pub(crate) struct Database {
    users: Vec<User>,
    groups: Vec<Group>,
}

/// The database that was read last, and of which files.
static LAST_READ: Mutex<Option<([Version; 2], Arc<Database>)>> = Mutex::new(None);

/// Which content a file had. Two of the same version are the same, unless one
/// of them is unsettled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    Missing,
    Settled {
        device: u64,
        inode: u64,
        size: u64,
        changed: Duration,
    },
    /// So new that it can change again without another time of change.
    Unsettled,
}

impl Version {
    fn of(path: &str) -> Self {
        let Ok(metadata) = std::fs::metadata(path) else { return Self::Missing };
        let seconds = u64::try_from(metadata.ctime()).unwrap_or(0);
        let changed = Duration::new(seconds, u32::try_from(metadata.ctime_nsec()).unwrap_or(0));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if now < changed + settling_time(changed) {
            return Self::Unsettled;
        }
        Self::Settled { device: metadata.dev(), inode: metadata.ino(), size: metadata.size(), changed }
    }
}

/// How long after a change the next one may look the same.
fn settling_time(changed: Duration) -> Duration {
    if changed.subsec_nanos() == 0 { COARSE_SETTLING_TIME } else { SETTLING_TIME }
}

struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

impl Database {
    /// As the files are now; they are read only if they have changed.
    pub(crate) fn current() -> Arc<Self> {
        let versions = [PASSWD, GROUP].map(Version::of);
        let mut last = LAST_READ.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((read, database)) = &*last
            && *read == versions
            && !versions.contains(&Version::Unsettled)
        {
            return Arc::clone(database);
        }
        let database = Arc::new(Self::parse(&read_bounded(PASSWD), &read_bounded(GROUP)));
        *last = Some((versions, Arc::clone(&database)));
        database
    }

    fn parse(passwd: &str, group: &str) -> Self {
        Self {
            users: passwd.lines().filter_map(User::parse).collect(),
            groups: group.lines().filter_map(Group::parse).collect(),
        }
    }

    fn resolve(&self, text: &str) -> Result<Identity, Failure> {
        let (user_part, group_part) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let unknown = || Failure::UserNotFound(text.chars().take(64).collect());

        let known = self.users.iter().find(|user| user.name == user_part);
        let (name, uid, gid, home) = match (known, user_part.parse::<u32>()) {
            (Some(user), _) => (user.name.clone(), user.uid, user.gid, user.home.clone()),
            (None, Ok(uid)) => match self.users.iter().find(|user| user.uid == uid) {
                Some(user) => (user.name.clone(), uid, user.gid, user.home.clone()),
                None => (uid.to_string(), uid, if uid == 0 { 0 } else { uid }, "/".to_owned()),
            },
            // An image without a user database still has its root.
            (None, Err(_)) if user_part == "root" => ("root".to_owned(), 0, 0, "/root".to_owned()),
            (None, Err(_)) => return Err(unknown()),
        };
        let gid = match group_part {
            None => gid,
            Some(group) => match (self.groups.iter().find(|entry| entry.name == group), group.parse()) {
                (Some(entry), _) => entry.gid,
                (None, Ok(gid)) => gid,
                (None, Err(_)) => return Err(unknown()),
            },
        };
        let mut groups: Vec<u32> = self.groups.iter().filter(|g| g.members.contains(&name)).map(|g| g.gid).collect();
        groups.push(gid);
        groups.sort_unstable();
        groups.dedup();
        groups.truncate(MAX_GROUPS);
        let home = if home.starts_with('/') { home } else { "/".to_owned() };
        Ok(Identity { name, uid, gid, groups, home })
    }

    /// Names for listings; a number where there is none.
    pub(crate) fn names(&self) -> Names {
        Names {
            users: self.users.iter().rev().map(|user| (user.uid, user.name.clone())).collect(),
            groups: self.groups.iter().rev().map(|group| (group.gid, group.name.clone())).collect(),
        }
    }
}

/// Owner names by number.
pub(crate) struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    pub(crate) fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    pub(crate) fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

impl User {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
        let _password = fields.next()?;
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let _comment = fields.next();
        let home = fields.next().unwrap_or_default().to_owned();
        Some(Self { name, uid, gid, home })
    }
}

impl Group {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
        let _password = fields.next()?;
        let gid = fields.next()?.parse().ok()?;
        let members = fields.next().unwrap_or_default().split(',').map(|member| member.trim().to_owned()).collect();
        Some(Self { name, gid, members })
    }
}

/// What is there and readable; a guest may have broken or removed the file, or
/// put a pipe in its place, which must not hold us up.
fn read_bounded(path: &str) -> String {
    let Ok(file) = crate::files::open_regular(path.as_ref()) else { return String::new() };
    let mut bytes = Vec::with_capacity(USUAL_DATABASE_BYTES);
    let _ = file.take(MAX_DATABASE_BYTES).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD_TEXT: &str =
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\nbroken\n:x:5:5::/:\nn:x:no:1::/:\n";
    const GROUP_TEXT: &str = "root:x:0:\nuser:x:1000:\nstaff:x:50:user, root\nwheel:x:10:user\nbad:x:\n";

    fn resolve(text: &str) -> Option<(String, u32, u32, Vec<u32>, String)> {
        let identity = Database::parse(PASSWD_TEXT, GROUP_TEXT).resolve(text).ok()?;
        Some((identity.name, identity.uid, identity.gid, identity.groups, identity.home))
    }

    #[test]
    fn users_are_found_by_every_form() {
        assert_eq!(resolve("user"), Some(("user".to_owned(), 1000, 1000, vec![10, 50, 1000], "/home/user".to_owned())));
        assert_eq!(resolve("1000").map(|found| found.0), Some("user".to_owned()));
        assert_eq!(resolve("4242"), Some(("4242".to_owned(), 4242, 4242, vec![4242], "/".to_owned())));
        assert_eq!(resolve("user:staff").map(|found| found.2), Some(50));
        assert_eq!(resolve("1000:7").map(|found| found.2), Some(7));
        assert_eq!(resolve("nobody"), None);
        assert_eq!(resolve("n"), None);
        assert_eq!(resolve("user:nogroup"), None);
    }

    #[test]
    fn a_clock_without_parts_of_a_second_is_given_its_time() {
        assert_eq!(settling_time(Duration::from_secs(7)), COARSE_SETTLING_TIME);
        assert_eq!(settling_time(Duration::new(7, 1)), SETTLING_TIME);
    }

    #[test]
    fn an_empty_database_still_has_root() {
        let database = Database::parse("", "");
        assert_eq!(database.resolve("root").map(|root| root.uid).ok(), Some(0));
        assert_eq!(database.names().user(7), "7");
    }
}
