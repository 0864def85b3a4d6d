//! What a test can make go wrong, and what it can count.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Where a fault strikes and what is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MockOperation {
    Check,
    Create,
    Connect,
    Destroy,
    List,
    Sweep,
    Usage,
    /// Starting a command.
    Start,
    Attach,
    /// Every file call.
    File,
    /// Reaching a port inside.
    Dial,
    /// Input, its end, resizes and signals of a command.
    Input,
    Pause,
    Resume,
    Ping,
    SetDeadline,
}

/// What happens instead of, or before, the operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It fails at once with this message.
    Fail(String),
    /// It fails after having done its work: what a lost answer looks like.
    FailAfter(String),
    /// It never answers.
    Hang,
    /// It works, this much later.
    Delay(Duration),
    /// A create fails because the image does not exist; elsewhere as `Fail`.
    MissingImage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    Once,
    Count(u32),
    /// Until `clear`.
    Always,
}

/// Faults by operation. Those with a count are used up first in, first out;
/// one that is `Always` then stays.
#[derive(Debug, Default)]
pub struct MockFaults {
    planned: Mutex<HashMap<MockOperation, Vec<(Fault, Times)>>>,
}

impl MockFaults {
    pub fn inject(&self, operation: MockOperation, fault: Fault, times: Times) {
        self.planned().entry(operation).or_default().push((fault, times));
    }

    /// Ends every fault of an operation. Calls that hang already stay hung.
    pub fn clear(&self, operation: MockOperation) {
        self.planned().remove(&operation);
    }

    pub(super) fn take(&self, operation: MockOperation) -> Option<Fault> {
        let mut planned = self.planned();
        let faults = planned.get_mut(&operation)?;
        let (fault, times) = faults.first_mut()?;
        let fault = fault.clone();
        match times {
            Times::Always => {}
            Times::Count(left) if *left > 1 => *left -= 1,
            Times::Once | Times::Count(_) => {
                faults.remove(0);
            }
        }
        Some(fault)
    }

    fn planned(&self) -> std::sync::MutexGuard<'_, HashMap<MockOperation, Vec<(Fault, Times)>>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls of one operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    pub started: u64,
    pub succeeded: u64,
    /// Failed, or dropped before they ended.
    pub failed: u64,
    pub in_flight: u64,
    /// Most that ever ran at the same time.
    pub most_in_flight: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters(Mutex<HashMap<MockOperation, Calls>>);

impl Counters {
    pub(super) fn of(&self, operation: MockOperation) -> Calls {
        self.calls().get(&operation).copied().unwrap_or_default()
    }

    /// Counts a call from here until the guard is dropped.
    pub(super) fn begin(&self, operation: MockOperation) -> Counted<'_> {
        let mut calls = self.calls();
        let entry = calls.entry(operation).or_default();
        entry.started += 1;
        entry.in_flight += 1;
        entry.most_in_flight = entry.most_in_flight.max(entry.in_flight);
        Counted { counters: self, operation, succeeded: false }
    }

    fn calls(&self) -> std::sync::MutexGuard<'_, HashMap<MockOperation, Calls>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Counted<'a> {
    counters: &'a Counters,
    operation: MockOperation,
    succeeded: bool,
}

impl Counted<'_> {
    pub(super) fn succeeded(mut self) {
        self.succeeded = true;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let mut calls = self.counters.calls();
        let entry = calls.entry(self.operation).or_default();
        entry.in_flight -= 1;
        if self.succeeded {
            entry.succeeded += 1;
        } else {
            entry.failed += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_used_up_in_order() {
        let faults = MockFaults::default();
        faults.inject(MockOperation::Create, Fault::Fail("a".into()), Times::Once);
        faults.inject(MockOperation::Create, Fault::Hang, Times::Count(2));
        faults.inject(MockOperation::Create, Fault::FailAfter("b".into()), Times::Always);
        let taken = || faults.take(MockOperation::Create);
        assert_eq!(taken(), Some(Fault::Fail("a".into())));
        assert_eq!(taken(), Some(Fault::Hang));
        assert_eq!(taken(), Some(Fault::Hang));
        assert_eq!(taken(), Some(Fault::FailAfter("b".into())));
        assert_eq!(taken(), Some(Fault::FailAfter("b".into())));
        faults.clear(MockOperation::Create);
        assert_eq!(faults.take(MockOperation::Create), None);
    }

    #[test]
    fn a_dropped_call_counts_as_failed_and_no_longer_in_flight() {
        let counters = Counters::default();
        let (first, second) = (counters.begin(MockOperation::List), counters.begin(MockOperation::List));
        first.succeeded();
        drop(second);
        let expected = Calls { started: 2, succeeded: 1, failed: 1, in_flight: 0, most_in_flight: 2 };
        assert_eq!(counters.of(MockOperation::List), expected);
    }
}
