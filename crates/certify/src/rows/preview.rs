//! Row R14: port 3000, opened at the address that people open.

use std::time::Duration;

use stacyvm_api::WriteRequest;
use stacyvm_client::{Client, SandboxClient};

use super::{Looked, Making, Seen, make, same, shell};
use crate::Target;
use crate::run::Run;
use crate::server::Subject;

const PORT: u16 = 3000;
const LISTEN_LIMIT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
const DIRECTORY: &str = "/workspace/stacyvm-certify-page";

/// Serves files with whatever the image has.
const SERVE: &str = "cd /workspace/stacyvm-certify-page && { python3 -m http.server 3000 || busybox httpd -f -p 3000 \
                     || httpd -f -p 3000; }";

pub(crate) async fn look(run: &mut Run<'_>, subject: &Subject) {
    let id = run.own("R14");
    if !run.has(&id) {
        return;
    }
    let client = subject.client();
    let (mark, image) = (run.mark.clone(), run.options.image.clone());
    let making = Making::of(run.target, &image, &mark);
    let can_dial = !run.target.is_remote() || dials(&client, run.target).await;
    if !can_dial {
        let fix = "use a backend with the feature `dial` or `agent`, if previews are wanted";
        return run.note(&id, Seen::warn("this backend gives no way to ports, so there are no previews", fix));
    }
    run.look(&id, shown(&client, making)).await;
    // Our own proxy is the one that has to reach sandboxes; where another one is
    // in front of it, it passes requests on to ours.
    let seen = match run.status_of(&id) {
        Some(crate::Status::Pass) => Seen::pass("the server's own proxy reaches a probe inside").with(id),
        _ => Seen::fail("the server's own proxy does not reach a probe inside", format!("see {id}")),
    };
    run.note("DK-H4", seen);
}

/// What the provider says of itself; where it says nothing, it is tried.
async fn dials(client: &Client, target: Target) -> bool {
    let detail = client.provider(target.provider()).await;
    detail.map_or(true, |detail| detail.health.capabilities.iter().any(|it| it == "dial"))
}

async fn shown(client: &Client, making: Making<'_>) -> Looked {
    let sandbox = make(client, making).await?;
    let page = format!("preview of {}\n", sandbox.id());
    let seen = open(&sandbox, &page).await;
    let _ = sandbox.destroy().await;
    seen
}

async fn open(sandbox: &SandboxClient, page: &str) -> Looked {
    let path = format!("{DIRECTORY}/index.html");
    sandbox.write_file(&WriteRequest { path, content: page.to_owned(), ..WriteRequest::default() }).await?;
    sandbox.exec_background(&shell(SERVE)).await?;
    let Some(url) = sandbox.port(PORT).await?.url else {
        return Ok(Seen::fail("this server has no previews", "set server.preview_domain or server.preview_port"));
    };
    let end = tokio::time::Instant::now() + LISTEN_LIMIT;
    loop {
        let answer = sandbox.open_preview(PORT, "/index.html").await?;
        if answer.status == 200 {
            same("the page", &page.to_owned(), &String::from_utf8_lossy(&answer.body).into_owned())?;
            return Ok(Seen::pass(format!("{url} shows the page that is served inside")));
        }
        // Until something listens the server says 502.
        if answer.status != 502 || tokio::time::Instant::now() >= end {
            let fix = "use an image with python3 or busybox; see docs/preview.md for what the status means";
            return Ok(Seen::fail(format!("{url} answered {}", answer.status), fix));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
