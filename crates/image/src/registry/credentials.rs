//! Credentials as `docker login` leaves them: `auths`, identity tokens and
//! credential helpers of a docker `config.json`. Read anew for each login, so
//! that a `docker login` takes effect without a restart.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{ImageError, ImageReference};

/// The file is a few hundred bytes; helpers answer with even less.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
const MAX_HELPER_OUTPUT_BYTES: u64 = 64 << 10;
const HELPER_DEADLINE: Duration = Duration::from_secs(15);
/// What a helper gives as the user name when its secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// How to log in to a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    Anonymous,
    Password {
        user: String,
        password: String,
    },
    /// Exchanged for access tokens (OAuth2 refresh token).
    IdentityToken(String),
    /// Sent as it is.
    RegistryToken(String),
}

impl Credentials {
    /// What the docker `config.json` at `path` has for an image's registry.
    pub async fn for_image(path: Option<&Path>, image: &ImageReference) -> Result<Self, ImageError> {
        find(path, image.registry()).await
    }
}

/// Secrets stay out of logs.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Password { .. } => "Password(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
            Self::RegistryToken(_) => "RegistryToken(…)",
        })
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: HashMap<String, AuthEntry>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
struct AuthEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// What the config file at `path` has for `registry`. A missing file, or no
/// entry, means to go in anonymously.
pub(crate) async fn find(path: Option<&Path>, registry: &str) -> Result<Credentials, ImageError> {
    let Some(path) = path else { return Ok(Credentials::Anonymous) };
    let failed = |reason: String| ImageError::Credentials { registry: registry.to_owned(), reason };
    let mut content = Vec::new();
    match tokio::fs::File::open(path).await {
        Ok(file) => {
            file.take(MAX_CONFIG_BYTES).read_to_end(&mut content).await.map_err(|error| failed(error.to_string()))?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Credentials::Anonymous),
        Err(error) => return Err(failed(format!("the docker configuration cannot be read: {error}"))),
    }
    // The parser's message would quote the file.
    let config: DockerConfig =
        serde_json::from_slice(&content).map_err(|_| failed("the docker configuration is not valid JSON".into()))?;
    if let Some((key, helper)) = config.cred_helpers.iter().find(|(key, _)| same_registry(key, registry)) {
        return ask_helper(helper, key).await.map_err(failed);
    }
    let entry = config.auths.iter().find(|(key, _)| same_registry(key, registry));
    if let Some((_, entry)) = entry
        && let Some(credentials) = decode(entry).map_err(failed)?
    {
        return Ok(credentials);
    }
    match &config.creds_store {
        Some(helper) => {
            let key = entry.map_or(registry, |(key, _)| key.as_str());
            ask_helper(helper, key).await.map_err(failed)
        }
        None => Ok(Credentials::Anonymous),
    }
}

/// Keys are host names, or URLs from older versions of docker. Docker Hub goes
/// by several names, all below `docker.io`.
fn same_registry(key: &str, registry: &str) -> bool {
    fn host(text: &str) -> &str {
        let text = text.split_once("://").map_or(text, |(_, rest)| rest);
        let host = text.split_once('/').map_or(text, |(host, _)| host);
        if host == "docker.io" || host.ends_with(".docker.io") { "docker.io" } else { host }
    }
    host(key) == host(registry)
}

fn decode(entry: &AuthEntry) -> Result<Option<Credentials>, String> {
    if !entry.registrytoken.is_empty() {
        return Ok(Some(Credentials::RegistryToken(entry.registrytoken.clone())));
    }
    if !entry.identitytoken.is_empty() {
        return Ok(Some(Credentials::IdentityToken(entry.identitytoken.clone())));
    }
    if !entry.auth.is_empty() {
        let invalid = || "`auth` is not base64 of user:password".to_owned();
        let decoded = STANDARD.decode(entry.auth.trim()).map_err(|_| invalid())?;
        let decoded = String::from_utf8(decoded).map_err(|_| invalid())?;
        let (user, password) = decoded.split_once(':').ok_or_else(invalid)?;
        let password = password.trim_end_matches('\0');
        return Ok(Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() }));
    }
    if !entry.username.is_empty() {
        return Ok(Some(Credentials::Password { user: entry.username.clone(), password: entry.password.clone() }));
    }
    Ok(None)
}

/// Runs `docker-credential-NAME get` with the registry on standard input.
async fn ask_helper(helper: &str, key: &str) -> Result<Credentials, String> {
    if helper.is_empty()
        || !helper.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    {
        return Err("the credential helper's name is not valid".into());
    }
    let program = format!("docker-credential-{helper}");
    let answer = tokio::time::timeout(HELPER_DEADLINE, run_helper(&program, key))
        .await
        .map_err(|_| format!("`{program}` does not answer"))??;
    let Some(answer) = answer else { return Ok(Credentials::Anonymous) };
    let answer: HelperAnswer =
        serde_json::from_slice(&answer).map_err(|_| format!("`{program}` gave something else than credentials"))?;
    Ok(if answer.username == TOKEN_USER {
        Credentials::IdentityToken(answer.secret)
    } else {
        Credentials::Password { user: answer.username, password: answer.secret }
    })
}

/// `None` when the helper knows nothing: it then fails, and says so.
async fn run_helper(program: &str, key: &str) -> Result<Option<Vec<u8>>, String> {
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("`{program}` cannot be run: {error}"))?;
    let failed = |error: std::io::Error| format!("`{program}`: {error}");
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read has its reasons, and its exit status.
        let _ = stdin.write_all(key.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_HELPER_OUTPUT_BYTES).read_to_end(&mut output).await.map_err(failed)?;
    }
    let status = child.wait().await.map_err(failed)?;
    Ok(status.success().then_some(output))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn found(config: &str, registry: &str) -> Result<Credentials, ImageError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config).unwrap();
        find(Some(file.path()), registry).await
    }

    fn password(user: &str, password: &str) -> Credentials {
        Credentials::Password { user: user.into(), password: password.into() }
    }

    #[tokio::test]
    async fn entries_are_found_by_host_and_url() {
        let config = r#"{"auths":{
            "registry.example:5000":{"auth":"dXNlcjpwYTpzcw=="},
            "https://index.docker.io/v1/":{"identitytoken":"idt"},
            "plain.example":{"username":"u","password":"p"},
            "token.example":{"registrytoken":"rt"},
            "empty.example":{}}}"#;
        assert_eq!(found(config, "registry.example:5000").await.unwrap(), password("user", "pa:ss"));
        assert_eq!(found(config, "registry.example").await.unwrap(), Credentials::Anonymous);
        assert_eq!(found(config, "docker.io").await.unwrap(), Credentials::IdentityToken("idt".into()));
        assert_eq!(found(config, "plain.example").await.unwrap(), password("u", "p"));
        assert_eq!(found(config, "token.example").await.unwrap(), Credentials::RegistryToken("rt".into()));
        assert_eq!(found(config, "empty.example").await.unwrap(), Credentials::Anonymous);
        assert_eq!(found("{}", "x").await.unwrap(), Credentials::Anonymous);
        assert_eq!(find(Some(Path::new("/nonexistent/config.json")), "x").await.unwrap(), Credentials::Anonymous);
    }

    #[tokio::test]
    async fn broken_configurations_never_show_their_content() {
        for config in ["{\"auths\":{\"x\":{\"auth\":\"SECRET!\"}}}", "SECRET", r#"{"credsStore":"../SECRET"}"#] {
            let message = found(config, "x").await.unwrap_err().to_string();
            assert!(!message.contains("SECRET"), "{message}");
        }
        assert!(!format!("{:?}", password("u", "SECRET")).contains("SECRET"));
    }

    #[tokio::test]
    async fn a_missing_helper_is_named() {
        let message = found(r#"{"credHelpers":{"x":"stacyvm-none"}}"#, "x").await.unwrap_err().to_string();
        assert!(message.contains("docker-credential-stacyvm-none"), "{message}");
    }
}
