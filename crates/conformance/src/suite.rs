//! Runs checks one after the other and always frees what they made.

use std::sync::Arc;
use std::time::Duration;

use stacyvm_api::Timestamp;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::context::SharedSandbox;
use crate::{Check, CheckReport, Context, Failure, Report, Status, Summary, Target, TargetError, checks};

/// Time that freeing a check's sandboxes may take before it counts as failed.
const CLEANUP_DEADLINE: Duration = Duration::from_mins(1);

/// Image of the published suite.
const DEFAULT_IMAGE: &str = "alpine:latest";

/// Which checks run, and in what image.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub image: String,
    /// Ids (`C07`), or beginnings of ids (`S3`); empty runs everything.
    pub only: Vec<String>,
    /// Shortens the deadlines of all checks to at most this.
    pub deadline_max: Option<Duration>,
    /// The check that runs then fails, none follows, and what was made is freed
    /// as ever.
    pub stop: CancellationToken,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self { image: DEFAULT_IMAGE.to_owned(), only: Vec::new(), deadline_max: None, stop: CancellationToken::new() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    #[error("no check is called `{0}`; ids look like C07 or S20, and `C` or `S2` select all that begin so")]
    Unknown(String),
}

/// Is told what happens while the suite runs.
pub trait Observer: Send + Sync {
    /// `index` counts from 1.
    fn started(&self, _index: usize, _total: usize, _check: &Check) {}
    fn finished(&self, _index: usize, _total: usize, _result: &CheckReport) {}
}

/// Nobody is watching.
impl Observer for () {}

/// Runs the contract. The report says what failed; only a selection that names
/// no check is an error.
pub async fn run(
    target: Arc<dyn Target>,
    options: &RunOptions,
    observer: &dyn Observer,
) -> Result<Report, SelectError> {
    let selected = select(&options.only)?;
    Ok(run_checks(target, &selected, options, observer).await)
}

async fn run_checks(
    target: Arc<dyn Target>,
    selected: &[&'static Check],
    options: &RunOptions,
    observer: &dyn Observer,
) -> Report {
    let started_at = Timestamp::now();
    let start = Instant::now();
    let shared = Arc::new(SharedSandbox::default());
    let mut results = Vec::with_capacity(selected.len());
    for (index, check) in selected.iter().enumerate() {
        observer.started(index + 1, selected.len(), check);
        let result = run_check(check, &target, options, &shared).await;
        observer.finished(index + 1, selected.len(), &result);
        // Only a failed check may be the last one: no part of the contract passes for the whole.
        let is_last = options.stop.is_cancelled() && result.status == Status::Fail;
        results.push(result);
        if is_last {
            break;
        }
    }
    let left_behind = free_the_rest(&*target, &shared).await;
    Report {
        target: target.label(),
        image: options.image.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started_at,
        duration_ms: millis(start),
        summary: Summary::of(&results),
        left_behind,
        checks: results,
    }
}

/// Destroys what still exists of this run and names what should not have.
async fn free_the_rest(target: &dyn Target, shared: &SharedSandbox) -> Vec<String> {
    let mut left_behind = Vec::new();
    if let Err(failure) = bounded_cleanup(shared.replace(target)).await {
        left_behind.push(format!("the shared sandbox: {failure}"));
    }
    let rest = async {
        let mut freed = Vec::new();
        for id in target.list().await? {
            target.destroy(&id).await?;
            freed.push(id.to_string());
        }
        Ok(freed)
    };
    match timeout(CLEANUP_DEADLINE, rest).await {
        Ok(Ok(freed)) => left_behind.extend(freed),
        Ok(Err::<_, TargetError>(error)) => left_behind.push(format!("cannot tell: {error}")),
        Err(_) => left_behind.push(format!("cannot tell: no answer within {CLEANUP_DEADLINE:?}")),
    }
    left_behind
}

fn select(only: &[String]) -> Result<Vec<&'static Check>, SelectError> {
    let all = checks::all();
    if only.is_empty() {
        return Ok(all.iter().collect());
    }
    let begins = |check: &Check, wanted: &str| check.id.to_ascii_lowercase().starts_with(&wanted.to_ascii_lowercase());
    for wanted in only {
        if wanted.is_empty() || !all.iter().any(|check| begins(check, wanted)) {
            return Err(SelectError::Unknown(wanted.clone()));
        }
    }
    Ok(all.iter().filter(|check| only.iter().any(|wanted| begins(check, wanted))).collect())
}

async fn run_check(
    check: &'static Check,
    target: &Arc<dyn Target>,
    options: &RunOptions,
    shared: &Arc<SharedSandbox>,
) -> CheckReport {
    let mut report = CheckReport {
        id: check.id.to_owned(),
        title: check.title.to_owned(),
        status: Status::Pass,
        reason: None,
        duration_ms: 0,
        evidence: Vec::new(),
    };
    if let Some(lack) = check.needs.iter().find_map(|need| target.lacks(*need)) {
        report.status = Status::Skip;
        report.reason = Some(lack);
        return report;
    }
    let start = Instant::now();
    let context = Arc::new(Context::new(target.clone(), options.image.clone(), check.id, shared.clone()));
    if let Err(failure) = outcome(check, options, context.clone()).await {
        mark_failed(&mut report, &failure);
        // What a failed check left in the shared sandbox must not fail others.
        if let Err(failure) = bounded_cleanup(shared.replace(&**target)).await {
            mark_failed(&mut report, &failure);
        }
    }
    if let Err(failure) = bounded_cleanup(context.free()).await {
        mark_failed(&mut report, &failure);
    }
    report.evidence = context.take_evidence();
    report.duration_ms = millis(start);
    report
}

/// The check in a task of its own, so that a panic is its failure alone.
async fn outcome(check: &'static Check, options: &RunOptions, context: Arc<Context>) -> Result<(), Failure> {
    let deadline = options.deadline_max.map_or(check.deadline, |most| most.min(check.deadline));
    let mut task = tokio::spawn(async move { (check.body)(&context).await });
    let why = tokio::select! {
        biased;
        () = options.stop.cancelled() => "interrupted".to_owned(),
        ended = &mut task => return ended.unwrap_or_else(|panic| Err(Failure(format!("the check itself broke: {panic}")))),
        () = tokio::time::sleep(deadline) => format!("not finished after {deadline:?}"),
    };
    task.abort();
    // Wait for the end, so that nothing is made while cleaning up.
    let _ = task.await;
    Err(Failure(why))
}

async fn bounded_cleanup(cleanup: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let late = |_| Failure(format!("cleaning up was not finished after {CLEANUP_DEADLINE:?}"));
    timeout(CLEANUP_DEADLINE, cleanup).await.map_err(late)?
}

fn mark_failed(report: &mut CheckReport, failure: &Failure) {
    report.status = Status::Fail;
    report.reason = Some(match report.reason.take() {
        Some(earlier) => format!("{earlier}; also: {failure}"),
        None => failure.to_string(),
    });
}

fn millis(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use async_trait::async_trait;
    use stacyvm_api::SandboxId;
    use stacyvm_sandbox::Session;

    use super::*;
    use crate::{Ability, Checked, Order, SandboxView};

    #[test]
    fn ids_are_unique_and_in_order() {
        let ids: Vec<&str> = checks::all().iter().map(|check| check.id).collect();
        assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "an id is used twice");
        assert!(ids.is_sorted(), "{ids:?}");
    }

    #[test]
    fn a_selection_takes_ids_and_beginnings_and_names_what_is_unknown() {
        let ids = |only: &[&str]| -> Result<Vec<&str>, SelectError> {
            let only: Vec<String> = only.iter().map(|text| (*text).to_owned()).collect();
            Ok(select(&only)?.iter().map(|check| check.id).collect())
        };
        assert_eq!(ids(&["C07"]).unwrap(), ["C07"]);
        assert_eq!(ids(&["c01", "C18"]).unwrap(), ["C01", "C18"]);
        assert_eq!(ids(&["C"]).unwrap().len(), 18);
        assert_eq!(ids(&["C07", "Q9"]), Err(SelectError::Unknown("Q9".to_owned())));
        assert_eq!(ids(&[""]), Err(SelectError::Unknown(String::new())));
        assert_eq!(ids(&[]).unwrap().len(), checks::all().len());
    }

    /// Counts sandboxes; sessions into them are not needed here.
    #[derive(Default)]
    struct Ledger {
        existing: Mutex<BTreeSet<SandboxId>>,
        /// Destroy says yes and does nothing.
        clings: bool,
    }

    #[async_trait]
    impl Target for Ledger {
        fn label(&self) -> String {
            "ledger".to_owned()
        }

        fn lacks(&self, ability: Ability) -> Option<String> {
            (ability == Ability::Watch).then(|| "no watch here".to_owned())
        }

        async fn create(&self, _order: &Order) -> Result<SandboxId, TargetError> {
            let id = SandboxId::random();
            self.existing.lock().unwrap().insert(id.clone());
            Ok(id)
        }

        async fn session(&self, _id: &SandboxId) -> Result<Arc<dyn Session>, TargetError> {
            Err(TargetError::Unsupported("sessions"))
        }

        async fn view(&self, id: &SandboxId) -> Result<SandboxView, TargetError> {
            Err(TargetError::NotFound(id.clone()))
        }

        async fn destroy(&self, id: &SandboxId) -> Result<(), TargetError> {
            if !self.clings {
                self.existing.lock().unwrap().remove(id);
            }
            Ok(())
        }

        async fn list(&self) -> Result<Vec<SandboxId>, TargetError> {
            Ok(self.existing.lock().unwrap().iter().cloned().collect())
        }

        async fn usage(&self, _id: &SandboxId) -> Result<(u64, u64), TargetError> {
            Err(TargetError::Unsupported("usage"))
        }
    }

    async fn makes_then_fails(cx: &Context) -> Checked {
        // The session fails after the sandbox exists, which is the hard case.
        cx.fresh().await.map(drop)
    }

    async fn makes_then_panics(cx: &Context) -> Checked {
        let _ = cx.fresh().await;
        panic!("as a check never should")
    }

    async fn makes_then_hangs(cx: &Context) -> Checked {
        let _ = cx.fresh().await;
        std::future::pending().await
    }

    const fn check(id: &'static str, needs: &'static [Ability], body: crate::check::Body) -> Check {
        Check { id, title: "a check", needs, deadline: Duration::from_millis(200), body }
    }

    static PASSES: Check = check("T1", &[], |_| Box::pin(std::future::ready(Ok(()))));
    static FAILS: Check = check("T2", &[], |cx| Box::pin(makes_then_fails(cx)));
    static PANICS: Check = check("T3", &[], |cx| Box::pin(makes_then_panics(cx)));
    static HANGS: Check = check("T4", &[], |cx| Box::pin(makes_then_hangs(cx)));
    static SKIPPED: Check = check("T5", &[Ability::Watch], |_| Box::pin(std::future::ready(Ok(()))));

    #[tokio::test]
    async fn whatever_a_check_does_the_next_one_runs_and_nothing_is_left() {
        let ledger = Arc::new(Ledger::default());
        let all = [&FAILS, &PANICS, &HANGS, &SKIPPED, &PASSES];
        let report = run_checks(ledger.clone(), &all, &RunOptions::default(), &()).await;
        let seen: Vec<_> = report.checks.iter().map(|check| (check.status, check.reason.as_deref())).collect();
        assert_eq!(seen[0], (Status::Fail, Some("sessions is not supported")));
        assert_eq!(seen[1].0, Status::Fail);
        assert!(seen[1].1.unwrap().contains("the check itself broke"), "{seen:?}");
        assert_eq!(seen[2], (Status::Fail, Some("not finished after 200ms")));
        assert_eq!(seen[3], (Status::Skip, Some("no watch here")));
        assert_eq!(seen[4], (Status::Pass, None));
        assert_eq!(ledger.list().await.unwrap(), []);
        assert_eq!(report.left_behind, Vec::<String>::new());
        assert!(!report.is_success());
    }

    /// Says stop in the middle of the second check.
    struct Impatient(CancellationToken);

    impl Observer for Impatient {
        fn started(&self, index: usize, _total: usize, _check: &Check) {
            let stop = self.0.clone();
            if index == 2 {
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    stop.cancel();
                });
            }
        }
    }

    #[tokio::test]
    async fn a_run_that_is_interrupted_frees_what_it_made_and_is_no_success() {
        static ENDLESS: Check =
            Check { deadline: Duration::from_hours(1), ..check("T6", &[], |cx| Box::pin(makes_then_hangs(cx))) };
        let (ledger, stop) = (Arc::new(Ledger::default()), CancellationToken::new());
        let all = [&PASSES, &ENDLESS, &SKIPPED, &PASSES];
        let options = RunOptions { stop: stop.clone(), ..RunOptions::default() };
        let report = run_checks(ledger.clone(), &all, &options, &Impatient(stop)).await;
        let seen: Vec<_> = report.checks.iter().map(|check| (check.id.as_str(), check.reason.as_deref())).collect();
        assert_eq!(seen, [("T1", None), ("T6", Some("interrupted"))]);
        assert_eq!((ledger.list().await.unwrap(), report.is_success()), (vec![], false));
        // Said before the first check: nothing is made.
        let report = run_checks(ledger.clone(), &all, &options, &()).await;
        assert_eq!((report.checks.len(), report.is_success()), (1, false));
    }

    #[tokio::test]
    async fn what_cannot_be_destroyed_is_named() {
        let ledger = Arc::new(Ledger { clings: true, ..Ledger::default() });
        let report = run_checks(ledger.clone(), &[&FAILS], &RunOptions::default(), &()).await;
        let existing: Vec<String> = ledger.list().await.unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(report.left_behind, existing);
        assert_eq!(existing.len(), 1);
    }
}
