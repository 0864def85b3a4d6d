//! Rows B0 to B8: what every runtime has to pass.

use std::fs;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use stacyvm_client::Client;
use stacyvm_conformance::{Format, RunOptions, ServerTarget};
use tokio::process::Command;

use super::{Looked, Seen, sweep};
use crate::host::{run as run_program, tail};
use crate::run::{LOOK_BACK, Run, SMOKE, SUITE};
use crate::server::Subject;
use crate::{CertifyOptions, Target};

/// What deployments without this program use.
const SMOKE_SCRIPT: &str = include_str!("../../../../scripts/smoke-deployment.sh");
const SMOKE_LIMIT: Duration = Duration::from_mins(5);

/// What `make test` writes at its end.
#[derive(Debug, Deserialize)]
struct TestResult {
    commit: String,
    status: String,
    finished_at: String,
    #[serde(default)]
    docker_integration: bool,
}

/// How the smoke script learns whom to ask.
#[derive(Clone, Copy)]
enum Told {
    ByArguments,
    ByVariables,
}

pub(crate) async fn look(run: &mut Run<'_>, subject: &Subject) {
    let (target, options, client) = (run.target, run.options, subject.client());
    run.settle("B1", || test_suite(options, false));
    run.settle("DK-V1", || test_suite(options, true));
    run.look("B3", listed(&client, target)).await;
    run.look("B4", ready(&client, target)).await;
    // Of a backend, R1 is about one that is not healthy.
    if !target.is_remote() {
        let healthy = run.own("R1");
        run.look(&healthy, healthy_provider(&client, target)).await;
    }
    for id in ["GV-R1", "KT-R1"] {
        run.look(id, healthy_provider(&client, target)).await;
    }
    let mut said = String::new();
    run.look("B2", script(subject, Told::ByArguments, &mut said)).await;
    run.look("B5", script(subject, Told::ByVariables, &mut said)).await;
    run.look(SMOKE, smoke(options, subject, target, &mut said)).await;
    run.attach("smoke.txt", &said);
    suite(run, &client).await;
}

/// The last rows: what is left when everything was destroyed.
pub(crate) async fn look_back(run: &mut Run<'_>, subject: Subject) {
    let (client, mark) = (subject.client(), run.mark.clone());
    let swept = sweep(&client, &mark).await;
    let is_ours = matches!(subject, Subject::Own(_));
    let closed = subject.close().await;
    if let Some(log) = &closed.log {
        run.attach("server.log", log);
    }
    let seen = async {
        // A server whose records were lost on purpose has none of ours, and that is fine.
        let count = swept?;
        if !closed.left.is_empty() {
            return Ok(Seen::fail(format!("left on this host: {}", closed.left.join(", ")), "see the server's log"));
        }
        let seen = Seen::pass(format!("{count} sandboxes of this run were destroyed at its end, and none is left"));
        Ok(if is_ours {
            seen.with("no directory and no mount below the server's data directory, and no control group")
        } else {
            seen
        })
    };
    run.look(LOOK_BACK, seen).await;
}

fn test_suite(options: &CertifyOptions, with_docker: bool) -> Looked {
    let how = if with_docker {
        "STACYVM_DOCKER_INTEGRATION=1 STACYVM_PROVIDERS_DEFAULT=docker make test, then pass \
         --test-result target/test-result.json"
    } else {
        "make test, then pass --test-result target/test-result.json"
    };
    let Some(path) = &options.test_result else {
        return Ok(Seen::warn("not shown: no result of the test suite was given", how));
    };
    let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let result: TestResult =
        serde_json::from_slice(&text).map_err(|error| format!("{} is no result of ours: {error}", path.display()))?;
    if result.status != "passed" {
        return Ok(Seen::fail(format!("the test suite {} at {}", result.status, result.finished_at), how));
    }
    if result.commit != options.commit {
        let message = format!("the result is of commit {}, this program of {}", result.commit, options.commit);
        return Ok(Seen::fail(message, how));
    }
    if with_docker && !result.docker_integration {
        return Ok(Seen::warn("the result is of a run without the docker integration tests", how));
    }
    Ok(Seen::pass(format!("passed for commit {} at {}", result.commit, result.finished_at)))
}

async fn listed(client: &Client, target: Target) -> Looked {
    let names: Vec<String> = client.providers().await?.into_iter().map(|provider| provider.name).collect();
    let provider = target.provider();
    if names.iter().any(|name| name == provider) {
        return Ok(Seen::pass(format!("GET /api/v1/providers lists {provider}")).with(names.join(", ")));
    }
    let fix = format!("set providers.{provider}.enabled to true on the server");
    Ok(Seen::fail(format!("the server has only {}", names.join(", ")), fix))
}

async fn ready(client: &Client, target: Target) -> Looked {
    let readiness = client.ready().await?;
    let state = readiness.status.clone();
    if state != "ready" {
        return Err(format!("GET /api/v1/ready says {state}").into());
    }
    let provider = readiness.providers.iter().find(|provider| provider.name == target.provider());
    match provider {
        Some(provider) if provider.healthy => Ok(Seen::pass(format!("ready, and {} is healthy", provider.name))),
        // Ready with another provider proves nothing about this one.
        Some(provider) => Err(format!(
            "the server is ready, but {} is not healthy: {}",
            provider.name,
            provider.error.clone().unwrap_or_default()
        )
        .into()),
        None => Err(format!("the server is ready, but without {}", target.provider()).into()),
    }
}

async fn healthy_provider(client: &Client, target: Target) -> Looked {
    let detail = client.provider(target.provider()).await?;
    let mut evidence: Vec<String> = Vec::new();
    let mut fix = None;
    for finding in &detail.health.findings {
        evidence.push(format!("{}: {}", finding.name, finding.message));
        fix = fix.or_else(|| finding.fix.clone());
    }
    if !detail.healthy {
        let error = detail.health.error.unwrap_or_default();
        let fix = fix.unwrap_or_else(|| format!("stacyvm providers {}", target.provider()));
        return Ok(Seen { evidence, ..Seen::fail(format!("healthy: false, {error}"), fix) });
    }
    let message = format!("GET /api/v1/providers/{} says healthy: true", target.provider());
    Ok(Seen { evidence, ..Seen::pass(message) })
}

/// The very script that is shipped.
async fn script(subject: &Subject, told: Told, said: &mut String) -> Looked {
    let mut file = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    file.write_all(SMOKE_SCRIPT.as_bytes()).map_err(|error| error.to_string())?;
    let mut command = Command::new("sh");
    command.arg(file.path()).env_remove("STACYVM_SMOKE_URL").env_remove("STACYVM_API_KEY");
    let key = subject.api_key().unwrap_or_default();
    match told {
        Told::ByArguments => command.args([subject.url(), key]),
        Told::ByVariables => command.env("STACYVM_SMOKE_URL", subject.url()).env("STACYVM_API_KEY", key),
    };
    let ran = run_program(&mut command, SMOKE_LIMIT).await?;
    said.push_str(&ran.output);
    if !ran.success {
        return Ok(Seen::fail(tail(&ran.output), "stacyvm health, and the server's log"));
    }
    Ok(Seen::pass("all four requests answered as they should").with(tail(&ran.output)))
}

#[derive(Debug, Deserialize)]
struct SmokePage {
    checks: Vec<SmokeCheck>,
}

#[derive(Debug, Deserialize)]
struct SmokeCheck {
    status: String,
    name: String,
    message: String,
}

async fn smoke(options: &CertifyOptions, subject: &Subject, target: Target, said: &mut String) -> Looked {
    let mut command = Command::new(&options.program);
    command.args(["smoke", "--json", "--provider", target.provider(), "--image", &options.image]);
    command.args(["--url", subject.url()]);
    match subject.api_key() {
        Some(key) => command.env("STACYVM_API_KEY", key),
        None => command.env_remove("STACYVM_API_KEY"),
    };
    let ran = run_program(&mut command, SMOKE_LIMIT).await?;
    said.push_str(&ran.output);
    let page: SmokePage = serde_json::from_str(&ran.output)
        .map_err(|_| format!("`stacyvm smoke` gave no result: {}", tail(&ran.output)))?;
    Ok(judge(&page, ran.success))
}

/// What the provider says it lacks is no fault, and is named.
fn judge(page: &SmokePage, success: bool) -> Seen {
    let with = |status: &str| -> Vec<String> {
        let found = page.checks.iter().filter(|check| check.status == status);
        found.map(|check| format!("{}: {}", check.name, check.message)).collect()
    };
    let (failed, warned, skipped) = (with("FAIL"), with("WARN"), with("SKIP"));
    let evidence: Vec<String> = page.checks.iter().map(|check| format!("{} {}", check.status, check.name)).collect();
    let fix = "stacyvm smoke against this server";
    let seen = if !failed.is_empty() || !success {
        Seen::fail(failed.join("; "), fix)
    } else if warned.is_empty() {
        Seen::pass(format!("{} steps passed, {} skipped", with("PASS").len(), skipped.len()))
    } else {
        Seen::warn(warned.join("; "), fix)
    };
    let seen = seen.with(evidence.join(", "));
    if skipped.is_empty() { seen } else { seen.with(format!("skipped: {}", skipped.join("; "))) }
}

/// The contract suite over the REST API, and its report beside ours.
async fn suite(run: &mut Run<'_>, client: &Client) {
    let (target, image, stop) = (run.target, run.options.image.clone(), run.stop.clone());
    let mut kept = None;
    let work = async {
        let server = ServerTarget::connect(client.clone(), Some(target.provider())).await;
        let server = Arc::new(server.map_err(|error| error.to_string())?);
        let options = RunOptions { image, stop, ..RunOptions::default() };
        let report = stacyvm_conformance::run(server, &options, &()).await.map_err(|error| error.to_string())?;
        let summary = report.summary;
        let counted = format!("{} passed, {} failed, {} skipped", summary.passed, summary.failed, summary.skipped);
        let (failed, skipped) = (report.failed_ids().join(", "), report.skipped_ids().join(", "));
        let left = report.left_behind.join(", ");
        let seen = if report.is_success() {
            Seen::pass(counted)
        } else {
            Seen::fail(format!("{counted}: {failed} {left}"), "stacyvm conformance --url URL --only ID shows more")
        };
        kept = Some(report);
        Ok(if skipped.is_empty() { seen } else { seen.with(format!("skipped: {skipped}")) })
    };
    run.look(SUITE, work).await;
    // The same under the ids of targets that have no finer rows.
    let ids = ["FC-R2", "QM-R2", "PR-R2", "EX-R2"].map(str::to_owned);
    if let Some(report) = kept {
        for id in ids {
            let message = report.summary_line();
            let seen = if report.is_success() { Seen::pass(message) } else { Seen::fail(message, "see B7") };
            run.note(&id, seen.with("B7"));
        }
        run.attach("conformance.json", &report.render(Format::Json));
        run.attach("conformance.txt", &report.render(Format::Text));
        run.suite = Some(report);
    } else {
        run.close(&ids, "the contract suite did not run", "see B7");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn a_step_that_is_skipped_is_named_and_never_counted_as_passed() {
        let page = |statuses: &[&str]| SmokePage {
            checks: statuses
                .iter()
                .zip(["smoke.exec", "smoke.stdin"])
                .map(|(status, name)| SmokeCheck {
                    status: (*status).to_owned(),
                    name: name.to_owned(),
                    message: "why".to_owned(),
                })
                .collect(),
        };
        let seen = judge(&page(&["PASS", "SKIP"]), true);
        assert_eq!((seen.status, seen.message.as_str()), (Status::Pass, "1 steps passed, 1 skipped"));
        assert_eq!(seen.evidence, ["PASS smoke.exec, SKIP smoke.stdin", "skipped: smoke.stdin: why"]);
        assert_eq!(judge(&page(&["PASS", "FAIL"]), false).status, Status::Fail);
    }
}
