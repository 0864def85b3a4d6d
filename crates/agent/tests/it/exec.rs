//! Commands.

use std::time::Duration;

use bytes::Bytes;
use stacyvm_sandbox::{
    AttachRequest, ProcessEvent, ProcessInput, ProcessSelector, Session as _, SessionError, StartRequest, TerminalSize,
};

use crate::harness::{Agent, argv, collect, env, eventually, is_alive, next, shell};

#[tokio::test]
async fn a_command_answers_with_output_and_status() {
    let agent = Agent::start();
    let output = agent.shell("echo out; echo err >&2; exit 7").await;
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(output.code(), Some(7));
    assert!(output.pid > 1);
}

#[tokio::test]
async fn arguments_environment_and_directory_arrive_as_given() {
    let agent = Agent::start();
    let odd = ["printf", "%s|", "a b", "", "$HOME", "'", "\u{1F600}", "-n"];
    assert_eq!(agent.run(argv(&odd)).await.expect("printf").text(), "a b||$HOME|'|\u{1F600}|-n|");

    let request = StartRequest { env: env(&[("X", "1 2"), ("PATH", "/usr/bin:/bin")]), ..shell("echo $X; pwd") };
    let output = agent.run(request).await.expect("the shell starts");
    assert_eq!(output.text(), format!("1 2\n{}\n", agent.dir.display()));

    let elsewhere = StartRequest { workdir: Some("/".to_owned()), ..shell("pwd; cat") };
    assert_eq!(agent.run(elsewhere).await.expect("stdin is empty").text(), "/\n");
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let agent = Agent::start();
    let missing = agent.run(argv(&["no-such-program"])).await;
    assert!(matches!(&missing, Err(SessionError::CommandNotFound(text)) if text.contains("no-such-program")));
    assert!(matches!(agent.run(argv(&["/etc/passwd"])).await, Err(SessionError::CommandNotFound(_))));
    assert!(matches!(agent.run(argv(&[])).await, Err(SessionError::InvalidArgument(_))));
    assert!(matches!(agent.run(argv(&["a\0b"])).await, Err(SessionError::InvalidArgument(_))));
    let nowhere = StartRequest { workdir: Some("/no/such/dir".to_owned()), ..shell("true") };
    assert!(matches!(agent.run(nowhere).await, Err(SessionError::InvalidArgument(text)) if text.contains("/no/such")));
    let nobody = StartRequest { user: Some("no-such-user".to_owned()), ..shell("true") };
    assert!(matches!(agent.run(nobody).await, Err(SessionError::UserNotFound(_))));
}

#[tokio::test]
async fn a_default_directory_that_is_gone_is_named_and_another_one_helps() {
    let agent = Agent::start();
    let dir = agent.dir.display().to_string();
    assert_eq!(agent.shell("rmdir \"$PWD\" && echo gone").await.text(), "gone\n");
    let refused = agent.run(shell("true")).await;
    let Err(SessionError::InvalidArgument(text)) = &refused else { panic!("{refused:?}") };
    assert!(text.contains(&dir) && text.contains("`workdir`"), "{text}");
    let elsewhere = StartRequest { workdir: Some("/".to_owned()), ..shell(&format!("mkdir {dir} && pwd")) };
    assert_eq!(agent.run(elsewhere).await.expect("a directory that is there").text(), "/\n");
    assert_eq!(agent.shell("pwd").await.text(), format!("{dir}\n"));
}

#[tokio::test]
async fn signals_end_commands_and_are_reported() {
    let agent = Agent::start();
    let mut events = agent.session.start(argv(&["sleep", "1000"])).await.expect("it starts");
    let ProcessEvent::Started { pid } = next(&mut events).await.expect("an event") else { panic!("no start") };
    agent.session.signal(&ProcessSelector::Pid(pid), 15).await.expect("it runs");
    let exit = collect(events).await.expect("it ends").exit.expect("an exit");
    assert_eq!((exit.code, exit.signal, exit.timed_out), (None, Some(15), false));
    let again = agent.session.signal(&ProcessSelector::Pid(pid), 15).await;
    assert!(matches!(again, Err(SessionError::ProcessNotFound(_))), "{again:?}");
}

#[tokio::test]
async fn a_deadline_kills_detached_descendants_and_keeps_the_output() {
    let agent = Agent::start();
    let script = "echo before; setsid sh -c 'sh -c \"echo \\$\\$ > pid; exec sleep 1000\" & ' & \
                  while [ ! -s pid ]; do sleep 0.01; done; sleep 1000";
    let request = StartRequest { deadline: Some(Duration::from_millis(700)), ..shell(script) };
    let output = agent.run(request).await.expect("it starts");
    assert_eq!(output.text(), "before\n");
    assert!(output.exit.is_some_and(|exit| exit.timed_out), "{output:?}");
    let pid: u32 = std::fs::read_to_string(agent.path("pid")).expect("written").trim().parse().expect("a number");
    eventually("the detached process is dead", async || !is_alive(pid)).await;
}

#[tokio::test]
async fn a_background_child_neither_holds_the_end_back_nor_dies() {
    let agent = Agent::start();
    let output = agent.shell("sleep 1000 & echo $!").await;
    assert_eq!(output.code(), Some(0));
    let pid: u32 = output.text().trim().parse().expect("a number");
    assert!(is_alive(pid), "it lives on");
    let group = agent.shell(&format!("kill -9 {pid}")).await;
    assert_eq!(group.code(), Some(0));
    eventually("it is dead", async || !is_alive(pid)).await;
}

#[tokio::test]
async fn stdin_is_written_and_closed() {
    let agent = Agent::start();
    let request = StartRequest { stdin: true, tag: Some("cat".to_owned()), ..argv(&["cat"]) };
    let events = agent.session.start(request).await.expect("it starts");
    let cat = ProcessSelector::Tag("cat".to_owned());
    let input = Bytes::from(vec![b'x'; 3 << 20]);
    let reading = tokio::spawn(collect(events));
    agent.session.send_input(&cat, ProcessInput::Stdin(input.clone())).await.expect("it reads");
    agent.session.close_stdin(&cat).await.expect("it is open");
    let output = reading.await.expect("no panic").expect("it ends");
    assert_eq!((output.stdout.len(), output.code()), (input.len(), Some(0)));
}

#[tokio::test]
async fn a_terminal_is_one_and_can_be_resized() {
    let agent = Agent::start();
    let request = StartRequest {
        terminal: Some(TerminalSize { cols: 80, rows: 24 }),
        ..shell("test -t 0 && test -t 1 && stty size; read line; stty size; echo got $line")
    };
    let mut events = agent.session.start(request).await.expect("it starts");
    let mut output = crate::harness::Output::default();
    while !String::from_utf8_lossy(&output.terminal).contains("24 80") {
        output.add(next(&mut events).await.expect("an event"));
    }
    let process = ProcessSelector::Pid(output.pid);
    agent.session.resize(&process, TerminalSize { cols: 132, rows: 50 }).await.expect("it has a terminal");
    agent.session.send_input(&process, ProcessInput::Terminal(Bytes::from_static(b"hi\r"))).await.expect("it reads");
    let rest = collect(events).await.expect("it ends");
    let text = String::from_utf8_lossy(&rest.terminal).into_owned();
    assert!(text.contains("50 132") && text.contains("got hi"), "{text:?}");
    assert_eq!(rest.code(), Some(0));
}

#[tokio::test]
async fn output_can_be_read_again_from_an_offset() {
    let agent = Agent::start();
    let output = agent.shell("echo 0123456789").await;
    let process = ProcessSelector::Pid(output.pid);
    let again = agent.session.attach(AttachRequest { process, offset: 4 }).await.expect("it is remembered");
    let again = collect(again).await.expect("it has ended");
    assert_eq!((again.text().as_str(), again.exit), ("456789\n", output.exit));
    let processes = agent.session.processes().await.expect("a list");
    let listed = processes.iter().find(|process| process.pid == output.pid).expect("it is listed");
    assert_eq!((listed.argv.len(), listed.exit), (3, output.exit));
}
