//! Rows EX-R1 and EX-R3: what callers hear when a backend fails. The faults are
//! injected: servers of our own are started with a wrong key, with a host where
//! nobody is, and with a backend that does one thing wrong at a time.

use stacyvm_api::{CreateRequest, ErrorCode, FindingLevel, ProviderDetail};
use stacyvm_client::{ClientError, SandboxClient};

use super::{Looked, Seen, Trouble, eventually};
use crate::run::Run;
use crate::server::{Call, Fault, FaultyBackend, LEAK, OwnServer, START_LIMIT, Subject, chain};
use crate::{CertifyOptions, Target};

/// Nobody listens there: the port is reserved.
const DEAD_HOST: &str = "http://127.0.0.1:1";
/// Not the key of any backend.
const WRONG_KEY: &str = "stacyvm-certify-wrong-key";

/// How long the servers of these rows wait for a backend.
const PATIENCE: &str = "2s";
const COMMAND_LIMIT: stacyvm_api::Duration = stacyvm_api::Duration::from_secs(3);

pub(crate) async fn look(run: &mut Run<'_>, subject: &Subject) {
    if !run.has("EX-R3") {
        return;
    }
    if let Subject::Given { .. } = subject {
        let ids = ["EX-R1", "EX-R3"].map(str::to_owned);
        let fix = "certify on the server's host, without --stacyvm-url";
        return run.close(&ids, "not available: the server is not ours to give wrong backends", fix);
    }
    let (target, options) = (run.target, run.options);
    run.look("EX-R1", told_apart(target, options)).await;
    run.look("EX-R3", mapped(target, options)).await;
}

/// The real backend with a wrong key, and no backend at all.
async fn told_apart(target: Target, options: &CertifyOptions) -> Looked {
    let key = complaint(target, options, &settings(&options.settings.remote_url)).await?;
    let Some(key) = key else {
        let fix = "give the backend a key of its own, and see that it asks for it";
        return Ok(Seen::fail("the backend takes any key", fix));
    };
    let host = complaint(target, options, &settings(DEAD_HOST)).await?;
    let host = host.ok_or("a host where nobody listens is said to be healthy")?;
    let speaks_of_key = |complaint: &Complaint| complaint.why.contains("key");
    if !speaks_of_key(&key) || speaks_of_key(&host) {
        let said = format!("they are not told apart: `{}` of a wrong key, `{}` of a dead host", key.why, host.why);
        return Err(said.into());
    }
    Ok(Seen::pass("health and callers hear which of the two it is, and what to do")
        .with(format!("wrong key: {}; fix: {}; callers: {}", key.why, key.fix, key.refusal))
        .with(format!("dead host: {}; fix: {}; callers: {}", host.why, host.fix, host.refusal)))
}

/// A backend, as a server of ours is told of it.
fn settings(url: &str) -> [(&'static str, &str); 3] {
    [("BASE_URL", url), ("API_KEY", WRONG_KEY), ("TIMEOUT", PATIENCE)]
}

/// What a server says of a backend that it cannot use.
struct Complaint {
    why: String,
    fix: String,
    /// What somebody hears who wants a sandbox.
    refusal: String,
}

/// None where the server finds nothing wrong.
async fn complaint(
    target: Target,
    options: &CertifyOptions,
    backend: &[(&str, &str)],
) -> Result<Option<Complaint>, Trouble> {
    let server = OwnServer::start_with_backend(target, options, backend).await?;
    let complaint = complaint_of(target, options, &server).await;
    server.close().await;
    complaint
}

async fn complaint_of(
    target: Target,
    options: &CertifyOptions,
    server: &OwnServer,
) -> Result<Option<Complaint>, Trouble> {
    let looked = eventually(START_LIMIT, async || {
        let detail = server.client.provider(target.provider()).await.ok()?;
        (!detail.health.findings.is_empty()).then_some(detail)
    });
    let detail: ProviderDetail = looked.await.ok_or("the server does not say how its provider is")?;
    if detail.healthy {
        return Ok(None);
    }
    let failed = detail.health.findings.iter().find(|finding| finding.level == FindingLevel::Failure);
    let failed = failed.ok_or("unhealthy, and no finding says why")?;
    let fix = failed.fix.clone().filter(|fix| !fix.is_empty()).ok_or("unhealthy, and nothing says what to do")?;
    let request = CreateRequest { image: Some(options.image.clone()), ..CreateRequest::default() };
    let refusal = match server.client.create(&request).await {
        Ok(sandbox) => return Err(format!("{} was made all the same", sandbox.id).into()),
        Err(error) => expect(&error, ErrorCode::Unavailable, "a sandbox")?,
    };
    if refusal.contains(WRONG_KEY) || server.log().contains(WRONG_KEY) {
        return Err("the key is told on".into());
    }
    Ok(Some(Complaint { why: failed.message.clone(), fix, refusal }))
}

/// Failures of a backend at three calls, and what each has to become.
const MAPPED: [(Fault, [ErrorCode; 3]); 10] = {
    use ErrorCode::{BadGateway, NotFound, ResourceLimit, Timeout, Unavailable};
    [
        (Fault::Status(401), [Unavailable, Unavailable, Unavailable]),
        (Fault::Status(403), [Unavailable, Unavailable, Unavailable]),
        // At a spawn there is no sandbox yet: it is the backend that is missing.
        (Fault::Status(404), [Unavailable, NotFound, NotFound]),
        (Fault::Status(408), [Unavailable, Timeout, Timeout]),
        (Fault::Status(410), [Unavailable, NotFound, NotFound]),
        (Fault::Status(429), [ResourceLimit, ResourceLimit, ResourceLimit]),
        (Fault::Status(500), [Unavailable, Unavailable, Unavailable]),
        (Fault::Status(503), [Unavailable, Unavailable, Unavailable]),
        // A command has a deadline of its own.
        (Fault::Hang, [Unavailable, Timeout, Unavailable]),
        (Fault::Garbage, [BadGateway, BadGateway, BadGateway]),
    ]
};

async fn mapped(target: Target, options: &CertifyOptions) -> Looked {
    let backend = FaultyBackend::start().await?;
    let server = OwnServer::start_with_backend(target, options, &settings(backend.url())).await?;
    let seen = every_fault(&server, &backend, options).await;
    let log = server.log();
    server.close().await;
    let evidence = seen?;
    if log.contains(LEAK) {
        return Err("the server's log has what the backend wrote".into());
    }
    let message =
        format!("{} failures are the errors that they have to be, without the backend's words", evidence.len());
    Ok(Seen { evidence, ..Seen::pass(message) })
}

async fn every_fault(
    server: &OwnServer,
    backend: &FaultyBackend,
    options: &CertifyOptions,
) -> Result<Vec<String>, Trouble> {
    let request =
        CreateRequest { image: Some(options.image.clone()), allow_unenforced: Some(true), ..CreateRequest::default() };
    let mut evidence = Vec::new();
    for (fault, [of_spawn, of_exec, of_file]) in MAPPED {
        let mut note = |call: &str, code: ErrorCode, error: &ClientError| {
            let what = format!("{call}, {fault}");
            expect(error, code, &what).map(|_| evidence.push(format!("{what}: {code}")))
        };
        backend.break_at(Call::Spawn, fault);
        match server.client.create(&request).await {
            Err(error) => note("spawn", of_spawn, &error)?,
            Ok(_) => return Err(format!("spawn, {fault}: a sandbox was made").into()),
        }
        backend.mend();
        // One that is said to be gone is not used again.
        let sandbox = server.client.sandbox(server.client.create(&request).await?.id);
        backend.break_at(Call::Exec, fault);
        match run_command(&sandbox).await {
            Err(error) => note("exec", of_exec, &error)?,
            Ok(said) => return Err(format!("exec, {fault}: it succeeded, {said:?}").into()),
        }
        backend.mend();
        let sandbox = server.client.sandbox(server.client.create(&request).await?.id);
        backend.break_at(Call::Read, fault);
        match sandbox.list_files("/workspace").await {
            Err(error) => note("files", of_file, &error)?,
            Ok(files) => return Err(format!("files, {fault}: it succeeded, {files:?}").into()),
        }
        backend.mend();
    }
    Ok(evidence)
}

async fn run_command(sandbox: &SandboxClient) -> Result<String, ClientError> {
    let request = stacyvm_api::ExecRequest { timeout: Some(COMMAND_LIMIT), ..super::shell("true") };
    sandbox.exec(&request).await.map(|result| result.stdout)
}

/// The code that it has to be, and none of the backend's words; what it says.
fn expect(error: &ClientError, code: ErrorCode, what: &str) -> Result<String, Trouble> {
    let said = format!("{} {}", chain(error), error.hint().unwrap_or_default());
    if said.contains(LEAK) {
        return Err(format!("{what}: the backend's words are told on: {said}").into());
    }
    match error.code() {
        Some(found) if found == code => Ok(chain(error)),
        found => Err(format!("{what}: it has to be {code}, and is {found:?}: {said}").into()),
    }
}
