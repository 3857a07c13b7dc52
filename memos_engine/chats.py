"""Named conversations: what each holds, so that its next turn computes only what is new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.session import Session
from memos_engine.memory.governance import Principal

MOST = 256  # conversations kept; the least recently used ones are ended


@dataclass(eq=False)
class Chat:
    """pages: the conversation in the decoder. cube_ids: memories that it holds. last: the newest answer's
    last token."""

    pages: Session
    cube_ids: set[str] = field(default_factory=set)
    last: int | None = None

    @property
    def begun(self) -> bool:
        return bool(self.pages.spans)

    def went_on(self, answer: Sequence[int], cube_ids: Sequence[str]) -> None:
        """Takes note of a finished turn."""
        self.cube_ids.update(cube_ids)
        self.last = answer[-1]

    def closing(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """What still has to close the newest answer, `ids` being the template's whole closing: a stop token
        may have begun it."""
        return ids[1:] if ids and self.last == ids[0] else ids


class Chats:
    """The conversations of one engine, by principal and name."""

    def __init__(self, decoder: DecoderEngine) -> None:
        self.decoder = decoder
        self._open: OrderedDict[tuple[Principal, str], Chat] = OrderedDict()

    def get(self, principal: Principal, name: str, salt: bytes) -> Chat:
        """The conversation of that name, opened if there is none."""
        chat = self._open.pop((principal, name), None) or Chat(self.decoder.open_session(salt))
        self._open[principal, name] = chat
        while len(self._open) > MOST:
            _, oldest = self._open.popitem(last=False)
            self.decoder.close_session(oldest.pages)
        return chat

    def end(self, principal: Principal, name: str | None = None) -> int:
        """Ends one conversation, or all of a principal; returns how many there were."""
        keys = [k for k in self._open if k[0] == principal and name in (None, k[1])]
        for key in keys:
            self.decoder.close_session(self._open.pop(key).pages)
        return len(keys)
