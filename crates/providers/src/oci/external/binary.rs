//! Finding the runtime's program, and refusing what cannot serve.

use crate::host::is_ordinary_user;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stacyvm_sandbox::ProviderError;
use tokio::io::AsyncReadExt;

use crate::oci::NAME;

/// Longest a program may take to say what it is.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Longest answer that is read.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Longest part of a wrong answer that is shown.
const MAX_SHOWN_CHARS: usize = 80;

/// A runtime of this host, as sandboxes remember it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::oci) struct Binary {
    pub(in crate::oci) program: PathBuf,
    /// As it calls itself.
    pub(in crate::oci) name: String,
    pub(in crate::oci) version: String,
}

/// Why a program is not taken.
#[derive(Debug, thiserror::Error)]
pub(in crate::oci) enum Refusal {
    #[error("`{0}` is neither the name of a program nor an absolute path")]
    Relative(String),
    #[error("there is no program `{0}`")]
    Missing(String),
    #[error("{} cannot be asked what it is", .0.display())]
    Mute(PathBuf, #[source] io::Error),
    #[error("{} is not an OCI runtime: asked for its version, it says `{said}`", .program.display())]
    Stranger { program: PathBuf, said: String },
    #[error(
        "{name} {version} cannot start sandboxes here: its `create` has no --preserve-fds, by which the agent inherits \
         the socket it listens on"
    )]
    NoDescriptors { name: String, version: String },
    #[error("{} cannot be reached by sandboxes: others may not pass through {}", .run_dir.display(), .blocked.display())]
    Unreachable { run_dir: PathBuf, blocked: PathBuf },
    #[error("an ordinary user's server starts sandboxes with its built-in runtime only")]
    Rootless,
}

impl Binary {
    /// Finds a program by its name in `search` (directories as in `PATH`), or by
    /// its absolute path, and asks it what it is. `run_dir` is where bundles
    /// will be made.
    pub(in crate::oci) async fn find(wanted: &str, search: &str, run_dir: &Path) -> Result<Self, Refusal> {
        if is_ordinary_user() {
            return Err(Refusal::Rootless);
        }
        let binary = Self::ask(locate(wanted, search)?).await?;
        binary.check_descriptors().await?;
        check_reachable(run_dir)?;
        Ok(binary)
    }

    /// Whether it is still what it was; for health.
    pub(in crate::oci) async fn check(&self) -> Result<Self, Refusal> {
        if !is_program(&self.program) {
            return Err(Refusal::Missing(self.program.display().to_string()));
        }
        Self::ask(self.program.clone()).await
    }

    async fn ask(program: PathBuf) -> Result<Self, Refusal> {
        let said = answer(&program, &["--version"]).await.map_err(|error| Refusal::Mute(program.clone(), error))?;
        let introduced = introduction(&said);
        let follows_specification = said.lines().any(|line| line.starts_with("spec:"));
        match introduced {
            // Not all name the specification there; those say what they support.
            Some((name, version)) if follows_specification || has_features(&program).await => {
                Ok(Self { program, name, version })
            }
            _ => {
                let said = said.lines().next().unwrap_or_default().chars().take(MAX_SHOWN_CHARS).collect();
                Err(Refusal::Stranger { program, said })
            }
        }
    }

    async fn check_descriptors(&self) -> Result<(), Refusal> {
        let help = answer(&self.program, &["create", "--help"]).await;
        let help = help.map_err(|error| Refusal::Mute(self.program.clone(), error))?;
        if help.contains("preserve-fds") {
            return Ok(());
        }
        Err(Refusal::NoDescriptors { name: self.name.clone(), version: self.version.clone() })
    }
}

impl Refusal {
    /// What to do about it.
    pub(in crate::oci) fn fix(&self) -> String {
        match self {
            Self::Relative(_) | Self::Missing(_) => {
                "install it (Debian: apt-get install crun, or runc), give its absolute path in \
                 providers.oci.runtime, or set that to builtin"
            }
            Self::NoDescriptors { name, .. } if name == "runsc" => {
                "for gVisor use the provider `docker` with Docker's runtime runsc; here set providers.oci.runtime to \
                 builtin, crun or runc"
            }
            Self::Mute(..) | Self::Stranger { .. } | Self::NoDescriptors { .. } => {
                "set providers.oci.runtime to builtin, crun or runc"
            }
            Self::Unreachable { .. } => {
                "set providers.oci.run_dir to a directory that everybody may pass through to, such as /run/stacyvm"
            }
            Self::Rootless => "run the server as root, or set providers.oci.runtime to builtin",
        }
        .to_owned()
    }
}

impl From<Refusal> for ProviderError {
    fn from(refusal: Refusal) -> Self {
        Self::Unavailable {
            provider: NAME.to_owned(),
            message: refusal.to_string(),
            hint: Some(refusal.fix()),
            cause: Some(refusal.into()),
        }
    }
}

fn locate(wanted: &str, search: &str) -> Result<PathBuf, Refusal> {
    let found = if Path::new(wanted).is_absolute() {
        Some(PathBuf::from(wanted)).filter(|path| is_program(path))
    } else if wanted.is_empty() || wanted.contains('/') {
        return Err(Refusal::Relative(wanted.to_owned()));
    } else {
        let directories = search.split(':').map(Path::new).filter(|directory| directory.is_absolute());
        directories.map(|directory| directory.join(wanted)).find(|path| is_program(path))
    };
    found.ok_or_else(|| Refusal::Missing(wanted.to_owned()))
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// `NAME version VERSION` in the first line, which all of them print.
fn introduction(said: &str) -> Option<(String, String)> {
    let mut words = said.lines().next()?.split_whitespace();
    let name = words.next()?;
    let version = words.find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let is_plain = |word: &str| word.len() <= 64 && word.bytes().all(|byte| byte.is_ascii_graphic());
    (is_plain(name) && is_plain(version)).then(|| (name.to_owned(), version.to_owned()))
}

/// The specification's own question.
async fn has_features(program: &Path) -> bool {
    let Ok(said) = answer(program, &["features"]).await else { return false };
    serde_json::from_str::<serde_json::Value>(&said).is_ok_and(|features| features["ociVersionMax"].is_string())
}

/// What a program prints, within bounds.
async fn answer(program: &Path, arguments: &[&str]) -> io::Result<String> {
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut said = Vec::new();
    let mut stdout = stdout.take(MAX_ANSWER_BYTES);
    match tokio::time::timeout(ANSWER_LIMIT, stdout.read_to_end(&mut said)).await {
        Ok(read) => drop(read?),
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    }
    // One that goes on talking is ended here.
    child.start_kill()?;
    child.wait().await?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// The bundle is mounted over `run_dir`, where the sandbox's root, a stranger to
/// the host, has to get to.
fn check_reachable(run_dir: &Path) -> Result<(), Refusal> {
    let passable = |path: &&Path| std::fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o001 != 0);
    match run_dir.ancestors().skip(1).find(|path| !passable(path)) {
        Some(blocked) => Err(Refusal::Unreachable { run_dir: run_dir.to_owned(), blocked: blocked.to_owned() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_introduce_themselves() {
        let pair = |name: &str, version: &str| Some((name.to_owned(), version.to_owned()));
        assert_eq!(introduction("runc version 1.1.5+ds1\nspec: 1.0.2-dev\n"), pair("runc", "1.1.5+ds1"));
        assert_eq!(introduction("crun version 1.8.1\ncommit: f8\n"), pair("crun", "1.8.1"));
        assert_eq!(introduction("youki version: 0.5.0\n"), pair("youki", "0.5.0"));
        assert_eq!(introduction("hello\n"), None);
        assert_eq!(introduction(""), None);
    }

    #[test]
    fn names_are_looked_up_and_other_relative_paths_refused() {
        assert_eq!(locate("sh", "relative:/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(locate("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        assert!(matches!(locate("./sh", "/bin"), Err(Refusal::Relative(_))));
        assert!(matches!(locate("", "/bin"), Err(Refusal::Relative(_))));
        assert!(matches!(locate("no-such-runtime", "/bin"), Err(Refusal::Missing(_))));
        assert!(matches!(locate("/etc/passwd", ""), Err(Refusal::Missing(_))), "it cannot be executed");
    }

    #[tokio::test]
    async fn a_program_that_never_stops_talking_is_no_runtime() {
        let refused = Binary::ask("/usr/bin/yes".into()).await;
        assert!(matches!(refused, Err(Refusal::Stranger { .. })), "{refused:?}");
    }
}
