"""The control plane's tables beside the first ones. Only `migrations.py` runs this.

The same rule: words and times of a user (`fact`, `fact_closing`, `cube_source`) can be destroyed by an
erasure and by nothing else; edges, grants and branches hold ids, times and short labels and stay.
"""

from __future__ import annotations

from memos_engine.memory.schema import frozen


def _shown(row: str) -> str:
    """What decides who finds a memory."""
    return ", ".join(
        f"{row}.{name}" for name in ("owner", "version", "state", "visibility", "ttl_at", "closed_at")
    )


_COLUMNS = (
    "ALTER TABLE cube_version ADD COLUMN gist BLOB CHECK (length(gist) = 16)",
    "ALTER TABLE cube ADD COLUMN gist BLOB CHECK (length(gist) = 16)",  # the present version's, for the index
    "ALTER TABLE cube ADD COLUMN closed_at TEXT",  # when, on the clock of facts, its fact ended
    "ALTER TABLE cube ADD COLUMN half_life_s REAL CHECK (half_life_s > 0)",
    "ALTER TABLE cube ADD COLUMN source_gone_at TEXT",
    "CREATE INDEX cube_by_gist ON cube (owner, gist) WHERE gist IS NOT NULL",
    "CREATE INDEX cube_not_private ON cube (owner) WHERE visibility <> 'private'",
    "CREATE INDEX cube_by_ttl ON cube (ttl_at) WHERE ttl_at IS NOT NULL",
    "DROP TRIGGER cube_moved",
    "CREATE TRIGGER cube_moved AFTER UPDATE OF owner, version, state, visibility, ttl_at, closed_at ON cube "
    f"WHEN ({_shown('OLD')}) IS NOT ({_shown('NEW')}) "
    "BEGIN INSERT INTO index_log (cube_id) VALUES (NEW.id); END",
)

_VERSION = "FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version)"

_TABLES = (
    f"""CREATE TABLE fact (
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        subject TEXT,
        attribute TEXT,
        key TEXT,
        valid_from TEXT,
        valid_to TEXT,
        CHECK ((key IS NULL) = (subject IS NULL) AND (key IS NULL) = (attribute IS NULL)),
        PRIMARY KEY (cube_id, version),
        {_VERSION}
    ) STRICT""",
    "CREATE INDEX fact_by_key ON fact (key) WHERE key IS NOT NULL",
    # The last row written by a moment says until when a fact holds; NULL: as the fact itself says.
    """CREATE TABLE fact_closing (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        at TEXT NOT NULL,
        valid_to TEXT,
        FOREIGN KEY (cube_id, version) REFERENCES fact (cube_id, version)
    ) STRICT""",
    "CREATE INDEX fact_closing_by_cube ON fact_closing (cube_id, version, seq)",
    f"""CREATE TABLE cube_source (
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        data TEXT NOT NULL CHECK (json_valid(data)),
        PRIMARY KEY (cube_id, version),
        {_VERSION}
    ) STRICT""",
    """CREATE TABLE edge (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        source TEXT NOT NULL,
        source_version INTEGER NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('derived_from', 'supersedes', 'merged_from', 'mentions',
        'branch_of', 'resembles', 'contradicts')),
        target TEXT NOT NULL,
        target_version INTEGER NOT NULL,
        at TEXT NOT NULL,
        CHECK (source <> target),
        UNIQUE (source, source_version, kind, target, target_version),
        FOREIGN KEY (source, source_version) REFERENCES cube_version (cube_id, version),
        FOREIGN KEY (target, target_version) REFERENCES cube_version (cube_id, version)
    ) STRICT""",
    "CREATE INDEX edge_by_target ON edge (target, kind)",
    """CREATE TABLE grant_ (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        owner INTEGER NOT NULL REFERENCES principal (id),
        cube_id TEXT REFERENCES cube (id),
        grantee INTEGER REFERENCES principal (id),
        action TEXT NOT NULL CHECK (action IN ('read', 'write', 'share')),
        effect TEXT NOT NULL CHECK (effect IN ('allow', 'deny')),
        expires_at TEXT,
        granted_by INTEGER NOT NULL REFERENCES principal (id),
        at TEXT NOT NULL,
        revoked_at TEXT
    ) STRICT""",
    "CREATE INDEX grant_by_cube ON grant_ (cube_id) WHERE cube_id IS NOT NULL",
    "CREATE INDEX grant_by_owner ON grant_ (owner, effect)",
    "CREATE INDEX grant_by_grantee ON grant_ (grantee, effect)",
    """CREATE TABLE branch (
        scope INTEGER PRIMARY KEY REFERENCES principal (id),
        origin INTEGER NOT NULL REFERENCES principal (id),
        at TEXT NOT NULL,
        dropped_at TEXT
    ) STRICT""",
    # Calls that may be repeated; those that add a memory are kept with it.
    """CREATE TABLE done (
        caller INTEGER NOT NULL REFERENCES principal (id),
        token BLOB NOT NULL CHECK (length(token) = 32),
        request BLOB NOT NULL CHECK (length(request) = 32),
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        PRIMARY KEY (caller, token),
        FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version)
    ) STRICT, WITHOUT ROWID""",
)

_ERASABLE = ("fact", "fact_closing", "cube_source")

_TRIGGERS = (
    # Whose rights change may see other memories in search: its caches read everything anew.
    "CREATE TRIGGER rights_given AFTER INSERT ON grant_ BEGIN INSERT INTO index_log (cube_id) "
    "VALUES (NULL); END",
    "CREATE TRIGGER rights_taken AFTER UPDATE OF revoked_at ON grant_ BEGIN INSERT INTO index_log (cube_id) "
    "VALUES (NULL); END",
    *frozen("edge", why="derivations are immutable"),
    *frozen("done", why="what was done is immutable"),
    *frozen("grant_", why="a grant is revoked, not removed", operations=("DELETE",)),
    "CREATE TRIGGER grant_no_update BEFORE UPDATE OF owner, cube_id, grantee, action, effect, expires_at, "
    "granted_by, at ON grant_ BEGIN SELECT RAISE(ABORT, 'grant_: a grant is immutable; revoke it'); END",
    *frozen("branch", why="a branch is dropped, not removed", operations=("DELETE",)),
    *(
        statement
        for table in _ERASABLE
        for statement in (
            *frozen(table, why="immutable; a change is a new row", operations=("UPDATE",)),
            f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} "
            "WHEN NOT EXISTS (SELECT 1 FROM erasure WHERE cube_id = OLD.cube_id) "
            f"BEGIN SELECT RAISE(ABORT, '{table}: rows go only with an erasure'); END",
            f"CREATE TRIGGER {table}_no_revival BEFORE INSERT ON {table} "
            "WHEN EXISTS (SELECT 1 FROM erasure WHERE cube_id = NEW.cube_id) "
            f"BEGIN SELECT RAISE(ABORT, '{table}: the memory was erased'); END",
        )
    ),
)

CONTROL: tuple[str, ...] = _COLUMNS + _TABLES + _TRIGGERS
