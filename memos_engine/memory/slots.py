"""What else an utterance says, besides what is wanted: names, a time, a kind of memory, whose memories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from memos_engine.memory.call import MAX_ENTITIES, Intent
from memos_engine.memory.dates import relative_times
from memos_engine.memory.when import Interval, intervals

HEAD = 4000
"""Characters of an utterance that slots are looked for in."""

_QUOTED = re.compile(r'"([^"\n]{1,200})"|“([^”\n]{1,200})”|(?<!\w)\'([^\'\n]{1,200})\'(?!\w)')
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_SENTENCE = re.compile(r"(?:^|[.!?:;]\s+|\n\s*|[\"“'])$")
# Words with a capital that name nobody: dates, languages aside, and how sentences begin.
_PLAIN_WORDS = """
a an and the i i'm i've i'd i'll my we our you your he she it it's its they their this that these those there
in on at of for from to with by as if but or so not no yes do does did is are was were be been have has had
can could will would shall should may might must who what when where why how which whose let let's please hey
hi hello ok okay thanks actually correction wait sorry well now never always don't monday tuesday wednesday
thursday friday saturday sunday january february march april june july august september october november
december today tomorrow yesterday last next mr mrs ms dr
"""
_PLAIN = frozenset(_PLAIN_WORDS.split())
_PAST = re.compile(
    r"\b(?:did|was|were|had|went|said|told|met|saw|got|came|took|made|bought|ate|left|felt|gave|ago|been"
    r"|(?!need|feed|speed|indeed)[a-z]{2,}ed)\b",
    re.IGNORECASE,
)
_TASK = re.compile(
    r"^\s*(?:from now on|in (?:the )?future|always|never|whenever|call me|address me"
    r"|answer (?:me )?in|reply in)\b",
    re.IGNORECASE,
)
_LIKING = re.compile(
    r"\b(?:favou?rite|prefer\w*|dislikes?|likes?\s+(?!to\s+know)|loves?|hates?|enjoys?|adores?"
    r"|detests?|can't stand"
    r"|cannot stand|fond of|fan of|allergic to|don't (?:eat|drink))\b",
    re.IGNORECASE,
)
_KINDS = (
    (re.compile(r"\bpreferences?\b|\bwhat (?:do )?I (?:like|prefer)\b", re.IGNORECASE), "preference"),
    (re.compile(r"\b(?:standing )?instructions\b", re.IGNORECASE), "task_prompt"),
)
_ALL = re.compile(
    r"\b(?:all|every) (?:of )?(?:scopes?|users?)\b|\bmine and (?:shared|theirs)\b", re.IGNORECASE
)
_SHARED = re.compile(
    r"\bshared (?:memor\w+|notes?)\b|\b(?:for|with) (?:everyone|everybody|all of us"
    r"|the (?:whole )?(?:team|family|group))\b"
    r"|\b(?:the team's|our team's|everyone's|the family's) (?:memor\w+|notes?)\b",
    re.IGNORECASE,
)
_PRIVATE = re.compile(
    r"\b(?:just|only) (?:for me|between us|me)\b|\bprivately\b|\bmy (?:own|private) (?:memor\w+"
    r"|notes?)\b|\bkeep (?:this|it|that) private\b",
    re.IGNORECASE,
)


def entities_of(text: str, before: str = "") -> tuple[str, ...]:
    """Names (words with a capital that do not merely begin a sentence) and quotations, in order.

    `before`: what stands in front of the text where it was said.
    """
    head = text[:HEAD]
    found: dict[str, int] = {}
    quoted: set[int] = set()
    for match in _QUOTED.finditer(head):
        quoted.update(range(*match.span()))
        found.setdefault(next(part for part in match.groups() if part), match.start())
    for match in _WORD.finditer(head):
        word = match[0]
        name = re.sub(r"['’]s$", "", word)
        if match.start() in quoted or not name[0].isupper() or name.casefold().replace("’", "'") in _PLAIN:
            continue
        if _SENTENCE.search((before + head[: match.start()])[-4:]) and not _named(head[match.end() :]):
            continue
        last = next(reversed(found), None)
        if last is not None and head[: match.start()].endswith(f"{last} "):  # `Anna Smith` is one name
            at = found.pop(last)
            found[f"{last} {name}"] = at
        else:
            found.setdefault(name, match.start())
    kept = [name for name in sorted(found, key=found.__getitem__) if not name.isspace()]
    return tuple(kept[:MAX_ENTITIES])


_SAID_OF = re.compile(
    r"(?:['’]s)?\s+(?:is|was|has|had|will|can|and|likes?|loves?|hates?|lives?|works?|said|[A-Z]\w+\b|\w+ed\b)"
)


def _named(rest: str) -> bool:
    """Whether the word before this begins its sentence as a name: something is said of it."""
    return _SAID_OF.match(rest) is not None


def window_of(text: str, now: datetime, intent: Intent) -> Interval | None:
    """The time that a text speaks of: from the beginning of the first to the end of the last that it names.

    Dates without a year, and weekdays, lie in the past where the text speaks of the past, else ahead.
    """
    head = text[:HEAD]
    past = _PAST.search(head) is not None
    named = [(one.first, one.last) for one in relative_times(head, now, ahead=not past)]
    here = intervals(head, now, [now.year], relative=False)
    other = intervals(head, now, [now.year + (-1 if past else 1)], relative=False)
    if len(here) != len(other):  # 29 February: which one belongs to which is not known
        other = here
    for (first, last), moved in zip(here, other, strict=True):
        wrong = first > now if past else last < now and intent is not Intent.RECALL
        named.append(moved if wrong else (first, last))
    if not named:
        return None
    return min(first for first, _ in named), max(last for _, last in named)


def type_of(text: str, intent: Intent) -> str | None:
    """What to store a text as, or the only type to look for (None: any)."""
    head = text[:HEAD]
    if intent in (Intent.REMEMBER, Intent.UPDATE):
        if _TASK.search(head):
            return "task_prompt"
        return "preference" if _LIKING.search(head) else "fact"
    return next((kind for pattern, kind in _KINDS if pattern.search(head)), None)


def scope_of(text: str, intent: Intent) -> str:
    """Whose memories are meant; writing is private, looking is in all that the caller may see."""
    head = text[:HEAD]
    kinds: Sequence[tuple[re.Pattern[str], str]] = ((_PRIVATE, "private"), (_SHARED, "shared"), (_ALL, "all"))
    said = next((scope for pattern, scope in kinds if pattern.search(head)), None)
    return said or ("all" if intent in (Intent.RECALL, Intent.QUESTION) else "private")
