//! Whose `/workspace` it is.
//!
//! Runs as the sandbox's root inside its own tree, so that nothing an image
//! contains can point at the host; the files read are still hostile bytes.

use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};

use crate::oci::rootless::Authority;
use crate::oci::spawner::protocol::{Failure, FailureKind, LaunchPlan, Step};

/// Longest user database that is looked into.
const MAX_PASSWD_BYTES: u64 = 1 << 20;

/// Hands `/workspace` to the sandbox's user and makes the working directory.
pub(in crate::oci) fn prepare_workspace(plan: &LaunchPlan, authority: &Authority) -> Result<(), Failure> {
    if let Some(user) = plan.user.as_deref().filter(|user| !user.is_empty()) {
        let (uid, gid) = resolve(user).ok_or_else(|| Failure {
            kind: FailureKind::UnknownUser,
            step: "find the user".into(),
            message: format!("the image has no user `{user}`"),
        })?;
        if uid.max(gid) >= authority.ids() {
            return Err(Failure {
                kind: FailureKind::UnknownUser,
                step: "find the user".into(),
                message: format!(
                    "sandboxes of this server have {} uids, too few for the user `{user}` ({uid}:{gid}); use the user \
                     `root`, or see `stacyvm providers oci` for how to have more",
                    authority.ids()
                ),
            });
        }
        rustix::fs::chown("/workspace", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .step("hand over the workspace")?;
    }
    let Some(workdir) = plan.workdir.as_deref() else { return Ok(()) };
    let path = Path::new("/").join(workdir);
    std::fs::create_dir_all(&path).map_err(|error| Failure {
        kind: FailureKind::Image,
        step: "make the working directory".into(),
        message: format!("the image's working directory {} cannot be made: {error}", path.display()),
    })
}

/// `name`, `uid`, `name:group` or `uid:gid`, as images and requests write it.
fn resolve(spec: &str) -> Option<(u32, u32)> {
    let (user, group) = spec.split_once(':').map_or((spec, None), |(user, group)| (user, Some(group)));
    let passwd = read_small("/etc/passwd").unwrap_or_default();
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find_map(|fields| {
        let (uid, gid) = (number(fields.get(2)?)?, number(fields.get(3)?)?);
        (fields[0] == user || fields[2] == user).then_some((uid, gid))
    });
    let (uid, own_gid) = entry.or_else(|| Some((number(user)?, 0)))?;
    let gid = match group {
        None => own_gid,
        Some(group) => find_group(group).or_else(|| number(group))?,
    };
    Some((uid, gid))
}

fn find_group(name: &str) -> Option<u32> {
    let groups = read_small("/etc/group").unwrap_or_default();
    groups.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields[0] == name).then(|| number(fields.get(2)?)).flatten()
    })
}

/// A user number that exists inside a sandbox.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id < crate::host::ids::RANGE)
}

/// A regular file's text, bounded; never blocks on a FIFO or a device.
fn read_small(path: &str) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_PASSWD_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
