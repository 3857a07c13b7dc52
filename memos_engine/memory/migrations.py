"""Ordered, named steps from an empty database to today's schema.

Each step and its row in `schema_migration` are one savepoint in one transaction, taken with the write
lock: a step is applied whole or not at all, and by one process only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlite_utils import Database, Migrations

from memos_engine.errors import StoreVersionError
from memos_engine.memory.schema import APPLICATION_ID, FIRST
from memos_engine.memory.schema_adapters import ADAPTERS
from memos_engine.memory.schema_control import CONTROL
from memos_engine.memory.schema_jobs import JOBS
from memos_engine.memory.schema_retrieval import SECOND
from memos_engine.memory.store_fts import fill_passages
from memos_engine.memory.store_times import TIMES, fill_times

Step = tuple[str, Callable[[Database], None]]


def _running(statements: Sequence[str]) -> Callable[[Database], None]:
    def step(db: Database) -> None:
        for statement in statements:
            db.execute(statement)

    return step


def _retrieval(db: Database) -> None:
    _running(SECOND)(db)
    fill_passages(db.conn)


def _times(db: Database) -> None:
    _running(TIMES)(db)
    fill_times(db.conn)


STEPS: tuple[Step, ...] = (
    ("0001_first", _running(FIRST)),
    ("0002_retrieval", _retrieval),
    ("0003_control", _running(CONTROL)),
    ("0004_named_times", _times),
    ("0005_jobs", _running(JOBS)),
    ("0006_adapters", _running(ADAPTERS)),
)

_LEDGER = """CREATE TABLE IF NOT EXISTS schema_migration (
    id INTEGER PRIMARY KEY, migration_set TEXT NOT NULL, name TEXT NOT NULL, applied_at TEXT NOT NULL,
    UNIQUE (migration_set, name)
) STRICT"""


def pending(db: Database, steps: Sequence[Step] = STEPS) -> list[str]:
    """Names of the steps still to run; only reads.

    Raises `StoreVersionError` when the database holds steps that this version does not know.
    """
    return [step.name for step in _checked(db, steps).pending(db)]


def migrate(db: Database, steps: Sequence[Step] = STEPS) -> None:
    """Bring the database up to date within the caller's write transaction. Raises as `pending` does."""
    plan = _checked(db, steps)
    db.execute(_LEDGER)
    plan.apply(db)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {len(steps)}")


def _checked(db: Database, steps: Sequence[Step]) -> Migrations:
    plan = Migrations("memos_engine")
    plan.migrations_table = "schema_migration"
    for name, apply in steps:
        plan(name=name)(apply)
    known = {name for name, _ in steps}
    unknown = [step.name for step in plan.applied(db) if step.name not in known]
    version = max(int(db.execute("PRAGMA user_version").fetchone()[0]), len(steps) + len(unknown))
    if unknown or version > len(steps):
        raise StoreVersionError(
            f"the store has schema version {version}, this memos_engine knows versions up to {len(steps)}; "
            "install a newer memos_engine to open it."
        )
    return plan
