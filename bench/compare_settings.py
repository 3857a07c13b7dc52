"""What differs between two runs apart from their numbers: a reader must know before blaming the code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memos_engine.bench.report.tables import flatten
from memos_engine.bench.report.values import clean, number, part

MACHINE = ("cpu", "gpu", "cores", "memory_gib", "threads", "system", "python", "torch", "transformers")


def differences(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float) -> list[str]:
    """One sentence for each thing that differs: machine, load, configuration, commit, ceilings."""
    notes = []
    for side, document in (("a", a), ("b", b)):
        if document.get("complete") is False:
            notes.append(f"Result {side} is incomplete: its run was interrupted.")
    notes += _machine(part(a, "machine"), part(b, "machine"))
    notes += _config(part(a, "config"), part(b, "config"))
    if a.get("commit") != b.get("commit"):
        old, new = (clean(d.get("commit")) or "none recorded" for d in (a, b))
        notes.append(f"Different commits: {old}, then {new}.")
    elif clean(a.get("commit")).endswith("-dirty"):
        notes.append(f"Both ran from {clean(a.get('commit'))}: the code may differ all the same.")
    if a.get("version") != b.get("version"):
        notes.append(
            f"Different versions of the format: {clean(a.get('version'))}, {clean(b.get('version'))}."
        )
    return notes + _ceilings(part(a, "ceilings"), part(b, "ceilings"), tolerance)


def _machine(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    changed = [key for key in MACHINE if a.get(key) != b.get(key)]
    notes = []
    for key in changed:
        old, new = (clean(machine.get(key)) or "none" for machine in (a, b))
        notes.append(f"Different {key.replace('_gib', '')}: {old}, then {new}.")
    if part(a, "ops") != part(b, "ops"):
        before, after = dict(flatten(part(a, "ops"))), dict(flatten(part(b, "ops")))
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        notes.append(f"Different kernels in use: {', '.join(changed[:6])}.")
    if part(a, "systems") != part(b, "systems"):
        before, after = dict(flatten(part(a, "systems"))), dict(flatten(part(b, "systems")))
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        notes.append(f"Different systems or versions of theirs: {', '.join(changed[:6])}.")
    loads = number(a, "load_average"), number(b, "load_average")
    cores = number(b, "cores") or 1.0
    if loads[0] is not None and loads[1] is not None and abs(loads[0] - loads[1]) > 0.25 * cores:
        notes.append(
            f"Different load: {loads[0]:.2f} before, {loads[1]:.2f} after, on {cores:.0f} cores; "
            "the busier run is the slower one for that reason alone."
        )
    return notes


def _config(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    before, after = dict(flatten(a)), dict(flatten(b))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:
        return []
    said = [f"{k} {before.get(k, 'unset')}, then {after.get(k, 'unset')}" for k in changed[:8]]
    return [f"Different configuration: {'; '.join(said)}."]


def _ceilings(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> list[str]:
    before, after = _numbers(a), _numbers(b)
    notes = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old and abs(new / old - 1) > tolerance:
            notes.append(f"Ceiling {name} moved by {100 * (new / old - 1):+.0f} %: {old:g}, then {new:g}.")
    missing = sorted(before.keys() ^ after.keys())
    if missing:
        notes.append(f"Ceilings in only one of the two: {', '.join(missing[:6])}.")
    return sorted(notes)


def _numbers(values: Any, before: str = "") -> dict[str, float]:
    """Every number of a nested structure by its path."""
    found: dict[str, float] = {}
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        name = f"{before}{clean(str(key), 60)}"
        if isinstance(value, (dict, list)):
            found |= _numbers(value, f"{name}.")
        elif (read := number({"v": value}, "v")) is not None:
            found[name] = read
    return found
