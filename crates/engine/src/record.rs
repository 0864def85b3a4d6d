//! One sandbox in memory: its record, where it is in its life, and the way
//! inside. Memory is what requests read; the store is written behind it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stacyvm_api::{ExecId, LimitReport, Sandbox, SandboxId, SandboxState, Timestamp};
use stacyvm_sandbox::{LimitKills, Provider, Session};
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;

use crate::admission::Reservation;
use crate::exec::Command;
use crate::lifecycle::{Effect, Happening, Lifecycle, Runtime};
use crate::order::{DISK_RANGE_MIB, MEMORY_RANGE_MIB};
use crate::store::{Idempotency, PortSettings, SandboxRow};

/// The one node of a server without workers.
pub(crate) const WORKER_ID: &str = "local";

/// Shared by everything that deals with one sandbox.
pub(crate) struct Record {
    pub(crate) id: SandboxId,
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) generation: u32,
    pub(crate) tenant: Option<String>,
    pub(crate) has_setup: bool,
    pub(crate) idempotency: Option<Idempotency>,
    pub(crate) session: OnceCell<Arc<dyn Session>>,
    /// Commands whose end is not known yet.
    pub(crate) commands: Mutex<HashMap<ExecId, Arc<Command>>>,
    /// Commands that the agent may have and that are not in `commands` yet.
    starting: AtomicUsize,
    /// The inside ends: commands and streams of it, and the watch.
    pub(crate) ended: CancellationToken,
    /// Whoever makes it gives up.
    pub(crate) abort_create: CancellationToken,
    /// Times limits killed something here, as last seen.
    kills: Mutex<LimitKills>,
    /// The last reading of processor time, for a rate.
    pub(crate) cpu_reading: Mutex<Option<(Instant, u64)>>,
    /// Expiry that the agent has confirmed, in milliseconds of Unix time.
    pub(crate) agent_expires_at: AtomicU64,
    /// Its watch runs and its commands are known: at once for a sandbox of this
    /// process, after recovery for an older one.
    pub(crate) taken_in: AtomicBool,
    /// It ended because its memory was used up.
    pub(crate) ran_out_of_memory: AtomicBool,
    /// Failed attempts to free it in a row.
    pub(crate) free_failures: AtomicU32,
    /// Ports whose access somebody set.
    ports: Mutex<PortSettings>,
    state: Mutex<State>,
    /// Tells of every change of the life cycle.
    changed: watch::Sender<()>,
}

/// A command is on its way to the agent; see [`Record::starting`].
pub(crate) struct Starting<'a>(&'a AtomicUsize);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

struct State {
    lifecycle: Lifecycle,
    sandbox: Arc<Sandbox>,
    reservation: Option<Reservation>,
}

/// Where a record comes from.
pub(crate) struct NewRecord {
    pub(crate) row: SandboxRow,
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) reservation: Reservation,
}

impl Record {
    pub(crate) fn new(new: NewRecord) -> Arc<Self> {
        let SandboxRow { sandbox, generation, has_setup, idempotency, .. } = new.row;
        Arc::new(Self {
            id: sandbox.id.clone(),
            provider: new.provider,
            generation,
            tenant: sandbox.tenant_id.clone(),
            has_setup,
            idempotency,
            session: OnceCell::new(),
            commands: Mutex::default(),
            starting: AtomicUsize::new(0),
            ended: CancellationToken::new(),
            abort_create: CancellationToken::new(),
            kills: Mutex::default(),
            cpu_reading: Mutex::default(),
            agent_expires_at: AtomicU64::new(sandbox.expires_at.unix_ms().unsigned_abs()),
            taken_in: AtomicBool::new(false),
            ran_out_of_memory: AtomicBool::new(false),
            free_failures: AtomicU32::new(0),
            ports: Mutex::default(),
            state: Mutex::new(State {
                lifecycle: new.lifecycle,
                sandbox: Arc::new(sandbox),
                reservation: Some(new.reservation),
            }),
            changed: watch::Sender::new(()),
        })
    }

    /// The record as the API shows it; immutable, so that nobody sees half a
    /// change.
    pub(crate) fn sandbox(&self) -> Arc<Sandbox> {
        Arc::clone(&self.lock().sandbox)
    }

    pub(crate) fn state(&self) -> SandboxState {
        self.lock().lifecycle.state()
    }

    pub(crate) fn runtime(&self) -> Runtime {
        self.lock().lifecycle.runtime()
    }

    pub(crate) fn expires_at(&self) -> Timestamp {
        self.lock().sandbox.expires_at
    }

    /// Changes the record and hands the new version to `then`, which sees the
    /// versions in order.
    pub(crate) fn update(&self, now: Timestamp, change: impl FnOnce(&mut Sandbox), then: impl FnOnce(SandboxRow)) {
        let mut state = self.lock();
        change(Arc::make_mut(&mut state.sandbox));
        then(self.row(&state, now));
    }

    /// Takes in what happened. `publish` is called for what must be in order:
    /// the record to write and the events; the other effects are returned.
    pub(crate) fn apply(
        &self,
        happening: Happening,
        reason: Option<&str>,
        now: Timestamp,
        publish: impl Fn(Effect, SandboxRow),
    ) -> Vec<Effect> {
        let mut state = self.lock();
        let before = state.lifecycle.state();
        let effects = state.lifecycle.apply(happening);
        let after = state.lifecycle.state();
        if before != after {
            let sandbox = Arc::make_mut(&mut state.sandbox);
            sandbox.state = after;
            match after {
                SandboxState::Running | SandboxState::Paused => sandbox.reason = None,
                SandboxState::Creating
                | SandboxState::Unhealthy
                | SandboxState::Destroying
                | SandboxState::Destroyed
                | SandboxState::Error => {
                    if let Some(reason) = reason {
                        sandbox.reason = Some(reason.to_owned());
                    }
                }
            }
        }
        let (ordered, rest): (Vec<Effect>, Vec<Effect>) =
            effects.into_iter().partition(|effect| matches!(effect, Effect::Persist | Effect::Announce(_)));
        for effect in ordered {
            publish(effect, self.row(&state, now));
        }
        // Given back outside the lock: admission wakes others.
        let released = if rest.contains(&Effect::ReleaseCapacity) { state.reservation.take() } else { None };
        drop(state);
        drop(released);
        self.changed.send_replace(());
        rest
    }

    /// What the provider reported, before the record says `running`. Its own
    /// bounds replace what was asked for.
    pub(crate) fn set_limits(&self, limits: LimitReport) {
        let mut state = self.lock();
        let sandbox = Arc::make_mut(&mut state.sandbox);
        if let Some(memory) = limits.memory_mb.filter(|mib| *mib > 0 && mib <= MEMORY_RANGE_MIB.end()) {
            sandbox.memory_mb = memory;
        }
        sandbox.disk_size_mb = limits.disk_size_mb.filter(|mib| DISK_RANGE_MIB.contains(mib)).or(sandbox.disk_size_mb);
        sandbox.limits = Some(limits);
    }

    pub(crate) fn kills(&self) -> LimitKills {
        *self.kills.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readings may come out of order; counters only grow.
    pub(crate) fn saw_kills(&self, seen: LimitKills) {
        let mut kills = self.kills.lock().unwrap_or_else(PoisonError::into_inner);
        *kills = LimitKills {
            memory: kills.memory.max(seen.memory),
            pids: kills.pids.max(seen.pids),
            disk: kills.disk.max(seen.disk),
        };
    }

    pub(crate) fn to_row(&self, now: Timestamp) -> SandboxRow {
        self.row(&self.lock(), now)
    }

    /// Waits until `done` says so of state and runtime.
    pub(crate) async fn wait_until(&self, done: impl Fn(SandboxState, Runtime) -> bool) {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let lifecycle = self.lock().lifecycle;
            if done(lifecycle.state(), lifecycle.runtime()) {
                return;
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    pub(crate) fn commands(&self) -> MutexGuard<'_, HashMap<ExecId, Arc<Command>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says so while a command is being started.
    pub(crate) fn starting(&self) -> Starting<'_> {
        self.starting.fetch_add(1, Ordering::AcqRel);
        Starting(&self.starting)
    }

    pub(crate) fn is_starting(&self) -> bool {
        self.starting.load(Ordering::Acquire) > 0
    }

    pub(crate) fn port_access(&self) -> MutexGuard<'_, PortSettings> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn agent_knows_expiry(&self, expires_at: Timestamp) {
        self.agent_expires_at.store(expires_at.unix_ms().unsigned_abs(), Ordering::Relaxed);
    }

    fn row(&self, state: &State, now: Timestamp) -> SandboxRow {
        SandboxRow {
            sandbox: Sandbox::clone(&state.sandbox),
            generation: self.generation,
            has_setup: self.has_setup,
            idempotency: self.idempotency.clone(),
            updated_at: now,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
