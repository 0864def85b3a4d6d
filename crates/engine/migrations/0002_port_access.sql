-- Who may open the preview of a port, where somebody said so.

CREATE TABLE port_access (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    port       INTEGER NOT NULL,
    access     TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, port)
) STRICT, WITHOUT ROWID;
