"""The prompt's layout: anchor | history | memories | query, each span tokenised alone.

Spans are cut out of the tokenizer's own chat template by rendering it once with marker texts, so any template
works that puts messages one after the other. Ids of spans are concatenated, never re-tokenised as joined
text: only then does a stored span mean the same tokens in every request.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from memos_engine.errors import ModelError

log = logging.getLogger("memos_engine")

_A, _B, _C = "\x1aalpha\x1a", "\x1abeta\x1a", "\x1agamma\x1a"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, by the shortest import where its `tokenizer.json` is there."""
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def eos_ids(folder: Path) -> tuple[int, ...]:
    """End-of-text ids of a model folder: those of `generation_config.json`, else of `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if value is not None:
            return (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
    return ()


class PromptLayout:
    """Spans of a chat prompt for one tokenizer.

    Where a template refuses two user turns in a row, memories stand as lines at the head of the user's turn;
    without any template they are plain lines.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self._lock = threading.Lock()
        try:
            pieces = self._pieces()
        except ModelError:
            if system_prompt is None:
                raise
            log.warning("memos_engine: the chat template takes no system prompt; it goes without.")
            self.system_prompt = None
            pieces = self._pieces()
        self._anchor, self._memory, self._query, self._turn = pieces

    @cached_property
    def anchor(self) -> tuple[int, ...]:
        """The template's opening with the system prompt: what every stored span was encoded behind."""
        return self._ids(self._anchor)

    @cached_property
    def turn_open(self) -> tuple[int, ...]:
        """What opens the user's turn; empty where memories are not turns of their own."""
        return self._ids(self._memory[0])

    @cached_property
    def turn_close(self) -> tuple[int, ...]:
        """What ends a turn; empty where memories are not turns of their own."""
        return self._ids(self._memory[1]) if self._memory[0] else ()

    @cached_property
    def answer_close(self) -> tuple[int, ...]:
        """What ends an answer, before the next turn opens."""
        return self._ids(self._turn[2])

    def memory(self, text: str) -> tuple[int, ...]:
        """A memory as a complete span of its own."""
        return self._wrapped(self._memory, text)

    def query(self, text: str) -> tuple[int, ...]:
        """The user's message and the opening of the answer."""
        return self._wrapped(self._query, text)

    def history(self, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Earlier (user, assistant) turns."""
        opening, middle, closing = self._turn
        out: list[int] = []
        for user, assistant in turns:
            out += [*self._ids(opening), *self._content(user), *self._ids(middle)]
            out += [*self._content(assistant), *self._ids(closing)]
        return tuple(out)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer (without its padding state), the template and the pieces used here."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for volatile in ("padding", "truncation"):
            state.pop(volatile, None)
        pieces = [self._anchor, self._memory, self._query, self._turn]
        parts = [json.dumps(state, sort_keys=True), str(self.tokenizer.chat_template), json.dumps(pieces)]
        total = hashlib.sha256()
        for part in parts:
            raw = part.encode("utf-8", "surrogatepass")
            total.update(len(raw).to_bytes(8, "little") + raw)
        return total.hexdigest()

    # -- pieces ----------------------------------------------------------------------------------

    def _pieces(self) -> tuple[str, tuple[str, str], tuple[str, str], tuple[str, str, str]]:
        """(anchor, memory wrapper, query wrapper, (user opening, user to assistant, assistant closing))."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.bos_token or "", ("", "\n"), ("", ""), ("", "\n", "\n")
        single = self._render([("user", _A)], generate=False)
        before, close = _cut(single, _A)
        prompted = _cut(self._render([("user", _A)], generate=True), _A)[1]
        dialogue = self._render([("user", _A), ("assistant", _B), ("user", _C)], generate=False)
        rest = _cut(dialogue, _A)[1]
        middle, rest = _cut(rest, _B)
        answer_close_open = _cut(rest, _C)[0]
        try:
            between = _cut(_cut(self._render([("user", _A), ("user", _B)], generate=False), _A)[1], _B)[0]
        except ModelError:
            between = ""
        if self.system_prompt and self.system_prompt in middle + answer_close_open + prompted:
            raise ModelError("The chat template repeats the system prompt in later turns.")
        if between.startswith(close) and before.endswith(between[len(close) :]) and between != close:
            opening = between[len(close) :]
            anchor = before[: len(before) - len(opening)]
            closing = answer_close_open[: len(answer_close_open) - len(opening)]
            return anchor, (opening, close), (opening, prompted), (opening, middle, closing)
        return before, ("", "\n"), ("", prompted), ("", middle, answer_close_open)

    def _render(self, turns: Sequence[tuple[str, str]], generate: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # templates raise whatever Jinja raises
            raise ModelError(f"The chat template refuses {[r for r, _ in turns]}: {error}") from error
        return str(text)

    def _wrapped(self, wrapper: tuple[str, str], text: str) -> tuple[int, ...]:
        return (*self._ids(wrapper[0]), *self._content(text.strip()), *self._ids(wrapper[1]))

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._tokens(text, False) if text else ()

    def _content(self, text: str) -> tuple[int, ...]:
        """Text from outside: a special token spelled out in it stays text and cannot end a turn."""
        return self._tokens(text, True)

    def _tokens(self, text: str, split: bool) -> tuple[int, ...]:
        with self._lock:  # split_special_tokens is a state of the tokenizer
            out = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split)
        return tuple(out["input_ids"])


def _cut(text: str, marker: str) -> tuple[str, str]:
    left, found, right = text.partition(marker)
    if not found:
        raise ModelError("The chat template drops or rewrites message texts; it cannot be cut into spans.")
    return left, right
