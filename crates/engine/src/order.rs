//! From what a caller asks for to what a provider is ordered to make: template
//! and defaults filled in, everything checked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use stacyvm_api::{CreateRequest, Disk, Limit, NetworkMode, NetworkRequest, OwnerId, Template};
use stacyvm_sandbox::{DiskRequest, NetworkPolicy, Provider};

use crate::shared::Shared;
use crate::{Caller, EngineError, LimitExceeded};

/// The image that published SDKs fill in when their user names none.
const SDK_DEFAULT_IMAGE: &str = "alpine:latest";

const IMAGE_MAX_BYTES: usize = 512;

/// What one sandbox may have of memory, in MiB. Below 16 not even the agent and a
/// shell run: the kernel would end what is started, without a word. 16 TiB is more
/// than hosts have, and far below where bytes overflow.
pub const MEMORY_RANGE_MIB: RangeInclusive<u64> = 16..=1 << 24;
/// The same of a disk; more is beyond any, and would not fit a number in bytes.
pub const DISK_RANGE_MIB: RangeInclusive<u64> = 1..=1 << 32;
/// The same of processes and threads. The agent takes five, each command a helper;
/// what is left has to be enough for a runtime to start them and for a shell with a
/// pipe. The most is also Linux' own maximum of pids.
pub const PIDS_RANGE: RangeInclusive<u64> = 16..=1 << 22;
/// The same of processors. A kernel's scheduler shares out no less of one, and can
/// be built for no more (`NR_CPUS`).
pub const VCPUS_RANGE: RangeInclusive<f64> = 0.01..=8192.0;

const METADATA_MAX_ENTRIES: usize = 64;
const METADATA_KEY_MAX_BYTES: usize = 256;
const METADATA_VALUE_MAX_BYTES: usize = 4096;
const ENV_MAX_ENTRIES: usize = 512;
/// Linux takes 128 KiB for one string and a share of the stack for all.
const ENV_MAX_BYTES: usize = 128 * 1024;
const USER_MAX_BYTES: usize = 64;
const ALLOW_MAX_ENTRIES: usize = 128;
/// One sandbox to make, fully resolved.
#[derive(Clone)]
pub(crate) struct Order {
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) image: String,
    pub(crate) memory_mb: u64,
    pub(crate) vcpus: f64,
    pub(crate) pids_limit: u64,
    pub(crate) disk_size_mb: Option<u64>,
    pub(crate) disk: DiskRequest,
    pub(crate) requested: BTreeSet<Limit>,
    pub(crate) ttl: Duration,
    pub(crate) owner: Option<OwnerId>,
    pub(crate) tenant: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) user: Option<String>,
    pub(crate) network: NetworkPolicy,
    pub(crate) allow_unenforced: bool,
    pub(crate) template: Option<String>,
    pub(crate) setup: Vec<String>,
}

impl Order {
    pub(crate) fn network_request(&self) -> NetworkRequest {
        NetworkRequest { mode: self.network.mode.clone(), allow: self.network.allow.clone() }
    }
}

impl Shared {
    /// Whom a create is accounted to: the caller, else whom the body names.
    pub(crate) fn owner_of(caller: &Caller, request: &CreateRequest) -> Result<Option<OwnerId>, EngineError> {
        let named = || OwnerId::parse_optional(request.owner_id.as_deref().unwrap_or_default()).map_err(invalid);
        if let Some(bound) = &caller.bound_to
            && named()?.is_some_and(|named| named != *bound)
        {
            return Err(EngineError::OwnerBound(bound.clone()));
        }
        if caller.owner.is_some() {
            return Ok(caller.owner.clone());
        }
        named()
    }

    /// The ttl of a create, or the limit that it exceeds.
    pub(crate) fn ttl_of(
        &self,
        owner: Option<&OwnerId>,
        asked: Option<stacyvm_api::Duration>,
    ) -> Result<Duration, EngineError> {
        let max = self.quotas.effective(owner, &self.options.limits).max_ttl;
        let default = self.options.defaults.ttl;
        let Some(asked) = asked else { return Ok(max.map_or(default, |max| default.min(max))) };
        check_ttl(asked.get(), max)
    }

    pub(crate) fn resolve(&self, caller: &Caller, request: &CreateRequest) -> Result<Order, EngineError> {
        let name = request.template.as_deref().map(str::trim).filter(|name| !name.is_empty());
        let template = name.map(|name| self.template(name)).transpose()?;
        let template = template.as_ref();
        if let Some(secrets) = template.and_then(|template| template.secrets.as_ref()).filter(|all| !all.is_empty()) {
            return Err(EngineError::SecretsUnresolved {
                template: name.unwrap_or_default().to_owned(),
                names: secrets.iter().map(|secret| secret.name.clone()).collect(),
            });
        }
        let defaults = &self.options.defaults;
        let provider = self
            .provider(given(request.provider.as_deref(), template.and_then(|template| template.provider.as_deref())))?;
        let owner = Self::owner_of(caller, request)?;
        let ttl = request.ttl.or_else(|| template.and_then(template_ttl));
        let disk_size_mb = positive(request.disk_size_mb)
            .or_else(|| template.and_then(|template| positive(template.disk_size_mb)))
            .or(defaults.disk_size_mb);
        let disk = request.disk.or(template.and_then(|template| template.disk));
        let allow_unenforced = request.allow_unenforced.or(template.and_then(|template| template.allow_unenforced));
        let own = provider.defaults();
        let order = Order {
            image: image_of(request, template, own.image.as_deref().unwrap_or(&defaults.image))?,
            memory_mb: positive(request.memory_mb)
                .or_else(|| template.and_then(|template| positive(template.memory_mb)))
                .or(own.memory_mib)
                .unwrap_or(defaults.memory_mb),
            vcpus: processors(request.vcpus)?
                .or(template.map(|template| processors(template.vcpus.or(template.cpu_cores))).transpose()?.flatten())
                .or(own.vcpus)
                .unwrap_or(defaults.vcpus),
            pids_limit: positive(request.pids_limit)
                .or_else(|| template.and_then(|template| positive(template.pids_limit)))
                .or(own.pids_limit)
                .unwrap_or(defaults.pids_limit),
            disk_size_mb,
            disk: DiskRequest { size_mib: disk_size_mb, in_memory: disk == Some(Disk::Memory) },
            requested: requested_limits(request, template),
            ttl: self.ttl_of(owner.as_ref(), ttl)?,
            owner,
            tenant: caller.tenant.clone(),
            metadata: metadata_of(request, template)?,
            env: environment_of(request, template)?,
            user: user_of(given(request.user.as_deref(), template.and_then(|template| template.user.as_deref())))?,
            network: self.network_of(request, template, provider.as_ref())?,
            allow_unenforced: allow_unenforced.unwrap_or(false),
            template: name.map(str::to_owned),
            setup: template.and_then(|template| template.setup.clone()).unwrap_or_default(),
            provider: Arc::clone(provider),
        };
        self.check_sizes(&order)?;
        Ok(order)
    }

    fn network_of(
        &self,
        request: &CreateRequest,
        template: Option<&Template>,
        provider: &dyn Provider,
    ) -> Result<NetworkPolicy, EngineError> {
        let mode = request
            .network
            .as_ref()
            .map(|network| network.mode.clone())
            .or_else(|| blank_is_none(request.network_mode.as_deref()).map(NetworkMode::parse))
            .or_else(|| template.and_then(template_network_mode))
            .or_else(|| self.options.defaults.network.clone())
            .unwrap_or_else(|| network_of_provider(provider));
        let mut allow = Vec::new();
        let of_template = template.and_then(|template| template.network.as_ref());
        for network in of_template.into_iter().chain(request.network.as_ref()) {
            for destination in &network.allow {
                if !is_destination(destination) {
                    let message = format!("`{destination}` is neither an address nor a CIDR such as 10.0.0.0/8");
                    return Err(EngineError::InvalidInput(message));
                }
                allow.push(destination.trim().to_owned());
            }
        }
        // Names need no exception: what they resolve to in public is reachable
        // anyway, and what is private is named by its address.
        let hosts = template.and_then(|template| template.allowed_hosts.as_ref()).into_iter().flatten();
        allow.extend(hosts.filter(|host| is_destination(host)).map(|host| host.trim().to_owned()));
        allow.sort();
        allow.dedup();
        at_most("allowed destinations", allow.len(), ALLOW_MAX_ENTRIES)?;
        Ok(NetworkPolicy { mode, allow })
    }

    fn check_sizes(&self, order: &Order) -> Result<(), EngineError> {
        let limits = &self.options.limits;
        check_enough(order.memory_mb, order.vcpus, order.pids_limit)?;
        let least =
            |set: Option<u64>, range: &RangeInclusive<u64>| set.map_or(*range.end(), |max| max.min(*range.end()));
        let asked = [
            ("memory_mb", order.memory_mb as f64, least(limits.max_memory_mb, &MEMORY_RANGE_MIB) as f64),
            ("vcpus", order.vcpus, limits.max_vcpus.map_or(*VCPUS_RANGE.end(), |max| max.min(*VCPUS_RANGE.end()))),
            (
                "disk_size_mb",
                order.disk_size_mb.unwrap_or(0) as f64,
                least(limits.max_disk_size_mb, &DISK_RANGE_MIB) as f64,
            ),
            ("pids_limit", order.pids_limit as f64, *PIDS_RANGE.end() as f64),
        ];
        for (what, asked, max) in asked {
            if asked > max {
                return Err(EngineError::Limit(LimitExceeded::Resource { what, asked, max }));
            }
        }
        Ok(())
    }
}

/// Refuses what no sandbox could start with.
pub(crate) fn check_enough(memory_mb: u64, vcpus: f64, pids_limit: u64) -> Result<(), EngineError> {
    let whole = |range: RangeInclusive<u64>| *range.start() as f64..=*range.end() as f64;
    for (what, asked, range) in [
        ("memory_mb", memory_mb as f64, whole(MEMORY_RANGE_MIB)),
        ("vcpus", vcpus, VCPUS_RANGE),
        ("pids_limit", pids_limit as f64, whole(PIDS_RANGE)),
    ] {
        let (min, max) = range.into_inner();
        if asked < min {
            let message =
                format!("{what} {asked} is too little to run anything: {min} is the minimum, {max} the maximum");
            return Err(EngineError::InvalidInput(message));
        }
    }
    Ok(())
}

pub(crate) fn check_ttl(asked: Duration, max: Option<Duration>) -> Result<Duration, EngineError> {
    if asked.is_zero() {
        return Err(EngineError::InvalidInput("ttl must be longer than zero".to_owned()));
    }
    match max.filter(|max| asked > *max) {
        Some(max) => Err(EngineError::Limit(LimitExceeded::Ttl { asked, max })),
        None => Ok(asked),
    }
}

/// What a request and its template ask for; the server's defaults are no request.
fn requested_limits(request: &CreateRequest, template: Option<&Template>) -> BTreeSet<Limit> {
    let number = |value: Option<u64>| positive(value).is_some();
    let processors = |value: Option<f64>| value.is_some_and(|vcpus| vcpus > 0.0);
    let of_template = |asks: &dyn Fn(&Template) -> bool| template.is_some_and(asks);
    [
        (Limit::Memory, number(request.memory_mb) || of_template(&|template| number(template.memory_mb))),
        (Limit::Cpu, processors(request.vcpus) || of_template(&|t| processors(t.vcpus.or(t.cpu_cores)))),
        (Limit::Pids, number(request.pids_limit) || of_template(&|template| number(template.pids_limit))),
        (Limit::Disk, number(request.disk_size_mb) || of_template(&|template| number(template.disk_size_mb))),
    ]
    .into_iter()
    .filter_map(|(limit, asked)| asked.then_some(limit))
    .collect()
}

/// What sandboxes reach where nobody says: as much as the runtime offers.
fn network_of_provider(provider: &dyn Provider) -> NetworkMode {
    let offered = provider.capabilities();
    match (offered.shares_host, offered.network) {
        (true, _) => NetworkMode::Named("host".to_owned()),
        (false, true) => NetworkMode::Bridge,
        (false, false) => NetworkMode::None,
    }
}

fn template_network_mode(template: &Template) -> Option<NetworkMode> {
    let shorthand = || blank_is_none(template.network_mode.as_deref()).map(NetworkMode::parse);
    template.network.as_ref().map(|network| network.mode.clone()).or_else(shorthand)
}

fn template_ttl(template: &Template) -> Option<stacyvm_api::Duration> {
    let seconds = template.ttl_seconds.map(stacyvm_api::Duration::from_secs);
    template.ttl.or(seconds).filter(|ttl| !ttl.is_zero())
}

fn image_of(request: &CreateRequest, template: Option<&Template>, default: &str) -> Result<String, EngineError> {
    let asked = blank_is_none(request.image.as_deref());
    let of_template = template.and_then(|template| blank_is_none(Some(&template.image)));
    let image = match of_template {
        Some(image) => asked.filter(|asked| *asked != SDK_DEFAULT_IMAGE).unwrap_or(image),
        None => asked.unwrap_or(default),
    };
    check_image(image)?;
    Ok(image.to_owned())
}

/// Refuses what is no name of an image for any runtime.
pub fn check_image(image: &str) -> Result<(), EngineError> {
    check_text("image", image, IMAGE_MAX_BYTES)
}

fn metadata_of(request: &CreateRequest, template: Option<&Template>) -> Result<BTreeMap<String, String>, EngineError> {
    let mut metadata = BTreeMap::new();
    if let Some(template) = template {
        metadata.extend(template.metadata.clone().unwrap_or_default());
        metadata.insert("template".to_owned(), template.name.clone());
    }
    metadata.extend(request.metadata.clone().unwrap_or_default());
    at_most("metadata entries", metadata.len(), METADATA_MAX_ENTRIES)?;
    for (key, value) in &metadata {
        at_most("bytes in a metadata key", key.len(), METADATA_KEY_MAX_BYTES)?;
        at_most("bytes in a metadata value", value.len(), METADATA_VALUE_MAX_BYTES)?;
    }
    Ok(metadata)
}

fn environment_of(
    request: &CreateRequest,
    template: Option<&Template>,
) -> Result<BTreeMap<String, String>, EngineError> {
    let mut env = template.and_then(|template| template.env.clone()).unwrap_or_default();
    env.extend(request.env.clone().unwrap_or_default());
    check_environment(&env)?;
    Ok(env)
}

pub(crate) fn check_environment(env: &BTreeMap<String, String>) -> Result<(), EngineError> {
    at_most("environment variables", env.len(), ENV_MAX_ENTRIES)?;
    let bytes = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    at_most("bytes of environment", bytes, ENV_MAX_BYTES)?;
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let message = format!("`{}` cannot be an environment variable", name.escape_debug());
            return Err(EngineError::InvalidInput(message));
        }
    }
    Ok(())
}

fn user_of(user: Option<&str>) -> Result<Option<String>, EngineError> {
    let Some(user) = blank_is_none(user) else { return Ok(None) };
    check_text("user", user, USER_MAX_BYTES)?;
    Ok(Some(user.to_owned()))
}

/// An address or a network in CIDR form.
fn is_destination(text: &str) -> bool {
    let text = text.trim();
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let Ok(address) = address.parse::<IpAddr>() else { return false };
    let bits = if address.is_ipv4() { 32 } else { 128 };
    prefix.is_none_or(|prefix| {
        prefix.bytes().all(|byte| byte.is_ascii_digit()) && prefix.parse::<u32>().is_ok_and(|prefix| prefix <= bits)
    })
}

fn processors(asked: Option<f64>) -> Result<Option<f64>, EngineError> {
    match asked {
        Some(vcpus) if !vcpus.is_finite() || vcpus < 0.0 => {
            Err(EngineError::InvalidInput("vcpus must be a positive number".to_owned()))
        }
        Some(vcpus) if vcpus > 0.0 => Ok(Some(vcpus)),
        Some(_) | None => Ok(None),
    }
}

/// Zero means the default, as for the published SDKs.
pub(crate) fn positive(asked: Option<u64>) -> Option<u64> {
    asked.filter(|asked| *asked > 0)
}

fn given<'a>(first: Option<&'a str>, second: Option<&'a str>) -> Option<&'a str> {
    blank_is_none(first).or(blank_is_none(second))
}

fn blank_is_none(text: Option<&str>) -> Option<&str> {
    text.map(str::trim).filter(|text| !text.is_empty())
}

pub(crate) fn check_text(what: &str, text: &str, max_bytes: usize) -> Result<(), EngineError> {
    if text.len() > max_bytes || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        let message = format!("{what} has at most {max_bytes} bytes, without spaces or control characters");
        return Err(EngineError::InvalidInput(message));
    }
    Ok(())
}

fn at_most(what: &str, count: usize, max: usize) -> Result<(), EngineError> {
    if count > max {
        return Err(EngineError::InvalidInput(format!("{count} {what} are more than {max}")));
    }
    Ok(())
}

fn invalid(error: impl std::fmt::Display) -> EngineError {
    EngineError::InvalidInput(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_addresses_and_networks() {
        for text in ["10.0.0.1", "10.0.0.0/8", "fd00::/8", "::1", " 192.168.1.1 ", "0.0.0.0/0"] {
            assert!(is_destination(text), "{text}");
        }
        for text in
            ["", "example.com", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "fd00::/129", "10.0.0.1:80", "1.2.3.4/"]
        {
            assert!(!is_destination(text), "{text}");
        }
    }

    #[test]
    fn a_template_gives_the_image_unless_the_request_truly_names_one() {
        let template = Template { image: "python:3.12".to_owned(), ..Template::default() };
        let image = |asked: Option<&str>, template: Option<&Template>| {
            let request = CreateRequest { image: asked.map(str::to_owned), ..CreateRequest::default() };
            image_of(&request, template, "default").unwrap()
        };
        assert_eq!(image(None, None), "default");
        assert_eq!(image(Some(""), None), "default");
        assert_eq!(image(Some("alpine:latest"), None), "alpine:latest");
        assert_eq!(image(Some("alpine:latest"), Some(&template)), "python:3.12");
        assert_eq!(image(None, Some(&template)), "python:3.12");
        assert_eq!(image(Some("debian"), Some(&template)), "debian");
    }

    #[test]
    fn a_limit_counts_as_asked_for_when_request_or_template_names_it() {
        let asked = |request: &CreateRequest, template: Option<&Template>| -> Vec<Limit> {
            requested_limits(request, template).into_iter().collect()
        };
        let silent = CreateRequest { memory_mb: Some(0), ..CreateRequest::default() };
        assert_eq!(asked(&silent, None), []);
        assert_eq!(asked(&silent, Some(&Template::default())), []);
        let explicit = CreateRequest { vcpus: Some(0.5), pids_limit: Some(9), ..CreateRequest::default() };
        assert_eq!(asked(&explicit, None), [Limit::Cpu, Limit::Pids]);
        let template = Template { memory_mb: Some(64), disk_size_mb: Some(1), ..Template::default() };
        assert_eq!(asked(&explicit, Some(&template)), [Limit::Memory, Limit::Cpu, Limit::Pids, Limit::Disk]);
    }

    #[test]
    fn environments_that_cannot_exist_are_refused() {
        let env = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        assert!(check_environment(&env("A", "b=c\n")).is_ok());
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "\0")] {
            assert!(check_environment(&env(name, value)).is_err(), "{name:?} {value:?}");
        }
        assert!(check_environment(&env("A", &"x".repeat(ENV_MAX_BYTES))).is_err());
    }
}
