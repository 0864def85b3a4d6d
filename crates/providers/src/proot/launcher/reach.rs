//! What PRoot, and with it every program of a sandbox, can reach of this host at
//! most: held by the kernel (Landlock), whatever way around PRoot a guest finds.
//!
//! Kernels differ in what they know of this, and some know nothing. Each holds
//! what it can.

use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _, RulesetCreated,
    RulesetCreatedAttr as _, RulesetError, Scope, path_beneath_rules,
};

use super::protocol::ReachPlan;

/// What a rule may name: file accesses up to truncation and device calls, and
/// signals and abstract sockets that stay in the sandbox (Linux 6.12).
const KNOWN: ABI = ABI::V6;

/// Without signals, the first version that knows enough to be worth it.
const LEAST: ABI = ABI::V1;

/// PRoot is linked with libraries of the host.
const LIBRARIES: [&str; 6] = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.preload"];

/// Holds this process and its children to the plan, for ever.
pub(super) fn confine(plan: &ReachPlan) -> Result<(), RulesetError> {
    ruleset()?
        .add_rules(path_beneath_rules(LIBRARIES, AccessFs::from_read(KNOWN)))?
        .add_rules(path_beneath_rules(&plan.read, AccessFs::from_read(KNOWN)))?
        .add_rules(path_beneath_rules(&plan.write, AccessFs::from_all(KNOWN)))?
        .restrict_self()
        .map(drop)
}

fn ruleset() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()
}

/// How much of it this kernel knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::proot) enum Known {
    /// Files, signals, abstract sockets.
    All,
    /// Files only (before Linux 6.12).
    Files,
    Nothing,
}

pub(in crate::proot) fn known() -> Known {
    let demands = |abi: ABI| {
        let demanded = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        let demanded = demanded.handle_access(AccessFs::from_all(abi));
        let demanded =
            if abi >= ABI::V6 { demanded.and_then(|rules| rules.scope(Scope::from_all(abi))) } else { demanded };
        demanded.and_then(Ruleset::create).is_ok()
    };
    if demands(KNOWN) {
        Known::All
    } else if demands(LEAST) {
        Known::Files
    } else {
        Known::Nothing
    }
}
