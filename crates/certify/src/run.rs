//! One certification, from the host to the last row.

use std::time::{Duration, Instant};

use stacyvm_api::{SandboxId, Timestamp};
use stacyvm_conformance::Report as SuiteReport;
use tokio_util::sync::CancellationToken;

use crate::report::sha256;
use crate::rows::{self, Looked, Seen};
use crate::server::Subject;
use crate::{
    Attachment, CertifyOptions, HostCheck, HostFacts, Measured, Outcome, Report, Row, Signoff, Status, Target, rows_of,
};

/// Longest time for one row; the contract suite has a limit for each check.
const ROW_LIMIT: Duration = Duration::from_mins(10);
const SUITE_LIMIT: Duration = Duration::from_hours(1);

/// The rows of `stacyvm smoke`, the contract suite, and what is left at the end.
pub(crate) const SMOKE: &str = "B6";
pub(crate) const SUITE: &str = "B7";
pub(crate) const LOOK_BACK: &str = "B8";

pub(crate) const INTERRUPTED: &str = "the run was interrupted";

/// What to do where nothing better is known.
const LOOK: &str = "look at the server's log beside the report, and run `stacyvm doctor` on this host";

/// Is told of every row as it is done.
pub trait Observer: Send + Sync {
    fn finished(&self, _outcome: &Outcome) {}
}

/// Nobody is watching.
impl Observer for () {}

/// A report, and the files that go beside it.
#[derive(Debug)]
pub struct Certified {
    pub report: Report,
    pub files: Vec<(String, Vec<u8>)>,
}

/// Looks at every row of a target. What cannot be looked at is part of the
/// report; nothing is an error. Told to `stop`, it looks at no further row, and
/// ends what it has made.
pub async fn certify(
    target: Target,
    options: &CertifyOptions,
    host_checks: &[HostCheck],
    observer: &dyn Observer,
    stop: &CancellationToken,
) -> Certified {
    let mut run = Run::new(target, options, observer, stop);
    rows::host::look(&mut run, host_checks).await;
    let provider = target.provider();
    if options.given.is_none() && !options.known_providers.iter().any(|known| known == provider) {
        run.close_rest(
            &format!("not available: this version of StacyVM has no provider {provider}"),
            "use a version that has it; only the host was looked at",
        );
        return run.finish("none: there is no such provider");
    }
    let mut subject = match Subject::open(target, options, stop).await {
        Ok(subject) => subject,
        Err(why) => {
            run.note("B0", Seen::fail(why, LOOK));
            run.close_rest("not reached: there is no server to ask", "see B0");
            return run.finish("none: it did not start");
        }
    };
    let url = subject.url().to_owned();
    run.note("B0", Seen::pass(format!("{url} answers")));
    rows::baseline::look(&mut run, &subject).await;
    rows::sandbox::look(&mut run, &mut subject).await;
    rows::identity::look(&mut run, &subject).await;
    rows::limits::look(&mut run, &subject).await;
    rows::faults::look(&mut run, &subject).await;
    rows::preview::look(&mut run, &subject).await;
    rows::measure::look(&mut run, &mut subject).await;
    rows::restart::look(&mut run, &mut subject).await;
    rows::baseline::look_back(&mut run, subject).await;
    run.close_rest("not available: nothing looks at this row yet", "look at it by hand, and say so in the sign-off");
    run.finish(&url)
}

/// What is known so far.
pub(crate) struct Run<'a> {
    pub(crate) target: Target,
    pub(crate) options: &'a CertifyOptions,
    pub(crate) stop: &'a CancellationToken,
    /// Marks the sandboxes of this run.
    pub(crate) mark: String,
    pub(crate) suite: Option<SuiteReport>,
    pub(crate) measured: Option<Measured>,
    observer: &'a dyn Observer,
    rows: Vec<Row>,
    outcomes: Vec<Outcome>,
    files: Vec<(String, Vec<u8>)>,
}

impl<'a> Run<'a> {
    fn new(
        target: Target,
        options: &'a CertifyOptions,
        observer: &'a dyn Observer,
        stop: &'a CancellationToken,
    ) -> Self {
        Self {
            target,
            options,
            stop,
            mark: SandboxId::random().to_string(),
            suite: None,
            measured: None,
            observer,
            rows: rows_of(target),
            outcomes: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Whether the target has this row at all.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.rows.iter().any(|row| row.id == id)
    }

    /// The id of a row that every runtime has under its own prefix.
    pub(crate) fn own(&self, number: &str) -> String {
        format!("{}-{number}", self.target.prefix())
    }

    /// Looks at a row; whether it went well. Does nothing where the target does
    /// not have the row.
    pub(crate) async fn look(&mut self, id: &str, work: impl Future<Output = Looked>) -> bool {
        if !self.has(id) {
            return false;
        }
        if self.stop.is_cancelled() && id != LOOK_BACK {
            self.note(id, Seen::unavailable(INTERRUPTED, "run it again"));
            return false;
        }
        let limit = if id == SUITE { SUITE_LIMIT } else { ROW_LIMIT };
        let started = Instant::now();
        let seen = tokio::select! {
            // Those free what they have made, and then end by themselves.
            () = self.stop.cancelled(), if !matches!(id, SMOKE | SUITE | LOOK_BACK) => {
                Seen::unavailable(INTERRUPTED, "run it again")
            }
            looked = tokio::time::timeout(limit, work) => match looked {
                Ok(Ok(seen)) => seen,
                Ok(Err(trouble)) => trouble.into_seen(LOOK),
                Err(_) => Seen::fail(format!("not done after {limit:?}"), LOOK),
            },
        };
        let well = matches!(seen.status, Status::Pass | Status::Warn);
        self.record(id, seen, started.elapsed());
        well
    }

    /// [`Self::look`] where nothing has to be waited for.
    pub(crate) fn settle(&mut self, id: &str, work: impl FnOnce() -> Looked) {
        if self.has(id) {
            let seen = work().unwrap_or_else(|trouble| trouble.into_seen(LOOK));
            self.note(id, seen);
        }
    }

    /// Writes a row down that took no time.
    pub(crate) fn note(&mut self, id: &str, seen: Seen) {
        self.record(id, seen, Duration::ZERO);
    }

    fn record(&mut self, id: &str, seen: Seen, took: Duration) {
        let Some(row) = self.rows.iter().find(|row| row.id == id) else { return };
        if self.outcomes.iter().any(|outcome| outcome.name == id) {
            return;
        }
        let outcome = Outcome {
            status: seen.status,
            name: row.id.to_owned(),
            title: row.title.to_owned(),
            message: seen.message,
            fix: seen.fix,
            evidence: seen.evidence,
            duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        };
        self.observer.finished(&outcome);
        self.outcomes.push(outcome);
    }

    /// Every row that was not looked at is unavailable, for this reason.
    pub(crate) fn close_rest(&mut self, why: &str, fix: &str) {
        for row in self.rows.clone() {
            self.note(row.id, Seen::unavailable(why, fix));
        }
    }

    /// The rows of one part that were not looked at.
    pub(crate) fn close(&mut self, ids: &[String], why: &str, fix: &str) {
        for id in ids {
            self.note(id, Seen::unavailable(why, fix));
        }
    }

    pub(crate) fn status_of(&self, id: &str) -> Option<Status> {
        self.outcomes.iter().find(|outcome| outcome.name == id).map(|outcome| outcome.status)
    }

    /// A file beside the report. Written again under the same name it grows.
    pub(crate) fn attach(&mut self, name: &str, text: &str) {
        let name = format!("{}-{name}", self.options.name);
        match self.files.iter_mut().find(|(known, _)| *known == name) {
            Some((_, bytes)) => bytes.extend_from_slice(text.as_bytes()),
            None => self.files.push((name, text.as_bytes().to_vec())),
        }
    }

    fn finish(mut self, url: &str) -> Certified {
        let place = |outcome: &Outcome| self.rows.iter().position(|row| row.id == outcome.name);
        self.outcomes.sort_by_key(place);
        let host = HostFacts::of_this();
        let (status, summary) = Report::overall(&self.outcomes);
        let signoff = self.signoff(&host, url);
        let attachments = self.files.iter();
        let attachments = attachments.map(|(name, bytes)| Attachment { name: name.clone(), sha256: sha256(bytes) });
        let report = Report {
            generated_at: Timestamp::now(),
            runtime: self.target.to_string(),
            host,
            stacyvm_version: self.options.version.clone(),
            stacyvm_commit: self.options.commit.clone(),
            stacyvm_url: url.to_owned(),
            config_file: self.config_file(),
            image: self.options.image.clone(),
            status,
            summary,
            attachments: attachments.collect(),
            checks: self.outcomes,
            measured: self.measured,
            caveats: self.target.caveat().map(str::to_owned).into_iter().collect(),
            signoff,
            report_hash: String::new(),
        };
        Certified { report, files: self.files }
    }

    fn config_file(&self) -> String {
        match (&self.options.config, &self.options.given) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(_)) => "of the server that was asked".to_owned(),
            (None, None) => "none (defaults)".to_owned(),
        }
    }

    fn signoff(&self, host: &HostFacts, url: &str) -> Signoff {
        let word = |ids: &[String]| {
            let worst = ids.iter().filter_map(|id| self.status_of(id)).max();
            worst.map_or("not part of this target", Status::as_str).to_owned()
        };
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        let restarts = ["R13a", "R13b", "R13c", "R13d", "R5"].map(|number| self.own(number));
        let restarts = if self.target == Target::Firecracker { &restarts[..] } else { &restarts[..4] };
        Signoff {
            runtime: self.target.to_string(),
            host_os_kernel: format!("{} ({})", host.os, host.distribution),
            stacyvm_version: format!("{} ({})", self.options.version, self.options.commit),
            config_file: self.config_file(),
            provider_health_endpoint: if url.starts_with("http") {
                format!("{url}/api/v1/providers/{}", self.target.provider())
            } else {
                url.to_owned()
            },
            smoke_script_result: word(&ids(&["B2", "B5", "B6"])),
            lifecycle_conformance: self.suite_part(&["C01", "C02", "C03", "C04", "C05", "C06", "S6"]),
            exec_conformance: self.suite_part(&["C07", "C08", "C09", "S2", "S3"]),
            file_conformance: self.suite_part(&["C12", "C13", "C14", "C15", "C16", "C17", "C18", "S0", "S1"]),
            streaming_conformance: self.suite_part(&["C10", "C11", "S4"]),
            live_preview: word(&[self.own("R14")]),
            restart_reconciliation: word(restarts),
            ..Signoff::default()
        }
    }

    /// The contract suite's checks with these beginnings of ids.
    fn suite_part(&self, beginnings: &[&str]) -> String {
        use stacyvm_conformance::Status as Suite;
        let Some(suite) = &self.suite else { return "not run".to_owned() };
        let part: Vec<_> =
            suite.checks.iter().filter(|check| beginnings.iter().any(|it| check.id.starts_with(it))).collect();
        let count = |status| part.iter().filter(|check| check.status == status).count();
        let (passed, failed, skipped) = (count(Suite::Pass), count(Suite::Fail), count(Suite::Skip));
        let word = if failed == 0 && passed > 0 { "PASS" } else { "FAIL" };
        format!("{word} ({passed} passed, {failed} failed, {skipped} skipped)")
    }
}
