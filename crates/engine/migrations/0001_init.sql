-- Times are milliseconds since 1970 in UTC; durations carry their unit in the
-- name. JSON is text.

CREATE TABLE sandboxes (
    id              TEXT PRIMARY KEY,
    state           TEXT NOT NULL,
    provider        TEXT NOT NULL,
    image           TEXT NOT NULL,
    memory_mb       INTEGER NOT NULL,
    vcpus           REAL NOT NULL,
    disk_size_mb    INTEGER,
    owner_id        TEXT,
    tenant_id       TEXT,
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    metadata        TEXT NOT NULL,
    network         TEXT,
    limits          TEXT,
    reason          TEXT,
    generation      INTEGER NOT NULL,
    -- Commands of a template run before the sandbox counts as running.
    has_setup       INTEGER NOT NULL,
    idempotency_key TEXT,
    request_digest  TEXT
) STRICT;

CREATE INDEX sandboxes_by_state ON sandboxes (state, created_at DESC, id DESC);
CREATE INDEX sandboxes_by_update ON sandboxes (updated_at) WHERE state = 'destroyed';

CREATE TABLE exec_log (
    exec_id      TEXT PRIMARY KEY,
    sandbox_id   TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    command      TEXT NOT NULL,
    status       TEXT NOT NULL,
    pid          INTEGER,
    exit_code    INTEGER,
    started_at   INTEGER NOT NULL,
    duration_us  INTEGER,
    -- When the command is to be killed, for a server that takes it over.
    deadline_at  INTEGER,
    terminal     INTEGER NOT NULL,
    output       BLOB
) STRICT;

CREATE INDEX exec_log_by_sandbox ON exec_log (sandbox_id, started_at DESC, exec_id DESC);
CREATE INDEX exec_log_by_time ON exec_log (started_at);
CREATE INDEX exec_log_running ON exec_log (sandbox_id) WHERE status = 'running';

CREATE TABLE operation_log (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    at          INTEGER NOT NULL,
    actor       TEXT NOT NULL,
    tenant_id   TEXT,
    action      TEXT NOT NULL,
    sandbox_id  TEXT,
    provider    TEXT NOT NULL,
    resource    TEXT NOT NULL,
    success     INTEGER NOT NULL,
    detail      TEXT NOT NULL,
    duration_us INTEGER NOT NULL
) STRICT;

CREATE INDEX operation_log_by_time ON operation_log (at);
CREATE INDEX operation_log_by_sandbox ON operation_log (sandbox_id, id DESC);

CREATE TABLE events (
    id         INTEGER PRIMARY KEY,
    kind       TEXT NOT NULL,
    sandbox_id TEXT,
    tenant_id  TEXT,
    at         INTEGER NOT NULL,
    data       TEXT
) STRICT;

CREATE TABLE templates (
    name TEXT PRIMARY KEY,
    body TEXT NOT NULL
) STRICT;

CREATE TABLE owner_quotas (
    owner_id            TEXT PRIMARY KEY,
    max_sandboxes       INTEGER NOT NULL,
    max_ttl_s           INTEGER NOT NULL,
    max_exec_timeout_s  INTEGER NOT NULL,
    created_at          INTEGER NOT NULL,
    updated_at          INTEGER NOT NULL
) STRICT;

-- Numbers that outlive the rows they are about.
CREATE TABLE counters (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
