//! What a sandbox uses, where no control group counts it.
//!
//! Read off its processes one by one. So the processor time of those that have
//! ended is missing, and memory is what they map of their own: the kernel's for
//! their sake is nobody's.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use super::cgroup::Reading;
use super::process;

/// More processes are not looked at; a reading is no place to hang.
const MAX_PROCESSES: usize = 4096;

/// Adds up the first process of a sandbox and all that descend from it.
pub(crate) fn of_sandbox(init: impl AsFd) -> Reading {
    match process::number(init) {
        Ok(Some(init)) => of_processes(init),
        Ok(None) | Err(_) => Reading::default(),
    }
}

pub(crate) fn of_processes(init: i32) -> Reading {
    let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
    let mut reading = Reading::default();
    let mut waiting = VecDeque::from([init]);
    while let Some(pid) = waiting.pop_front() {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let Some(ticks) = read("stat").as_deref().and_then(cpu_ticks) else { continue };
        reading.pids += 1;
        reading.cpu_usec += ticks * 1_000_000 / ticks_per_second;
        reading.memory_bytes += read("status").map_or(0, |status| own_memory_bytes(&status));
        if reading.pids as usize >= MAX_PROCESSES {
            break;
        }
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            waiting.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        }
    }
    reading
}

/// Fields 14 and 15 of `/proc/PID/stat`; the name in field 2 may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Without pages of files, which the kernel can drop at will.
fn own_memory_bytes(status: &str) -> u64 {
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|text| text.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).unwrap_or(0)
    };
    (kib("RssAnon:") + kib("RssShmem:")) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_counts_descendants_and_their_memory() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & echo; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let reading = of_processes(i32::try_from(child.id()).unwrap());
        assert_eq!(reading.pids, 2);
        assert!(reading.memory_bytes > 0, "{reading:?}");
        assert_eq!(of_processes(i32::MAX), Reading::default());
        let sleeping = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
        let sleeping = rustix::process::Pid::from_raw(sleeping.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(sleeping, rustix::process::Signal::KILL).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn texts_of_the_kernel_are_understood() {
        assert_eq!(cpu_ticks("7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 40 2 0 0 20 0 1 0 4242"), Some(42));
        assert_eq!(own_memory_bytes("VmRSS:\t 900 kB\nRssAnon:\t     100 kB\nRssShmem:\t 4 kB\n"), 104 << 10);
    }
}
