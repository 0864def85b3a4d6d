//! Processes of this host that belong to a sandbox, and what memory they take.

use std::fs;

/// Ids of processes whose command line or control group speaks of one of
/// `marks`.
pub(crate) fn speaking_of(marks: &[String]) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let speaks = |pid: &u32| {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let text = [read("cmdline"), read("cgroup")].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        marks.iter().any(|mark| text.contains(mark))
    };
    pids.filter(speaks).collect()
}

/// What a process takes of the host's memory, its share of what it shares with
/// others included (`Pss`).
pub(crate) fn memory_kib(pid: u32) -> Option<u64> {
    let table = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().trim_end_matches(" kB").trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_process_is_found_by_its_words() {
        let mut child = std::process::Command::new("sleep").arg("61.25").spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        // Between fork and exec it has our own command line.
        let mut found = speaking_of(&["61.25".to_owned()]);
        while found.is_empty() && Instant::now() < end {
            std::thread::yield_now();
            found = speaking_of(&["61.25".to_owned()]);
        }
        assert_eq!(found, [child.id()]);
        assert!(memory_kib(child.id()).is_some_and(|kib| kib > 0));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(speaking_of(&["61.25".to_owned()]), Vec::<u32>::new());
    }
}
