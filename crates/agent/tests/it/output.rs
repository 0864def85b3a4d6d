//! Much output, and readers that are slow, late or gone.

use std::time::Duration;

use futures_util::StreamExt as _;
use stacyvm_sandbox::{AttachRequest, ProcessEvent, ProcessSelector, Session as _, StartRequest};

use crate::harness::{Agent, Output, argv, collect, eventually, is_alive, next, shell};

const MEGABYTE: usize = 1 << 20;

/// Resident memory of a process in bytes.
fn memory(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

#[tokio::test]
async fn a_hundred_megabytes_arrive_whole() {
    let agent = Agent::start();
    let mut events = agent.session.start(argv(&["head", "-c", "100000000", "/dev/zero"])).await.expect("it starts");
    let (mut seen, mut peak, mut count) = (0, 0, 0);
    let exit = loop {
        match next(&mut events).await.expect("an event") {
            ProcessEvent::Stdout(bytes) => seen += bytes.len(),
            ProcessEvent::Exited(exit) => break exit,
            ProcessEvent::Started { .. } => {}
            other => panic!("{other:?}"),
        }
        count += 1;
        if count % 100 == 0 {
            peak = peak.max(memory(agent.child.id()));
            // A reader that falls behind again and again, but keeps reading.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!((seen, exit.code), (100_000_000, Some(0)));
    assert!(peak < 64 * MEGABYTE, "the agent held {peak} bytes");
}

#[tokio::test]
async fn a_command_without_a_reader_goes_on_and_the_gap_is_told() {
    let agent = Agent::start();
    let request = StartRequest { tag: Some("flood".to_owned()), ..shell("head -c 20000000 /dev/zero; echo end") };
    drop(agent.session.start(request).await.expect("it starts"));
    let flood = ProcessSelector::Tag("flood".to_owned());
    eventually("it ends although nobody reads", async || {
        agent.session.processes().await.expect("a list").iter().any(|process| process.exit.is_some())
    })
    .await;
    let events = agent.session.attach(AttachRequest { process: flood, offset: 0 }).await.expect("remembered");
    let output = collect(events).await.expect("it has ended");
    assert_eq!(output.dropped as usize + output.stdout.len(), 20_000_004);
    assert!(output.dropped > 0 && output.stdout.len() > MEGABYTE / 2, "{}", output.stdout.len());
    assert!(output.stdout.ends_with(b"end\n"));
}

#[tokio::test]
async fn a_stalled_reader_holds_up_neither_other_calls_nor_the_command_for_ever() {
    let agent = Agent::start();
    let request = StartRequest { tag: Some("flood".to_owned()), ..shell("yes | head -c 30000000; echo end >&2") };
    // Never read from here on.
    let stalled = agent.session.start(request).await.expect("it starts");
    for _ in 0..50 {
        assert_eq!(agent.shell("echo ok").await.text(), "ok\n");
    }
    let flood = || ProcessSelector::Tag("flood".to_owned());
    eventually("the command goes on without the stalled reader", async || {
        let processes = agent.session.processes().await.expect("a list");
        processes.iter().any(|process| process.tag.as_deref() == Some("flood") && process.exit.is_some())
    })
    .await;
    let late = collect(stalled).await.expect("its stream still works");
    assert_eq!(late.dropped as usize + late.stdout.len() + late.stderr.len(), 30_000_004);
    assert!(late.dropped > 0, "it was told what it missed");
    let again = agent.session.attach(AttachRequest { process: flood(), offset: 30_000_000 }).await.expect("remembered");
    assert_eq!(collect(again).await.expect("it has ended").stderr, b"end\n");
}

#[tokio::test]
async fn a_reader_can_come_back_where_it_was() {
    let agent = Agent::start();
    let request =
        StartRequest { tag: Some("steps".to_owned()), ..shell("echo one; read line < gate; echo two; echo three") };
    assert_eq!(agent.shell("mkfifo gate").await.code(), Some(0));
    let mut events = agent.session.start(request).await.expect("it starts");
    let mut output = Output::default();
    while output.text() != "one\n" {
        output.add(next(&mut events).await.expect("an event"));
    }
    drop(events);
    let process = ProcessSelector::Tag("steps".to_owned());
    let events = agent.session.attach(AttachRequest { process, offset: 4 }).await.expect("it still runs");
    let reading = tokio::spawn(collect(events));
    assert_eq!(agent.shell("echo go > gate").await.code(), Some(0));
    let rest = reading.await.expect("no panic").expect("it ends");
    assert_eq!((rest.text().as_str(), rest.code()), ("two\nthree\n", Some(0)));
}

#[tokio::test]
async fn what_the_main_process_wrote_last_is_never_lost() {
    let agent = Agent::start();
    for _ in 0..30 {
        // The background child keeps the pipe open and writes on.
        let output = agent.shell("(while :; do echo noise >&2; sleep 0.001; done) & head -c 60000 /dev/zero").await;
        assert_eq!((output.stdout.len(), output.code()), (60_000, Some(0)));
    }
    agent.shell("pkill -9 -P 1 -f noise || true").await;
}

#[tokio::test]
async fn many_commands_run_at_once() {
    let agent = Agent::start();
    let commands = (0..64).map(|index| {
        let session = std::sync::Arc::clone(&agent.session);
        tokio::spawn(async move {
            let events = session.start(shell(&format!("sleep 0.2; echo {index}"))).await.expect("it starts");
            collect(events).await.expect("it ends").text()
        })
    });
    let commands: Vec<_> = commands.collect();
    for (index, command) in commands.into_iter().enumerate() {
        assert_eq!(command.await.expect("no panic"), format!("{index}\n"));
    }
}

#[tokio::test]
async fn more_streams_than_one_connection_carries() {
    let agent = Agent::start();
    let mut open = Vec::new();
    for _ in 0..150 {
        let mut events = agent.session.start(argv(&["sleep", "1000"])).await.expect("it starts");
        assert!(matches!(next(&mut events).await, Ok(ProcessEvent::Started { .. })));
        open.push(events);
    }
    assert_eq!(agent.shell("echo still here").await.text(), "still here\n");
}

#[tokio::test]
async fn the_console_shows_the_last_lines() {
    let agent = Agent::start();
    agent.shell("echo one; echo two >&2; printf three").await;
    let lines = agent.session.console(10).await.expect("lines");
    assert!(["one", "two", "three"].iter().all(|line| lines.iter().any(|shown| shown == line)), "{lines:?}");
    agent.shell("seq 5000").await;
    let lines = agent.session.console(100_000).await.expect("lines");
    assert_eq!((lines.len(), lines.last().map(String::as_str)), (1000, Some("5000")));
}

#[tokio::test]
async fn a_fork_storm_is_killed_at_its_deadline() {
    let agent = Agent::start();
    // Processes that live only to start the next one, in sessions of their own.
    let script = "hop() { setsid sh -c 'echo $$ >> pids; [ -e stop ] || exec sh hop.sh' & }; \
                  echo 'setsid sh hop.sh & exit' > hop.sh; for i in 1 2 3 4; do hop; done; sleep 1000";
    let request = StartRequest { deadline: Some(Duration::from_millis(500)), ..shell(script) };
    let output = agent.run(request).await.expect("it starts");
    assert!(output.exit.is_some_and(|exit| exit.timed_out), "{output:?}");
    assert_eq!(agent.shell("echo alive").await.text(), "alive\n");
    assert!(is_alive(agent.child.id()));
    let hoppers = || {
        std::fs::read_dir("/proc").expect("a process table").flatten().any(|entry| {
            let cwd = std::fs::read_link(entry.path().join("cwd"));
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            cwd.is_ok_and(|cwd| cwd == agent.dir) && command.ends_with(b"hop.sh\0")
        })
    };
    eventually("no process of the storm is left", async || !hoppers()).await;
}

#[tokio::test]
async fn events_stop_when_the_agent_does() {
    let mut agent = Agent::start();
    let mut events = agent.session.start(argv(&["sleep", "1000"])).await.expect("it starts");
    assert!(matches!(next(&mut events).await, Ok(ProcessEvent::Started { .. })));
    let pid = rustix::process::Pid::from_child(&agent.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it lives");
    let mut exited = false;
    while let Some(event) = events.next().await {
        exited |= matches!(event, Ok(ProcessEvent::Exited(_)));
    }
    agent.child.wait().expect("it ends");
    assert!(exited || agent.session.ping().await.is_err());
    let after = agent.session.ping().await;
    assert!(matches!(after, Err(stacyvm_sandbox::SessionError::Gone)), "{after:?}");
}
