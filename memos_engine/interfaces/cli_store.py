"""What the commands without a model share: an open store and its caller, times, ids."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memos_engine.errors import MemoryInputError, MemoryNotFoundError, NotAStoreError

if TYPE_CHECKING:
    from memos_engine.memory.governance import Principal
    from memos_engine.memory.store import MemoryStore

DEFAULT_STORE = Path("memory")
TENANT = "default"

BranchOption = Annotated[str, typer.Option("--branch", help="In this what-if branch of yours.")]
StoreHere = Annotated[Path, typer.Option("--store", envvar="MEMOS_ENGINE_STORE", help="Store directory.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="An id, or at least its first 8 characters.")]
AsOfOption = Annotated[
    str | None,
    typer.Option("--as-of", metavar="TIME", help="As it was known then; ISO 8601, local unless it says."),
]


def user_name(name: str | None) -> str:
    """The user asked for, else who runs this."""
    return getpass.getuser() if name is None else name


def existing(store: Path) -> Path:
    """For commands that only look: a mistyped directory is an error, not a new store."""
    if not store.exists():
        raise NotAStoreError(f"there is no store at {store}; name one with --store, or remember something.")
    return store


def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def standard_input() -> str:
    """All of it, as text. Raises `MemoryInputError`."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise MemoryInputError(f"standard input is not UTF-8 ({error.reason}); convert it first.") from error


@dataclass(frozen=True, slots=True)
class Opened:
    """An open store and who asks."""

    store: MemoryStore
    principal: Principal

    def id(self, given: str) -> str:
        """The id that `given` begins. Raises `MemoryInputError`, `MemoryNotFoundError`."""
        return self.store.find_id(self.principal, given)


@contextmanager
def opened(directory: Path, user: str | None = None, branch: str = "") -> Iterator[Opened]:
    """The store there, without any model; imports no torch. Raises `StoreError`, `MemoryNotFoundError`."""
    from memos_engine.memory.governance import Principal
    from memos_engine.memory.store import MemoryStore

    if not (existing(directory) / "memory.db").exists():
        raise NotAStoreError(
            f"{directory} is not a memos_engine store; name the directory that holds memory.db."
        )
    with MemoryStore.open(directory) as store:
        mine = Principal(TENANT, user_name(user))
        if branch and branch not in {b.name for b in store.branches(mine) if b.dropped_at is None}:
            raise MemoryNotFoundError(
                f"there is no branch {branch!r}; `cube branch ls` shows which there are."
            )
        yield Opened(store, Principal(TENANT, mine.user, branch))


def moment(text: str) -> datetime:
    """A time as people type it: ISO 8601; one without a zone is local, a date alone its first instant.

    Raises `MemoryInputError`.
    """
    try:
        found = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in ("Z", "z") else text)
        return found.astimezone() if found.tzinfo is None else found
    except (ValueError, OverflowError, OSError) as error:
        raise MemoryInputError(
            f"{text!r} is no point in time; write it like 2026-11-01 or 2026-11-01T12:30:00+00:00."
        ) from error


def optional_moment(text: str | None) -> datetime | None:
    """As `moment`; None stays None."""
    return None if text is None else moment(text)


def local(when: datetime | None, *, exact: bool = False) -> str:
    """A time for a table, in local time; `exact` can be given to --as-of again and means the same."""
    if when is None:
        return ""
    try:
        when = when.astimezone()
    except (ValueError, OverflowError, OSError):  # at the ends of the calendar
        return when.isoformat()
    return f"{when:%Y-%m-%d %H:%M:%S.%f}" if exact else f"{when:%Y-%m-%d %H:%M:%S}"
