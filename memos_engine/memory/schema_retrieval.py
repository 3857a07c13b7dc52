"""The tables of retrieval, second step of the schema. Only `migrations.py` runs this.

The words themselves lie in one FTS5 table for each tenant, made when its first memory comes (`store_fts.py`).
"""

from __future__ import annotations

LOG_ROWS = 1 << 16

SECOND: tuple[str, ...] = (
    "CREATE TABLE tenant (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT",
    # A memory version as search sees it; `id` is its row in the tenant's FTS table and is never given out
    # again. `place` is the id of the memory's first version: where it stands in its session.
    """CREATE TABLE passage (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        cube_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        place INTEGER NOT NULL,
        session TEXT,
        words INTEGER NOT NULL CHECK (words >= 0),
        valid_from TEXT NOT NULL,
        UNIQUE (cube_id, version),
        FOREIGN KEY (cube_id, version) REFERENCES cube_version (cube_id, version)
    ) STRICT""",
    # What changed, in order, for caches of whatever search may see. Without an id: everything, as when
    # somebody's rights change. Caches that have fallen behind its beginning read everything anew.
    "CREATE TABLE index_log (seq INTEGER PRIMARY KEY AUTOINCREMENT, cube_id TEXT) STRICT",
    f"""CREATE TRIGGER index_log_is_short AFTER INSERT ON index_log
        BEGIN DELETE FROM index_log WHERE seq <= NEW.seq - {LOG_ROWS}; END""",
    "CREATE TRIGGER passage_added AFTER INSERT ON passage "
    "BEGIN INSERT INTO index_log (cube_id) VALUES (NEW.cube_id); END",
    "CREATE TRIGGER passage_gone AFTER DELETE ON passage "
    "BEGIN INSERT INTO index_log (cube_id) VALUES (OLD.cube_id); END",
    "CREATE TRIGGER cube_moved AFTER UPDATE OF owner, version, state, visibility, ttl_at ON cube "
    "BEGIN INSERT INTO index_log (cube_id) VALUES (NEW.id); END",
    "CREATE TRIGGER vector_added AFTER INSERT ON vector "
    "WHEN EXISTS (SELECT 1 FROM passage WHERE cube_id = NEW.cube_id AND version = NEW.version) "
    "BEGIN INSERT INTO index_log (cube_id) VALUES (NEW.cube_id); END",
    "CREATE TRIGGER passage_no_revival BEFORE INSERT ON passage "
    "WHEN EXISTS (SELECT 1 FROM erasure WHERE cube_id = NEW.cube_id) "
    "BEGIN SELECT RAISE(ABORT, 'passage: the memory was erased'); END",
)
