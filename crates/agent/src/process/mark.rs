//! A group of its own for every command, where the kernel gives orphans to no
//! subreaper (gVisor before 2023): whatever a command starts inherits it, and
//! without capabilities nobody gets rid of it.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::kernel;

/// Numbers that no image uses: the last 65,536 below those that mean "none".
const FIRST: u32 = 0x7ffe_0000;
const COUNT: u32 = 0x1_0000;

/// A supplementary group that stands for one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u32);

impl Mark {
    /// The next one, if this kernel needs any.
    pub(crate) fn next_if_needed() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        (!kernel::has_subreapers()).then(|| Self(FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT))
    }

    pub(crate) fn group(self) -> u32 {
        self.0
    }

    pub(super) fn is_on(self, pid: i32) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| self.is_in(&status))
    }

    /// `proc_pid_status(5)`. A name cannot contain a newline there.
    fn is_in(self, status: &str) -> bool {
        let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
        groups.is_some_and(|groups| groups.split_whitespace().any(|group| group.parse() == Ok(self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_one_of_the_groups() {
        let mark = Mark(FIRST + 5);
        assert!(mark.is_in(&format!("Name:\tsh\nGroups:\t0 {} \nVmSize: 1\n", FIRST + 5)));
        assert!(!mark.is_in(&format!("Name:\t{}\nGroups:\t0 {}5\n", FIRST + 5, FIRST + 5)));
        assert!(!mark.is_in("Name:\tsh\n"));
    }

    #[test]
    fn linux_needs_none() {
        assert_eq!(Mark::next_if_needed(), None);
        assert!(!Mark(FIRST).is_on(std::process::id() as i32));
    }
}
