//! Control groups: limits, readings, and the last word on what still runs.
//!
//! Hosts have cgroup v1, v2, or both at once with the controllers split
//! between them, so each controller is looked up on its own. Ours live below
//! `<mount>/<parent>/<instance>/<sandbox>`; with the instance in the path,
//! servers with different data directories never touch each other's.

mod delegation;
mod detect;
mod group;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stacyvm_api::{Limit, LimitReport};

use detect::Controller;
pub(crate) use group::{Reading, remove, unthrottle};

/// What to do where a controller is missing, as root and as an ordinary user.
pub(crate) const CONTROLLER_FIX: &str =
    "run as root on a host with this controller, or create sandboxes with allow_unenforced";
pub(crate) const DELEGATION_FIX: &str = "run the server as root, or on a host with cgroup v2 and systemd in a group that is this user's: \
     systemd-run --user --scope -p Delegate=yes stacyvm serve";

/// Controllers that no writable hierarchy of the host has, and why. Changes nothing.
pub(crate) fn not_offered() -> Vec<(&'static str, String)> {
    let (_, missing) = detect::controllers();
    missing.into_iter().map(|(controller, reason)| (controller.name(), reason)).collect()
}

/// What a sandbox may use; zero means that nothing was asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: f64,
    pub(crate) pids: u64,
}

/// Limits that this host holds.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct BundleLimits {
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) no_swap: bool,
    /// Microseconds of processor time in each period of so many.
    pub(crate) cpu: Option<(u64, u64)>,
    pub(crate) pids: Option<u64>,
}

/// How the child gets into its control groups.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(crate) struct CgroupPlan {
    /// `tasks` files of v1 hierarchies, which the child writes itself into.
    pub(crate) v1_tasks: Vec<PathBuf>,
    /// Directory of the v2 hierarchy, which the child is cloned into.
    pub(crate) v2_dir: Option<PathBuf>,
}

/// Where one controller's groups are made.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    V1(PathBuf),
    V2(PathBuf),
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::V1(path) | Self::V2(path) => path,
        }
    }
}

/// This server's part of the host's control groups.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    /// Directory of this instance in each controller's hierarchy.
    places: BTreeMap<Controller, Place>,
    /// Why a controller cannot be used.
    missing: BTreeMap<Controller, String>,
}

impl Cgroups {
    /// Finds the controllers and makes this instance's directories in them.
    pub(crate) fn open(parent: &str, instance: &str) -> Self {
        let (mounts, mut missing) = detect::controllers();
        let mut places = BTreeMap::new();
        for (controller, mount) in mounts {
            match detect::make_instance_dir(controller, &mount, parent, instance) {
                Ok(place) => drop(places.insert(controller, place)),
                // Counting is not limiting: there are other ways to count.
                Err(_) if controller == Controller::CpuAccounting => {}
                Err(error) => drop(missing.insert(controller, error.to_string())),
            }
        }
        Self { places, missing }
    }

    pub(crate) fn missing(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.missing.iter().map(|(controller, reason)| (controller.name(), reason.as_str()))
    }

    /// Which of the limits the kernel can hold here.
    pub(crate) fn report(&self, limits: &Limits) -> LimitReport {
        let mut report = LimitReport::default();
        let mut say = |asked: bool, limit, held: bool| {
            if asked {
                if held { report.enforced.push(limit) } else { report.unenforced.push(limit) }
            }
        };
        let has = |controller| self.places.contains_key(&controller);
        say(limits.memory_bytes > 0, Limit::Memory, has(Controller::Memory));
        say(limits.memory_bytes > 0, Limit::Swap, has(Controller::Memory) && self.bounds_swap());
        say(limits.vcpus > 0.0, Limit::Cpu, has(Controller::Cpu));
        say(limits.pids > 0, Limit::Pids, has(Controller::Pids));
        report
    }

    /// Whether every sandbox has a group, by which it can be found.
    pub(crate) fn are_available(&self) -> bool {
        !self.places.is_empty()
    }

    /// Which limits another runtime is to be told, having the same groups: those
    /// that hold here.
    pub(crate) fn for_bundle(&self, limits: &Limits) -> BundleLimits {
        let held = self.report(limits).enforced;
        let holds = |limit| held.contains(&limit);
        BundleLimits {
            memory_bytes: holds(Limit::Memory).then_some(limits.memory_bytes),
            no_swap: holds(Limit::Swap) && self.places.get(&Controller::Memory).is_some_and(group::bounds_swap),
            cpu: holds(Limit::Cpu).then(|| (group::cpu_quota_usec(limits.vcpus), group::CPU_PERIOD_USEC)),
            pids: holds(Limit::Pids).then_some(limits.pids),
        }
    }

    fn bounds_swap(&self) -> bool {
        self.places.get(&Controller::Memory).is_some_and(|place| group::bounds_swap(place) || !detect::host_swaps())
    }

    /// Directories of a sandbox, one in each hierarchy.
    pub(crate) fn directories(&self, sandbox: &str) -> Vec<PathBuf> {
        let mut directories: Vec<PathBuf> = self.places.values().map(|place| place.path().join(sandbox)).collect();
        directories.sort_unstable();
        directories.dedup();
        directories
    }

    /// Makes a sandbox's groups with its limits set.
    pub(crate) fn create(&self, sandbox: &str, limits: &Limits) -> io::Result<CgroupPlan> {
        for directory in self.directories(sandbox) {
            std::fs::create_dir(&directory)?;
        }
        let mut plan = CgroupPlan::default();
        for (controller, place) in &self.places {
            let directory = place.path().join(sandbox);
            match place {
                Place::V1(_) => {
                    group::limit_v1(*controller, &directory, limits)?;
                    plan.v1_tasks.push(directory.join("tasks"));
                }
                Place::V2(_) => {
                    group::limit_v2(*controller, &directory, limits)?;
                    plan.v2_dir = Some(directory);
                }
            }
        }
        plan.v1_tasks.sort_unstable();
        plan.v1_tasks.dedup();
        Ok(plan)
    }

    /// What a sandbox uses now; `other` says it where no group does.
    pub(crate) fn read(&self, sandbox: &str, other: impl FnOnce() -> Reading) -> Reading {
        let exists = |place: &&Place| place.path().join(sandbox).exists();
        let complete = self.missing.is_empty() && self.places.values().all(|place| exists(&place));
        let mut reading = if complete { Reading::default() } else { other() };
        for (controller, place) in self.places.iter().filter(|(_, place)| exists(place)) {
            let directory = place.path().join(sandbox);
            match place {
                Place::V1(_) => reading.add_v1(*controller, &directory),
                Place::V2(_) => reading.add_v2(*controller, &directory),
            }
        }
        reading
    }

    /// Times the kernel killed in a sandbox for want of memory: one file's worth of
    /// [`read`](Self::read).
    pub(crate) fn oom_kills(&self, sandbox: &str) -> u64 {
        match self.places.get(&Controller::Memory) {
            Some(Place::V1(path)) => group::oom_kills_v1(&path.join(sandbox)),
            Some(Place::V2(path)) => group::oom_kills_v2(&path.join(sandbox)),
            None => 0,
        }
    }

    /// Sandboxes that have a group here, known or not.
    pub(crate) fn sandboxes(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .places
            .values()
            .filter_map(|place| std::fs::read_dir(place.path()).ok())
            .flatten()
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Takes this instance's own directories away, if no sandbox is in them.
    pub(crate) fn close(&self) {
        for place in self.places.values() {
            // Whatever is still inside keeps it, and the shared parent belongs
            // to every server.
            if std::fs::remove_dir(place.path()).is_ok() {
                let _ = place.path().parent().map(std::fs::remove_dir);
            }
        }
    }
}
