//! Which runtimes this server has, and which of them is the default.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use stacyvm_api::FindingLevel;
use stacyvm_engine::Engine;
use stacyvm_image::ImageStore;
use stacyvm_providers::custom::{CustomOptions, CustomProvider};
use stacyvm_providers::docker::DockerProvider;
use stacyvm_providers::mock::MockProvider;
use stacyvm_providers::oci::{BridgeOptions, DiskOptions, HostImageOptions, OciOptions, OciProvider, OciRuntime};
use stacyvm_providers::proot::{Permission, ProotOptions, ProotProvider};
use stacyvm_sandbox::{HealthReport, Provider};

use super::docker;
use super::options::image_store;
use crate::config::{Config, Environment};
use crate::failure::Advice;

const AUTO: &str = "auto";

/// Every provider this program can have, in the order in which `auto` prefers
/// them.
pub(crate) const KNOWN: [&str; 5] = ["oci", "docker", "proot", "custom", "mock"];

/// The providers of a server.
pub(crate) struct Chosen {
    pub(crate) all: Vec<Arc<dyn Provider>>,
    pub(crate) default: String,
    /// Why that one, in a few words.
    pub(super) why: String,
    /// Given once the server is known to demand a key.
    shared_network: Permission,
}

/// What the default provider's health says to whoever starts the server.
#[derive(Debug, Default)]
pub(super) struct Examined {
    /// What keeps it from making sandboxes, if anything does.
    pub(super) troubles: Vec<String>,
    /// Findings about what it cannot do in full.
    pub(super) shortcomings: Vec<String>,
}

impl Chosen {
    /// Callers need a key from now on: what was refused for want of one is not
    /// any more, and the health that is shown says so.
    pub(super) async fn permit(&self, engine: &Engine) {
        self.shared_network.give();
        if self.all.iter().any(|provider| provider.name() == "proot") {
            engine.test_providers().await;
        }
    }

    /// Looks at the default provider.
    pub(super) async fn examine(&self) -> Examined {
        let mut examined = Examined::default();
        let default = &self.default;
        for provider in self.all.iter().filter(|provider| provider.name() == default) {
            let report = provider.check().await;
            examined.troubles.extend(report.reason().map(|why| format!("{default} cannot make sandboxes: {why}")));
            let warnings = report.findings.into_iter().filter(|finding| finding.level == FindingLevel::Warning);
            examined.shortcomings.extend(warnings.map(|finding| finding.name));
        }
        examined
    }
}

/// Opens what the configuration enables.
pub(crate) async fn open(
    config: &Config,
    data_dir: &Path,
    environment: &Environment,
    shared_network: Permission,
) -> anyhow::Result<Chosen> {
    let wanted = configured(config, &config.providers.default);
    if wanted != AUTO && !KNOWN.contains(&wanted) {
        return Err(Advice::new(
            format!("there is no provider `{wanted}`"),
            format!("set providers.default to auto, {}", names()),
        )
        .into());
    }
    let mut all = Vec::new();
    for name in enabled(config) {
        all.push(open_one(name, config, data_dir, environment, &shared_network).await?);
    }
    let (default, why) = match (wanted, all.first()) {
        (AUTO, Some(first)) => (first.name().to_owned(), reason(first.name(), config)),
        (AUTO, None) => {
            return Err(Advice::new(
                "no provider is enabled",
                "set providers.oci.enabled or providers.docker.enabled to true",
            )
            .into());
        }
        ("custom", _) => (config.custom.name.clone(), "as configured".to_owned()),
        (wanted, _) => (wanted.to_owned(), "as configured".to_owned()),
    };
    Ok(Chosen { all, default, why, shared_network })
}

/// Opens one provider by name, enabled or not. `shared_network` is given where
/// nobody but whoever runs this program, or has its key, can use it.
pub(crate) async fn open_one(
    name: &str,
    config: &Config,
    data_dir: &Path,
    environment: &Environment,
    shared_network: &Permission,
) -> anyhow::Result<Arc<dyn Provider>> {
    match configured(config, name) {
        "oci" => {
            let images = ImageStore::open(image_store(config, data_dir, environment)).await?;
            let options = OciOptions { images: Some(images), ..oci(config, data_dir, environment) };
            let provider = OciProvider::open(options).await;
            Ok(Arc::new(provider.context("the provider oci cannot be used")?))
        }
        "docker" => {
            let provider = DockerProvider::open(docker::options(config, data_dir, environment)?);
            Ok(Arc::new(provider.context("the provider docker cannot be used")?))
        }
        "custom" => {
            if config.custom.base_url.trim().is_empty() {
                let fix = "set providers.custom.base_url, or STACYVM_PROVIDERS_CUSTOM_BASE_URL, to the backend's \
                           address, such as http://10.0.0.2:7425; `stacyvm backend serve` starts one";
                return Err(Advice::new("the provider custom has no backend: its base_url is not set", fix).into());
            }
            let provider = CustomProvider::open(custom(config, data_dir)).await;
            Ok(Arc::new(provider.context("the provider custom cannot be used")?))
        }
        "proot" => {
            let images = ImageStore::open(image_store(config, data_dir, environment)).await?;
            let options = ProotOptions {
                images: Some(images),
                shared_network: shared_network.clone(),
                ..proot(config, data_dir, environment)
            };
            let provider = ProotProvider::open(&options).await;
            Ok(Arc::new(provider.context("the provider proot cannot be used")?))
        }
        "mock" => Ok(Arc::new(MockProvider::default())),
        other => Err(Advice::new(format!("there is no provider `{other}`"), format!("use {}", names())).into()),
    }
}

/// What the default comes to, of the names in [`KNOWN`]; `None` where nothing is
/// enabled.
pub(crate) fn default_kind(config: &Config) -> Option<&str> {
    match configured(config, &config.providers.default) {
        AUTO => enabled(config).first().copied(),
        wanted => Some(wanted),
    }
}

pub(crate) fn is_known(config: &Config, name: &str) -> bool {
    KNOWN.contains(&configured(config, name))
}

/// The custom provider has a name of its own, too.
pub(crate) fn is_custom(config: &Config, name: &str) -> bool {
    configured(config, name) == "custom"
}

/// What a provider says of this host, or of its backend, without a server: it
/// is opened in a directory that is gone afterwards, so that no sandbox of
/// anybody's is seen.
pub(crate) async fn examine_one(
    name: &str,
    config: &Config,
    environment: &Environment,
    demands_key: bool,
) -> anyhow::Result<HealthReport> {
    let scratch = tempfile::Builder::new().prefix("stacyvm-doctor-").tempdir().context("a directory to look from")?;
    let mut config = config.clone();
    config.proot.workspace_base = None;
    config.oci.run_dir = Some(scratch.path().join("run"));
    let shared_network = if demands_key { Permission::given() } else { Permission::default() };
    let provider = open_one(name, &config, scratch.path(), environment, &shared_network).await?;
    let report = provider.check().await;
    provider.shutdown().await;
    Ok(report)
}

/// In the order in which `auto` prefers them. The default is always enabled.
pub(crate) fn enabled(config: &Config) -> Vec<&'static str> {
    let switched_on = |name: &str| match name {
        "oci" => config.oci.enabled,
        "docker" => config.docker.enabled,
        "custom" => config.custom.enabled,
        "proot" => config.proot.enabled,
        "mock" => config.mock.enabled,
        _ => false,
    };
    KNOWN
        .into_iter()
        .filter(|name| switched_on(name) || configured(config, &config.providers.default) == *name)
        .collect()
}

/// The kind of provider that a name means.
fn configured<'a>(config: &Config, name: &'a str) -> &'a str {
    if name == config.custom.name { "custom" } else { name }
}

fn custom(config: &Config, data_dir: &Path) -> CustomOptions {
    let settings = &config.custom;
    CustomOptions {
        name: settings.name.clone(),
        api_key: settings.api_key.as_ref().map(|key| key.expose().to_owned()),
        timeout: settings.timeout.get(),
        ..CustomOptions::new(settings.base_url.clone(), data_dir.join("custom").join(&settings.name))
    }
}

fn names() -> String {
    let [others @ .., last] = KNOWN;
    format!("{} or {last}", others.join(", "))
}

fn reason(name: &str, config: &Config) -> String {
    match (name, config.oci.runtime.as_str()) {
        ("oci", "builtin") => "built in, needs no daemon".to_owned(),
        ("oci", runtime) => format!("by {runtime}, needs no daemon"),
        _ => "the first that is enabled".to_owned(),
    }
}

/// Emptied at boot, and the same for all servers of a user.
fn default_run_dir(data_dir: &Path, environment: &Environment) -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/stacyvm");
    }
    // After `su` the variable may still be another user's.
    let is_ours = |dir: &&str| dir_owner(dir.as_ref()) == Some(rustix::process::geteuid().as_raw());
    let runtime = environment.get("XDG_RUNTIME_DIR").filter(is_ours);
    runtime.map_or_else(|| data_dir.join("run"), |dir| Path::new(dir).join("stacyvm"))
}

fn dir_owner(dir: &Path) -> Option<u32> {
    std::fs::metadata(dir).ok().filter(std::fs::Metadata::is_dir).map(|metadata| metadata.uid())
}

fn proot(config: &Config, data_dir: &Path, environment: &Environment) -> ProotOptions {
    let settings = &config.proot;
    let own = ProotOptions::new(data_dir);
    ProotOptions {
        workspace_base: settings.workspace_base.clone(),
        run_dir: config.oci.run_dir.clone().unwrap_or_else(|| default_run_dir(data_dir, environment)),
        program: settings.proot_binary.clone(),
        search_path: environment.get("PATH").map_or_else(|| own.search_path.clone(), str::to_owned),
        rootfs: settings.rootfs_path.clone(),
        cgroup_parent: config.oci.cgroup_parent.clone(),
        max_sandboxes: settings.max_sandboxes,
        max_memory_mib: settings.max_memory_mb,
        max_disk_mib: settings.max_disk_mb,
        languages: settings.languages.clone(),
        namespaces: settings.namespaces,
        ..own
    }
}

fn oci(config: &Config, data_dir: &Path, environment: &Environment) -> OciOptions {
    let settings = &config.oci;
    // Devices and rules of the host's network are root's.
    let bridge = settings.bridge && rustix::process::geteuid().is_root();
    OciOptions {
        runtime: oci_runtime(&settings.runtime, environment),
        run_dir: settings.run_dir.clone().unwrap_or_else(|| default_run_dir(data_dir, environment)),
        host_image: HostImageOptions { include: settings.host_include.iter().map(PathBuf::from).collect() },
        cgroup_parent: settings.cgroup_parent.clone(),
        prepared: settings.prepared,
        disk: DiskOptions {
            loop_images: settings.loop_disks,
            prepared: settings.prepared_disks,
            expected_mib: Some(config.defaults.disk_size_mb).filter(|mib| *mib > 0),
        },
        bridge: bridge.then_some(BridgeOptions { prepared: settings.prepared_bridge, ..BridgeOptions::default() }),
        ..OciOptions::new(data_dir)
    }
}

fn oci_runtime(wanted: &str, environment: &Environment) -> OciRuntime {
    match wanted.trim() {
        "" | "builtin" => OciRuntime::Builtin,
        name => OciRuntime::Program {
            name: name.to_owned(),
            search: environment.get("PATH").unwrap_or_default().to_owned(),
        },
    }
}
