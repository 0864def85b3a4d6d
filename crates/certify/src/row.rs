//! The rows of the matrix: what each target has to pass, by id.

use crate::Target;

/// What a row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Every runtime.
    Baseline,
    /// The host, without a server.
    Host,
    /// A command that proves the host's part by itself.
    Validation,
    /// A server and its sandboxes.
    Runtime,
}

/// One line of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub id: &'static str,
    pub kind: Kind,
    /// What holds when it passes.
    pub title: &'static str,
}

const fn row(id: &'static str, kind: Kind, title: &'static str) -> Row {
    Row { id, kind, title }
}

use Kind::{Baseline, Host, Runtime, Validation};

const BASELINE: [Row; 9] = [
    row("B0", Baseline, "a server with this runtime answers"),
    row("B1", Baseline, "the test suite passes for this build"),
    row("B2", Baseline, "the smoke script passes with address and key as arguments"),
    row("B3", Baseline, "the server lists the provider"),
    row("B4", Baseline, "the server is ready, and the provider is healthy"),
    row("B5", Baseline, "the smoke script passes with address and key as variables"),
    row("B6", Baseline, "`stacyvm smoke` passes on this provider"),
    row("B7", Baseline, "the contract suite passes on this provider"),
    row("B8", Baseline, "nothing of this run is left"),
];

/// Rows of our own runtime, after those of Docker.
const OCI: [Row; 20] = [
    row("OC-H1", Host, "kernel, overlay and namespaces are there"),
    row("OC-H2", Host, "control groups hold memory, processors and processes"),
    row("OC-H3", Host, "networks of sandboxes can be made"),
    row("OC-R1", Runtime, "the provider is healthy"),
    row("OC-R2", Runtime, "a sandbox is made"),
    row("OC-R3", Runtime, "a command's status and output come back"),
    row("OC-R4", Runtime, "a file is written"),
    row("OC-R5", Runtime, "a file is read"),
    row("OC-R6", Runtime, "files are listed"),
    row("OC-R7", Runtime, "a file is moved"),
    row("OC-R8", Runtime, "a file's mode is changed"),
    row("OC-R9", Runtime, "a file is described"),
    row("OC-R10", Runtime, "files are found by pattern"),
    row("OC-R11", Runtime, "a file is deleted"),
    row("OC-R12", Runtime, "a destroyed sandbox is gone, and so is all it had on the host"),
    row("OC-R13a", Runtime, "a restart of the server leaves sandbox and commands running"),
    row("OC-R13b", Runtime, "a sandbox that ended while the server was down is known to have"),
    row("OC-R13c", Runtime, "a sandbox that no record explains is freed"),
    row("OC-R14", Runtime, "port 3000 is shown at its preview"),
    row("OC-R15", Runtime, "the sandbox is a container of ours: user namespace, seccomp, no new privileges"),
];

const DOCKER: [Row; 21] = [
    row("DK-H1", Host, "the daemon runs"),
    row("DK-H2", Host, "the configured socket answers us"),
    row("DK-H3", Host, "the configured network exists"),
    row("DK-H4", Host, "a proxy can reach sandboxes"),
    row("DK-V1", Validation, "the docker integration tests pass for this build"),
    row("DK-R1", Runtime, "the provider is healthy"),
    row("DK-R2", Runtime, "a sandbox is made"),
    row("DK-R3", Runtime, "a command's status and output come back"),
    row("DK-R4", Runtime, "a file is written"),
    row("DK-R5", Runtime, "a file is read"),
    row("DK-R6", Runtime, "files are listed"),
    row("DK-R7", Runtime, "a file is moved"),
    row("DK-R8", Runtime, "a file's mode is changed"),
    row("DK-R9", Runtime, "a file is described"),
    row("DK-R10", Runtime, "files are found by pattern"),
    row("DK-R11", Runtime, "a file is deleted"),
    row("DK-R12", Runtime, "a destroyed sandbox is gone, and so is its container"),
    row("DK-R13a", Runtime, "a restart of the server leaves the container and its commands running"),
    row("DK-R13b", Runtime, "a container that was removed while the server was down is known to be gone"),
    row("DK-R13c", Runtime, "a container that no record explains is taken up or freed"),
    row("DK-R13d", Runtime, "a container whose sandbox was destroyed is removed"),
];

const DOCKER_PREVIEW: Row = row("DK-R14", Runtime, "port 3000 is shown at its preview");
const DOCKER_IDENTITY: Row =
    row("DK-R15", Runtime, "the daemon made the container with the runtime that was asked for");

const GVISOR: [Row; 7] = [
    row("GV-H1", Host, "runsc is installed and registered"),
    row("GV-H2", Host, "providers.docker.runtime is runsc"),
    row("GV-V1", Validation, "alpine:latest runs with runsc"),
    row("GV-R1", Runtime, "the provider is healthy with runsc"),
    row("GV-R2", Runtime, "the sandbox's kernel is gVisor, inside and for the daemon"),
    row("GV-R3", Runtime, "system calls that workloads need are probed one by one"),
    row("GV-R4", Runtime, "files written by the API are seen by commands, and the reverse"),
];

const KATA: [Row; 7] = [
    row("KT-H1", Host, "Kata Containers is installed and registered"),
    row("KT-H2", Host, "virtualization can be used"),
    row("KT-H3", Host, "providers.docker.runtime is the registered name"),
    row("KT-V1", Validation, "alpine:latest runs with the registered runtime"),
    row("KT-R1", Runtime, "the provider is healthy"),
    row("KT-R2", Runtime, "the sandbox's kernel is its own"),
    row("KT-R3", Runtime, "start and memory are within the operator's limits"),
];

const FIRECRACKER: [Row; 11] = [
    row("FC-H1", Host, "/dev/kvm can be read and written"),
    row("FC-H2", Host, "firecracker is installed"),
    row("FC-H3", Host, "the kernel is there"),
    row("FC-H4", Host, "the root file system is there or can be built"),
    row("FC-H5", Host, "the agent is there"),
    row("FC-H6", Host, "networks of guests can be made"),
    row("FC-R1", Runtime, "the provider is healthy"),
    row("FC-R2", Runtime, "the contract suite passes on this host"),
    row("FC-R3", Runtime, "snapshots are restored, and two clones are independent"),
    row("FC-R4", Runtime, "destroying leaves no process, socket, device or file"),
    row("FC-R5", Runtime, "after a restart machines are attached again or freed"),
];

const QEMU: [Row; 5] = [
    row("QM-H1", Host, "/dev/kvm can be read and written"),
    row("QM-H2", Host, "qemu is installed"),
    row("QM-R1", Runtime, "the provider is healthy"),
    row("QM-R2", Runtime, "the contract suite passes on this host"),
    row("QM-R3", Runtime, "the sandbox's kernel is its own"),
];

const PROOT: [Row; 12] = [
    row("PR-H1", Host, "proot is installed"),
    row("PR-H2", Host, "the root file system is there"),
    row("PR-H3", Host, "the workspace base can be written to"),
    row("PR-H4", Host, "every configured language is in the root file system"),
    row("PR-R1", Runtime, "the provider is healthy"),
    row("PR-R2", Runtime, "lifecycle, commands and files work in the real root file system"),
    row("PR-R3", Runtime, "memory and disk limits act"),
    row("PR-R4", Runtime, "every configured language runs"),
    row("PR-R13a", Runtime, "a restart of the server leaves sandbox and commands running"),
    row("PR-R13b", Runtime, "a sandbox that ended while the server was down is known to have"),
    row("PR-R13c", Runtime, "a sandbox that no record explains is taken up or freed"),
    row("PR-R14", Runtime, "port 3000 is shown at its preview"),
];

const REMOTE: [Row; 8] = [
    row("EX-H1", Host, "the backend's name, port and TLS can be reached"),
    row("EX-H2", Host, "the key is not in the configuration file"),
    row("EX-H3", Host, "the backend's address is well formed"),
    row("EX-R1", Runtime, "a wrong key and a dead host are told apart and say what to do"),
    row("EX-R2", Runtime, "the contract suite passes on this backend"),
    row("EX-R3", Runtime, "failures of the backend become typed errors without its words"),
    row("EX-R13a", Runtime, "a restart of the server leaves the sandbox where it is"),
    row("EX-R14", Runtime, "port 3000 is shown at its preview"),
];

/// Measured for every runtime; memory only where it is this host's.
const LATENCY: Row = row("M1", Runtime, "time to start and memory of a sandbox are within the operator's limits");

/// What a target has to pass, in the order in which it is looked at.
pub fn rows_of(target: Target) -> Vec<Row> {
    let daemon = || [&DOCKER[..], &[DOCKER_PREVIEW, DOCKER_IDENTITY]].concat();
    let own = match target {
        Target::Oci => [&OCI[..], &[LATENCY]].concat(),
        Target::Docker => [daemon(), vec![LATENCY]].concat(),
        Target::Gvisor => [daemon(), GVISOR.to_vec(), vec![LATENCY]].concat(),
        Target::Kata => [daemon(), KATA.to_vec()].concat(),
        Target::Firecracker => [&FIRECRACKER[..], &[LATENCY]].concat(),
        Target::Qemu => [&QEMU[..], &[LATENCY]].concat(),
        Target::Proot => [&PROOT[..], &[LATENCY]].concat(),
        Target::E2b | Target::Custom => [&REMOTE[..], &[LATENCY]].concat(),
    };
    let (host, runtime): (Vec<Row>, Vec<Row>) =
        own.into_iter().partition(|row| matches!(row.kind, Kind::Host | Kind::Validation));
    [host, BASELINE.to_vec(), runtime].concat()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_are_unique_for_each_target_and_have_a_title() {
        for target in Target::ALL {
            let rows = rows_of(target);
            let ids: BTreeSet<&str> = rows.iter().map(|row| row.id).collect();
            assert_eq!(ids.len(), rows.len(), "{target}");
            assert!(rows.iter().all(|row| !row.title.is_empty()), "{target}");
        }
    }

    #[test]
    fn the_published_rows_are_all_there() {
        let ids = |target| rows_of(target).iter().map(|row| row.id).collect::<BTreeSet<_>>();
        let numbered = |prefix: &str, last: u32| (1..=last).map(|n| format!("{prefix}{n}")).collect::<Vec<_>>();
        let expected = [
            (
                Target::Docker,
                [numbered("B", 5), numbered("DK-H", 4), numbered("DK-V", 1), numbered("DK-R", 12)].concat(),
            ),
            (Target::Gvisor, [numbered("GV-H", 2), numbered("GV-V", 1), numbered("GV-R", 4)].concat()),
            (Target::Kata, [numbered("KT-H", 3), numbered("KT-V", 1), numbered("KT-R", 3)].concat()),
            (Target::Firecracker, [numbered("FC-H", 6), numbered("FC-R", 5)].concat()),
            (Target::Proot, [numbered("PR-H", 4), numbered("PR-R", 4)].concat()),
            (Target::E2b, [numbered("EX-H", 3), numbered("EX-R", 3)].concat()),
        ];
        for (target, rows) in expected {
            let ids = ids(target);
            for row in rows {
                assert!(ids.contains(row.as_str()), "{target} has no {row}");
            }
        }
        for row in ["DK-R13a", "DK-R13b", "DK-R13c", "DK-R13d", "DK-R14"] {
            for target in [Target::Docker, Target::Gvisor, Target::Kata] {
                assert!(ids(target).contains(row), "{target} has no {row}");
            }
        }
    }
}
