//! PRoot itself: finding it, and what it is told.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::error::ProotError;
use super::launcher::protocol::ReachPlan;
use super::options::ProotOptions;
use super::{loader, rootfs, state};

/// How long it may take to say what it is.
const VERSION_LIMIT: Duration = Duration::from_secs(5);

/// The program, by its path.
pub(super) fn find(options: &ProotOptions) -> Result<PathBuf, ProotError> {
    let is_program = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let name = &options.program;
    let candidates = if name.components().count() > 1 {
        vec![name.clone()]
    } else {
        options.search_path.split(':').filter(|dir| !dir.is_empty()).map(|dir| Path::new(dir).join(name)).collect()
    };
    candidates.into_iter().find(is_program).ok_or_else(|| ProotError::NoProgram(name.clone()))
}

/// Its own words about its version.
pub(super) async fn version(program: &Path) -> Option<String> {
    let mut command = tokio::process::Command::new(program);
    command.arg("--version").env_clear().stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(VERSION_LIMIT, command.output()).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_number = |word: &&str| word.starts_with(|first: char| first.is_ascii_digit()) && word.contains('.');
    let word = text.split_whitespace().map(|word| word.trim_matches(':').trim_start_matches('v')).find(is_number)?;
    Some(word.to_owned())
}

/// Starts the agent in a sandbox's root. `-0` has programs believe that they
/// are root, which is what images expect.
pub(super) fn arguments(sandbox: &Path) -> Vec<String> {
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let mut arguments = vec!["-0".to_owned(), "-r".to_owned(), text(state::root_dir(sandbox))];
    let agent = format!("{}:/{}", text(state::agent_file(sandbox)), rootfs::AGENT);
    let binds = rootfs::read_binds().chain(rootfs::device_binds()).map(text);
    for bind in binds.chain([agent]) {
        arguments.extend(["-b".to_owned(), bind]);
    }
    arguments.extend(["-w", "/"].map(str::to_owned));
    arguments.extend([format!("/{}", rootfs::AGENT), "serve".to_owned(), "--traced".to_owned()]);
    arguments
}

/// What it and the programs in it may touch of this host. Nobody writes to
/// `/proc`: the memory of PRoot itself is there.
pub(super) fn reach(program: &Path, sandbox: &Path) -> ReachPlan {
    ReachPlan {
        read: [program.to_owned(), state::agent_file(sandbox)]
            .into_iter()
            .chain(loader::of(sandbox).map(|(_, path)| path))
            .chain(rootfs::read_binds())
            .collect(),
        write: rootfs::device_binds().chain([state::root_dir(sandbox), state::temporary_dir(sandbox)]).collect(),
    }
}

/// Nothing of the server's: where its own files are, and a label for people who
/// look at the process table.
pub(super) fn environment(sandbox: &Path, label: String) -> BTreeMap<String, String> {
    let temporary = state::temporary_dir(sandbox).to_string_lossy().into_owned();
    let loaders = loader::of(sandbox).map(|(name, path)| (name, path.to_string_lossy().into_owned()));
    let own = [("PROOT_TMP_DIR", temporary), ("STACYVM_SANDBOX", label)];
    own.into_iter().chain(loaders).map(|(name, value)| (name.to_owned(), value)).collect()
}
