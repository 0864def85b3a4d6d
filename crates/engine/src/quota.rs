//! Owner quotas: kept in memory, written through.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use stacyvm_api::{OwnerId, OwnerQuota, OwnerQuotaRequest, QuotaSummary, Timestamp};

use crate::EngineError;
use crate::options::Limits;

#[derive(Debug, Default)]
pub(crate) struct Quotas(RwLock<BTreeMap<OwnerId, OwnerQuota>>);

/// What holds for one owner: the quota where it says something, else the
/// server's own limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_field_names, reason = "the published names of quotas")]
pub(crate) struct EffectiveLimits {
    pub(crate) max_sandboxes: Option<u64>,
    pub(crate) max_ttl: Option<Duration>,
    pub(crate) max_exec_timeout: Option<Duration>,
}

impl Quotas {
    pub(crate) fn load(&self, quotas: Vec<OwnerQuota>) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.extend(quotas.into_iter().map(|quota| (quota.owner_id.clone(), quota)));
    }

    pub(crate) fn all(&self) -> Vec<OwnerQuota> {
        self.read().values().cloned().collect()
    }

    pub(crate) fn get(&self, owner: &OwnerId) -> Option<OwnerQuota> {
        self.read().get(owner).cloned()
    }

    pub(crate) fn put(&self, quota: OwnerQuota) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(quota.owner_id.clone(), quota);
    }

    pub(crate) fn remove(&self, owner: &OwnerId) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(owner).is_some()
    }

    pub(crate) fn summary(&self) -> QuotaSummary {
        let quotas = self.read();
        let count = |given: fn(&OwnerQuota) -> bool| quotas.values().filter(|quota| given(quota)).count() as u64;
        QuotaSummary {
            total: quotas.len() as u64,
            with_max_sandboxes: count(|quota| quota.max_sandboxes > 0),
            with_max_ttl: count(|quota| !quota.max_ttl.is_zero()),
            with_max_exec_timeout: count(|quota| !quota.max_exec_timeout.is_zero()),
        }
    }

    pub(crate) fn effective(&self, owner: Option<&OwnerId>, limits: &Limits) -> EffectiveLimits {
        let quotas = self.read();
        let quota = owner.and_then(|owner| quotas.get(owner));
        let given = |span: stacyvm_api::Duration| (!span.is_zero()).then(|| span.get());
        EffectiveLimits {
            max_sandboxes: quota
                .map(|quota| quota.max_sandboxes)
                .filter(|max| *max > 0)
                .or(limits.max_sandboxes_per_owner),
            max_ttl: quota.and_then(|quota| given(quota.max_ttl)).or(limits.max_ttl),
            max_exec_timeout: quota.and_then(|quota| given(quota.max_exec_timeout)).or(limits.max_exec_timeout),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<OwnerId, OwnerQuota>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a request (http-api 7.6): blank inherits, and spans are whole seconds.
pub(crate) fn parse(
    owner: &OwnerId,
    request: &OwnerQuotaRequest,
    before: Option<&OwnerQuota>,
    now: Timestamp,
) -> Result<OwnerQuota, EngineError> {
    Ok(OwnerQuota {
        owner_id: owner.clone(),
        max_sandboxes: request.max_sandboxes,
        max_ttl: parse_span("max_ttl", &request.max_ttl)?,
        max_exec_timeout: parse_span("max_exec_timeout", &request.max_exec_timeout)?,
        created_at: before.map_or(now, |quota| quota.created_at),
        updated_at: now,
    })
}

fn parse_span(field: &str, text: &str) -> Result<stacyvm_api::Duration, EngineError> {
    if text.trim().is_empty() {
        return Ok(stacyvm_api::Duration::ZERO);
    }
    let refuse = |why: String| EngineError::InvalidInput(format!("{field}: {why}"));
    let span: stacyvm_api::Duration = text.trim().parse().map_err(|error| refuse(format!("{error}")))?;
    if span.get().subsec_nanos() != 0 {
        return Err(refuse(format!("`{}` is not in whole seconds", text.trim())));
    }
    Ok(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(max_ttl: &str) -> Result<OwnerQuota, EngineError> {
        let request = OwnerQuotaRequest { max_sandboxes: 2, max_ttl: max_ttl.to_owned(), ..Default::default() };
        parse(&"alice".parse().unwrap(), &request, None, Timestamp::from_unix_ms(0))
    }

    #[test]
    fn spans_are_whole_seconds_and_blank_inherits() {
        for text in ["", " ", "0", "0s"] {
            assert!(quota(text).unwrap().max_ttl.is_zero(), "{text:?}");
        }
        assert_eq!(quota("1m30s").unwrap().max_ttl.get(), Duration::from_secs(90));
        for text in ["-1s", "1.5s", "100ms", "soon"] {
            assert!(quota(text).unwrap_err().to_string().starts_with("max_ttl: "), "{text}");
        }
    }

    #[test]
    fn a_quota_replaces_limits_in_either_direction_and_only_where_it_says_something() {
        let quotas = Quotas::default();
        let limits = Limits { max_sandboxes_per_owner: Some(1), ..Limits::default() };
        let owner: OwnerId = "alice".parse().unwrap();
        assert_eq!(quotas.effective(Some(&owner), &limits).max_sandboxes, Some(1));
        quotas.put(quota("48h").unwrap());
        let effective = quotas.effective(Some(&owner), &limits);
        assert_eq!(effective.max_sandboxes, Some(2));
        assert_eq!(effective.max_ttl, Some(Duration::from_hours(48)));
        assert_eq!(effective.max_exec_timeout, limits.max_exec_timeout);
        assert_eq!(quotas.effective(None, &limits).max_ttl, limits.max_ttl);
        assert_eq!(
            quotas.summary(),
            QuotaSummary { total: 1, with_max_sandboxes: 1, with_max_ttl: 1, with_max_exec_timeout: 0 }
        );
    }
}
