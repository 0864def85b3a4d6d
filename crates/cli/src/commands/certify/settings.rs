//! What a configuration says about the runtimes, also about those that this
//! version does not have: their part of the host can still be looked at.

use std::path::PathBuf;

use stacyvm_certify::{KeySource, RuntimeSettings, Target};

use crate::config::{Content, Environment, Loaded, Source, Value, default_of};

/// Names under which the published script takes what has another one here.
const ALIASES: [(&str, &str); 3] = [
    ("providers.firecracker.kernel_path", "STACYVM_FIRECRACKER_KERNEL"),
    ("providers.proot.rootfs_path", "STACYVM_PROOT_ROOTFS"),
    ("providers.proot.workspace_base", "STACYVM_PROOT_WORKSPACE_BASE"),
];

pub(super) fn of_runtimes(target: Target, loaded: &Loaded, environment: &Environment) -> RuntimeSettings {
    let texts = Texts { loaded, environment };
    let path = |key: &str| PathBuf::from(texts.get(key));
    let remote = format!("providers.{}", target.provider());
    RuntimeSettings {
        docker_socket: docker_socket(&texts.get("providers.docker.socket"), environment),
        docker_runtime: texts.get("providers.docker.runtime"),
        docker_network: texts.get("providers.docker.network_mode"),
        firecracker_kernel: path("providers.firecracker.kernel_path"),
        firecracker_rootfs: path("providers.firecracker.default_rootfs"),
        firecracker_agent: texts.unless_default("providers.firecracker.agent_path"),
        proot_rootfs: path("providers.proot.rootfs_path"),
        proot_workspace_base: path("providers.proot.workspace_base"),
        proot_languages: texts.list("providers.proot.languages"),
        remote_url: texts.get(&format!("{remote}.base_url")),
        remote_key: texts.key(&format!("{remote}.api_key")),
        variables: variables_of(target, environment),
    }
}

/// Settings of the target's provider that are in the environment, by their own
/// names.
fn variables_of(target: Target, environment: &Environment) -> Vec<(String, String)> {
    let prefix = variable(&format!("providers.{}.", target.provider()));
    let aliases =
        ALIASES.into_iter().filter_map(|(key, alias)| Some((variable(key), environment.get(alias)?.to_owned())));
    let set = environment.variables.iter().map(|(name, value)| (name.clone(), value.clone()));
    set.chain(aliases).filter(|(name, _)| name.starts_with(&prefix)).collect()
}

fn variable(key: &str) -> String {
    format!("STACYVM_{}", key.replace('.', "_").to_uppercase())
}

fn docker_socket(configured: &str, environment: &Environment) -> PathBuf {
    let wanted = Some(configured).filter(|text| !text.is_empty()).or_else(|| environment.get("DOCKER_HOST"));
    let wanted = wanted.unwrap_or("/var/run/docker.sock");
    PathBuf::from(wanted.strip_prefix("unix://").unwrap_or(wanted))
}

struct Texts<'a> {
    loaded: &'a Loaded,
    environment: &'a Environment,
}

impl Texts<'_> {
    fn variable(&self, key: &str) -> Option<&str> {
        let alias = ALIASES.into_iter().find(|(of, _)| *of == key).and_then(|(_, name)| self.environment.get(name));
        alias.or_else(|| self.environment.get(&variable(key)))
    }

    fn get(&self, key: &str) -> String {
        if let Some(text) = self.variable(key) {
            return text.to_owned();
        }
        match self.written(key).map(|value| &value.content) {
            Some(Content::Text(text)) => text.clone(),
            Some(Content::List(items)) => items.join(","),
            Some(Content::Map(_) | Content::Secret(_)) | None => default_of(key).to_owned(),
        }
    }

    /// A path that somebody chose; empty otherwise.
    fn unless_default(&self, key: &str) -> PathBuf {
        Some(self.get(key)).filter(|text| *text != default_of(key)).map(PathBuf::from).unwrap_or_default()
    }

    fn written(&self, key: &str) -> Option<&Value> {
        self.loaded.settings.get(key).or_else(|| self.loaded.unused.get(key))
    }

    fn list(&self, key: &str) -> Vec<String> {
        self.get(key).split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
    }

    fn key(&self, key: &str) -> Option<KeySource> {
        if self.variable(key).is_some() {
            return Some(KeySource::Environment);
        }
        let value = self.written(key).filter(|value| !value.content.is_empty())?;
        match value.source {
            Source::File { .. } => Some(KeySource::Configuration),
            Source::KeyFile(_) => Some(KeySource::File),
            Source::Environment(_) | Source::Option(_) => Some(KeySource::Environment),
            Source::Default => None,
        }
    }
}
