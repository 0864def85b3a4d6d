//! What an image says about how it wants to be run.

use std::collections::BTreeMap;
use std::fmt;

use oci_spec::image::{Arch, ImageConfiguration, Os};

use crate::{Digest, ImageError};

/// The parts of an OCI image configuration that a sandbox honours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// In the image's order; a later entry of the same name wins.
    pub env: Vec<(String, String)>,
    pub workdir: Option<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`, as the image has it.
    pub user: Option<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `80/tcp`, `53/udp`, in order.
    pub exposed_ports: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub stop_signal: Option<String>,
    /// RFC 3339, where the image says so.
    pub created: Option<String>,
    pub architecture: String,
}

/// Operating system and processor an image is built for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    pub os: Os,
    pub architecture: Arch,
    /// `v7` of `arm/v7`.
    pub variant: Option<String>,
}

impl Platform {
    /// This machine.
    pub fn host() -> Self {
        Self { os: Os::Linux, architecture: Arch::default(), variant: None }
    }

    /// Images without a variant run on every variant; others must say ours,
    /// where we ask for one.
    pub(crate) fn accepts(&self, os: &Os, architecture: &Arch) -> bool {
        *os == self.os && *architecture == self.architecture
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

/// A parsed configuration blob.
#[derive(Debug, Clone)]
pub(crate) struct ParsedConfig {
    pub(crate) config: ImageConfig,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) os: Os,
    pub(crate) architecture: Arch,
}

pub(crate) fn parse_config(reference: &dyn fmt::Display, bytes: &[u8]) -> Result<ParsedConfig, ImageError> {
    let malformed = |reason: String| ImageError::malformed(reference, reason);
    let parsed: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|error| malformed(format!("configuration: {error}")))?;
    let diff_ids = parsed
        .rootfs()
        .diff_ids()
        .iter()
        .map(|text| text.parse::<Digest>().map_err(|error| malformed(error.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    let mut config = ImageConfig {
        created: parsed.created().clone(),
        architecture: parsed.architecture().to_string(),
        ..ImageConfig::default()
    };
    if let Some(run) = parsed.config() {
        config.env = run.env().iter().flatten().filter_map(|entry| split_env(entry)).collect();
        config.workdir = non_empty(run.working_dir().as_ref());
        config.user = non_empty(run.user().as_ref());
        config.entrypoint = run.entrypoint().clone().unwrap_or_default();
        config.cmd = run.cmd().clone().unwrap_or_default();
        config.exposed_ports = run.exposed_ports().clone().unwrap_or_default();
        config.exposed_ports.sort();
        config.labels = run.labels().clone().unwrap_or_default().into_iter().collect();
        config.stop_signal = non_empty(run.stop_signal().as_ref());
    }
    Ok(ParsedConfig { config, diff_ids, os: parsed.os().clone(), architecture: parsed.architecture().clone() })
}

/// Names are never empty; an entry without `=` has no value to give.
fn split_env(entry: &str) -> Option<(String, String)> {
    let (name, value) = entry.split_once('=')?;
    (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
}

fn non_empty(text: Option<&String>) -> Option<String> {
    text.filter(|text| !text.is_empty()).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_configuration_is_read() {
        let digest = Digest::of(b"layer");
        let json = format!(
            r#"{{"created":"2024-01-02T03:04:05Z","architecture":"amd64","os":"linux","config":{{
            "Env":["PATH=/usr/bin","EMPTY=","BROKEN","A=b=c"],"WorkingDir":"/srv","User":"1000:1000",
            "Entrypoint":["/bin/x"],"Cmd":["-v"],"ExposedPorts":{{"80/tcp":{{}},"443/tcp":{{}}}},
            "Labels":{{"k":"v"}},"StopSignal":"SIGQUIT"}},"rootfs":{{"type":"layers","diff_ids":["{digest}"]}}}}"#
        );
        let parsed = parse_config(&"x", json.as_bytes()).unwrap();
        assert_eq!(parsed.diff_ids, vec![digest]);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            parsed.config,
            ImageConfig {
                env: vec![pair("PATH", "/usr/bin"), pair("EMPTY", ""), pair("A", "b=c")],
                workdir: Some("/srv".into()),
                user: Some("1000:1000".into()),
                entrypoint: vec!["/bin/x".into()],
                cmd: vec!["-v".into()],
                exposed_ports: vec!["443/tcp".into(), "80/tcp".into()],
                labels: BTreeMap::from([pair("k", "v")]),
                stop_signal: Some("SIGQUIT".into()),
                created: Some("2024-01-02T03:04:05Z".into()),
                architecture: "amd64".into(),
            }
        );
    }

    #[test]
    fn nulls_and_absent_parts_are_tolerated() {
        let json = br#"{"architecture":"amd64","os":"linux","config":{"Env":null,"Cmd":null,"Labels":null,
            "ExposedPorts":null,"User":"","WorkingDir":""},"rootfs":{"type":"layers","diff_ids":[]},"history":null}"#;
        let parsed = parse_config(&"x", json).unwrap();
        assert_eq!(parsed.config, ImageConfig { architecture: "amd64".into(), ..ImageConfig::default() });
        assert!(parse_config(&"x", b"[]").is_err());
    }
}
