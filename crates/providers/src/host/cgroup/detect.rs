//! Which controllers this host offers, and on which hierarchy.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::{Place, delegation};
use crate::host::is_ordinary_user;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Controller {
    Memory,
    Cpu,
    /// Only on v1; v2 counts processor time without a controller.
    CpuAccounting,
    Pids,
}

impl Controller {
    const ALL: [Self; 4] = [Self::Memory, Self::Cpu, Self::CpuAccounting, Self::Pids];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::CpuAccounting => "cpuacct",
            Self::Pids => "pids",
        }
    }

    /// The file that proves that the kernel can hold this limit.
    fn proof(self, v2: bool) -> &'static str {
        match (self, v2) {
            (Self::Memory, false) => "memory.limit_in_bytes",
            (Self::Memory, true) => "memory.max",
            (Self::Cpu, false) => "cpu.cfs_quota_us",
            (Self::Cpu, true) => "cpu.max",
            (Self::CpuAccounting, false) => "cpuacct.usage",
            (Self::CpuAccounting, true) => "cpu.stat",
            (Self::Pids, _) => "pids.max",
        }
    }
}

/// Mount of the hierarchy that carries each controller, and why others have
/// none.
pub(super) fn controllers() -> (BTreeMap<Controller, Place>, BTreeMap<Controller, String>) {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let offered = |group: &Path| std::fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    let top = |mount: &Path| if is_ordinary_user() { delegation::own_group(mount) } else { Some(mount.to_owned()) };
    let Hierarchies { found, read_only } = parse(&mountinfo, top, offered);
    let nowhere = if is_ordinary_user() {
        "no control group hierarchy that has it is this user's"
    } else {
        "the host mounts no control group hierarchy that has it"
    };
    let missing = Controller::ALL
        .into_iter()
        .filter(|controller| !found.contains_key(controller) && *controller != Controller::CpuAccounting)
        .map(|controller| {
            let read_only = read_only.get(&controller);
            let reason = read_only.map(|mount| format!("{} is mounted read-only", mount.display()));
            (controller, reason.unwrap_or_else(|| nowhere.to_owned()))
        })
        .collect();
    (found, missing)
}

/// Where each controller is.
#[derive(Debug, Default)]
struct Hierarchies {
    found: BTreeMap<Controller, Place>,
    /// Where nothing can be made, as in a container without privileges.
    read_only: BTreeMap<Controller, PathBuf>,
}

/// `top` is the group of a v2 hierarchy below which ours go, if there is one.
fn parse(mountinfo: &str, top: impl Fn(&Path) -> Option<PathBuf>, offered: impl Fn(&Path) -> String) -> Hierarchies {
    let Hierarchies { mut found, mut read_only } = Hierarchies::default();
    for line in mountinfo.lines() {
        let Some((place, kind)) = line.split_once(" - ") else { continue };
        let mut fields = place.split(' ').skip(4);
        let (Some(mount), Some(flags), mut kind) = (fields.next(), fields.next(), kind.split(' ')) else { continue };
        let mount = PathBuf::from(mount);
        let mut add = |controller, place: Place| {
            if flags.split(',').any(|flag| flag == "ro") {
                read_only.entry(controller).or_insert_with(|| mount.clone());
            } else {
                // The first mount of a hierarchy serves.
                found.entry(controller).or_insert(place);
            }
        };
        match (kind.next(), kind.nth(1)) {
            (Some("cgroup"), Some(options)) => {
                for controller in Controller::ALL {
                    if options.split(',').any(|option| option == controller.name()) {
                        add(controller, Place::V1(mount.clone()));
                    }
                }
            }
            (Some("cgroup2"), _) => {
                let Some(top) = top(&mount) else { continue };
                let offered = offered(&top);
                for controller in Controller::ALL {
                    if offered.split_whitespace().any(|name| name == controller.name()) {
                        add(controller, Place::V2(top.clone()));
                    }
                }
            }
            _ => {}
        }
    }
    Hierarchies { found, read_only }
}

/// Makes `<mount>/<parent>/<instance>` and sees that the controller works there.
pub(super) fn make_instance_dir(
    controller: Controller,
    mount: &Place,
    parent: &str,
    instance: &str,
) -> io::Result<Place> {
    let directory = mount.path().join(parent).join(instance);
    let denied = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", directory.display()));
    if let Place::V2(root) = mount {
        if is_ordinary_user() {
            delegation::vacate(root)?;
        }
        let outer = root.join(parent);
        std::fs::create_dir_all(&directory)?;
        for level in [root, &outer, &directory] {
            delegate(level, controller)?;
        }
        let probe = directory.join(".probe");
        match std::fs::create_dir(&probe) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let works = probe.join(controller.proof(true)).exists();
        std::fs::remove_dir(&probe)?;
        return if works { Ok(Place::V2(directory)) } else { Err(lacks(controller)) };
    }
    std::fs::create_dir_all(&directory).map_err(denied)?;
    if directory.join(controller.proof(false)).exists() { Ok(Place::V1(directory)) } else { Err(lacks(controller)) }
}

/// Lets the children of a v2 group have a controller.
fn delegate(group: &Path, controller: Controller) -> io::Result<()> {
    let control = group.join("cgroup.subtree_control");
    let name = controller.name();
    if std::fs::read_to_string(&control)?.split_whitespace().any(|enabled| enabled == name) {
        return Ok(());
    }
    std::fs::write(&control, format!("+{name}"))
        .map_err(|error| io::Error::new(error.kind(), format!("{} cannot be enabled: {error}", group.display())))
}

fn lacks(controller: Controller) -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        format!("the kernel's {} controller has no {}", controller.name(), controller.proof(false)),
    )
}

/// Whether the host has any swap to bound.
pub(super) fn host_swaps() -> bool {
    std::fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn each_controller_is_found_where_it_is() {
        let Hierarchies { found, read_only } =
            parse(HYBRID, |mount| Some(mount.to_owned()), |_| "hugetlb pids\n".to_owned());
        let v1 = |path: &str| Place::V1(format!("/sys/fs/cgroup/{path}").into());
        assert_eq!(found[&Controller::Memory], v1("memory"));
        assert_eq!(found[&Controller::Cpu], v1("cpu,cpuacct"));
        assert_eq!(found[&Controller::CpuAccounting], v1("cpu,cpuacct"));
        assert_eq!(found[&Controller::Pids], Place::V2("/sys/fs/cgroup/unified".into()));
        assert!(read_only.is_empty());
    }

    #[test]
    fn what_is_mounted_read_only_holds_no_limit() {
        let contained = HYBRID.replace("/memory rw ", "/memory ro,nosuid ").replace("/unified rw ", "/unified ro ");
        let all = |_: &Path| "memory pids".to_owned();
        let Hierarchies { found, read_only } = parse(&contained, |mount| Some(mount.to_owned()), all);
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [Controller::Cpu, Controller::CpuAccounting]);
        assert_eq!(read_only[&Controller::Memory], Path::new("/sys/fs/cgroup/memory"));
        assert_eq!(read_only[&Controller::Pids], Path::new("/sys/fs/cgroup/unified"));
        let twice = format!("{contained}35 30 0:28 / /mnt/memory rw - cgroup cgroup rw,memory\n");
        let found = parse(&twice, |mount| Some(mount.to_owned()), all).found;
        assert_eq!(found[&Controller::Memory], Place::V1("/mnt/memory".into()), "another mount of it can be written");
    }

    #[test]
    fn a_unified_host_has_all_on_v2_and_a_bare_one_nothing() {
        let unified = "29 24 0:25 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let offered = |_: &Path| "cpuset cpu io memory pids".to_owned();
        let found = parse(unified, |mount| Some(mount.to_owned()), offered).found;
        let v2 = Place::V2("/sys/fs/cgroup".into());
        assert_eq!(found.len(), 3);
        assert!(found.values().all(|place| *place == v2));
        assert!(parse(unified, |_| None, offered).found.is_empty(), "a hierarchy of which nothing is ours");
        assert!(parse("1 0 8:1 / / rw - ext4 /dev/sda rw\n", |_| None, |_| String::new()).found.is_empty());
    }
}
