"""Colours by role, each for light and for dark pages.

Ours is warm, everyone else cool, and within a system the mode decides line and marker, so that neither colour
blindness nor a grey print loses a series. Plots are drawn in the light colours; in the page each of these
becomes a CSS variable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memos_engine.bench.report.values import OURS, Row, clean, is_ours

# role: (light, dark)
ROLES = {
    "ink": ("#20242b", "#e7e9ed"),
    "muted": ("#58616d", "#a6aeb9"),
    "grid": ("#dfe2e6", "#353a43"),
    "card": ("#ffffff", "#1b1e24"),
    "limit": ("#6a7380", "#939ca9"),
    "ours": ("#cf4509", "#ff8147"),
    "ours-full": ("#7c3511", "#d8a17f"),
    "ours-prefix": ("#b37600", "#f0b23a"),
    "ours-text": ("#a8325a", "#f28cab"),
    "transformers": ("#0066b0", "#5caff3"),
    "vllm": ("#00805a", "#33c495"),
    "llamacpp": ("#7a4cae", "#bb9ae8"),
    "paper": ("#5d6f86", "#8ea3bd"),
    "other-0": ("#00788a", "#45c2d4"),
    "other-1": ("#b0348f", "#ea86cf"),
    "other-2": ("#5c7400", "#a9c443"),
    "other-3": ("#3f51b5", "#93a1f5"),
    "other-4": ("#8a5a3b", "#cfa283"),
}
OTHERS = [role for role in ROLES if role.startswith("other-")]

# mode: (line, marker)
STYLES: dict[str, tuple[Any, str]] = {
    "splice": ("-", "D"),
    "full": ("--", "o"),
    "prefix": ("-.", "s"),
    "text": (":", "^"),
    "query_only": (":", "x"),
    "none": (":", "x"),
}
# tier: (line, marker) of spliced memory that does not wait in host memory
SPLICED: dict[str, tuple[Any, str]] = {"disk-warm": ((0, (6, 2)), "v"), "disk-cold": ((0, (1.5, 1.5)), "X")}


def light(role: str) -> str:
    return ROLES[role][0]


def variable(role: str) -> str:
    """The role as the page's CSS names it."""
    return f"--p-{role}"


def series_role(row: Row, names: Sequence[str]) -> str:
    """The colour of a row; `names` are all systems, methods or backends of the plot, so that strangers each
    get a colour of their own, the same in every plot of a page with the same systems."""
    if row.get("mode") in ("query_only", "none") and is_ours(row):
        return "limit"
    if is_ours(row):
        role = f"ours-{clean(row.get('mode'), 20)}"
        return role if role in ROLES else "ours"
    name = row_name(row)
    if name in ("transformers", "vllm", "llamacpp"):
        return name
    strangers = sorted({n for n in names if n not in (OURS, "transformers", "vllm", "llamacpp")})
    return OTHERS[strangers.index(name) % len(OTHERS)] if name in strangers else "limit"


def row_name(row: Row) -> str:
    """The system, method or backend that a row is about."""
    found = next((row[key] for key in ("system", "method", "backend", "dtype") if row.get(key)), None)
    return str(clean(found, 60))
