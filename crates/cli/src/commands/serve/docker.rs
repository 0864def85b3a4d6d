//! Which docker daemon, found as docker's own client finds it, and what its
//! containers are.
//!
//! `providers.docker.socket`, else `DOCKER_HOST`, else the context that
//! `DOCKER_CONTEXT` or `config.json` names, else the usual socket.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use stacyvm_providers::docker::{CapabilitySet, ClientIdentity, DockerOptions, Endpoint, Network, Seccomp, TlsFiles};
use stacyvm_sandbox::ProviderDefaults;

use super::options::{docker_config, docker_dir, non_blank};
use crate::config::{Config, Docker, Environment, PreviewMode};
use crate::failure::Advice;

/// The context that stands for no context.
const DEFAULT_CONTEXT: &str = "default";
const DOCKER_ENDPOINT: &str = "docker";

/// Such a file has a few hundred bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The provider's settings, or what is wrong with which key.
pub(super) fn options(config: &Config, data_dir: &Path, environment: &Environment) -> Result<DockerOptions, Advice> {
    let settings = &config.docker;
    let of = |key: &'static str| move |message: String| Advice::new(message, format!("see providers.docker.{key}"));
    let endpoint = endpoint(settings, environment)?;
    Ok(DockerOptions {
        runtime: non_blank(&settings.runtime).unwrap_or_else(|| "runc".to_owned()),
        network: Network::parse(&settings.network_mode).map_err(of("network_mode"))?,
        seccomp: Seccomp::read(&settings.seccomp_profile).map_err(of("seccomp_profile"))?,
        read_only_rootfs: settings.read_only_rootfs,
        user: settings.user.clone(),
        capabilities: CapabilitySet::parse(&settings.dropped_caps, &settings.added_caps)
            .map_err(of("dropped_caps and providers.docker.added_caps"))?,
        tmpfs: settings.tmpfs.clone(),
        defaults: ProviderDefaults {
            image: settings.default_image.clone(),
            memory_mib: settings.memory.map(|size| size.mib),
            vcpus: settings.cpus.map(|processors| processors.0),
            pids_limit: settings.pids_limit.filter(|limit| *limit > 0),
        },
        docker_config: docker_config(config, environment),
        traefik_domain: match config.server.preview_mode {
            PreviewMode::Builtin => None,
            PreviewMode::Traefik => non_blank(&config.server.preview_domain),
        },
        ..DockerOptions::new(data_dir, endpoint)
    })
}

fn endpoint(settings: &Docker, environment: &Environment) -> Result<Endpoint, Advice> {
    let own = settings.tls_dir.as_deref().map(tls_files);
    if let Some(address) = non_blank(&settings.socket) {
        let tls = own.or_else(|| tls_of_environment(environment));
        return parse(&address, tls, "providers.docker.socket");
    }
    if let Some(address) = environment.get("DOCKER_HOST") {
        return parse(address, own.or_else(|| tls_of_environment(environment)), "DOCKER_HOST");
    }
    match context_name(environment)? {
        Some(name) => of_context(&name, own, environment),
        None => Ok(Endpoint::default_socket()),
    }
}

fn parse(address: &str, tls: Option<TlsFiles>, from: &str) -> Result<Endpoint, Advice> {
    Endpoint::parse(address, tls).map_err(|message| Advice::new(message, format!("see {from}")))
}

/// As docker's client does: only where verification is asked for.
fn tls_of_environment(environment: &Environment) -> Option<TlsFiles> {
    environment.get("DOCKER_TLS_VERIFY")?;
    let dir = environment.get("DOCKER_CERT_PATH").map(PathBuf::from).or_else(|| docker_dir(environment))?;
    Some(tls_files(&dir))
}

fn tls_files(dir: &Path) -> TlsFiles {
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let identity = certificate.exists().then_some(ClientIdentity { certificate, key });
    TlsFiles { ca: dir.join("ca.pem"), identity }
}

/// Of docker's `config.json`, what matters here.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct ClientConfig {
    current_context: String,
}

fn context_name(environment: &Environment) -> Result<Option<String>, Advice> {
    let chosen = match environment.get("DOCKER_CONTEXT") {
        Some(name) => Some(name.to_owned()),
        None => match docker_dir(environment).map(|dir| dir.join("config.json")).filter(|path| path.exists()) {
            Some(path) => non_blank(&read::<ClientConfig>(&path)?.current_context),
            None => None,
        },
    };
    Ok(chosen.filter(|name| name != DEFAULT_CONTEXT))
}

/// `contexts/meta/DIGEST/meta.json` in docker's directory.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ContextMeta {
    #[serde(default)]
    endpoints: std::collections::BTreeMap<String, ContextEndpoint>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ContextEndpoint {
    #[serde(default)]
    host: String,
    #[serde(default, rename = "SkipTLSVerify")]
    skip_tls_verify: bool,
}

fn of_context(name: &str, own_tls: Option<TlsFiles>, environment: &Environment) -> Result<Endpoint, Advice> {
    let contexts = docker_dir(environment).unwrap_or_default().join("contexts");
    let digest = digest_of(name);
    let path = contexts.join("meta").join(&digest).join("meta.json");
    if !path.exists() {
        let message = format!("there is no docker context `{name}` ({} does not exist)", path.display());
        return Err(Advice::new(message, "see `docker context ls`, DOCKER_CONTEXT, or set providers.docker.socket"));
    }
    let meta: ContextMeta = read(&path)?;
    let Some(endpoint) = meta.endpoints.get(DOCKER_ENDPOINT).filter(|endpoint| !endpoint.host.is_empty()) else {
        let message = format!("the docker context `{name}` names no daemon");
        return Err(Advice::new(message, "see `docker context inspect`, or set providers.docker.socket"));
    };
    if endpoint.skip_tls_verify {
        let message = format!("the docker context `{name}` does not verify its daemon");
        return Err(Advice::new(message, "give it a CA (`docker context update`), or set providers.docker.socket"));
    }
    let tls_dir = contexts.join("tls").join(&digest).join(DOCKER_ENDPOINT);
    let tls = own_tls.or_else(|| tls_dir.join("ca.pem").exists().then(|| tls_files(&tls_dir)));
    parse(&endpoint.host, tls, &format!("the docker context `{name}`"))
}

/// Docker names a context's directories by the SHA-256 of its name.
fn digest_of(name: &str) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(name.as_bytes()) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, Advice> {
    let failed = |error: &dyn std::fmt::Display| {
        Advice::new(format!("cannot read {}: {error}", path.display()), "mend it, or set providers.docker.socket")
    };
    let length = std::fs::metadata(path).map_err(|error| failed(&error))?.len();
    if length > MAX_FILE_BYTES {
        return Err(failed(&format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    let bytes = std::fs::read(path).map_err(|error| failed(&error))?;
    serde_json::from_slice(&bytes).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    struct Home(tempfile::TempDir);

    impl Home {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        /// The endpoint that a configuration and variables lead to.
        fn endpoint(&self, settings: &str, variables: &[(&str, &str)]) -> Result<Endpoint, String> {
            let variables: BTreeMap<String, String> =
                variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            let home = self.0.path();
            self.write("stacyvm.yaml", &format!("providers: {{docker: {{{settings}}}}}\n"));
            let environment = Environment { variables, home: Some(home.to_owned()), current_dir: home.to_owned() };
            let config = crate::config::load(None, &environment).map_err(|error| error.to_string())?.config;
            let options = options(&config, home, &environment).map_err(|advice| advice.to_string())?;
            Ok(options.endpoint)
        }

        fn shown(&self, settings: &str, variables: &[(&str, &str)]) -> String {
            self.endpoint(settings, variables).unwrap().to_string()
        }

        fn context(&self, name: &str, meta: &str) -> String {
            let digest = digest_of(name);
            self.write(&format!(".docker/contexts/meta/{digest}/meta.json"), meta);
            digest
        }
    }

    #[test]
    fn the_daemon_is_found_as_dockers_client_finds_it() {
        let home = Home::new();
        assert_eq!(home.shown("", &[]), "unix:///var/run/docker.sock");
        home.context("box", r#"{"Name":"box","Endpoints":{"docker":{"Host":"unix:///box.sock"}}}"#);
        home.context("other", r#"{"Name":"other","Endpoints":{"docker":{"Host":"tcp://other:1"}}}"#);
        home.write(".docker/config.json", r#"{"currentContext": "box", "auths": {}}"#);
        assert_eq!(home.shown("", &[]), "unix:///box.sock");
        assert_eq!(home.shown("", &[("DOCKER_CONTEXT", "other")]), "tcp://other:1");
        assert_eq!(home.shown("", &[("DOCKER_CONTEXT", "default")]), "unix:///var/run/docker.sock");
        let host = [("DOCKER_HOST", "tcp://host:2"), ("DOCKER_CONTEXT", "other")];
        assert_eq!(home.shown("", &host), "tcp://host:2");
        assert_eq!(home.shown("socket: /own.sock", &host), "unix:///own.sock");
    }

    #[test]
    fn certificates_come_with_the_address() {
        let home = Home::new();
        let tls_of = |endpoint: Endpoint| match endpoint {
            Endpoint::Tcp { tls, port, .. } => (tls, port),
            Endpoint::Unix(path) => panic!("{}", path.display()),
        };
        let digest = home.context("box", r#"{"Endpoints":{"docker":{"Host":"tcp://box"}}}"#);
        for file in ["ca.pem", "cert.pem", "key.pem"] {
            home.write(&format!(".docker/contexts/tls/{digest}/docker/{file}"), "x");
        }
        let (tls, port) = tls_of(home.endpoint("", &[("DOCKER_CONTEXT", "box")]).unwrap());
        let tls = tls.unwrap();
        assert!(tls.ca.ends_with(format!("{digest}/docker/ca.pem")) && tls.identity.is_some() && port == 2376);

        let host = ("DOCKER_HOST", "tcp://host");
        assert_eq!(tls_of(home.endpoint("", &[host]).unwrap()), (None, 2375));
        let (tls, _) = tls_of(home.endpoint("", &[host, ("DOCKER_TLS_VERIFY", "1")]).unwrap());
        assert_eq!(tls.unwrap().ca, home.0.path().join(".docker/ca.pem"));
        let variables = [host, ("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", "/certs")];
        let (tls, _) = tls_of(home.endpoint("", &variables).unwrap());
        assert_eq!(tls, Some(TlsFiles { ca: "/certs/ca.pem".into(), identity: None }));
        let (tls, _) = tls_of(home.endpoint("socket: tcp://x, tls_dir: /own", &variables).unwrap());
        assert_eq!(tls.unwrap().ca, Path::new("/own/ca.pem"));
    }

    #[test]
    fn what_cannot_be_meant_says_where_it_stands() {
        let home = Home::new();
        home.context("lax", r#"{"Endpoints":{"docker":{"Host":"tcp://x","SkipTLSVerify":true}}}"#);
        home.context("none", r#"{"Endpoints":{}}"#);
        home.context("broken", "{");
        for (settings, variables, part) in [
            ("", vec![("DOCKER_CONTEXT", "gone")], "no docker context `gone`"),
            ("", vec![("DOCKER_CONTEXT", "lax")], "does not verify"),
            ("", vec![("DOCKER_CONTEXT", "none")], "names no daemon"),
            ("", vec![("DOCKER_CONTEXT", "broken")], "meta.json"),
            ("", vec![("DOCKER_HOST", "ssh://me@box")], "forward the socket"),
            ("network_mode: 'container:x'", vec![], "`container:x`"),
            ("seccomp_profile: /nonexistent.json", vec![], "/nonexistent.json"),
            ("dropped_caps: [NET_ROW]", vec![], "`NET_ROW`"),
            ("memory: 512x", vec![], "512m"),
        ] {
            let message = home.endpoint(settings, &variables).unwrap_err();
            assert!(message.contains(part), "{settings} {variables:?}: {message}");
        }
    }
}
