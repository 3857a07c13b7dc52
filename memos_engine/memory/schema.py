"""The tables of a store. Only `migrations.py` runs this.

What may have to be destroyed (texts, tags, vectors, payload references) lies in tables of its own; what
stays forever (versions, events, audit) holds ids, times, short labels and keyed fingerprints only.
"""

from __future__ import annotations

APPLICATION_ID = 0x4D6D4531  # "MmE1", in the header of every memory.db of ours


def frozen(table: str, *, why: str, operations: tuple[str, ...] = ("UPDATE", "DELETE")) -> tuple[str, ...]:
    """Triggers that refuse these operations on a table."""
    return tuple(
        f"CREATE TRIGGER {table}_no_{operation.lower()} BEFORE {operation} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table}: {why}'); END"
        for operation in operations
    )


_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    """CREATE TABLE principal (
        id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, user TEXT NOT NULL, created_at TEXT NOT NULL,
        UNIQUE (tenant, user)
    ) STRICT""",
    # The projection: what a memory is now. Everything here can be computed from versions and events.
    """CREATE TABLE cube (
        id TEXT PRIMARY KEY,
        provenance_id TEXT NOT NULL,
        owner INTEGER NOT NULL REFERENCES principal (id),
        kind TEXT NOT NULL CHECK (kind IN ('text', 'kv', 'lora')),
        version INTEGER NOT NULL CHECK (version >= 1),
        state TEXT NOT NULL CHECK (state IN ('generated', 'activated', 'merged', 'archived', 'expired',
        'frozen')), created_at TEXT NOT NULL,
        updated_at TEXT NOT NULL,
        origin TEXT NOT NULL,
        semantic_type TEXT NOT NULL,
        visibility TEXT NOT NULL DEFAULT 'private' CHECK (visibility IN ('private', 'shared', 'read_only')),
        priority INTEGER NOT NULL DEFAULT 0,
        ttl_at TEXT,
        sensitivity TEXT NOT NULL DEFAULT 'normal',
        uses INTEGER NOT NULL DEFAULT 0 CHECK (uses >= 0),
        last_used_at TEXT,
        idempotency BLOB,
        UNIQUE (owner, idempotency),
        FOREIGN KEY (id, version) REFERENCES cube_version (cube_id, version) DEFERRABLE INITIALLY DEFERRED
    ) STRICT""",
    "CREATE INDEX cube_by_owner ON cube (owner, state)",
    """CREATE TABLE cube_version (
        cube_id TEXT NOT NULL REFERENCES cube (id) DEFERRABLE INITIALLY DEFERRED,
        version INTEGER NOT NULL CHECK (version >= 1),
        parent INTEGER,
        at TEXT NOT NULL,
        origin TEXT NOT NULL,
        semantic_type TEXT NOT NULL,
        body_hmac BLOB NOT NULL CHECK (length(body_hmac) = 32),
        key_id TEXT NOT NULL,
        PRIMARY KEY (cube_id, version),
        FOREIGN KEY (cube_id, parent) REFERENCES cube_version (cube_id, version)
    ) STRICT""",
    # One row for every move in a memory's life, so that the past can be read at any time.
    """CREATE TABLE cube_event (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        at TEXT NOT NULL,
        event TEXT NOT NULL,
        state TEXT NOT NULL,
        FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version)
    ) STRICT""",
    "CREATE INDEX cube_event_by_cube ON cube_event (cube_id, seq)",
    """CREATE TABLE cube_body (
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        body TEXT NOT NULL,
        tags TEXT NOT NULL CHECK (json_valid(tags)),
        PRIMARY KEY (cube_id, version),
        FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version)
    ) STRICT""",
    # A tombstone; `payloads` (JSON: SHA-256 names) are files still to be removed while scrubbed_at is NULL.
    """CREATE TABLE erasure (
        cube_id TEXT PRIMARY KEY REFERENCES cube (id),
        at TEXT NOT NULL,
        payloads TEXT NOT NULL CHECK (json_valid(payloads)),
        scrubbed_at TEXT
    ) STRICT""",
    "CREATE INDEX erasure_pending ON erasure (cube_id) WHERE scrubbed_at IS NULL",
    "CREATE TABLE embedder (model_id TEXT NOT NULL, dim INTEGER NOT NULL, PRIMARY KEY (model_id), "
    "UNIQUE (model_id, dim)) STRICT",
    """CREATE TABLE vector (
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        model_id TEXT NOT NULL,
        dim INTEGER NOT NULL CHECK (dim >= 1),
        vec BLOB NOT NULL CHECK (length(vec) = 4 * dim),
        PRIMARY KEY (cube_id, version, model_id),
        FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version),
        FOREIGN KEY (model_id, dim) REFERENCES embedder (model_id, dim)
    ) STRICT""",
    # Two memories with the same words have the same identity (it covers content, not names): both may own it.
    """CREATE TABLE kv_artifact (
        identity TEXT NOT NULL,
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
        size INTEGER NOT NULL CHECK (size >= 0),
        checksum TEXT NOT NULL CHECK (length(checksum) = 32),
        tokens INTEGER NOT NULL CHECK (tokens >= 0),
        created_at TEXT NOT NULL,
        PRIMARY KEY (identity, cube_id),
        FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version)
    ) STRICT""",
    "CREATE INDEX kv_by_cube ON kv_artifact (cube_id)",
    "CREATE INDEX kv_by_file ON kv_artifact (sha256)",
    # Other memories whose text a record saw while it was built: it must go when one of them goes.
    """CREATE TABLE kv_context (
        identity TEXT NOT NULL,
        cube_id TEXT NOT NULL,
        source_id TEXT NOT NULL REFERENCES cube (id),
        PRIMARY KEY (identity, cube_id, source_id),
        FOREIGN KEY (identity, cube_id) REFERENCES kv_artifact (identity, cube_id) ON DELETE CASCADE
    ) STRICT""",
    "CREATE INDEX kv_context_by_source ON kv_context (source_id)",
    """CREATE TABLE access_log (
        seq INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        cube_id TEXT NOT NULL REFERENCES cube (id),
        uses INTEGER NOT NULL CHECK (uses >= 1)
    ) STRICT""",
    "CREATE INDEX access_log_by_cube ON access_log (cube_id, at)",
    """CREATE TABLE audit (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        event TEXT NOT NULL CHECK (json_valid(event)),
        hash TEXT NOT NULL CHECK (length(hash) = 64)
    ) STRICT""",
)

_TRIGGERS = (
    *frozen("cube_version", why="versions are immutable"),
    *frozen("cube_event", why="events are immutable"),
    *frozen("audit", why="the audit trail is append-only"),
    *frozen("erasure", why="an erasure is final", operations=("DELETE",)),
    "CREATE TRIGGER erasure_no_update BEFORE UPDATE OF cube_id, at, payloads ON erasure "
    "BEGIN SELECT RAISE(ABORT, 'erasure: an erasure is final'); END",
    *frozen("cube", why="memories are erased, not dropped", operations=("DELETE",)),
    *frozen("cube_body", why="bodies are immutable; a change is a new version", operations=("UPDATE",)),
    "CREATE TRIGGER cube_body_no_delete BEFORE DELETE ON cube_body "
    "WHEN NOT EXISTS (SELECT 1 FROM erasure WHERE cube_id = OLD.cube_id) "
    "BEGIN SELECT RAISE(ABORT, 'cube_body: a body goes only with an erasure'); END",
    *(
        f"CREATE TRIGGER {table}_no_revival BEFORE INSERT ON {table} "
        "WHEN EXISTS (SELECT 1 FROM erasure WHERE cube_id = NEW.cube_id) "
        f"BEGIN SELECT RAISE(ABORT, '{table}: the memory was erased'); END"
        for table in ("cube_body", "vector", "kv_artifact")
    ),
)

FIRST: tuple[str, ...] = _TABLES + _TRIGGERS
