"""Background jobs and who did what with them. Only `migrations.py` runs this.

A job names memories by id and holds short labels, numbers and reasons, never a text. Its memories decide who
sees it: rows go with an erasure of any of them.
"""

from __future__ import annotations

JOBS: tuple[str, ...] = (
    """CREATE TABLE job (
        id TEXT PRIMARY KEY,
        owner INTEGER NOT NULL REFERENCES principal (id),
        kind TEXT NOT NULL,
        token TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed', 'cancelled')),
        value REAL NOT NULL,
        detail TEXT NOT NULL CHECK (json_valid(detail)),
        attempts INTEGER NOT NULL DEFAULT 0,
        most_attempts INTEGER NOT NULL,
        not_before TEXT NOT NULL,
        worker TEXT,
        lease_until TEXT,
        progress REAL NOT NULL DEFAULT 0 CHECK (progress BETWEEN 0 AND 1),
        reason TEXT NOT NULL DEFAULT '',
        cancel_asked INTEGER NOT NULL DEFAULT 0,
        created_at TEXT NOT NULL,
        updated_at TEXT NOT NULL,
        CHECK ((state = 'running') = (worker IS NOT NULL) AND (worker IS NULL) = (lease_until IS NULL))
    ) STRICT""",
    # The same job is queued once at a time; when it has ended it may come again.
    "CREATE UNIQUE INDEX job_once ON job (owner, kind, token) WHERE state IN ('waiting', 'running')",
    "CREATE INDEX job_waiting ON job (value DESC, created_at) WHERE state = 'waiting'",
    "CREATE INDEX job_leases ON job (lease_until) WHERE state = 'running'",
    """CREATE TABLE job_cube (
        job_id TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
        place INTEGER NOT NULL,
        cube_id TEXT NOT NULL REFERENCES cube (id),
        PRIMARY KEY (job_id, place)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX job_cube_by_cube ON job_cube (cube_id)",
    "CREATE TRIGGER job_erased AFTER INSERT ON erasure BEGIN DELETE FROM job WHERE id IN (SELECT job_id FROM "
    "job_cube WHERE cube_id = NEW.cube_id); END",
)
