//! Rows PR-R3 and PR-R4: whether limits act where nothing but this host holds
//! them, and whether the languages that the configuration names run.

use std::fmt::Write as _;

use stacyvm_api::ErrorCode;
use stacyvm_client::{Client, SandboxClient};

use super::{Caps, Looked, Making, Seen, Trouble, language, make, make_limited, same, shell};
use crate::run::Run;
use crate::server::Subject;

/// A limit that is beyond what the probe takes, and one that is below it.
const ROOMY_MEMORY_MIB: u64 = 512;
const TIGHT_MEMORY_MIB: u64 = 64;
/// Holds this much at once.
const ALLOCATE: &str = "head -c 201326592 /dev/zero | tail -c 201326592 | wc -c";
const ALLOCATED: &str = "201326592";

/// What a sandbox may write beyond its image.
const ROOM_MIB: u64 = 32;
/// Writes eight times that in files that are small by themselves, and then
/// waits to be stopped.
const WRITE: &str = "i=0; while [ $i -lt 64 ]; do head -c 4194304 /dev/zero > /workspace/part-$i || exit 9; \
                     i=$((i + 1)); done; sleep 60; echo went on";

pub(crate) async fn look(run: &mut Run<'_>, subject: &Subject) {
    if !run.has("PR-R3") {
        return;
    }
    let (client, target) = (subject.client(), run.target);
    let (mark, image) = (run.mark.clone(), run.options.image.clone());
    let making = Making::of(target, &image, &mark);
    let wanted = run.options.settings.proot_languages.clone();
    run.look("PR-R3", caps(&client, making)).await;
    run.look("PR-R4", languages(&client, making, &wanted)).await;
}

async fn caps(client: &Client, making: Making<'_>) -> Looked {
    let memory = memory(client, making).await?;
    let disk = disk(client, making).await?;
    Ok(Seen::pass("both stopped what went beyond; they are operational controls, not isolation of the grade of a VM")
        .with(memory)
        .with(disk))
}

/// A limit that stops everything would prove nothing: a larger one has to let
/// the same command pass.
async fn memory(client: &Client, making: Making<'_>) -> Result<String, Trouble> {
    let limited = |mib| Caps { memory_mib: Some(mib), ..Caps::default() };
    let roomy = make_limited(client, making, limited(ROOMY_MEMORY_MIB)).await?;
    let result = roomy.exec(&shell(ALLOCATE)).await;
    roomy.destroy().await?;
    same("the command below its limit", &ALLOCATED.to_owned(), &result?.stdout.trim().to_owned())?;
    let tight = make_limited(client, making, limited(TIGHT_MEMORY_MIB)).await?;
    let result = tight.exec(&shell(ALLOCATE)).await;
    tight.destroy().await?;
    let how = match result {
        Ok(result) if result.stdout.trim() != ALLOCATED => format!("ended with {}", result.exit_code),
        Err(error) if error.code() == Some(ErrorCode::SandboxOom) => "SANDBOX_OOM".to_owned(),
        Ok(_) => return Err(format!("192 MiB were taken with a limit of {TIGHT_MEMORY_MIB} MiB").into()),
        Err(error) => return Err(error.into()),
    };
    Ok(format!("memory: 192 MiB within {ROOMY_MEMORY_MIB} MiB passed, within {TIGHT_MEMORY_MIB} MiB: {how}"))
}

async fn disk(client: &Client, making: Making<'_>) -> Result<String, Trouble> {
    let plain = make(client, making).await?;
    let stats = plain.stats().await;
    plain.destroy().await?;
    let image = stats?.disk_bytes.ok_or("the provider does not say what a sandbox's files take")?;
    let cap = image.div_ceil(1 << 20) + ROOM_MIB;
    let caps = Caps { disk_mib: Some(cap), ..Caps::default() };
    let sandbox = make_limited(client, making, caps).await?;
    let result = sandbox.exec(&shell(WRITE)).await;
    let _ = sandbox.destroy().await;
    let how = match result {
        Ok(result) if !result.stdout.contains("went on") => format!("ended with {}", result.exit_code),
        Ok(_) => return Err(format!("256 MiB were written with {ROOM_MIB} MiB left of a limit of {cap} MiB").into()),
        Err(error) => match error.code() {
            Some(code @ (ErrorCode::SandboxDiskFull | ErrorCode::NotFound)) => code.to_string(),
            _ => return Err(error.into()),
        },
    };
    Ok(format!("disk: 256 MiB with {ROOM_MIB} MiB left of {cap} MiB: {how}"))
}

async fn languages(client: &Client, making: Making<'_>, wanted: &[String]) -> Looked {
    if wanted.is_empty() {
        return Ok(Seen::pass("the configuration names no language"));
    }
    let sandbox = make(client, making).await?;
    let versions = versions(&sandbox, wanted).await;
    let _ = sandbox.destroy().await;
    let (missing, evidence) = versions?;
    if missing.is_empty() {
        return Ok(Seen { evidence, ..Seen::pass(format!("{} run, and say their versions", wanted.join(", "))) });
    }
    let fix = language::fix(wanted, &missing);
    Ok(Seen { evidence, ..Seen::fail(format!("these do not run: {}", missing.join(", ")), fix) })
}

/// Which do not run, and what each said.
async fn versions(sandbox: &SandboxClient, wanted: &[String]) -> Result<(Vec<String>, Vec<String>), Trouble> {
    let (mut missing, mut said) = (Vec::new(), Vec::new());
    for language in wanted {
        let result = sandbox.exec(&shell(&format!("{language} --version 2>&1"))).await?;
        let mut line = format!("{language}: {}", result.stdout.lines().next().unwrap_or_default());
        if result.exit_code != 0 {
            let _ = write!(line, " (ended with {})", result.exit_code);
            missing.push(language.clone());
        }
        said.push(line);
    }
    Ok((missing, said))
}
