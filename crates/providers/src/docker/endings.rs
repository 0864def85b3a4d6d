//! Noticing that containers end, and that the kernel kills in them, through one
//! stream of the daemon's events for all sandboxes.
//!
//! The stream breaks when the daemon restarts, and an event may fall into the
//! gap before it is opened; so what is waited for is also looked at whenever a
//! stream begins, and now and then while it lasts.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bollard::errors::Error as ApiError;
use bollard::models::{ContainerSummaryStateEnum, EventMessage};
use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt as _;
use stacyvm_api::SandboxId;
use stacyvm_sandbox::Ending;
use tokio::sync::watch;
use tokio::time::{Instant, interval_at, sleep};

use super::error::DockerError;
use super::label;
use super::server::Server;

/// Pause before a broken stream is opened again; doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The first look comes soon after the stream was asked for, which is when
/// something could have been missed.
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// The daemon may tell that a container ended before it tells that the kernel
/// killed in it.
const OOM_NEWS_TIME: Duration = Duration::from_millis(500);
const OOM_NEWS_POLL: Duration = Duration::from_millis(50);

/// What is known of the ends of this server's containers.
#[derive(Default)]
pub(super) struct Endings {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// By container id; true once it has ended.
    waiting: HashMap<String, watch::Sender<bool>>,
    /// Times the kernel killed for want of memory, by the container's name, which
    /// is the sandbox's.
    oom_kills: HashMap<String, u64>,
    is_following: bool,
}

impl Endings {
    /// Forgets a sandbox whose container was removed.
    pub(super) fn forget(&self, name: &str, container: &str) {
        let mut known = self.lock();
        known.oom_kills.remove(name);
        if let Some(sender) = known.waiting.remove(container) {
            sender.send_replace(true);
        }
    }

    pub(super) fn oom_kills(&self, name: &str) -> u64 {
        self.lock().oom_kills.get(name).copied().unwrap_or(0)
    }

    fn subscribe(&self, container: &str) -> watch::Receiver<bool> {
        let mut known = self.lock();
        known.waiting.entry(container.to_owned()).or_insert_with(|| watch::Sender::new(false)).subscribe()
    }

    fn ended(&self, container: &str) {
        if let Some(sender) = self.lock().waiting.remove(container) {
            sender.send_replace(true);
        }
    }

    fn take(&self, event: EventMessage) {
        let Some(actor) = event.actor else { return };
        let name = actor.attributes.and_then(|mut attributes| attributes.remove("name"));
        match (event.action.as_deref(), actor.id, name) {
            (Some("die" | "destroy"), Some(container), _) => self.ended(&container),
            (Some("oom"), _, Some(name)) => *self.lock().oom_kills.entry(name).or_default() += 1,
            _ => {}
        }
    }

    fn waited_for(&self) -> Vec<String> {
        let mut known = self.lock();
        // Those that nobody waits for any more are not looked at again.
        known.waiting.retain(|_, sender| sender.receiver_count() > 0);
        known.waiting.keys().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Resolves when a container has ended.
pub(super) async fn container_ended(server: &Arc<Server>, container: &str) {
    let mut ended = server.endings.subscribe(container);
    follow(server);
    // A sender that is gone has been told, or its container forgotten.
    let _ = ended.wait_for(|ended| *ended).await;
}

/// Resolves when a sandbox has ended, and says how.
pub(super) async fn wait(server: &Arc<Server>, id: &SandboxId) -> Result<Ending, DockerError> {
    let Some(found) = server.find(id).await? else { return Ok(Ending::Removed) };
    if found.running {
        container_ended(server, &found.container).await;
    }
    let told_by = Instant::now() + OOM_NEWS_TIME;
    loop {
        let Some(found) = server.find(id).await? else { return Ok(Ending::Removed) };
        if found.is_being_removed {
            // A removal ends it first.
            server.wait_until_removed(id).await?;
            return Ok(Ending::Removed);
        }
        if !server.oom_ends_sandbox() {
            return Ok(Ending::Died);
        }
        if found.oom_killed || server.endings.oom_kills(id.as_str()) > 0 {
            return Ok(Ending::OutOfMemory);
        }
        if Instant::now() >= told_by {
            return Ok(Ending::Died);
        }
        sleep(OOM_NEWS_POLL).await;
    }
}

/// Starts the one task that reads events, unless it runs.
pub(super) fn follow(server: &Arc<Server>) {
    if std::mem::replace(&mut server.endings.lock().is_following, true) {
        return;
    }
    let server = Arc::downgrade(server);
    tokio::spawn(async move {
        let mut pause = FIRST_PAUSE;
        while let Some(strong) = server.upgrade() {
            let began = Instant::now();
            drop(strong);
            if let Some(error) = read(&server).await {
                tracing::debug!(%error, "the docker daemon's events end");
            }
            pause = if began.elapsed() > LONGEST_PAUSE { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            sleep(pause).await;
        }
    });
}

/// Reads one stream to its end; gives up when the provider is gone.
async fn read(server: &Weak<Server>) -> Option<ApiError> {
    let strong = server.upgrade()?;
    let filters = HashMap::from([
        ("type", vec!["container".to_owned()]),
        ("event", ["die", "destroy", "oom"].map(str::to_owned).into()),
        ("label", vec![label::filter_of(&strong.instance)]),
    ]);
    let mut events =
        Box::pin(strong.daemon.client.events(Some(EventsOptionsBuilder::default().filters(&filters).build())));
    drop(strong);
    let mut look = interval_at(Instant::now() + FIRST_LOOK, LOOK_INTERVAL);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(event)) => server.upgrade()?.endings.take(event),
                Some(Err(error)) => return Some(error),
                None => return None,
            },
            _ = look.tick() => {
                if let Err(error) = settle(&*server.upgrade()?).await {
                    tracing::debug!(%error, "the docker daemon does not say what runs");
                }
            }
        }
    }
}

/// Compares what is waited for with what runs.
async fn settle(server: &Server) -> Result<(), DockerError> {
    let waited_for = server.endings.waited_for();
    if waited_for.is_empty() {
        return Ok(());
    }
    let running = server.containers().await?;
    let lives = |id: &String| {
        running.iter().any(|container| {
            container.id.as_ref() == Some(id)
                && matches!(
                    container.state,
                    Some(ContainerSummaryStateEnum::RUNNING | ContainerSummaryStateEnum::PAUSED)
                )
        })
    };
    for container in waited_for.iter().filter(|container| !lives(container)) {
        server.endings.ended(container);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bollard::models::EventActor;

    use super::*;

    fn event(action: &str, container: &str) -> EventMessage {
        let attributes = HashMap::from([("name".to_owned(), format!("sb-{container}"))]);
        EventMessage {
            action: Some(action.to_owned()),
            actor: Some(EventActor { id: Some(container.to_owned()), attributes: Some(attributes) }),
            ..EventMessage::default()
        }
    }

    #[test]
    fn events_reach_those_who_wait_and_no_others() {
        let endings = Endings::default();
        let (one, two) = (endings.subscribe("one"), endings.subscribe("two"));
        endings.take(event("die", "one"));
        endings.take(event("oom", "two"));
        endings.take(event("start", "two"));
        assert!(*one.borrow() && !*two.borrow());
        assert_eq!((endings.oom_kills("sb-one"), endings.oom_kills("sb-two")), (0, 1));
        endings.forget("sb-two", "two");
        assert!(*two.borrow());
        assert_eq!(endings.oom_kills("sb-two"), 0);
    }

    #[test]
    fn what_nobody_waits_for_is_forgotten() {
        let endings = Endings::default();
        let kept = endings.subscribe("kept");
        drop(endings.subscribe("left"));
        assert_eq!(endings.waited_for(), ["kept"]);
        drop(kept);
    }
}
