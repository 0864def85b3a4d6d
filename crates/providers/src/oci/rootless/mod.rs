//! Sandboxes of an ordinary user.
//!
//! The spawner moves into a user namespace in which it is root. Its uid 0 is
//! the server's own user, further uids are those that `/etc/subuid` gives this
//! user; without them there is no other. All else hangs together as with root,
//! one level down:
//!
//! ```text
//!  server (ordinary user) ──▶ spawner (root of the outer namespace) ──▶ init of a sandbox
//!    files, sockets,            mounts, pid, ipc, uts, cgroup             root of its own
//!    images                     namespaces belong to the outer one        namespace
//! ```
//!
//! So root inside a sandbox has no power over its mounts here either. Three
//! things an ordinary user cannot do, and what takes their place:
//!
//! - Owners of layers cannot be shifted (idmapped mounts need the host's root).
//!   Layers belong to the server's user, who is root inside, and every sandbox
//!   has the same uids. Only namespaces keep two sandboxes apart.
//! - Devices cannot be made. The host's harmless ones are shown instead.
//! - Files that further uids left cannot be removed from outside. The spawner
//!   does that.
//!
//! `outer` is the namespace, `subordinate` the further uids; what on this host
//! forbids all of it, [`crate::host::obstacle`] says.

mod outer;
mod subordinate;

use std::io;

use serde::{Deserialize, Serialize};

use crate::host::ids;

pub(super) use outer::enter;

/// First kernel whose overlayfs an ordinary user can mount (5.11) and whose
/// mounts can be made read-only as a tree (5.12).
pub(super) const NEEDED_KERNEL: (u32, u32) = (5, 12);

/// On whose rights a spawner makes sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Authority {
    /// The host's root's: every sandbox has uids of its own.
    Root,
    /// An ordinary user's: all sandboxes have the same.
    User {
        /// How many uids and gids there are in a sandbox.
        ids: u32,
        /// Why there are fewer than programs expect.
        shortage: Option<String>,
    },
}

impl Authority {
    /// How many uids and gids there are in a sandbox.
    pub(super) fn ids(&self) -> u32 {
        match self {
            Self::Root => ids::RANGE,
            Self::User { ids, .. } => *ids,
        }
    }

    /// What to write as a sandbox's map of uids or gids (`kind` is `uid` or
    /// `gid`), with `base` as its root's number.
    pub(super) fn map(&self, kind: &str, base: u32) -> io::Result<String> {
        match self {
            Self::Root => Ok(format!("0 {base} {}\n", ids::RANGE)),
            Self::User { .. } => Ok(identity_map(&std::fs::read_to_string(format!("/proc/self/{kind}_map"))?)),
        }
    }

    /// Whether processes may choose their groups. The kernel refuses that to
    /// those who could not have got their uids without its help.
    pub(super) fn sets_groups(&self) -> bool {
        self.ids() > 1
    }
}

/// All ids of a namespace for one inside it, under the same numbers. The kernel
/// takes no run that is made of several here.
fn identity_map(own: &str) -> String {
    own.lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace();
            let (first, count) = (numbers.next()?, numbers.nth(1)?);
            Some(format!("{first} {first} {count}\n"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_of_ids_is_passed_on_by_itself() {
        let own = "         0       1000          1\n         1     100000      65535\n";
        assert_eq!(identity_map(own), "0 0 1\n1 1 65535\n");
    }

    #[test]
    fn groups_can_be_chosen_where_there_is_a_choice() {
        let user = |ids| Authority::User { ids, shortage: None };
        assert!(!user(1).sets_groups() && user(65_536).sets_groups() && Authority::Root.sets_groups());
        assert_eq!(Authority::Root.map("uid", 7).unwrap(), "0 7 65536\n");
    }
}
