//! Rows R2 to R12: a sandbox from its making to its end, each step on content.

use std::time::Duration;

use stacyvm_api::{ErrorCode, SandboxState, WriteRequest};
use stacyvm_client::{Client, SandboxClient};

use super::{Looked, Making, Seen, Trouble, daemon, eventually, make, output, same};
use crate::host::{Daemon, speaking_of};
use crate::run::Run;
use crate::server::Subject;

/// How long what a sandbox had may take to go.
const GONE_LIMIT: Duration = Duration::from_secs(30);

const DIRECTORY: &str = "/workspace/stacyvm-certify";
const FILE: &str = "/workspace/stacyvm-certify/one.txt";
const MOVED: &str = "/workspace/stacyvm-certify/moved.txt";
const CONTENT: &str = "certified: ümläuts, a tab\tand two lines\nof it\n";

pub(crate) async fn look(run: &mut Run<'_>, subject: &mut Subject) {
    let made = run.own("R2");
    // Where there are no rows for the steps, the same numbers mean other things.
    if !run.has(&run.own("R12")) {
        return;
    }
    let client = subject.client();
    let (mark, image) = (run.mark.clone(), run.options.image.clone());
    let making = Making::of(run.target, &image, &mark);
    let mut sandbox = None;
    let work = async {
        let made = make(&client, making).await?;
        let record = made.get().await?;
        let seen = Seen::pass(format!("{} is running", record.id)).with(format!("image {}", record.image));
        sandbox = Some(made);
        Ok(seen)
    };
    run.look(&made, work).await;
    let steps: Vec<String> = (3..=12).map(|number| run.own(&format!("R{number}"))).collect();
    let Some(sandbox) = sandbox else {
        return run.close(&steps, "not reached: no sandbox could be made", &format!("see {made}"));
    };
    run.look(&steps[0], exec(&sandbox)).await;
    run.look(&steps[1], write(&sandbox)).await;
    run.look(&steps[2], read(&sandbox)).await;
    run.look(&steps[3], list(&sandbox)).await;
    run.look(&steps[4], rename(&sandbox)).await;
    run.look(&steps[5], chmod(&sandbox)).await;
    run.look(&steps[6], stat(&sandbox)).await;
    run.look(&steps[7], glob(&sandbox)).await;
    run.look(&steps[8], delete(&sandbox)).await;
    let daemon = daemon(run);
    let remains = remains(subject, daemon.as_ref(), &sandbox);
    run.look(&steps[9], destroy(&client, &sandbox, remains)).await;
}

async fn exec(sandbox: &SandboxClient) -> Looked {
    let result = sandbox.exec(&super::shell("echo ok")).await?;
    same("exit status", &0, &result.exit_code)?;
    same("output", &"ok\n".to_owned(), &result.stdout)?;
    Ok(Seen::pass("`echo ok` ended with 0 and said ok"))
}

async fn write(sandbox: &SandboxClient) -> Looked {
    let request = WriteRequest { path: FILE.to_owned(), content: CONTENT.to_owned(), ..WriteRequest::default() };
    sandbox.write_file(&request).await?;
    // What a command reads, not what the API says it wrote.
    same("the file for a command", &CONTENT.to_owned(), &output(sandbox, &format!("cat {FILE}")).await?)?;
    Ok(Seen::pass(format!("{} bytes, and a command reads the same", CONTENT.len())))
}

async fn read(sandbox: &SandboxClient) -> Looked {
    same("the file", &CONTENT.as_bytes().to_vec(), &sandbox.read_file(FILE).await?)?;
    Ok(Seen::pass("the bytes that were written"))
}

async fn list(sandbox: &SandboxClient) -> Looked {
    let files = sandbox.list_files(DIRECTORY).await?;
    let found: Vec<(String, u64)> = files.into_iter().map(|file| (file.name, file.size)).collect();
    same("the directory", &vec![("one.txt".to_owned(), CONTENT.len() as u64)], &found)?;
    Ok(Seen::pass("the directory shows the file and its size, and nothing else"))
}

async fn rename(sandbox: &SandboxClient) -> Looked {
    sandbox.move_file(FILE, MOVED).await?;
    same("the file at its new name", &CONTENT.as_bytes().to_vec(), &sandbox.read_file(MOVED).await?)?;
    must_be_missing(sandbox, FILE).await?;
    Ok(Seen::pass("readable under its new name, missing under the old one"))
}

async fn chmod(sandbox: &SandboxClient) -> Looked {
    sandbox.chmod(MOVED, "0750").await?;
    let seen = output(sandbox, &format!("stat -c %a {MOVED}")).await?;
    same("the mode for a command", &"750\n".to_owned(), &seen)?;
    Ok(Seen::pass("a command sees mode 0750"))
}

async fn stat(sandbox: &SandboxClient) -> Looked {
    let file = sandbox.stat(MOVED).await?;
    same("the size", &(CONTENT.len() as u64), &file.size)?;
    same("the mode", &"0750".to_owned(), &file.mode)?;
    same("whether it is a directory", &false, &file.is_dir)?;
    Ok(Seen::pass(format!("{} bytes, mode {}, no directory", file.size, file.mode)))
}

async fn glob(sandbox: &SandboxClient) -> Looked {
    let found = sandbox.glob(&format!("{DIRECTORY}/*.txt")).await?;
    same("what is found", &vec![MOVED.to_owned()], &found)?;
    same("what is found otherwise", &Vec::new(), &sandbox.glob(&format!("{DIRECTORY}/*.md")).await?)?;
    Ok(Seen::pass("exactly the file that fits"))
}

async fn delete(sandbox: &SandboxClient) -> Looked {
    sandbox.remove(MOVED).await?;
    must_be_missing(sandbox, MOVED).await?;
    same("the directory for a command", &String::new(), &output(sandbox, &format!("ls {DIRECTORY}")).await?)?;
    Ok(Seen::pass("missing afterwards, for the API and for a command"))
}

async fn must_be_missing(sandbox: &SandboxClient, path: &str) -> Result<(), Trouble> {
    match sandbox.read_file(path).await {
        Err(error) if error.code() == Some(ErrorCode::FileNotFound) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Err(format!("{path} can still be read").into()),
    }
}

/// Where a sandbox's remains would be.
pub(crate) enum Remains {
    /// Files and processes of our own server's on this host.
    Host {
        directory: std::path::PathBuf,
        id: String,
    },
    Daemon {
        daemon: Daemon,
        id: String,
    },
    /// The host is not ours to look at.
    Unknown,
}

pub(crate) fn remains(subject: &Subject, daemon: Option<&Daemon>, sandbox: &SandboxClient) -> Remains {
    let id = sandbox.id().to_string();
    match (subject, daemon) {
        (_, Some(daemon)) => Remains::Daemon { daemon: daemon.clone(), id },
        (Subject::Own(server), None) => Remains::Host { directory: server.sandboxes_dir().join(&id), id },
        (Subject::Given { .. }, None) => Remains::Unknown,
    }
}

impl Remains {
    /// What is still there; none when all of it is gone.
    pub(crate) async fn left(&self) -> Option<String> {
        match self {
            Self::Host { directory, id } => {
                let processes = speaking_of(&[format!("/{id}")]);
                if directory.exists() {
                    return Some(format!("the directory {}", directory.display()));
                }
                (!processes.is_empty()).then(|| format!("the processes {processes:?}"))
            }
            Self::Daemon { daemon, id } => match daemon.containers_of(id).await {
                Ok(left) if left.is_empty() => None,
                Ok(left) => Some(format!("the container {}", left[0].id)),
                Err(why) => Some(format!("nobody knows what: {why}")),
            },
            Self::Unknown => None,
        }
    }

    /// Waits until nothing is left; what is, otherwise.
    pub(crate) async fn gone(&self, limit: Duration) -> Result<(), Trouble> {
        let mut left = String::new();
        let gone = eventually(limit, async || match self.left().await {
            None => Some(()),
            Some(still) => {
                left = still;
                None
            }
        })
        .await;
        gone.ok_or_else(|| format!("after {limit:?} there is still {left}").into())
    }
}

async fn destroy(client: &Client, sandbox: &SandboxClient, remains: Remains) -> Looked {
    sandbox.destroy().await?;
    match client.sandbox(sandbox.id().clone()).get().await {
        Ok(record) if record.state == SandboxState::Destroyed => {}
        Err(error) if error.code() == Some(ErrorCode::NotFound) => {}
        Ok(record) => return Err(format!("{} is still {:?}", record.id, record.state).into()),
        Err(error) => return Err(error.into()),
    }
    remains.gone(GONE_LIMIT).await?;
    Ok(match remains {
        Remains::Host { .. } => Seen::pass("destroyed; its directory and its processes are gone from the host"),
        Remains::Daemon { .. } => Seen::pass("destroyed; the daemon has no container of it"),
        Remains::Unknown => Seen::warn(
            "the server says that it is destroyed; its host was not looked at",
            "certify on the server's host, without --stacyvm-url",
        ),
    })
}
