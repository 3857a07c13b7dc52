"""The life of a memory: one table of legal moves (the states of MemOS, arXiv 2507.03724, section 5.4)."""

from __future__ import annotations

from enum import Enum

from memos_engine.errors import LifecycleError


class LifecycleState(str, Enum):
    """Where a memory is in its life. Values are what the store writes."""

    GENERATED = "generated"  # written, never used
    ACTIVATED = "activated"  # used at least once, or restored
    MERGED = "merged"  # supplemented or confirmed: a newer version replaced its body
    ARCHIVED = "archived"  # kept, but not offered to requests
    EXPIRED = "expired"  # deleted or past its time to live; only its history shows
    FROZEN = "frozen"  # used, but closed to changes

    def __str__(self) -> str:
        return self.value


LIVE = frozenset(
    {LifecycleState.GENERATED, LifecycleState.ACTIVATED, LifecycleState.MERGED, LifecycleState.FROZEN}
)
"""States that requests may retrieve."""

CHANGEABLE = LIVE - {LifecycleState.FROZEN}
"""States in which a memory may get a new version."""

_S = LifecycleState
MOVES: dict[LifecycleState | None, frozenset[LifecycleState]] = {
    None: frozenset({_S.GENERATED}),
    _S.GENERATED: frozenset({_S.ACTIVATED, _S.MERGED, _S.ARCHIVED, _S.EXPIRED, _S.FROZEN}),
    _S.ACTIVATED: frozenset({_S.MERGED, _S.ARCHIVED, _S.EXPIRED, _S.FROZEN}),
    _S.MERGED: frozenset({_S.ACTIVATED, _S.MERGED, _S.ARCHIVED, _S.EXPIRED, _S.FROZEN}),
    _S.ARCHIVED: frozenset({_S.ACTIVATED, _S.EXPIRED}),
    _S.FROZEN: frozenset({_S.GENERATED, _S.ACTIVATED, _S.MERGED}),
    _S.EXPIRED: frozenset(),
}
"""From each state (None: not yet stored) the states that may follow. Two things are outside of this table:
erasure, because the owner's right to have a text destroyed holds in every state, and the Time Machine, which
takes all memories of an owner back to states that they were in before."""


def check_move(source: LifecycleState | None, target: LifecycleState) -> None:
    """Raise `LifecycleError`, naming the legal moves, unless `source -> target` is one of them."""
    legal = MOVES[source]
    if target in legal:
        return
    here = f"a memory that is {source}" if source is not None else "a new memory"
    names = ", ".join(sorted(state.value for state in legal))
    advice = f"from there it can become: {names}" if names else "nothing follows that state"
    raise LifecycleError(f"{here} cannot become {target}; {advice}.")
