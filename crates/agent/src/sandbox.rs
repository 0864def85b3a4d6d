//! What every part of the agent shares: the boot configuration, as it is now.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use stacyvm_envd::{BootConfig, Role};
use tokio::sync::watch;

use crate::Failure;
use crate::boot::Tracer;
use crate::files::watch::Watchers;
use crate::process::Processes;
use crate::user::{self, Identity};

pub(crate) struct Sandbox {
    pub generation: u32,
    pub role: Role,
    pub shares_host_network: bool,
    pub tracer: Tracer,
    pub processes: Arc<Processes>,
    pub watchers: Watchers,
    /// Milliseconds of Unix time; zero is never.
    pub expires_at_unix_ms: watch::Sender<i64>,
    /// What commands get back if the agent raised its own limit.
    pub open_files: Option<libc::rlimit>,
    /// What commands may have at most.
    pub capabilities: Option<u64>,
    settings: Mutex<Settings>,
    /// Opened once, so that an image without `/dev` works too.
    null: Option<Arc<OwnedFd>>,
}

struct Settings {
    token: String,
    env: BTreeMap<String, String>,
    default_user: Option<String>,
    workdir: String,
}

impl Sandbox {
    pub(crate) fn new(config: BootConfig, open_files: Option<libc::rlimit>, tracer: Tracer) -> Self {
        Self {
            generation: config.generation,
            role: config.role,
            shares_host_network: config.shares_host_network,
            tracer,
            processes: Arc::default(),
            watchers: Watchers::default(),
            expires_at_unix_ms: watch::Sender::new(config.expires_at_unix_ms),
            open_files,
            capabilities: config.capabilities,
            settings: Mutex::new(Settings {
                token: config.token,
                env: config.env,
                default_user: config.default_user,
                workdir: config.workdir,
            }),
            null: rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok().map(Arc::new),
        }
    }

    pub(crate) fn is_init(&self) -> bool {
        self.role == Role::Init
    }

    /// Environment that every command starts from.
    pub(crate) fn env(&self) -> BTreeMap<String, String> {
        self.settings().env.clone()
    }

    /// Where commands start when no directory is named.
    pub(crate) fn workdir(&self) -> String {
        self.settings().workdir.clone()
    }

    /// Adds to the environment and replaces what is given.
    pub(crate) fn configure(&self, env: BTreeMap<String, String>, user: Option<String>, workdir: Option<String>) {
        let mut settings = self.settings();
        settings.env.extend(env);
        settings.default_user = user.or(settings.default_user.take());
        settings.workdir = workdir.unwrap_or(std::mem::take(&mut settings.workdir));
    }

    /// After a fork or a restore: the old one stops working.
    pub(crate) fn set_token(&self, token: String) {
        self.settings().token = token;
    }

    /// Compared without telling by its time how much was right.
    pub(crate) fn is_token(&self, given: &[u8]) -> bool {
        let settings = self.settings();
        let token = settings.token.as_bytes();
        if given.len() != token.len() {
            return false;
        }
        let difference = given.iter().zip(token).fold(0u8, |difference, (a, b)| difference | (a ^ b));
        std::hint::black_box(difference) == 0
    }

    /// Who is meant, or the sandbox's own user when nobody is named.
    pub(crate) fn identity(&self, user: Option<&str>) -> Result<Identity, Failure> {
        let named = user.filter(|user| !user.is_empty()).map(str::to_owned);
        let default = || self.settings().default_user.clone();
        user::resolve(&named.or_else(default).unwrap_or_else(|| "root".to_owned()))
    }

    fn settings(&self) -> std::sync::MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Standard input that is at its end.
    pub(crate) fn empty_input(&self) -> Result<Arc<OwnedFd>, Errno> {
        match &self.null {
            Some(null) => Ok(Arc::clone(null)),
            None => rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map(|(read, _write)| Arc::new(read)),
        }
    }
}
