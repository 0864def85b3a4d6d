//! The checks, one file per subject.

mod exec;
mod file;
mod isolation;
mod lifecycle;
mod network;
mod process;
mod terminal;
mod transfer;
mod watch;

use std::sync::LazyLock;
use std::time::Duration;

use crate::Check;

/// For most checks; generous, because it only has to end what hangs.
const DEADLINE: Duration = Duration::from_mins(1);
/// For checks that move much data or make many sandboxes.
const LONG_DEADLINE: Duration = Duration::from_mins(4);

static ALL: LazyLock<Vec<Check>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for part in [
        lifecycle::checks,
        exec::checks,
        file::checks,
        transfer::checks,
        process::checks,
        terminal::checks,
        watch::checks,
        network::checks,
        isolation::checks,
    ] {
        all.extend(part());
    }
    all.sort_by_key(|check| check.id);
    all
});

/// Every check, in order of id.
pub fn all() -> &'static [Check] {
    &ALL
}

/// `check!("C07", "title", [Ability], function)`, with `long` for a long deadline.
macro_rules! check {
    ($id:literal, $title:literal, [$($need:ident),*], $body:path) => {
        $crate::checks::check!(@ $id, $title, [$($need),*], $body, $crate::checks::DEADLINE)
    };
    ($id:literal, $title:literal, [$($need:ident),*], $body:path, long) => {
        $crate::checks::check!(@ $id, $title, [$($need),*], $body, $crate::checks::LONG_DEADLINE)
    };
    (@ $id:literal, $title:literal, [$($need:ident),*], $body:path, $deadline:expr) => {
        $crate::Check {
            id: $id,
            title: $title,
            needs: &[$($crate::Ability::$need),*],
            deadline: $deadline,
            body: |context| Box::pin($body(context)),
        }
    };
}
use check;
