"""A conversation whose pages stay between its requests, approximate ones included.

The prefix index takes exact pages only. A session may go on from any page of its own: what was spliced stays
where it was spliced, under the same lineage. Its pages are the first to be given away when others need room;
the next request then replays the whole plan, splices and all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memos_engine.errors import MemoryInputError

if TYPE_CHECKING:
    from memos_engine.decoder.sequence import Sequence, Span


@dataclass(eq=False)
class Session:
    """spans: everything so far, questions and answers. blocks: pages that hold the first `computed` tokens;
    none where they were given away. selected: positions of spliced tokens that were computed again. epoch:
    that of the pool when the pages were made. adapter_state: under which they were made, and from where."""

    root: bytes = b""
    spans: tuple[Span, ...] = ()
    selected: tuple[int, ...] = ()
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    epoch: int = 0
    adapter_state: tuple[bytes, int] = (b"", 0)
    request: Sequence | None = None  # under way; one at a time
    closed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far."""
        return sum(len(span.token_ids) for span in self.spans)

    def require_idle(self) -> None:
        """Raises MemoryInputError where no request may begin."""
        if self.closed or self.request is not None:
            state = "closed" if self.closed else "busy with another request"
            raise MemoryInputError(f"The session is {state}; open another one or wait.")
