//! `stacyvm certify`: evidence that a runtime on this host is fit for
//! production. What is looked at lives in the crate `certify`; here it learns
//! what this program knows, and its report gets to where it is wanted.

mod settings;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use stacyvm_api::Duration;
use stacyvm_certify::{
    Certified, CertifyOptions, Format, GivenServer, HostCheck, Observer, Outcome, Report, Status, Target,
};

use crate::check::{Check, Status as Found};
use crate::commands::serve::KNOWN_PROVIDERS;
use crate::commands::version::BUILD;
use crate::commands::{Context, doctor, stop_when_interrupted};
use crate::config::{self, Environment};
use crate::failure::Advice;
use crate::output::{Output, print};

/// Certify a runtime on this host, with evidence
///
/// Looks at the host, starts a server of its own with the runtime (or asks the
/// one at --stacyvm-url) and goes through every row of the matrix one by one:
/// provider health, smoke, the contract suite, files, preview, identity of the
/// runtime, restart, time and memory. A row that nobody could look at is
/// UNAVAILABLE, and a report with one is no pass.
///
/// With --output the contract suite's report, what smoke said and the server's
/// log are written beside the report. Its last three fields are yours to fill in.
/// After Ctrl-C what the run has made is destroyed, and no report is written.
///
/// Exit status: 0 when everything passed, 1 otherwise, 2 for wrong arguments.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "Examples:
  stacyvm certify oci
  stacyvm certify oci --image-archive image.tar --output certification/oci.md
  stacyvm certify gvisor --slo-spawn-p95 2s --slo-mem-overhead 64 --image python:3.12-alpine
  stacyvm certify docker --stacyvm-url https://vm.example.com --stacyvm-api-key \"$KEY\"
  stacyvm certify verify certification/oci.md")]
pub(crate) struct CertifyArgs {
    #[command(subcommand)]
    command: Option<CertifyCommand>,
    /// oci, docker, gvisor, kata, firecracker, qemu, proot, e2b, custom or all
    #[arg(required = true, value_parser = targets)]
    target: Option<Targets>,
    /// Form of the report: text, json or markdown; of --output's ending unless given
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// File for the report, and place for what goes beside it
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Ask this server instead of starting one
    #[arg(long, value_name = "URL")]
    stacyvm_url: Option<String>,
    /// That server's key, instead of --api-key
    #[arg(long, value_name = "KEY", requires = "stacyvm_url")]
    stacyvm_api_key: Option<String>,
    /// Program whose server is started, instead of this one
    #[arg(long, value_name = "PATH", value_parser = existing)]
    stacyvm_bin: Option<PathBuf>,
    /// Configuration file of the server
    #[arg(long, value_name = "FILE", value_parser = existing)]
    config: Option<PathBuf>,
    /// Image to make sandboxes from; alpine:latest unless given, and for proot its own root, `rootfs`
    #[arg(long)]
    image: Option<String>,
    /// Archive to import that image from, where no registry can be reached
    #[arg(long, value_name = "FILE", conflicts_with = "stacyvm_url", value_parser = existing)]
    image_archive: Option<PathBuf>,
    /// Sandboxes to start in order to measure: 1 to 1000
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
    /// Longest time that 95 of 100 sandboxes may take to start
    #[arg(long, value_name = "TIME")]
    slo_spawn_p95: Option<Duration>,
    /// Most host memory that an idle sandbox may take
    #[arg(long, value_name = "MIB")]
    slo_mem_overhead: Option<u64>,
    /// What `make test` wrote: target/test-result.json
    #[arg(long, value_name = "FILE", value_parser = existing)]
    test_result: Option<PathBuf>,
    /// Command that restarts the server at --stacyvm-url
    #[arg(long, value_name = "COMMAND", requires = "stacyvm_url")]
    restart_command: Option<String>,
}

#[derive(Debug, Subcommand)]
enum CertifyCommand {
    Verify(verify::VerifyArgs),
}

/// A path that is there: a run takes long, and its report is no place for a
/// slip of the fingers.
fn existing(text: &str) -> Result<PathBuf, String> {
    match std::fs::metadata(text) {
        Ok(_) => Ok(PathBuf::from(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(format!("there is no file {text}")),
        Err(error) => Err(error.to_string()),
    }
}

/// One target, or all of them.
#[derive(Debug, Clone)]
struct Targets(Vec<Target>);

fn targets(text: &str) -> Result<Targets, String> {
    if text == "all" {
        return Ok(Targets(Target::ALL.to_vec()));
    }
    text.parse().map(|target| Targets(vec![target]))
}

pub(crate) async fn run(context: &Context, args: CertifyArgs) -> anyhow::Result<ExitCode> {
    if let Some(CertifyCommand::Verify(args)) = &args.command {
        return verify::run(context, args);
    }
    let Targets(targets) = args.target.clone().context("name a target")?;
    let format = args.form(context.output);
    let environment = Environment::of_this_process();
    let stop = stop_when_interrupted();
    let mut succeeded = true;
    let mut printed = Vec::new();
    for target in targets.iter().copied() {
        let path = args.output.as_deref();
        let path = path.map(|path| if targets.len() > 1 { of_target(path, target) } else { path.to_owned() });
        let options = options(context, &args, target, path.as_deref(), &environment)?;
        let loaded = config::load(args.config.as_deref(), &environment);
        let checks = doctor::runtime_checks(target.name(), &loaded, &environment).await;
        let checks: Vec<HostCheck> = checks.into_iter().map(host_check).collect();
        let certified = stacyvm_certify::certify(target, &options, &checks, &Watch(context.output), &stop).await;
        if stop.is_cancelled() {
            let hint = "run it again; where B8 names something that is left, remove that first";
            return Err(Advice::new("the run was interrupted, and no report is written", hint).into());
        }
        succeeded &= certified.report.is_success();
        context.output.note(&format!("{}\n", certified.report.summary_line()));
        match path {
            Some(path) => {
                write(&path, &certified, format)?;
                let said = format!("certification report written: {}", path.display());
                if context.output.is_json() { context.output.note(&said) } else { print(&format!("{said}\n"))? }
            }
            None => printed.push(certified.report),
        }
    }
    if args.output.is_none() {
        print(&page(&printed, format))?;
    }
    Ok(if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl CertifyArgs {
    /// As asked for, else as the name of the file says, else text.
    fn form(&self, output: Output) -> Format {
        let of_file = || match self.output.as_ref()?.extension()?.to_str()? {
            "md" | "markdown" => Some(Format::Markdown),
            "json" => Some(Format::Json),
            "txt" => Some(Format::Text),
            _ => None,
        };
        let otherwise = if output.is_json() { Format::Json } else { Format::Text };
        self.format.or_else(of_file).unwrap_or(otherwise)
    }
}

/// One report as it is, several as a list.
fn page(reports: &[Report], format: Format) -> String {
    let rendered: Vec<String> = reports.iter().map(|report| report.render(format)).collect();
    match (format, &rendered[..]) {
        (Format::Json, [one]) => one.clone(),
        (Format::Json, all) => format!("[\n{}]\n", all.join(",\n")),
        (Format::Text | Format::Markdown, all) => all.join("\n"),
    }
}

fn options(
    context: &Context,
    args: &CertifyArgs,
    target: Target,
    output: Option<&Path>,
    environment: &Environment,
) -> anyhow::Result<CertifyOptions> {
    let absolute = |path: &PathBuf| std::path::absolute(path).with_context(|| format!("cannot use {}", path.display()));
    // It is started in another directory.
    let program = match &args.stacyvm_bin {
        Some(path) => absolute(path)?,
        None => std::env::current_exe().context("this program's own file")?,
    };
    let loaded = config::load(args.config.as_deref(), environment)?;
    let api_key = args.stacyvm_api_key.clone().or_else(|| context.api_key.clone());
    Ok(CertifyOptions {
        name: name_of(output, target),
        program,
        version: BUILD.version.to_owned(),
        commit: BUILD.commit.to_owned(),
        given: args.stacyvm_url.clone().map(|url| GivenServer { url, api_key }),
        config: loaded.file.as_ref().map(absolute).transpose()?,
        image: args.image.clone().unwrap_or_else(|| target.usual_image().to_owned()),
        image_archive: args.image_archive.as_ref().map(absolute).transpose()?,
        samples: args.samples,
        slo_spawn_p95: args.slo_spawn_p95.map(Duration::get),
        slo_memory_overhead_mib: args.slo_mem_overhead,
        test_result: args.test_result.clone(),
        restart_command: args.restart_command.clone(),
        settings: settings::of_runtimes(target, &loaded, environment),
        known_providers: KNOWN_PROVIDERS.iter().map(|name| (*name).to_owned()).collect(),
    })
}

fn host_check(check: Check) -> HostCheck {
    let status = match check.status {
        Found::Pass => Status::Pass,
        Found::Skip => Status::Unavailable,
        Found::Warn => Status::Warn,
        Found::Fail => Status::Fail,
    };
    HostCheck { name: check.name, status, message: check.message, fix: check.fix }
}

/// What files beside a report begin with, its whole name: those of another
/// report in the same directory, `oci.json` beside `oci.md`, stay what they are.
fn name_of(output: Option<&Path>, target: Target) -> String {
    let name = output.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| target.to_string())
}

/// `certification.md` of docker is `docker-certification.md`.
fn of_target(path: &Path, target: Target) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{target}-{name}"))
}

/// The report, and beside it what it refers to.
fn write(path: &Path, certified: &Certified, format: Format) -> anyhow::Result<()> {
    let path = std::path::absolute(path).with_context(|| format!("cannot use {}", path.display()))?;
    let directory = path.parent().with_context(|| format!("{} is no file name", path.display()))?;
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let put = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    for (name, bytes) in &certified.files {
        put(&directory.join(name), bytes)?;
    }
    put(&path, certified.report.render(format).as_bytes())
}

/// One line for each row as it is done, beside the results.
struct Watch(Output);

impl Observer for Watch {
    fn finished(&self, outcome: &Outcome) {
        self.0.note(outcome.text().trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_every_target_and_nonsense_names_them() {
        assert_eq!(targets("all").unwrap().0, Target::ALL);
        assert_eq!(targets("kata").unwrap().0, [Target::Kata]);
        assert!(targets("vmware").unwrap_err().contains("firecracker"));
    }

    #[test]
    fn files_beside_a_report_have_its_name() {
        let name = |path: &str| name_of(Some(Path::new(path)), Target::Oci);
        assert_eq!((name("a/oci.md"), name("a/oci.json")), ("oci.md".to_owned(), "oci.json".to_owned()));
        assert_eq!(name_of(None, Target::Oci), "oci");
    }

    #[test]
    fn reports_of_several_targets_have_names_of_their_own() {
        assert_eq!(of_target(Path::new("a/certification.md"), Target::Docker), Path::new("a/docker-certification.md"));
    }
}
