"""MemReader: from what somebody says to a MemoryCall, by rules for English that need no model.

The rules are ordered; the first that fits decides, and `MemoryCall.reasons` names all that fired. Where none
fits, nothing is written: the utterance is a question to answer. docs/reader.md has the order and the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from memos_engine.errors import MemoryInputError
from memos_engine.memory import phrases as p
from memos_engine.memory.call import Intent, MemoryCall
from memos_engine.memory.governance import Principal
from memos_engine.memory.slots import entities_of, scope_of, type_of, window_of
from memos_engine.memory.values import time_to_text, validate_text

Choose = Callable[[str, Sequence[str]], int]
"""From a question and its options to the index of one: a model's constrained choice."""

SIGHT = 1000
"""Characters from where a rule looks that it sees; what is stored is never cut."""
_DEPTH = 4  # nested lead-ins ("never mind, actually, scratch that, ...") that are followed
_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "ʼ": "'"})  # one for one, so that places stay
_WHOLE_QUOTE = re.compile(r"[\"“']([^\"”“]+)[\"”'][\s.!?]*$")
_OPTIONS: tuple[tuple[Intent, str], ...] = (
    (Intent.QUESTION, "asks or requests something, to be answered"),
    (Intent.REMEMBER, "tells something to be remembered"),
    (Intent.RECALL, "asks what is remembered"),
    (Intent.UPDATE, "corrects something said before"),
    (Intent.FORGET, "wants something forgotten"),
)
_COMMANDS: tuple[tuple[str, Intent, re.Pattern[str]], ...] = (
    ("not-forget", Intent.REMEMBER, p.NOT_FORGET_TO),
    ("not-forget", Intent.REMEMBER, p.NOT_FORGET),
    ("not-store", Intent.FORGET, p.NOT_STORE),
    ("forget", Intent.FORGET, p.FORGET),
    ("forget-own", Intent.FORGET, p.FORGET_OWN),
    ("reminder", Intent.REMEMBER, p.REMIND_TO),
    ("remember-asked", Intent.RECALL, p.REMEMBER_ASKED),
    ("recall", Intent.RECALL, p.RECALL),
    ("remember", Intent.REMEMBER, p.REMEMBER),
    ("update", Intent.UPDATE, p.UPDATE),
)


@dataclass
class _Reading:
    """What is understood so far: the matter begins at `start`; `command`: by a command, not by its form.
    `begin`: where that command or form itself begins, which may tell of the time meant."""

    intent: Intent | None
    start: int
    command: bool = False
    reasons: list[str] = field(default_factory=list)
    begin: int = -1


class MemReader:
    """Reads utterances. Stateless and safe to share between threads."""

    def __init__(self, choose: Choose | None = None) -> None:
        """`choose`: decides where no rule does, unless the call has a budget."""
        self._choose = choose

    def read(
        self,
        principal: Principal,
        utterance: str,
        *,
        now: datetime,
        history: Sequence[str] = (),
        budget_ms: float | None = None,
    ) -> MemoryCall:
        """What `principal` wants. Relative times count from `now` (aware); `history` are the texts of the
        turns before, the latest last, of which only that one is looked at.

        With a `budget_ms` no model is asked, however large it is. Raises `MemoryInputError` for an utterance
        or a turn that is no valid text, or a choice that is none of the options.
        """
        validate_text(utterance)
        time_to_text(now)
        if isinstance(history, str):
            raise MemoryInputError("history must be a list of texts, not one str; put it into a list.")
        last = validate_text(history[-1]) if history else None
        plain = utterance.translate(_STRAIGHT)
        begin = len(plain) - len(plain.lstrip())
        found = _understood(plain, begin)
        reasons = found.reasons
        if found.intent is None:
            intent = self._decided(utterance, reasons, budget_ms)
        else:
            intent = found.intent
        first, end = _matter(plain, found, intent)
        text, anchor, before = utterance[first:end], None, utterance[max(0, first - 4) : first]
        if found.command and p.REFERENCE.match(plain[first:end][:SIGHT]):
            text, anchor = _filled(intent, last, reasons)
            before = ""
        window = window_of(plain[found.begin :], now, intent)
        if window is not None:
            reasons.append("time-window")
        return MemoryCall(
            caller=principal,
            intent=intent,
            text=text,
            entities=entities_of(text, before),
            window=window,
            semantic_type=type_of(plain if intent in (Intent.RECALL, Intent.FORGET) else text, intent),
            scope=scope_of(plain, intent),
            anchor=anchor,
            reasons=tuple(dict.fromkeys(reasons)),
        )

    def _decided(self, utterance: str, reasons: list[str], budget_ms: float | None) -> Intent:
        """The intent where no rule decides."""
        if self._choose is None or budget_ms is not None:
            reasons.append("undecided")
            return Intent.QUESTION
        said = utterance.strip()[:SIGHT]
        index = self._choose(f"What does this do? {said}", [option for _, option in _OPTIONS])
        if type(index) is not int or not 0 <= index < len(_OPTIONS):
            raise MemoryInputError(
                f"choose gave {index!r}; it must return the index of an option, 0 to {len(_OPTIONS) - 1}."
            )
        reasons.append("chosen-by-model")
        return _OPTIONS[index][0]


def _understood(plain: str, start: int, depth: int = 0) -> _Reading:
    """The first rule that fits what begins at `start`."""
    reasons: list[str] = []
    start = _without(plain, start, reasons, ("greeting", p.GREETING), ("politeness", p.PLEASE))
    if depth < _DEPTH:
        for name, pattern in (("abandoned", p.ABANDON), ("taken-back", p.TAKEN_BACK)):
            if match := pattern.match(plain, start, start + SIGHT):
                rest = _understood(plain, match.end(), depth + 1)
                if rest.intent is Intent.REMEMBER and not rest.command:
                    rest.intent = Intent.UPDATE  # a statement in place of what was said before
                rest.reasons[:0] = [*reasons, name]
                return rest
    for read in (_command, _correction, _asked, _stated):
        found = read(plain, start, depth)
        if found is not None:
            found.reasons[:0] = reasons
            found.begin = max(start, found.begin)
            return found
    return _Reading(None, start, reasons=reasons, begin=start)


def _without(plain: str, start: int, reasons: list[str], *leads: tuple[str, re.Pattern[str]]) -> int:
    """Where the matter begins behind these words, any of them, again and again, unless they are all."""
    again = True
    while again:
        again = False
        for name, pattern in leads:
            match = pattern.match(plain, start, start + SIGHT)
            if match and match.end() > start and plain[match.end() : match.end() + SIGHT].strip(" .!?"):
                start, again = match.end(), True
                reasons.append(name)
    return start


def _command(plain: str, start: int, depth: int) -> _Reading | None:
    """A memory verb, perhaps behind `could you` or `I want you to`."""
    asking = p.ASKING.match(plain, start, start + SIGHT)
    begin = asking.end() if asking else start
    if asking:
        skipped: list[str] = []
        begin = _without(plain, begin, skipped, ("politeness", p.PLEASE))
    if asking and "mind" in asking[0].lower() and (match := p.MIND_FORGET.match(plain, begin)):
        return _Reading(Intent.FORGET, match.end(), True, ["asked-to", "forget"])
    for at, lead in ((begin, ["asked-to"] if asking else []), (start, [])):
        for name, intent, pattern in _COMMANDS:
            if match := pattern.match(plain, at, at + SIGHT):
                return _Reading(intent, match.end(), True, [*lead, name])
    if asking and p.CAN_YOU.match(plain, start):
        if match := p.TELL.match(plain, begin, begin + SIGHT):
            begin = match.end()
        return _Reading(Intent.QUESTION, begin, reasons=["asked-to", "request"])
    return None


def _correction(plain: str, start: int, depth: int) -> _Reading | None:
    """`actually ...`, `no, ...`: a statement behind it takes the place of what is known."""
    match = p.CORRECTION.match(plain, start, start + SIGHT)
    if match and depth < _DEPTH and plain[match.end() : match.end() + SIGHT].strip(" .!?"):
        rest = _understood(plain, match.end(), depth + 1)
        strong = match[0].lower().strip(" ,:;.!–—-") in p.STRONG
        if (rest.intent is Intent.REMEMBER and not rest.command) or (rest.intent is None and strong):
            rest.intent = Intent.UPDATE
        if rest.intent is not None:
            rest.reasons[:0] = ["correction"]
            return rest
    if _ends_asking(plain):
        return None
    for name, pattern in (("changed", p.CHANGED), ("not-that", p.NOT_THAT)):
        if pattern.match(plain, start, start + SIGHT):
            return _Reading(Intent.UPDATE, start, reasons=[name])
    return None


def _asked(plain: str, start: int, depth: int) -> _Reading | None:
    """Questions, requests to whoever answers, and small talk."""
    for name, pattern in (("tell-me", p.TELL), ("wonder", p.WONDER)):
        if match := pattern.match(plain, start, start + SIGHT):
            return _Reading(Intent.QUESTION, match.end() if name == "tell-me" else start, reasons=[name])
    if _ends_asking(plain):
        return _Reading(Intent.QUESTION, start, reasons=["question-mark"])
    clause = p.WHEN_I.match(plain, start, start + SIGHT)
    if p.ASKED.match(plain, start, start + SIGHT) and not clause:
        return _Reading(Intent.QUESTION, start, reasons=["question-word"])
    for name, pattern in (
        ("inverted", p.INVERTED),
        ("inverted", p.INVERTED_NAME),
        ("small-talk", p.CHAT),
    ):
        if pattern.match(plain, start, start + SIGHT):
            return _Reading(Intent.QUESTION, start, reasons=[name])
    if p.STANDING.match(plain, start, start + SIGHT):
        return _Reading(Intent.REMEMBER, start, reasons=["standing-instruction"])
    if p.REQUEST.match(plain, start, start + SIGHT):
        return _Reading(Intent.QUESTION, start, reasons=["request"])
    return None


def _stated(plain: str, start: int, depth: int) -> _Reading | None:
    """A statement: it says something of somebody or something, so it is worth keeping."""
    for pattern in (p.STATED, p.NAMED_VERB, p.VERB_LATER):
        if pattern.match(plain, start, start + SIGHT):
            return _Reading(Intent.REMEMBER, start, reasons=["statement"])
    return None


def _ends_asking(plain: str) -> bool:
    """Whether the last thing in the text, but for emoji and the like, is a question mark."""
    return re.search(r"[?？؟][^\w]*$", plain[-80:]) is not None


def _matter(plain: str, found: _Reading, intent: Intent) -> tuple[int, int]:
    """First and last place of what is to be stored or looked for."""
    start, end = found.start, len(plain.rstrip())
    if not found.command:
        return start, end
    while start < end and plain[start].isspace():
        start += 1
    if intent in (Intent.RECALL, Intent.FORGET):
        end = _before(plain, start, end, " \t\r\n.!?,;:")
        while match := p.TAIL.search(plain, max(start, end - 80), end):
            end = match.start()
        if intent is Intent.RECALL and p.EVERYTHING.match(plain[start:end][:SIGHT]):
            return start, start
        for pattern in p.TOPIC:
            match = pattern.match(plain, start, min(end, start + SIGHT))
            if match and match.end() < end:
                start = match.end()
                break
        if intent is Intent.RECALL and p.EVERYTHING.match(plain[start:end][:SIGHT]):
            return start, start
    else:
        end = _before(plain, start, end, " \t\r\n?")
    if quoted := _WHOLE_QUOTE.match(plain, start, end):
        start, end = quoted.span(1)
    return start, max(start, len(plain[:end].rstrip()))


def _before(plain: str, start: int, end: int, marks: str) -> int:
    while end > start and plain[end - 1] in marks:
        end -= 1
    return end


def _filled(intent: Intent, last: str | None, reasons: list[str]) -> tuple[str, str | None]:
    """What `that` or `it` alone means: the turn before, where it can be what is spoken of."""
    if last is not None and not (intent in (Intent.REMEMBER, Intent.UPDATE) and _ends_asking(last)):
        reasons.append("filled-from-history")
        return last.strip(), last
    reasons.append("nothing-named")
    return "", None
