"""Where we stand, in words."""

from __future__ import annotations

from collections.abc import Sequence

from memos_engine.bench.report.standings import Standing
from memos_engine.bench.report.values import figure, times

SHOWN = 8


def summary_of(found: Sequence[Standing]) -> tuple[str, list[tuple[str, str]]]:
    """One sentence over all comparable groups, then each system that is ahead, and where."""
    ahead, level, behind = ([s for s in found if s.verdict == v] for v in ("ahead", "level", "behind"))
    groups = "1 comparable group" if len(found) == 1 else f"{len(found)} comparable groups"
    words = f"Ours is first in {len(ahead)} of {groups}"
    words += f", level with another system in {len(level)}" if level else ""
    words += f" and behind in {len(behind)}:" if behind else ". "
    if not behind:
        words += "Where others may be ahead outside these groups has not been measured."
    lines = []
    for rival, route in dict.fromkeys((s.rival, s.route) for s in sorted(behind, key=lambda s: s.lead.value)):
        own = [s for s in behind if (s.rival, s.route) == (rival, route)]
        factors = sorted(_inverse(s.lead.value) for s in own)
        spread = " to ".join(dict.fromkeys(times(factor) for factor in (factors[0], factors[-1])))
        groups_of = sum(s.route == route for s in found)
        sure = "" if all(s.firm for s in own) else " Some of these have too few samples for an interval."
        where = _together([s.group for s in own])
        plural = "" if groups_of == 1 else "s"
        said = f"{rival} is ahead {spread} in {len(own)} of {groups_of} group{plural}: {route}."
        lines.append((said, f"{where}.{sure}"))
    return words, lines


def _together(groups: Sequence[str]) -> str:
    """Groups on one line, what they share said once."""
    split = [group.split(", ") for group in groups]
    shared = 0
    while len(groups) > 1 and all(len(words) > shared + 1 for words in split):
        if len({words[-1 - shared] for words in split}) > 1:
            break
        shared += 1
    heads = [", ".join(words[: len(words) - shared]) for words in split]
    tail = f" (all: {', '.join(split[0][len(split[0]) - shared :])})" if shared else ""
    return "; ".join(heads[:SHOWN]) + ("; …" if len(heads) > SHOWN else "") + tail


def lead_words(item: Standing) -> tuple[str, str]:
    """How far ours is ahead or behind, and the interval."""
    lead = item.lead
    if item.verdict == "behind":
        main = f"{item.rival} ahead {times(_inverse(lead.value))}"
        ends = (_inverse(lead.high), _inverse(lead.low))
    else:
        main = (
            f"ours ahead {times(lead.value)}" if item.verdict == "ahead" else f"level ({times(lead.value)})"
        )
        ends = (lead.low, lead.high)
    if not item.firm:
        return main, "too few samples for an interval"
    return main, f"95 % interval {figure(ends[0])} to {figure(ends[1])}"


def _inverse(value: float) -> float:
    return 1 / value if value else float("inf")
