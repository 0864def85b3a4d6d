//! Images at the daemon: looked up, pulled where missing, and what they say
//! about how to run them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bollard::auth::DockerCredentials;
use bollard::errors::Error as ApiError;
use bollard::models::{CreateImageInfo, ImageInspect};
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures_util::StreamExt as _;
use stacyvm_image::{Credentials, ImageReference};
use stacyvm_sandbox::{Progress, ProgressSink};

use super::daemon::Daemon;
use super::error::{DockerError, bounded, status};

/// Search path of commands in an image that sets none (moby's default).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Layers whose progress is added up; an image has at most 127.
const MAX_LAYERS: usize = 256;

/// An image that the daemon has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ImageFacts {
    /// Content id; what a container is made from, whatever its name means by then.
    pub(super) id: String,
    pub(super) env: BTreeMap<String, String>,
    pub(super) user: Option<String>,
    pub(super) workdir: Option<String>,
}

/// Finds an image, or has the daemon pull it.
pub(super) async fn ensure(
    daemon: &Daemon,
    name: &str,
    docker_config: Option<&Path>,
    progress: &dyn ProgressSink,
) -> Result<ImageFacts, DockerError> {
    let reference: ImageReference = name.parse().map_err(|error| DockerError::Image(Box::new(error)))?;
    let shown = reference.to_string();
    if let Some(found) = find(daemon, &shown).await? {
        return Ok(found);
    }
    pull(daemon, &reference, docker_config, progress).await?;
    let found = find(daemon, &shown).await?;
    found.ok_or_else(|| DockerError::Pull { message: format!("{shown} was pulled, but the daemon does not have it") })
}

async fn find(daemon: &Daemon, name: &str) -> Result<Option<ImageFacts>, DockerError> {
    match daemon.client.inspect_image(name).await {
        Ok(image) => Ok(Some(ImageFacts::from(image))),
        Err(error) if status(&error) == Some(404) => Ok(None),
        Err(error) => Err(DockerError::api("look at the image")(error)),
    }
}

async fn pull(
    daemon: &Daemon,
    reference: &ImageReference,
    docker_config: Option<&Path>,
    progress: &dyn ProgressSink,
) -> Result<(), DockerError> {
    let credentials =
        Credentials::for_image(docker_config, reference).await.map_err(|error| DockerError::Image(Box::new(error)))?;
    let selector = reference.digest().map(ToString::to_string);
    let selector = selector.as_deref().or(reference.tag()).unwrap_or("latest");
    let name = format!("{}/{}", reference.registry(), reference.repository());
    let options = CreateImageOptionsBuilder::default().from_image(&name).tag(selector).build();
    let mut steps = daemon.client.create_image(Some(options), None, for_daemon(credentials, reference.registry()));
    let mut layers = Layers::default();
    while let Some(step) = steps.next().await {
        match step {
            Ok(step) => progress.report(layers.take(&step)),
            Err(
                ApiError::DockerStreamError { error: message } | ApiError::DockerResponseServerError { message, .. },
            ) => return Err(DockerError::Pull { message: bounded(&message) }),
            Err(error) => return Err(DockerError::api("pull the image")(error)),
        }
    }
    Ok(())
}

fn for_daemon(credentials: Credentials, registry: &str) -> Option<DockerCredentials> {
    let of = DockerCredentials { serveraddress: Some(registry.to_owned()), ..DockerCredentials::default() };
    match credentials {
        Credentials::Anonymous => None,
        Credentials::Password { user, password } => {
            Some(DockerCredentials { username: Some(user), password: Some(password), ..of })
        }
        Credentials::IdentityToken(token) => Some(DockerCredentials { identitytoken: Some(token), ..of }),
        Credentials::RegistryToken(token) => Some(DockerCredentials { registrytoken: Some(token), ..of }),
    }
}

/// Adds up what the daemon says of each layer.
#[derive(Default)]
struct Layers {
    /// Bytes there and bytes in all, by layer.
    bytes: HashMap<String, (u64, u64)>,
}

impl Layers {
    fn take(&mut self, step: &CreateImageInfo) -> Progress {
        let message = step.status.as_deref().map(bounded).unwrap_or_default();
        let phase = if message == "Extracting" { "unpack" } else { "pull" };
        let known = self.bytes.len() < MAX_LAYERS;
        if let (Some(layer), Some(detail)) = (&step.id, &step.progress_detail)
            && let (Some(current), Some(total)) = (detail.current, detail.total)
            && phase == "pull"
            && (known || self.bytes.contains_key(layer))
        {
            let bytes = |count: i64| u64::try_from(count).unwrap_or(0);
            self.bytes.insert(layer.clone(), (bytes(current), bytes(total)));
        }
        let sum = |of: fn(&(u64, u64)) -> u64| self.bytes.values().map(of).fold(0, u64::saturating_add);
        let done_bytes = sum(|layer| layer.0);
        let message = step.id.as_ref().map_or(message.clone(), |layer| format!("{}: {message}", bounded(layer)));
        Progress { phase, message, done_bytes, total_bytes: sum(|layer| layer.1) }
    }
}

impl From<ImageInspect> for ImageFacts {
    fn from(image: ImageInspect) -> Self {
        let config = image.config.unwrap_or_default();
        let pairs = config.env.unwrap_or_default();
        let mut env: BTreeMap<String, String> =
            pairs.iter().filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        env.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        Self {
            id: image.id.unwrap_or_default(),
            env,
            user: given(config.user),
            // `/` is what an image says that says nothing.
            workdir: given(config.working_dir).filter(|workdir| workdir.starts_with('/') && workdir != "/"),
        }
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::{ImageConfig, ProgressDetail};

    use super::*;

    #[test]
    fn an_image_that_says_nothing_gets_defaults() {
        let facts = ImageFacts::from(ImageInspect::default());
        assert_eq!(facts.env["PATH"], DEFAULT_PATH);
        assert_eq!((facts.user, facts.workdir), (None, None));
        let config = ImageConfig {
            env: Some(vec!["PATH=/x".into(), "A=b=c".into(), "broken".into()]),
            user: Some("app".into()),
            working_dir: Some("/srv".into()),
            ..ImageConfig::default()
        };
        let facts = ImageFacts::from(ImageInspect { config: Some(config), ..ImageInspect::default() });
        assert_eq!(
            facts.env.into_iter().collect::<Vec<_>>(),
            [("A".into(), "b=c".into()), ("PATH".into(), "/x".into())]
        );
        assert_eq!((facts.user.as_deref(), facts.workdir.as_deref()), (Some("app"), Some("/srv")));
    }

    #[test]
    fn layers_are_added_up() {
        let step = |layer: &str, status: &str, current, total| CreateImageInfo {
            id: Some(layer.into()),
            status: Some(status.into()),
            progress_detail: Some(ProgressDetail { current: Some(current), total: Some(total) }),
            ..CreateImageInfo::default()
        };
        let mut layers = Layers::default();
        layers.take(&step("a", "Downloading", 5, 10));
        let progress = layers.take(&step("b", "Downloading", 1, 20));
        assert_eq!((progress.done_bytes, progress.total_bytes), (6, 30));
        let progress = layers.take(&step("a", "Extracting", 3, 10));
        assert_eq!((progress.phase, progress.done_bytes, progress.message.as_str()), ("unpack", 6, "a: Extracting"));
    }
}
