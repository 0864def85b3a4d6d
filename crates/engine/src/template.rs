//! Templates: kept in memory, written through.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use stacyvm_api::{CreateRequest, Duration, Template, TemplateSpawnRequest};

use crate::EngineError;
use crate::order::{check_enough, check_text, positive};
use crate::shared::Shared;

/// Published defaults of a new template (http-api 5.5).
const DEFAULT_MEMORY_MB: u64 = 512;
const DEFAULT_CPUS: f64 = 1.0;
const DEFAULT_TTL: Duration = Duration::from_secs(300);

const NAME_MAX_BYTES: usize = 128;
const TEMPLATES_MAX: usize = 10_000;
/// One template as JSON.
const TEMPLATE_MAX_BYTES: usize = 1 << 20;

type Templates = RwLock<BTreeMap<String, Template>>;

impl Shared {
    pub(crate) fn template(&self, name: &str) -> Result<Template, EngineError> {
        let found = read(&self.templates).get(name).cloned();
        found.ok_or_else(|| EngineError::TemplateNotFound(name.to_owned()))
    }

    pub(crate) fn all_templates(&self) -> Vec<Template> {
        read(&self.templates).values().cloned().collect()
    }

    pub(crate) async fn create_template(&self, template: Template) -> Result<Template, EngineError> {
        let now = self.now();
        let template = Template {
            version: Some(1),
            created_at: Some(now),
            updated_at: Some(now),
            ..checked(with_defaults(template, None))?
        };
        {
            let mut all = self.templates.write().unwrap_or_else(PoisonError::into_inner);
            if all.contains_key(&template.name) {
                return Err(EngineError::TemplateExists(template.name));
            }
            if all.len() >= TEMPLATES_MAX {
                return Err(EngineError::InvalidInput(format!("there are {TEMPLATES_MAX} templates already")));
            }
            all.insert(template.name.clone(), template.clone());
        }
        self.store.save_template(&template).await.inspect_err(|_| {
            self.templates.write().unwrap_or_else(PoisonError::into_inner).remove(&template.name);
        })?;
        Ok(template)
    }

    pub(crate) async fn update_template(&self, name: &str, template: Template) -> Result<Template, EngineError> {
        let before = self.template(name)?;
        let template = Template { name: name.to_owned(), ..template };
        let template = Template {
            version: Some(before.version.unwrap_or(0) + 1),
            created_at: before.created_at,
            updated_at: Some(self.now()),
            ..checked(with_defaults(template, Some(&before)))?
        };
        self.store.save_template(&template).await?;
        self.templates.write().unwrap_or_else(PoisonError::into_inner).insert(template.name.clone(), template.clone());
        Ok(template)
    }

    pub(crate) async fn delete_template(&self, name: &str) -> Result<(), EngineError> {
        self.template(name)?;
        self.store.delete_template(name).await?;
        self.templates.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(())
    }
}

/// The create that a spawn from a template is.
pub(crate) fn create_request(name: &str, request: TemplateSpawnRequest) -> CreateRequest {
    CreateRequest {
        template: Some(name.to_owned()),
        provider: request.provider,
        ttl: request.ttl,
        metadata: request.metadata,
        ..CreateRequest::default()
    }
}

/// Fills in the published defaults and writes both vocabularies. Where both are
/// given and differ, the one that was changed counts: a client that knows only
/// one of them sends the other back as it was.
fn with_defaults(template: Template, before: Option<&Template>) -> Template {
    let cpus_before = before.and_then(|before| before.cpu_cores);
    let cpus = one_of(template.vcpus, template.cpu_cores, cpus_before, |cpus| *cpus > 0.0);
    let seconds = |template: &Template| template.ttl_seconds.map(Duration::from_secs);
    let seconds_before = before.and_then(seconds);
    let ttl = one_of(template.ttl, seconds(&template), seconds_before, |ttl| !ttl.is_zero());
    let (cpus, ttl) = (cpus.unwrap_or(DEFAULT_CPUS), ttl.unwrap_or(DEFAULT_TTL));
    Template {
        memory_mb: Some(template.memory_mb.filter(|memory| *memory > 0).unwrap_or(DEFAULT_MEMORY_MB)),
        vcpus: Some(cpus),
        cpu_cores: Some(cpus),
        ttl: Some(ttl),
        ttl_seconds: Some(ttl.get().as_secs()),
        pool_size: Some(template.pool_size.unwrap_or(0)),
        name: template.name.trim().to_owned(),
        image: template.image.trim().to_owned(),
        ..template
    }
}

/// The first spelling, unless only the second was changed.
fn one_of<T: PartialEq + Copy>(
    first: Option<T>,
    second: Option<T>,
    second_before: Option<T>,
    is_given: impl Fn(&T) -> bool,
) -> Option<T> {
    match (first.filter(&is_given), second.filter(&is_given)) {
        (Some(first), Some(second)) if first != second && second_before.is_some_and(|before| before != second) => {
            Some(second)
        }
        (Some(first), _) => Some(first),
        (None, second) => second,
    }
}

fn checked(template: Template) -> Result<Template, EngineError> {
    if template.name.is_empty() || template.image.is_empty() {
        return Err(EngineError::InvalidInput("a template needs a name and an image".to_owned()));
    }
    check_text("name", &template.name, NAME_MAX_BYTES)?;
    if template.name.contains(['/', '\\', '?', '#']) {
        return Err(EngineError::InvalidInput("the name of a template stands in URLs: no / \\ ? or #".to_owned()));
    }
    if template.vcpus.is_some_and(|cpus| !cpus.is_finite() || cpus < 0.0) {
        return Err(EngineError::InvalidInput("vcpus must be a positive number".to_owned()));
    }
    check_enough(
        positive(template.memory_mb).unwrap_or(u64::MAX),
        template.vcpus.filter(|vcpus| *vcpus > 0.0).unwrap_or(f64::INFINITY),
        positive(template.pids_limit).unwrap_or(u64::MAX),
    )?;
    let bytes = serde_json::to_vec(&template).map_or(usize::MAX, |json| json.len());
    if bytes > TEMPLATE_MAX_BYTES {
        return Err(EngineError::InvalidInput(format!("a template has at most {TEMPLATE_MAX_BYTES} bytes as JSON")));
    }
    Ok(template)
}

fn read(templates: &Templates) -> RwLockReadGuard<'_, BTreeMap<String, Template>> {
    templates.read().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_vocabularies_are_written_and_the_changed_one_counts() {
        let stored =
            with_defaults(Template { ttl_seconds: Some(60), cpu_cores: Some(2.0), ..Template::default() }, None);
        assert_eq!((stored.ttl, stored.vcpus), (Some(Duration::from_secs(60)), Some(2.0)));
        assert_eq!(stored.memory_mb, Some(DEFAULT_MEMORY_MB));

        // A client of the server's vocabulary sends `ttl` back unchanged.
        let changed = with_defaults(Template { ttl_seconds: Some(90), ..stored.clone() }, Some(&stored));
        assert_eq!((changed.ttl, changed.ttl_seconds), (Some(Duration::from_secs(90)), Some(90)));
        // A client of the SDKs' vocabulary sends `ttl_seconds` back unchanged.
        let changed = with_defaults(Template { ttl: Some(Duration::from_secs(30)), ..stored.clone() }, Some(&stored));
        assert_eq!((changed.ttl, changed.ttl_seconds), (Some(Duration::from_secs(30)), Some(30)));
        // Cut to whole seconds in the other spelling, which is no change.
        let odd: Duration = "1.5s".parse().unwrap();
        let stored = with_defaults(Template { ttl: Some(odd), ..Template::default() }, None);
        assert_eq!((with_defaults(stored.clone(), Some(&stored)).ttl, stored.ttl_seconds), (Some(odd), Some(1)));
        let zero = with_defaults(Template { ttl_seconds: Some(0), vcpus: Some(0.0), ..Template::default() }, None);
        assert_eq!((zero.ttl, zero.vcpus), (Some(DEFAULT_TTL), Some(DEFAULT_CPUS)));
    }
}
