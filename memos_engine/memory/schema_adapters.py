"""The tables of adapters (parameter memory). Only `migrations.py` runs this.

A memory of kind lora has versions like every other; which one is current is the memory's own version. What
can be destroyed (the payload, and the report, which quotes questions and answers) lies in a table of its own.
"""

from __future__ import annotations

from memos_engine.memory.schema import frozen

_TABLES = (
    # promoted_at NULL: stored, but not yet (or never) in use. revoked_at: its payload is gone for good.
    """CREATE TABLE adapter_version (
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        digest TEXT NOT NULL CHECK (length(digest) = 64),
        model TEXT NOT NULL CHECK (length(model) = 64),
        rank INTEGER NOT NULL CHECK (rank >= 1),
        nbytes INTEGER NOT NULL CHECK (nbytes >= 0),
        kv_floor INTEGER CHECK (kv_floor >= 0),
        how TEXT NOT NULL CHECK (how IN ('imported', 'trained', 'composed')),
        at TEXT NOT NULL,
        promoted_at TEXT,
        revoked_at TEXT,
        revoked_why TEXT,
        PRIMARY KEY (cube_id, version),
        FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version)
    ) STRICT""",
    """CREATE TABLE adapter_payload (
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
        size INTEGER NOT NULL CHECK (size >= 0),
        checksum TEXT NOT NULL CHECK (length(checksum) = 32),
        report TEXT NOT NULL CHECK (json_valid(report)),
        PRIMARY KEY (cube_id, version),
        FOREIGN KEY (cube_id, version) REFERENCES adapter_version (cube_id, version)
    ) STRICT""",
    "CREATE INDEX adapter_by_file ON adapter_payload (sha256)",
    # Every row that names a file of the vault, whatever form of memory it is.
    "CREATE VIEW payload AS SELECT sha256, size, checksum FROM kv_artifact UNION ALL "
    "SELECT sha256, size, checksum FROM adapter_payload",
)

_REVOKED = (
    "EXISTS (SELECT 1 FROM adapter_version v WHERE v.cube_id = OLD.cube_id AND v.version = OLD.version AND "
    "v.revoked_at IS NOT NULL)"
)

_TRIGGERS = (
    *frozen("adapter_version", why="versions are revoked, not removed", operations=("DELETE",)),
    "CREATE TRIGGER adapter_version_no_update BEFORE UPDATE OF cube_id, version, digest, model, rank, "
    "nbytes, kv_floor, how, at ON adapter_version "
    "BEGIN SELECT RAISE(ABORT, 'adapter_version: versions are immutable'); END",
    "CREATE TRIGGER adapter_version_no_return BEFORE UPDATE ON adapter_version WHEN OLD.revoked_at IS NOT "
    "NULL BEGIN SELECT RAISE(ABORT, 'adapter_version: a revocation is final'); END",
    *frozen("adapter_payload", why="payloads are immutable", operations=("UPDATE",)),
    f"CREATE TRIGGER adapter_payload_no_delete BEFORE DELETE ON adapter_payload WHEN NOT {_REVOKED} "
    "BEGIN SELECT RAISE(ABORT, 'adapter_payload: a payload goes only with a revocation'); END",
    "CREATE TRIGGER adapter_payload_no_revival BEFORE INSERT ON adapter_payload "
    "WHEN EXISTS (SELECT 1 FROM erasure WHERE cube_id = NEW.cube_id) "
    "BEGIN SELECT RAISE(ABORT, 'adapter_payload: the memory was erased'); END",
)

ADAPTERS: tuple[str, ...] = _TABLES + _TRIGGERS
