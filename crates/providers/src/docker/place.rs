//! How the agent's program gets to where the daemon can mount it: once per
//! daemon, read-only, shared by all sandboxes.
//!
//! A local daemon mounts a directory of ours. One elsewhere (or one that sees
//! another file system, as from within a container) gets the program as an
//! archive, into a volume named after its content.

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bollard::models::{ContainerCreateBody, HostConfig, Mount, MountType, VolumeCreateRequest};
use bollard::query_parameters::{ContainerArchiveInfoOptionsBuilder, UploadToContainerOptionsBuilder};
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex as AsyncMutex;

use super::daemon::Daemon;
use super::error::{DockerError, status};
use super::label;

/// Where containers see the directory with the program.
const TARGET: &str = "/.stacyvm/bin";
pub(super) const PROGRAM: &str = "/.stacyvm/bin/agent";
const PROGRAM_NAME: &str = "agent";
const PROGRAM_MODE: u32 = 0o555;

/// Of the hexadecimal digest, in names.
const DIGEST_CHARS: usize = 16;

/// Something the daemon can mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Directory(PathBuf),
    Volume(String),
}

impl Place {
    pub(super) fn mount(&self) -> Mount {
        let (typ, source) = match self {
            Self::Directory(path) => (MountType::BIND, path.display().to_string()),
            Self::Volume(name) => (MountType::VOLUME, name.clone()),
        };
        Mount {
            typ: Some(typ),
            source: Some(source),
            target: Some(TARGET.to_owned()),
            read_only: Some(true),
            ..Mount::default()
        }
    }
}

/// The agent's program and where it is by now.
pub(super) struct Program {
    bytes: &'static [u8],
    digest: String,
    directory: PathBuf,
    /// Whether the daemon may see our directory; false once it said that not.
    shared: Mutex<bool>,
    /// Held while the volume is filled; true once it was.
    volume_is_full: AsyncMutex<bool>,
}

impl Program {
    /// Writes the program into a directory below `dir`.
    pub(super) fn open(dir: &Path, bytes: &'static [u8], daemon_is_local: bool) -> io::Result<Self> {
        let mut digest = String::new();
        for byte in Sha256::digest(bytes) {
            let _ = write!(digest, "{byte:02x}");
        }
        digest.truncate(DIGEST_CHARS);
        let directory = dir.join(format!("agent-{digest}"));
        write_once(&directory, bytes)?;
        Ok(Self {
            bytes,
            digest,
            directory,
            shared: Mutex::new(daemon_is_local),
            volume_is_full: AsyncMutex::default(),
        })
    }

    /// Where the daemon finds it. `image` is any image that the daemon has.
    pub(super) async fn place(&self, daemon: &Daemon, instance: &str, image: &str) -> Result<Place, DockerError> {
        if self.is_shared() {
            return Ok(Place::Directory(self.directory.clone()));
        }
        let name = self.volume_name(instance);
        let mut is_full = self.volume_is_full.lock().await;
        // Somebody may have pruned the daemon's volumes; it would make an empty
        // one of that name.
        if !*is_full || !exists(daemon, &name).await? {
            *is_full = false;
            self.fill_volume(daemon, instance, image).await?;
            *is_full = true;
        }
        Ok(Place::Volume(name))
    }

    /// Takes in that the daemon does not find the directory; false when that
    /// was known.
    pub(super) fn not_shared(&self) -> bool {
        std::mem::replace(&mut *self.shared.lock().unwrap_or_else(PoisonError::into_inner), false)
    }

    pub(super) fn is_shared(&self) -> bool {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the program in our directory is what it should be.
    pub(super) fn check(&self) -> io::Result<()> {
        let length = std::fs::metadata(self.directory.join(PROGRAM_NAME))?.len();
        if length == self.bytes.len() as u64 { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// A server's own, so that no other removes it.
    pub(super) fn volume_name(&self, instance: &str) -> String {
        format!("stacyvm-agent-{instance}-{}", self.digest)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether a carrier may be at work.
    pub(super) fn is_placing(&self) -> bool {
        self.volume_is_full.try_lock().is_err()
    }

    /// Makes the volume and checks, through a container that is never started,
    /// that the whole program is in it.
    async fn fill_volume(&self, daemon: &Daemon, instance: &str, image: &str) -> Result<(), DockerError> {
        let name = self.volume_name(instance);
        let request = VolumeCreateRequest {
            name: Some(name.clone()),
            labels: Some(label::of_agent(instance, &self.digest)),
            ..VolumeCreateRequest::default()
        };
        daemon.client.create_volume(request).await.map_err(DockerError::api("make the agent's volume"))?;
        let carrier = self.make_carrier(daemon, instance, image, &name).await?;
        let filled = self.fill(daemon, &carrier).await;
        daemon.remove(&carrier).await?;
        filled
    }

    async fn make_carrier(
        &self,
        daemon: &Daemon,
        instance: &str,
        image: &str,
        volume: &str,
    ) -> Result<String, DockerError> {
        let mount = Mount { read_only: Some(false), ..Place::Volume(volume.to_owned()).mount() };
        let body = ContainerCreateBody {
            image: Some(image.to_owned()),
            entrypoint: Some(vec![PROGRAM.to_owned()]),
            labels: Some(label::of_agent(instance, &self.digest)),
            host_config: Some(HostConfig {
                mounts: Some(vec![mount]),
                network_mode: Some("none".to_owned()),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        };
        let made = daemon.client.create_container(None, body).await;
        Ok(made.map_err(DockerError::api("make the agent's carrier"))?.id)
    }

    async fn fill(&self, daemon: &Daemon, carrier: &str) -> Result<(), DockerError> {
        if self.is_complete(daemon, carrier).await? {
            return Ok(());
        }
        let archive = archive(self.bytes).map_err(DockerError::system("pack the agent"))?;
        let options = UploadToContainerOptionsBuilder::default().path(TARGET).build();
        let upload = daemon.client.upload_to_container(carrier, Some(options), bollard::body_full(archive.into()));
        upload.await.map_err(DockerError::api("upload the agent"))?;
        if self.is_complete(daemon, carrier).await? {
            return Ok(());
        }
        Err(DockerError::system("upload the agent")(io::ErrorKind::InvalidData.into()))
    }

    async fn is_complete(&self, daemon: &Daemon, carrier: &str) -> Result<bool, DockerError> {
        let options = ContainerArchiveInfoOptionsBuilder::default().path(PROGRAM).build();
        match daemon.client.get_container_archive_info(carrier, Some(options)).await {
            Ok(found) => Ok(u64::try_from(found.size).ok() == Some(self.bytes.len() as u64)),
            Err(error) if status(&error) == Some(404) => Ok(false),
            Err(error) => Err(DockerError::api("look at the agent's volume")(error)),
        }
    }
}

async fn exists(daemon: &Daemon, volume: &str) -> Result<bool, DockerError> {
    match daemon.client.inspect_volume(volume).await {
        Ok(_) => Ok(true),
        Err(error) if status(&error) == Some(404) => Ok(false),
        Err(error) => Err(DockerError::api("look at the agent's volume")(error)),
    }
}

/// One complete directory, or none.
fn write_once(directory: &Path, bytes: &[u8]) -> io::Result<()> {
    let program = directory.join(PROGRAM_NAME);
    if std::fs::read(&program).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    match std::fs::DirBuilder::new().mode(0o755).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    let fresh = directory.join("agent.new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o755).open(&fresh)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    std::fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(PROGRAM_MODE))?;
    std::fs::rename(fresh, program)
}

fn archive(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(PROGRAM_MODE);
    header.set_uid(0);
    header.set_gid(0);
    let mut archive = tar::Builder::new(Vec::with_capacity(bytes.len() + 2048));
    archive.append_data(&mut header, PROGRAM_NAME, bytes)?;
    archive.into_inner()
}
