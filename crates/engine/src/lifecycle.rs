//! The life of a sandbox as a pure state machine: no I/O, no clock, no locks.
//!
//! The rest of the engine tells it what happened and carries out the effects it
//! answers with, in order.
//!
//! ```text
//!                        Created
//!   ┌──────────┐ ───────────────────────► ┌─────────┐ ◄── Answered ── ┌───────────┐
//!   │ creating │                          │ running │                 │ unhealthy │
//!   └──────────┘                          └─────────┘ ─── Silent ───► └───────────┘
//!     │      │                             │  │   ▲ Resumed              │    │
//!     │      │ CreateFailed         Paused │  │   └──────── ┌────────┐   │    │
//!     │      │                             │  └───────────► │ paused │   │    │
//!     │      │                    Vanished,│                └────────┘   │    │
//!     │      │               DestroyAsked  │     Died          │  │      │    │ Died
//!     │      ▼                             ▼      │            │  │      │    │
//!     │   ┌────────────┐ ◄─────────────────┴──────┼────────────┴──┼──────┘    │
//!     └─► │ destroying │                          ▼               ▼           │
//!  Destroy└────────────┘ ◄── DestroyAsked ──── ┌───────────────────────┐ ◄────┘
//!  Asked     │      ▲ FreeingFailed, then      │         error         │
//!            │      └─ RetryDue frees again    └───────────────────────┘
//!            ▼ RuntimeFreed                       │ DestroyAsked, with the runtime freed
//!         ┌───────────┐ ◄─────────────────────────┘
//!         │ destroyed │
//!         └───────────┘
//! ```
//!
//! Beside the state there is what the runtime may still hold: `Held` from
//! before the provider is first asked for anything, `Freeing` while a destroy
//! is under way (never two at once), `None` once the provider confirmed that
//! nothing is left. Capacity is given back exactly then, in whatever state.

use stacyvm_api::{EventKind, SandboxState};

/// Where one sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lifecycle {
    state: SandboxState,
    runtime: Runtime,
}

/// What the runtime may hold for a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Runtime {
    Held,
    Freeing,
    None,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Happening {
    /// The provider made it, and its set-up ended well.
    Created,
    /// Making it failed or was given up; something may be left over.
    CreateFailed,
    Paused,
    Resumed,
    DestroyAsked,
    /// The provider says that nothing is left.
    RuntimeFreed,
    /// The provider could not end it.
    FreeingFailed,
    /// The pause after a failure is over.
    RetryDue,
    /// It ended by itself; remains may be left.
    Died,
    /// The runtime does not know it, although it should run.
    Vanished,
    /// Its agent does not answer.
    Silent,
    /// Its agent answers.
    Answered,
}

/// What is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Write the record.
    Persist,
    Announce(EventKind),
    /// Wait for its end.
    Watch,
    /// Commands, streams and the watch of it end.
    EndInside,
    /// Have the task that makes it give up.
    AbortCreate,
    /// Ask the provider to destroy it, and report `RuntimeFreed` or
    /// `FreeingFailed`.
    Free,
    /// Report `RetryDue` after a pause.
    RetryFree,
    ReleaseCapacity,
    /// Take it out of memory.
    Forget,
}

impl Lifecycle {
    /// A sandbox whose record is about to be written for the first time.
    pub(crate) const fn new() -> Self {
        Self { state: SandboxState::Creating, runtime: Runtime::Held }
    }

    /// A stored sandbox after a restart. Whether the runtime still holds
    /// something is not known, so it is assumed.
    pub(crate) const fn recovered(state: SandboxState) -> Self {
        let runtime = match state {
            SandboxState::Destroyed => Runtime::None,
            SandboxState::Creating
            | SandboxState::Running
            | SandboxState::Paused
            | SandboxState::Unhealthy
            | SandboxState::Destroying
            | SandboxState::Error => Runtime::Held,
        };
        Self { state, runtime }
    }

    pub(crate) const fn state(self) -> SandboxState {
        self.state
    }

    pub(crate) const fn runtime(self) -> Runtime {
        self.runtime
    }

    /// Takes in what happened. What makes no sense in this state, such as a
    /// late report, changes nothing and has no effects.
    pub(crate) fn apply(&mut self, happening: Happening) -> Vec<Effect> {
        use Effect::{AbortCreate, Announce, EndInside, Forget, Persist, ReleaseCapacity, RetryFree, Watch};
        use SandboxState::{Creating, Destroyed, Destroying, Error, Paused, Running, Unhealthy};
        match (self.state, happening) {
            (Creating, Happening::Created) => {
                self.state = Running;
                vec![Persist, Announce(EventKind::SandboxCreated), Announce(EventKind::SandboxRunning), Watch]
            }
            (Creating, Happening::CreateFailed) => {
                self.end(Destroying, &[Persist, Announce(EventKind::SandboxError), EndInside])
            }
            (Creating, Happening::DestroyAsked) => {
                // The task that makes it stops first; freeing while the
                // provider still creates would race with it.
                self.state = Destroying;
                vec![Persist, EndInside, AbortCreate]
            }
            (Running, Happening::Paused) => {
                self.state = Paused;
                vec![Persist]
            }
            (Running, Happening::Silent) => {
                self.state = Unhealthy;
                vec![Persist, Announce(EventKind::SandboxError)]
            }
            (Paused, Happening::Resumed) | (Unhealthy, Happening::Answered) => {
                self.state = Running;
                vec![Persist, Announce(EventKind::SandboxRunning)]
            }
            (Running | Unhealthy | Paused, Happening::DestroyAsked | Happening::Vanished) => {
                self.end(Destroying, &[Persist, EndInside])
            }
            (Running | Unhealthy | Paused, Happening::Died) => {
                self.end(Error, &[Persist, Announce(EventKind::SandboxError), EndInside])
            }
            (Error, Happening::DestroyAsked) => {
                if self.runtime == Runtime::None {
                    self.state = Destroyed;
                    return vec![Persist, Announce(EventKind::SandboxDestroyed), Forget];
                }
                self.end(Destroying, &[Persist])
            }
            // The task that made it has stopped, whatever it had reached.
            (Destroying, Happening::Created | Happening::CreateFailed) | (Destroying | Error, Happening::RetryDue) => {
                self.free()
            }
            (Destroying, Happening::RuntimeFreed) if self.runtime != Runtime::None => {
                self.state = Destroyed;
                self.runtime = Runtime::None;
                vec![Persist, Announce(EventKind::SandboxDestroyed), ReleaseCapacity, Forget]
            }
            (Error, Happening::RuntimeFreed) if self.runtime != Runtime::None => {
                self.runtime = Runtime::None;
                vec![ReleaseCapacity]
            }
            (Destroying | Error, Happening::FreeingFailed) if self.runtime == Runtime::Freeing => {
                self.runtime = Runtime::Held;
                vec![RetryFree]
            }
            (Creating | Running | Paused | Unhealthy | Destroying | Destroyed | Error, _) => Vec::new(),
        }
    }

    /// Moves to a state in which the runtime is to be freed.
    fn end(&mut self, state: SandboxState, effects: &[Effect]) -> Vec<Effect> {
        self.state = state;
        let mut effects = effects.to_vec();
        effects.extend(self.free());
        effects
    }

    fn free(&mut self) -> Vec<Effect> {
        if self.runtime != Runtime::Held {
            return Vec::new();
        }
        self.runtime = Runtime::Freeing;
        vec![Effect::Free]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Effect::{AbortCreate, Announce, EndInside, Forget, Free, Persist, ReleaseCapacity, RetryFree, Watch};
    use Happening::{
        Answered, CreateFailed, Created, DestroyAsked, Died, FreeingFailed, Paused, Resumed, RetryDue, RuntimeFreed,
        Silent, Vanished,
    };

    const STATES: [SandboxState; 7] = [
        SandboxState::Creating,
        SandboxState::Running,
        SandboxState::Paused,
        SandboxState::Unhealthy,
        SandboxState::Destroying,
        SandboxState::Destroyed,
        SandboxState::Error,
    ];
    const HAPPENINGS: [Happening; 12] = [
        Created,
        CreateFailed,
        Paused,
        Resumed,
        DestroyAsked,
        RuntimeFreed,
        FreeingFailed,
        RetryDue,
        Died,
        Vanished,
        Silent,
        Answered,
    ];
    const RUNTIMES: [Runtime; 3] = [Runtime::Held, Runtime::Freeing, Runtime::None];

    /// Every pair of state and happening that changes something, with the
    /// runtime before it. All that are not here change nothing.
    fn expected(from: Lifecycle, happening: Happening) -> Option<(SandboxState, Runtime, Vec<Effect>)> {
        use Runtime::{Freeing, Held, None as Gone};
        use SandboxState as S;
        let error = Announce(EventKind::SandboxError);
        let running = Announce(EventKind::SandboxRunning);
        let destroyed = Announce(EventKind::SandboxDestroyed);
        let created = Announce(EventKind::SandboxCreated);
        Some(match (from.state, from.runtime, happening) {
            (S::Creating, Held, Created) => (S::Running, Held, vec![Persist, created, running, Watch]),
            (S::Creating, Held, CreateFailed) => (S::Destroying, Freeing, vec![Persist, error, EndInside, Free]),
            (S::Creating, Held, DestroyAsked) => (S::Destroying, Held, vec![Persist, EndInside, AbortCreate]),
            (S::Running, Held, Happening::Paused) => (S::Paused, Held, vec![Persist]),
            (S::Paused, Held, Resumed) | (S::Unhealthy, Held, Answered) => (S::Running, Held, vec![Persist, running]),
            (S::Running, Held, Silent) => (S::Unhealthy, Held, vec![Persist, error]),
            (S::Running | S::Unhealthy | S::Paused, Held, DestroyAsked | Vanished) => {
                (S::Destroying, Freeing, vec![Persist, EndInside, Free])
            }
            (S::Running | S::Unhealthy | S::Paused, Held, Died) => {
                (S::Error, Freeing, vec![Persist, error, EndInside, Free])
            }
            (S::Destroying, Held, Created | CreateFailed | RetryDue) => (S::Destroying, Freeing, vec![Free]),
            (S::Error, Held, RetryDue) => (S::Error, Freeing, vec![Free]),
            (S::Destroying, Held | Freeing, RuntimeFreed) => {
                (S::Destroyed, Gone, vec![Persist, destroyed, ReleaseCapacity, Forget])
            }
            (S::Destroying, Freeing, FreeingFailed) => (S::Destroying, Held, vec![RetryFree]),
            (S::Error, Freeing, FreeingFailed) => (S::Error, Held, vec![RetryFree]),
            (S::Error, Held | Freeing, RuntimeFreed) => (S::Error, Gone, vec![ReleaseCapacity]),
            (S::Error, Held, DestroyAsked) => (S::Destroying, Freeing, vec![Persist, Free]),
            (S::Error, Freeing, DestroyAsked) => (S::Destroying, Freeing, vec![Persist]),
            (S::Error, Gone, DestroyAsked) => (S::Destroyed, Gone, vec![Persist, destroyed, Forget]),
            _ => return None,
        })
    }

    /// Whether a state and a runtime can come together at all.
    fn is_possible(lifecycle: Lifecycle) -> bool {
        match lifecycle.state {
            SandboxState::Creating | SandboxState::Running | SandboxState::Paused | SandboxState::Unhealthy => {
                lifecycle.runtime == Runtime::Held
            }
            SandboxState::Destroying => lifecycle.runtime != Runtime::None,
            SandboxState::Destroyed => lifecycle.runtime == Runtime::None,
            SandboxState::Error => true,
        }
    }

    #[test]
    fn every_transition_is_as_in_the_table() {
        let mut checked = 0;
        for state in STATES {
            for runtime in RUNTIMES {
                let before = Lifecycle { state, runtime };
                for happening in HAPPENINGS.into_iter().filter(|_| is_possible(before)) {
                    let mut after = before;
                    let effects = after.apply(happening);
                    let expected = expected(before, happening).unwrap_or((state, runtime, Vec::new()));
                    assert_eq!((after.state, after.runtime, effects), expected, "{before:?} {happening:?}");
                    checked += 1;
                }
            }
        }
        assert_eq!(checked, (4 + 2 + 1 + 3) * HAPPENINGS.len());
    }

    proptest! {
        #[test]
        fn invariants_hold_after_every_action(
            start in prop::sample::select(STATES.to_vec()),
            fresh in any::<bool>(),
            actions in prop::collection::vec(prop::sample::select(HAPPENINGS.to_vec()), 0..60),
        ) {
            let mut lifecycle = if fresh { Lifecycle::new() } else { Lifecycle::recovered(start) };
            let mut releases = usize::from(lifecycle.runtime == Runtime::None);
            let mut forgets = usize::from(lifecycle.state == SandboxState::Destroyed);
            for action in actions {
                let before = lifecycle;
                let effects = lifecycle.apply(action);
                let count = |effect: Effect| effects.iter().filter(|found| **found == effect).count();
                prop_assert!(is_possible(lifecycle), "{before:?} {action:?} {lifecycle:?}");
                // Every change of state is written, and nothing else is.
                prop_assert_eq!(count(Persist) == 1, before.state != lifecycle.state);
                // One destroy at a time.
                prop_assert_eq!(count(Free) == 1, before.runtime == Runtime::Held && lifecycle.runtime == Runtime::Freeing);
                // Capacity comes back once, when the runtime holds nothing.
                releases += count(ReleaseCapacity);
                prop_assert_eq!(releases == 1, lifecycle.runtime == Runtime::None);
                prop_assert!(releases <= 1);
                forgets += count(Forget);
                prop_assert_eq!(forgets == 1, lifecycle.state == SandboxState::Destroyed);
                // A failure to free is always followed by another attempt.
                prop_assert_eq!(count(RetryFree) == 1, before.runtime == Runtime::Freeing && lifecycle.runtime == Runtime::Held);
                // What was destroyed stays so.
                if before.state == SandboxState::Destroyed {
                    prop_assert!(effects.is_empty());
                }
            }
            // Whatever happened, a destroy and a runtime that obeys end it.
            for action in [DestroyAsked, CreateFailed, RetryDue, RuntimeFreed] {
                lifecycle.apply(action);
            }
            if lifecycle.state == SandboxState::Error {
                lifecycle.apply(DestroyAsked);
            }
            prop_assert_eq!(lifecycle.state, SandboxState::Destroyed);
        }
    }
}
