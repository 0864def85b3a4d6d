//! The one table of routes: method, path, scope, body and handler of each, and
//! what the API document says about it.

mod audit;
mod events;
mod exec;
mod exec_socket;
mod exec_stream;
mod file;
mod key;
mod port;
mod provider;
mod quota;
mod sandbox;
mod socket_form;
mod system;
mod template;
mod transfer;

use axum::Router;
use axum::middleware::from_fn_with_state;
use http::StatusCode;
use stacyvm_api::{
    AdmissionDecision, ApiKey, ApiKeyQuery, ApiKeyRequest, AuditQuery, AuditRecord, ChmodRequest, CreateRequest,
    CreatedApiKey, Event, ExecRequest, ExecResult, ExtendRequest, FileInfo, Health, HostStats, KeyRevokeQuery,
    ListQuery, MakeDirRequest, MoveRequest, OwnerQuota, OwnerQuotaRequest, OwnerUsage, PoolStatus, Port, PortLink,
    PortLinkRequest, PortRequest, ProcessSummary, ProviderDetail, ProviderHealth, PruneResult, QuotaSummary, Readiness,
    ResizeRequest, Sandbox, SandboxStats, SignalRequest, StatusBody, StdinRequest, StreamChunk, Template,
    TemplateSpawnRequest, Version, WatchEvent, WriteRequest,
};

use crate::App;
use crate::auth::Scope;
use crate::openapi::{self, Doc};
use crate::table::{self, BodyRule, Route, delete, get, post, put};

const TAR: &str = "application/x-tar";
const JSON: &str = "application/json";
const OCTETS: &str = "application/octet-stream";

/// Every route that exists.
pub(crate) fn table() -> Vec<Route> {
    let mut all = Vec::new();
    all.extend(sandboxes());
    all.extend(ports());
    all.extend(commands());
    all.extend(files());
    all.extend(templates());
    all.extend(quotas());
    all.extend(operations());
    all.extend(administration());
    all.extend(for_admins());
    all.extend(document());
    all
}

pub(crate) fn router(app: &App) -> Router {
    table::router(app, table()).layer(from_fn_with_state(app.clone(), crate::edge::edge)).with_state(app.clone())
}

fn sandboxes() -> Vec<Route> {
    use Scope::{Api, Read};
    vec![
        post("/sandboxes", Api, sandbox::create).slash().body(BodyRule::Json).doc(
            Doc::new("create_sandbox", "Create a sandbox")
                .text("Answers when commands can run, image pulls included. A client that goes away gives it up.")
                .header("X-User-ID", "Whom the sandbox is accounted to; wins over `owner_id`.")
                .header("Idempotency-Key", "Repeating a request with the same key gives the same sandbox.")
                .takes::<CreateRequest>()
                .gives_with::<Sandbox>(StatusCode::CREATED, "It runs."),
        ),
        get("/sandboxes", Read, sandbox::list).slash().doc(
            Doc::new("list_sandboxes", "List sandboxes, newest first")
                .text("All states but `destroyed`. The next page's cursor is in the header `X-Next-Cursor`.")
                .query::<ListQuery>()
                .gives_list::<Sandbox>("The sandboxes."),
        ),
        delete("/sandboxes", Api, sandbox::prune).slash().doc(
            Doc::new("prune_sandboxes", "Destroy every sandbox whose time is up").gives::<PruneResult>("How many."),
        ),
        post("/sandboxes/admission", Read, sandbox::admission).body(BodyRule::Json).doc(
            Doc::new("admission", "Ask whether a create would be admitted")
                .takes::<CreateRequest>()
                .gives::<AdmissionDecision>("The decision, also when it is no."),
        ),
        get("/sandboxes/{id}", Read, sandbox::get)
            .slash()
            .doc(Doc::new("get_sandbox", "Show a sandbox").gives::<Sandbox>("The sandbox.")),
        delete("/sandboxes/{id}", Api, sandbox::destroy).slash().doc(
            Doc::new("destroy_sandbox", "Destroy a sandbox")
                .text("Unknown ids succeed too.")
                .gives::<StatusBody>("`destroyed`: everything it used is freed.")
                .gives_with::<StatusBody>(
                    StatusCode::ACCEPTED,
                    "`destroying`: the runtime is asked again until it is.",
                ),
        ),
        post("/sandboxes/{id}/extend", Api, sandbox::extend).body(BodyRule::Json).doc(
            Doc::new("extend_sandbox", "Let a sandbox live `ttl` from now")
                .takes::<ExtendRequest>()
                .gives::<Sandbox>("The sandbox."),
        ),
        get("/sandboxes/{id}/stats", Read, sandbox::stats)
            .doc(Doc::new("sandbox_stats", "Read a sandbox's resource use").gives::<SandboxStats>("The reading.")),
        get("/sandboxes/{id}/logs", Read, sandbox::logs).doc(
            Doc::new("sandbox_logs", "Read the last lines that a sandbox's commands wrote")
                .query::<sandbox::LogsQuery>()
                .gives_list::<String>("Lines, oldest first."),
        ),
    ]
}

fn ports() -> Vec<Route> {
    use Scope::{Api, Read};
    vec![
        get("/sandboxes/{id}/ports", Read, port::list).doc(
            Doc::new("sandbox_ports", "List the TCP ports that listen inside")
                .text("Each with the address of its preview and who may open it.")
                .gives_list::<Port>("Ports."),
        ),
        get("/sandboxes/{id}/ports/{port}", Read, port::get)
            .doc(Doc::new("get_port", "Show a port").gives::<Port>("The port, whether or not something listens.")),
        put("/sandboxes/{id}/ports/{port}", Api, port::set).body(BodyRule::Json).doc(
            Doc::new("set_port", "Say who may open a port's preview")
                .text("Without it: anybody while the server has no key, else holders of a link or a key.")
                .takes::<PortRequest>()
                .gives::<Port>("The port."),
        ),
        post("/sandboxes/{id}/ports/{port}/link", Api, port::link).body(BodyRule::OptionalJson).doc(
            Doc::new("link_port", "Make a signed link that opens a port's preview for a while")
                .takes::<PortLinkRequest>()
                .gives_with::<PortLink>(StatusCode::CREATED, "The link."),
        ),
        get("/sandboxes/{id}/ports/{port}/forward", Api, port::forward).doc(
            Doc::new("forward_port", "Open a raw connection to a port")
                .text(
                    "Needs `Connection: upgrade` and `Upgrade: stacyvm-forward`; after 101 the connection's bytes are \
                     the port's, each direction until its end.",
                )
                .gives_nothing(StatusCode::SWITCHING_PROTOCOLS, "Bytes follow."),
        ),
    ]
}

fn commands() -> Vec<Route> {
    use Scope::{Api, Read};
    vec![
        post("/sandboxes/{id}/exec", Api, exec::run).body(BodyRule::FileJson).doc(
            Doc::new("exec", "Run a command")
                .text(
                    "With `stream` the answer is lines of JSON while the command runs; with `background` it comes at \
                     once. A client that goes away leaves the command running.",
                )
                .takes::<ExecRequest>()
                .gives::<ExecResult>("It ended; a non-zero exit is a success of the call.")
                .gives_lines::<StreamChunk>("With `stream`: one chunk a line."),
        ),
        get("/sandboxes/{id}/exec", Read, exec::log).doc(
            Doc::new("exec_log", "List commands, newest first")
                .query::<exec::LogQuery>()
                .gives_list::<ProcessSummary>("Commands that run or ran."),
        ),
        get("/sandboxes/{id}/exec/ws", Api, exec_socket::open).doc(
            Doc::new("exec_socket", "Run a command over a WebSocket")
                .text(
                    "The first message decides: with `\"type\":\"start\"` or `\"attach\"` the connection is \
                     interactive (stdin, resize, signals, exit code), without a type it is one request and its output.",
                )
                .gives_nothing(StatusCode::SWITCHING_PROTOCOLS, "WebSocket messages follow."),
        ),
        get("/sandboxes/{id}/exec/{exec_id}", Read, exec::show)
            .doc(Doc::new("get_exec", "Show a command").gives::<ProcessSummary>("The command.")),
        get("/sandboxes/{id}/exec/{exec_id}/attach", Read, exec_stream::attach).doc(
            Doc::new("attach_exec", "Read a command's output from an offset on, then live")
                .query::<exec_stream::AttachQuery>()
                .gives_lines::<StreamChunk>("One chunk a line, the last of them `exit`."),
        ),
        post("/sandboxes/{id}/exec/{exec_id}/signal", Api, exec::signal).body(BodyRule::Json).doc(
            Doc::new("signal_exec", "Send a signal to a command's process group")
                .takes::<SignalRequest>()
                .gives::<StatusBody>("`signalled`"),
        ),
        post("/sandboxes/{id}/exec/{exec_id}/stdin", Api, exec::stdin).body(BodyRule::Json).doc(
            Doc::new("write_stdin", "Write to a command's standard input, or end it")
                .takes::<StdinRequest>()
                .gives::<StatusBody>("`written`"),
        ),
        post("/sandboxes/{id}/exec/{exec_id}/resize", Api, exec::resize).body(BodyRule::Json).doc(
            Doc::new("resize_exec", "Resize a command's terminal")
                .takes::<ResizeRequest>()
                .gives::<StatusBody>("`resized`"),
        ),
    ]
}

fn files() -> Vec<Route> {
    use Scope::{Api, Read};
    vec![
        post("/sandboxes/{id}/files", Api, file::write)
            .body(BodyRule::FileJson)
            .doc(Doc::new("write_file", "Write a small file").takes::<WriteRequest>().gives::<StatusBody>("`written`")),
        put("/sandboxes/{id}/files", Api, transfer::upload).body(BodyRule::Upload).doc(
            Doc::new("upload_file", "Write a file of any size from the request body")
                .query::<transfer::UploadQuery>()
                .takes_bytes(OCTETS)
                .gives::<FileInfo>("The file. What was there before stays until the last byte has arrived."),
        ),
        get("/sandboxes/{id}/files", Read, transfer::download).doc(
            Doc::new("read_file", "Read a file")
                .text("One range of bytes may be asked for with the header `Range`.")
                .query::<file::PathQuery>()
                .gives_bytes("The file's bytes.")
                .gives_raw(StatusCode::PARTIAL_CONTENT, OCTETS, "The range's bytes."),
        ),
        delete("/sandboxes/{id}/files", Api, file::remove).doc(
            Doc::new("delete_file", "Delete a file or a directory")
                .query::<file::RemoveQuery>()
                .gives::<StatusBody>("`deleted`"),
        ),
        get("/sandboxes/{id}/files/list", Read, file::list).doc(
            Doc::new("list_files", "List a directory").query::<file::ListQuery>().gives_list::<FileInfo>("Entries."),
        ),
        get("/sandboxes/{id}/files/stat", Read, file::stat)
            .doc(Doc::new("stat_file", "Look at a file").query::<file::PathQuery>().gives::<FileInfo>("The entry.")),
        get("/sandboxes/{id}/files/glob", Read, file::glob).doc(
            Doc::new("glob_files", "Find paths by a pattern with `*`, `?`, `[…]` and `**`")
                .query::<file::GlobQuery>()
                .gives_list::<String>("Paths, in order."),
        ),
        post("/sandboxes/{id}/files/move", Api, file::rename).body(BodyRule::Json).doc(
            Doc::new("move_file", "Move a file or a directory").takes::<MoveRequest>().gives::<StatusBody>("`moved`"),
        ),
        post("/sandboxes/{id}/files/chmod", Api, file::chmod).body(BodyRule::Json).doc(
            Doc::new("chmod_file", "Set permission bits")
                .takes::<ChmodRequest>()
                .gives::<StatusBody>("`chmod applied`"),
        ),
        post("/sandboxes/{id}/files/mkdir", Api, file::make_dir).body(BodyRule::Json).doc(
            Doc::new("make_dir", "Make a directory and its parents")
                .takes::<MakeDirRequest>()
                .gives::<FileInfo>("The directory."),
        ),
        get("/sandboxes/{id}/files/watch", Read, file::watch).doc(
            Doc::new("watch_files", "Watch a directory for changes")
                .query::<file::WatchQuery>()
                .gives_lines::<WatchEvent>("One change a line, until the client goes away."),
        ),
        get("/sandboxes/{id}/files/archive", Read, transfer::download_archive).doc(
            Doc::new("download_archive", "Read a tree as a tar stream").query::<file::PathQuery>().gives_raw(
                StatusCode::OK,
                TAR,
                "An uncompressed tar; names are relative to the path.",
            ),
        ),
        put("/sandboxes/{id}/files/archive", Api, transfer::upload_archive).body(BodyRule::Upload).doc(
            Doc::new("upload_archive", "Unpack a tar stream below a directory")
                .query::<file::PathQuery>()
                .takes_bytes(TAR)
                .gives::<StatusBody>("`extracted`"),
        ),
    ]
}

fn templates() -> Vec<Route> {
    use Scope::{Api, Read};
    vec![
        post("/templates", Api, template::create).slash().body(BodyRule::Json).doc(
            Doc::new("create_template", "Store a template")
                .takes::<Template>()
                .gives_with::<Template>(StatusCode::CREATED, "As stored."),
        ),
        get("/templates", Read, template::list)
            .slash()
            .doc(Doc::new("list_templates", "List templates by name").gives_list::<Template>("Templates.")),
        get("/templates/{name}", Read, template::get)
            .slash()
            .doc(Doc::new("get_template", "Show a template").gives::<Template>("The template.")),
        put("/templates/{name}", Api, template::update)
            .slash()
            .body(BodyRule::Json)
            .doc(Doc::new("update_template", "Replace a template").takes::<Template>().gives::<Template>("As stored.")),
        delete("/templates/{name}", Api, template::remove)
            .slash()
            .doc(Doc::new("delete_template", "Delete a template").gives::<StatusBody>("`deleted`")),
        post("/templates/{name}/spawn", Api, template::spawn).body(BodyRule::OptionalJson).doc(
            Doc::new("spawn_template", "Create a sandbox from a template")
                .takes::<TemplateSpawnRequest>()
                .gives_with::<Sandbox>(StatusCode::CREATED, "It runs."),
        ),
    ]
}

/// The same below `/quotas` and `/admin/quotas`.
fn quotas() -> Vec<Route> {
    use Scope::{Api, Read};
    vec![
        get("/quotas", Read, quota::list)
            .slash()
            .doc(Doc::new("list_quotas", "List owners' limits").gives_list::<OwnerQuota>("Quotas by owner.")),
        get("/quotas/summary", Read, quota::summary)
            .doc(Doc::new("quota_summary", "Count owners' limits").gives::<QuotaSummary>("Counts.")),
        get("/quotas/{owner_id}", Read, quota::get)
            .slash()
            .doc(Doc::new("get_quota", "Show an owner's limits").gives::<OwnerQuota>("The quota.")),
        put("/quotas/{owner_id}", Api, quota::put).slash().body(BodyRule::Json).doc(
            Doc::new("put_quota", "Replace an owner's limits")
                .takes::<OwnerQuotaRequest>()
                .gives::<OwnerQuota>("As stored."),
        ),
        delete("/quotas/{owner_id}", Api, quota::remove)
            .slash()
            .doc(Doc::new("delete_quota", "Delete an owner's limits").gives::<StatusBody>("`deleted`")),
        get("/quotas/{owner_id}/usage", Read, quota::usage)
            .doc(Doc::new("quota_usage", "Show what an owner uses and may use").gives::<OwnerUsage>("The usage.")),
    ]
}

fn operations() -> Vec<Route> {
    use Scope::{Api, Probe, Read};
    vec![
        get("/live", Probe, system::live).doc(Doc::new("live", "Whether the process answers").gives::<Health>("Yes.")),
        get("/health", Probe, system::health)
            .doc(Doc::new("health", "Whether the server works").gives::<Health>("Yes.")),
        get("/ready", Probe, system::ready).doc(
            Doc::new("ready", "Whether sandboxes can be made")
                .gives::<Readiness>("Yes.")
                .gives_with::<Readiness>(StatusCode::SERVICE_UNAVAILABLE, "Not now; the body says why."),
        ),
        get("/version", Probe, system::version).doc(Doc::new("version", "What runs here").gives::<Version>("It.")),
        get("/providers", Read, provider::list)
            .slash()
            .doc(Doc::new("list_providers", "List runtimes").gives_list::<ProviderHealth>("Runtimes by name.")),
        get("/providers/{name}", Read, provider::get)
            .doc(Doc::new("get_provider", "Show a runtime").gives::<ProviderDetail>("The runtime.")),
        post("/providers/test", Api, provider::test).body(BodyRule::OptionalJson).doc(
            Doc::new("test_providers", "Check every runtime now").gives_raw(
                StatusCode::OK,
                JSON,
                "By name, whether it is healthy.",
            ),
        ),
        get("/snapshots", Read, system::snapshots).doc(Doc::new("list_snapshots", "List snapshots").gives_raw(
            StatusCode::OK,
            JSON,
            "An empty list for now.",
        )),
        get("/pool/status", Read, system::pool_status)
            .doc(Doc::new("pool_status", "Show pool mode").gives::<PoolStatus>("Disabled for now.")),
        get("/events", Read, events::stream).doc(
            Doc::new("events", "Follow events as server-sent events")
                .header("Last-Event-ID", "Go on after this event.")
                .query::<events::EventsQuery>()
                .gives_raw(StatusCode::OK, "text/event-stream", "One event a block, without `event:` lines.")
                .names::<Event>(),
        ),
        get("/metrics", Read, system::metrics_json).doc(Doc::new("metrics", "Read the metrics as JSON").gives_raw(
            StatusCode::OK,
            JSON,
            "Metrics.",
        )),
        get("/metrics/prometheus", Read, system::metrics_prometheus).doc(
            Doc::new("metrics_prometheus", "Read the metrics as Prometheus text").gives_raw(
                StatusCode::OK,
                "text/plain",
                "Metrics, or OpenMetrics when `Accept` asks for it.",
            ),
        ),
        get("/system/stats", Read, system::host_stats)
            .doc(Doc::new("host_stats", "Read the host's load").gives::<HostStats>("The reading.")),
        get("/diagnostics", Read, system::diagnostics).doc(
            Doc::new("diagnostics", "Read what support asks for; never a secret").gives_raw(
                StatusCode::OK,
                JSON,
                "The report.",
            ),
        ),
    ]
}

fn administration() -> Vec<Route> {
    use Scope::Admin;
    vec![
        post("/admin/keys", Admin, key::create).body(BodyRule::Json).doc(
            Doc::new("create_key", "Make an API key")
                .text("The first key closes a server that was open, and must have the scope `admin:*`.")
                .takes::<ApiKeyRequest>()
                .gives_with::<CreatedApiKey>(StatusCode::CREATED, "The key. It is never shown again."),
        ),
        get("/admin/keys", Admin, key::list).doc(
            Doc::new("list_keys", "List API keys, newest first")
                .query::<ApiKeyQuery>()
                .gives_list::<ApiKey>("What is known about them."),
        ),
        delete("/admin/keys/{key_id}", Admin, key::revoke).doc(
            Doc::new("revoke_key", "Revoke an API key")
                .text(
                    "It stops working before the answer, and so does what is under way with it. The last key with the \
                     scope `admin:*` is kept (`CONFLICT`), unless a key of the configuration has it or `force` is set.",
                )
                .query::<KeyRevokeQuery>()
                .gives::<StatusBody>("`revoked`"),
        ),
        get("/admin/audit", Admin, audit::list).doc(
            Doc::new("list_audit", "Read the audit log, newest first")
                .text("Every call that needs `api:*` or `admin:*`, and every refusal.")
                .query::<AuditQuery>()
                .gives_list::<AuditRecord>("Records.")
                .gives_raw(StatusCode::OK, audit::CSV, "With `format=csv`: a table."),
        ),
    ]
}

/// Aliases below `/admin` that demand an administrator.
fn for_admins() -> Vec<Route> {
    let aliased = ["/providers", "/quotas", "/metrics", "/diagnostics"];
    let prefix_len = table::BASE.len();
    let routes = operations().into_iter().chain(quotas());
    routes
        .filter(|route| aliased.iter().any(|group| route.info.path[prefix_len..].starts_with(group)))
        .map(|route| {
            let path = route.info.path[prefix_len..].to_owned();
            route.for_admins(&path)
        })
        .collect()
}

fn document() -> Vec<Route> {
    use Scope::Public;
    vec![
        get("", Public, openapi::doc_json)
            .at_root("/swagger/doc.json")
            .doc(Doc::new("api_document", "This document").gives_raw(StatusCode::OK, JSON, "OpenAPI.")),
        get("", Public, openapi::ui_root).at_root("/swagger").slash().doc(
            Doc::new("api_page", "A page to read and try the API").gives_raw(
                StatusCode::OK,
                "text/html",
                "Swagger UI.",
            ),
        ),
        get("", Public, openapi::ui)
            .at_root("/swagger/{*path}")
            .doc(Doc::new("api_page_part", "What the page loads").gives_raw(StatusCode::OK, OCTETS, "A file.")),
    ]
}
