//! Ways into a sandbox of any provider.

use futures_util::StreamExt as _;
use stacyvm_api::SandboxId;
use stacyvm_sandbox::{Connection, EnvdSession, Exit, ProcessEvent, Provider, Session as _, StartRequest};

/// What every sandbox of these tests demands.
pub(crate) const TOKEN: &str = "token-of-the-test";

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) exit: Exit,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) async fn session(provider: &dyn Provider, id: &SandboxId) -> EnvdSession {
    let connection = provider.connect(id).await.expect("a way in");
    let Connection::Envd(channel) = connection else { panic!("{connection:?}") };
    EnvdSession::connect(channel, TOKEN.into()).expect("a session")
}

pub(crate) fn shell(script: &str) -> StartRequest {
    argv(&["/bin/sh", "-c", script])
}

pub(crate) fn argv(argv: &[&str]) -> StartRequest {
    StartRequest { argv: argv.iter().map(|&argument| argument.to_owned()).collect(), ..StartRequest::default() }
}

pub(crate) async fn run(session: &EnvdSession, request: StartRequest) -> Ran {
    let mut events = session.start(request).await.expect("the command starts");
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match events.next().await.expect("an exit").expect("an event") {
            ProcessEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            ProcessEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ProcessEvent::Exited(exit) => {
                let text = |bytes| String::from_utf8(bytes).expect("text");
                return Ran { exit, stdout: text(stdout), stderr: text(stderr) };
            }
            ProcessEvent::Started { .. }
            | ProcessEvent::Terminal(_)
            | ProcessEvent::Dropped { .. }
            | ProcessEvent::Keepalive => {}
        }
    }
}

/// The output of a script that must succeed.
pub(crate) async fn output(session: &EnvdSession, script: &str) -> String {
    let ran = run(session, shell(script)).await;
    assert_eq!(ran.exit.code, Some(0), "{script}: {ran:?}");
    ran.stdout.trim_end().to_owned()
}
