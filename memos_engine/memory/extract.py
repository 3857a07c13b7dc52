"""Facts from a conversation, as an optional job: new memories derived from the turns, which stay.

`personal_facts` is a small set of rules for English (`I live in ...`, `my name is ...`); any callable can be
in its place, a model too. Nothing here runs by itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from memos_engine.errors import ConflictError, MemoryInputError
from memos_engine.memory.cube import Fact, MemCube, Provenance
from memos_engine.memory.fact import MAX_NAME_CHARS
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.values import validate_text

TRIGGER = "extract"
"""What the provenance of these memories says."""
MAX_CHARS = 20_000
"""Characters of a turn that the rules look at."""
MAX_CLAUSES = 8
"""Clauses of a sentence that the rules look at."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What a turn states: `text` is stored; `attribute` of `subject` (None: of whoever speaks) makes it a
    fact, which ends an earlier one of the same names. Raises `MemoryInputError`."""

    text: str
    attribute: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        validate_text(self.text)
        for name in (self.attribute, self.subject):
            if name is not None:
                validate_text(name, MAX_NAME_CHARS)
        if self.attribute is None and self.subject is not None:
            raise MemoryInputError("a statement's subject needs an attribute; give it, or no subject.")


Rule = Callable[[str], Iterable[Statement]]
"""From a turn's text to what it states; equal for equal texts, so that a repeated job finds its work done."""


def extract(
    operator: MemOperator,
    principal: Principal,
    turns: Iterable[MemCube],
    rule: Rule | None = None,
    *,
    speaker: str | None = None,
) -> list[MemCube]:
    """Store what these turns state (by `rule`, default `personal_facts`); returns those memories, in order.

    Each is the caller's own, of origin `inference`, `derived_from` its turn, and holds since that was said.
    `speaker` (default: the turn's owner) is the subject of what is said of `I`; a leading `speaker:` in a
    turn is passed over. Repeating the job adds nothing, and brings nothing back that was deleted since.
    Turns without a text, and what this job made, are passed over. Raises `MemoryInputError`,
    `MemoryNotFoundError` (a turn that the caller may not see), `StoreError`.
    """
    if speaker is not None:
        validate_text(speaker, MAX_NAME_CHARS)
    rule = rule or personal_facts
    found: dict[str, MemCube] = {}
    for turn in turns:
        if turn.body is None or (turn.provenance is not None and turn.provenance.trigger == TRIGGER):
            continue
        who = speaker or turn.owner.user
        for statement in rule(turn.body.removeprefix(f"{who}:").lstrip() or turn.body):
            if not isinstance(statement, Statement):
                raise MemoryInputError(f"a rule must give Statement objects, not {type(statement).__name__}.")
            cube = _stored(operator, principal, turn, statement, who)
            if cube is not None:
                found[cube.id] = cube
    return list(found.values())


def _stored(
    operator: MemOperator, principal: Principal, turn: MemCube, statement: Statement, who: str
) -> MemCube | None:
    said = turn.created_at
    if turn.fact is not None and turn.fact.valid_from is not None:
        said = turn.fact.valid_from
    about = (turn.id, statement.attribute or "", statement.subject or who, statement.text)
    digest = hashlib.sha256("\0".join(about).encode()).hexdigest()
    subject = (statement.subject or who) if statement.attribute else None
    fact = Fact(subject, statement.attribute, valid_from=said)
    try:
        return operator.remember(
            principal,
            statement.text,
            origin="inference",
            idempotency_key=f"extract:{digest}",
            fact=fact,
            provenance=Provenance(trigger=TRIGGER),
            derived_from=[turn.id],
        )
    except ConflictError:  # deleted since: whoever did so had a reason
        return None


# -- rules ----------------------------------------------------------------------------------------------

_SENTENCE = re.compile(r"(?:[^.!?\n;]|\.(?=\w))+[.!?;]?")
_CLAUSE = re.compile(r"\s(?:and|but)\s+(?=(?:i|my|we)\b)", re.IGNORECASE)
_UNSURE = re.compile(
    r"\b(?:if|unless|suppose|imagine|wish|would|maybe|perhaps|might|almost)\b", re.IGNORECASE
)
_OPENING = r"(?:(?:hi|hello|hey|well|so|and|but|also|yes|no|actually|oh|by the way)\b[\s,:!-]*){0,3}"
_VALUE = r"(?P<value>[^\W_](?:[^,;.!?\n]|\.(?=\w)){0,80}?)"
_END = (
    r"(?=\s*(?:[,;!?]|\.(?!\w)|$)|\s+(?:and|but|because|since|with|where|so|although|now|these\s+days"
    r"|at\s+the\s+moment)\b)"
)
_I = r"(?:i|we)"
_WHEN = r"(?:\s+(?:last|this)\s+\w+|\s+yesterday|\s+today|\s+\w+\s+\w+\s+ago)?"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"\s*{_OPENING}(?P<said>{pattern}){_END}", re.IGNORECASE), attribute)
    for pattern, attribute in (
        (rf"my\s+(?:full\s+|first\s+)?name(?:\s+is|'s)\s+{_VALUE}", "name"),
        (rf"(?:you\s+can\s+|please\s+)?call\s+me\s+{_VALUE}", "name"),
        (rf"{_I}(?:\s+currently|\s+now)?\s+live\s+in\s+{_VALUE}", "home"),
        (rf"(?:{_I}|i've|i\s+have|we've)(?:\s+just|\s+recently)?\s+moved\s+to\s+{_VALUE}{_WHEN}", "home"),
        (rf"(?:i|i\s+now|i\s+currently)\s+work\s+(?:at|for)\s+{_VALUE}", "workplace"),
        (rf"i(?:'m|\s+am)\s+working\s+(?:at|for)\s+{_VALUE}", "workplace"),
        (rf"i\s+work\s+as\s+{_VALUE}", "job"),
        (rf"my\s+job\s+is\s+{_VALUE}", "job"),
        (rf"my\s+birthday(?:\s+is|'s)\s+(?:on\s+)?{_VALUE}", "birthday"),
        (
            rf"my\s+(?P<what>(?:e-?mail|phone|mobile)(?:\s+(?:address|number))?|address)\s+is\s+{_VALUE}",
            "{what}",
        ),
        (rf"my\s+favou?rite\s+(?P<what>[\w-]+(?:\s+[\w-]+)?)\s+(?:is|are)\s+{_VALUE}", "favourite {what}"),
    )
)
# How a value begins where other words are as likely: `call me later`, `I live in fear`, `I work for hours`.
_PROPER = {
    "call": re.compile(r"[^\W\d_a-z]"),
    "home": re.compile(r"(?:the\s+)?[^\W\d_a-z]"),
    "workplace": re.compile(r"(?:(?:the|a|an|my|our)\s+)?[^\W\d_a-z]|(?:the|a|an)\s+\w"),
}
# A value that says nothing, or takes back what was said.
_EMPTY = re.compile(r"(?:not|no|none|never|what|who|where|unknown|none of your business)\b", re.IGNORECASE)
_STRAIGHT = str.maketrans({"’": "'", "ʼ": "'"})  # one for one, so that places stay


def personal_facts(text: str) -> list[Statement]:
    """What the speaker says of themselves, sentence by sentence; each statement's words are in the text.

    Questions, conditions, negations, quotations and what others say give nothing.
    """
    found: list[Statement] = []
    plain = text[:MAX_CHARS].translate(_STRAIGHT)
    for sentence in _SENTENCE.finditer(plain):
        if sentence[0].rstrip().endswith("?") or _UNSURE.search(sentence[0]):
            continue
        starts = [sentence.start(), *(m.end() for m in _CLAUSE.finditer(plain, *sentence.span()))]
        for start in starts[:MAX_CLAUSES]:
            statement = _stated(text, plain, start, sentence.end())
            if statement is not None:
                found.append(statement)
    return found


def _stated(text: str, plain: str, start: int, end: int) -> Statement | None:
    """What the clause that begins at `start` states."""
    for pattern, attribute in _RULES:
        match = pattern.match(plain, start, end)
        if match is None or _EMPTY.match(match["value"]):
            continue
        proper = _PROPER.get("call" if "call me" in match["said"].lower() else attribute)
        if proper is not None and not proper.match(match["value"]):
            continue
        named = {"what": " ".join(match["what"].lower().split())} if "what" in match.groupdict() else {}
        return Statement(text[match.start("said") : match.end("said")], attribute.format(**named))
    return None
