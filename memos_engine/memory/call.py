"""MemoryCall: what somebody wants of their memories, as MemReader understood it (arXiv 2507.03724, 5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.governance import Principal
from memos_engine.memory.values import time_from_text, time_to_text, validate_label, validate_text

SCOPES = ("private", "shared", "all")
MAX_ENTITIES = 32


class Intent(str, Enum):
    """What is wanted."""

    REMEMBER = "remember"  # store `text`
    RECALL = "recall"  # show the memories about `text`
    UPDATE = "update"  # `text` holds in place of what is known
    FORGET = "forget"  # end the memories that `text` describes
    QUESTION = "question"  # answer `text`, memories may help; nothing is written

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class MemoryCall:
    """A request to the memory. It is a plan: nothing has been looked up or written.

    `text` is what to store or to look for, without command words; empty where the words name nothing
    (`forget it`): ask back, except for `recall`, where it means everything. `anchor` is the earlier turn that
    `text` was taken from, where `that` or `it` pointed there. `entities`: names and quotations in the text.
    `window`: first and last moment, aware and both inside, of the time spoken of. `semantic_type`: what to
    store it as, or the only type to look for; None is any. `scope`: `private` (the caller's own), `shared`
    (what is open to others) or `all`. `reasons`: the rules that led here, in order. Raises
    `MemoryInputError`.
    """

    caller: Principal
    intent: Intent
    text: str
    entities: tuple[str, ...] = ()
    window: tuple[datetime, datetime] | None = None
    semantic_type: str | None = None
    scope: str = "all"
    anchor: str | None = None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.caller, Principal):
            raise MemoryInputError(
                f"the caller must be a Principal(tenant, user), not {type(self.caller).__name__}."
            )
        if not isinstance(self.intent, Intent):
            raise MemoryInputError(f"intent must be an Intent ({', '.join(Intent)}), not {self.intent!r}.")
        for text in (self.text or None, self.anchor):
            if text is not None:
                validate_text(text)
        if not isinstance(self.text, str):
            raise MemoryInputError(f"text must be a str, not {type(self.text).__name__}.")
        for what in ("entities", "reasons"):
            values = getattr(self, what)
            if not isinstance(values, tuple) or len(values) > MAX_ENTITIES:
                raise MemoryInputError(f"{what} must be a tuple of at most {MAX_ENTITIES} texts.")
            for value in values:
                validate_text(value)
        if self.semantic_type is not None:
            validate_label("semantic_type", self.semantic_type)
        if self.scope not in SCOPES:
            raise MemoryInputError(f"scope must be one of {', '.join(SCOPES)}, not {self.scope!r}.")
        if self.window is not None:
            _check_window(self.window)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; times are ISO 8601 in UTC."""
        return {
            "caller": self.caller.to_dict(),
            "intent": self.intent.value,
            "text": self.text,
            "entities": list(self.entities),
            "window": None if self.window is None else [time_to_text(moment) for moment in self.window],
            "semantic_type": self.semantic_type,
            "scope": self.scope,
            "anchor": self.anchor,
            "reasons": list(self.reasons),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryCall:
        """The inverse of `to_dict`; times come back in UTC. Raises `MemoryInputError`."""
        try:
            window = data["window"]
            if window is not None:
                first, last = window
                window = (time_from_text(first), time_from_text(last))
            return cls(
                caller=Principal(**data["caller"]),
                intent=Intent(data["intent"]),
                text=data["text"],
                entities=tuple(data["entities"]),
                window=window,
                semantic_type=data["semantic_type"],
                scope=data["scope"],
                anchor=data["anchor"],
                reasons=tuple(data["reasons"]),
            )
        except MemoryInputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryInputError(f"this is no MemoryCall as made by to_dict(): {error!r}.") from error


def _check_window(window: object) -> None:
    if not isinstance(window, tuple) or len(window) != 2:
        raise MemoryInputError("window must be a pair of times, its first and its last moment, or None.")
    first, last = window
    if time_to_text(last) < time_to_text(first):
        raise MemoryInputError(
            f"the window ends ({last.isoformat()}) before it begins ({first.isoformat()}); swap them."
        )
