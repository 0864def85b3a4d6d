//! `filesystem.Filesystem`, as E2B's SDKs speak it.

use std::path::PathBuf;
use std::time::Duration;

use connectrpc::{ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures_util::stream;
use stacyvm_envd::filesystem::{self as wire, watch_dir_response};
use tokio::time::timeout;

use super::{Rpc, keepalive, user};
use crate::Failure;
use crate::files::blocking;
use crate::files::entry::{Entry, EntryKind};
use crate::files::tree::{self, Removal};
use crate::files::watch::{Change, ChangeKind, Depth, NetworkMounts, Watch, WatchOptions};
use crate::user::Identity;

impl wire::Filesystem for Rpc {
    async fn stat<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<impl Encodable<wire::StatResponse> + Send + use<'a>> {
        let path = self.path(&ctx, request.view().path)?;
        let entry = blocking(move || Entry::read(&path)).await?;
        Response::ok(wire::StatResponse { entry: message(entry).into() })
    }

    async fn make_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<impl Encodable<wire::MakeDirResponse> + Send + use<'a>> {
        let (path, owner) = self.path_and_user(&ctx, request.view().path)?;
        let entry = blocking(move || tree::make_dir(&path, &owner)).await?;
        Response::ok(wire::MakeDirResponse { entry: message(entry).into() })
    }

    async fn r#move<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<impl Encodable<wire::MoveResponse> + Send + use<'a>> {
        let (source, owner) = self.path_and_user(&ctx, request.view().source)?;
        let destination = self.path(&ctx, request.view().destination)?;
        let entry = blocking(move || tree::rename(&source, &destination, &owner)).await?;
        Response::ok(wire::MoveResponse { entry: message(entry).into() })
    }

    async fn list_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<impl Encodable<wire::ListDirResponse> + Send + use<'a>> {
        let path = self.path(&ctx, request.view().path)?;
        let depth = request.view().depth;
        let entries = blocking(move || tree::list(&path, depth)).await?;
        let entries = entries.into_iter().map(message).collect();
        Response::ok(wire::ListDirResponse { entries })
    }

    async fn remove<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<impl Encodable<wire::RemoveResponse> + Send + use<'a>> {
        let path = self.path(&ctx, request.view().path)?;
        blocking(move || tree::remove(&path, Removal::Recursive)).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::WatchDirResponse> + Send + use<>>> {
        let path = self.path(&ctx, request.view().path)?;
        let options = watch_options(request.view().recursive, request.view().allow_network_mounts);
        let watch = self.sandbox.watchers.watch(path, options).await?;
        Response::stream_ok(changes(watch, keepalive(&ctx), request.view().include_entry))
    }

    async fn create_watcher<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<impl Encodable<wire::CreateWatcherResponse> + Send + use<'a>> {
        let path = self.path(&ctx, request.view().path)?;
        let options = watch_options(request.view().recursive, request.view().allow_network_mounts);
        let watcher_id = self.sandbox.watchers.create(path, options).await?;
        Response::ok(wire::CreateWatcherResponse { watcher_id })
    }

    async fn get_watcher_events<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<impl Encodable<wire::GetWatcherEventsResponse> + Send + use<'a>> {
        let changes = self.sandbox.watchers.take(request.view().watcher_id)?;
        let events = changes.into_iter().map(|change| event(&change, None)).collect();
        Response::ok(wire::GetWatcherEventsResponse { events })
    }

    async fn remove_watcher<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<impl Encodable<wire::RemoveWatcherResponse> + Send + use<'a>> {
        self.sandbox.watchers.remove(request.view().watcher_id)?;
        Response::ok(wire::RemoveWatcherResponse::default())
    }
}

fn watch_options(recursive: bool, allow_network_mounts: bool) -> WatchOptions {
    WatchOptions {
        depth: if recursive { Depth::Recursive } else { Depth::Direct },
        network: if allow_network_mounts { NetworkMounts::Allowed } else { NetworkMounts::Refused },
    }
}

fn changes(
    watch: Watch,
    keepalive: Duration,
    include_entry: bool,
) -> impl futures_util::Stream<Item = Result<wire::WatchDirResponse, ConnectError>> + Send + 'static {
    let first = Some(watch_dir_response::Event::Start(Box::default()));
    stream::try_unfold((first, watch), move |(first, mut watch)| async move {
        let event = match first {
            Some(first) => first,
            None => match timeout(keepalive, watch.next()).await {
                Ok(Ok(Some(change))) => {
                    let path = watch.root().join(&change.name);
                    let entry = if include_entry { blocking(move || Entry::read(&path)).await.ok() } else { None };
                    watch_dir_response::Event::Filesystem(Box::new(event(&change, entry)))
                }
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(failure)) => return Err(failure.into()),
                Err(_) => watch_dir_response::Event::Keepalive(Box::default()),
            },
        };
        let response = wire::WatchDirResponse { event: Some(event) };
        Ok(Some((response, (None, watch))))
    })
}

fn event(change: &Change, entry: Option<Entry>) -> wire::FilesystemEvent {
    let kind = match change.kind {
        ChangeKind::Create => wire::EventType::EVENT_TYPE_CREATE,
        ChangeKind::Write => wire::EventType::EVENT_TYPE_WRITE,
        ChangeKind::Remove => wire::EventType::EVENT_TYPE_REMOVE,
        ChangeKind::Rename => wire::EventType::EVENT_TYPE_RENAME,
        ChangeKind::Chmod => wire::EventType::EVENT_TYPE_CHMOD,
    };
    wire::FilesystemEvent {
        name: change.name.to_string_lossy().into_owned(),
        r#type: kind.into(),
        entry: entry.map(message).into(),
    }
}

impl Rpc {
    pub(super) fn path(&self, ctx: &RequestContext, path: &str) -> Result<PathBuf, Failure> {
        self.path_and_user(ctx, path).map(|(path, _)| path)
    }

    fn path_and_user(&self, ctx: &RequestContext, path: &str) -> Result<(PathBuf, Identity), Failure> {
        let identity = self.sandbox.identity(user(ctx)?.as_deref())?;
        let path = identity.resolve_path(path)?;
        Ok((path, identity))
    }
}

fn message(entry: Entry) -> wire::EntryInfo {
    let kind = match entry.kind {
        EntryKind::File => wire::FileType::FILE_TYPE_FILE,
        EntryKind::Directory => wire::FileType::FILE_TYPE_DIRECTORY,
        EntryKind::Symlink => wire::FileType::FILE_TYPE_SYMLINK,
        EntryKind::Other => wire::FileType::FILE_TYPE_UNSPECIFIED,
    };
    wire::EntryInfo {
        permissions: entry.permissions(),
        name: entry.name,
        r#type: kind.into(),
        path: entry.path,
        size: i64::try_from(entry.size).unwrap_or(i64::MAX),
        mode: entry.mode,
        owner: entry.owner,
        group: entry.group,
        modified_time: stacyvm_envd::timestamp(entry.modified_seconds, entry.modified_nanos).into(),
        symlink_target: entry.symlink_target,
        ..Default::default()
    }
}
