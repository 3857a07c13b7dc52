"""Reading result documents without trust, and writing their values as short plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Document = Mapping[str, Any]

OURS = "memos_engine"
# Kernel backends that are this package's own code.
OUR_BACKENDS = ("memos_engine", "ours", "native", "triton", "cpu", "cuda")

SYSTEMS = {"vllm": "vLLM", "llamacpp": "llama.cpp"}
MODES = {
    "full": "full prefill",
    "prefix": "exact prefix",
    "splice": "spliced",
    "query_only": "question alone",
    "text": "memory as text",
    "none": "no memory",
    "decode": "",
}
METHODS = {
    "full": "full prefill (fp32)",
    "full_bf16": "full prefill in bf16",
    "none": "no memory",
    "random": "random choice",
    "first_k": "first tokens",
    "int8": "memos_engine, int8",
    "neutral": "memos_engine, neutral contexts",
    "rank": "memos_engine, by rank",
    "anchored": "anchored records",
    "cacheblend": "V deviation",
}
RETRIEVERS = {
    "bm25": "BM25",
    "rrf": "RRF of BM25 and dense",
    "memos_engine_words": "memos_engine, no embedder",
    "memos_engine_shipped": "memos_engine, weights as shipped",
    "memos_engine_words_shipped": "memos_engine, no embedder, weights as shipped",
}
CATEGORIES = {
    "single_hop": "single hop",
    "temporal": "temporal",
    "multi_hop": "multi-hop",
    "open_domain": "open domain",
    "adversarial": "adversarial",
}
TIERS = {"host": "host memory", "device": "GPU memory", "disk-warm": "disk, warm", "disk-cold": "disk, cold"}
STATUSES = {
    "absent": "not installed",
    "unsupported": "not supported",
    "failed": "failed",
    "crashed": "crashed",
    "timeout": "over its time limit",
    "too_big": "too big for this machine",
}


def clean(value: Any, limit: int = 2000) -> str:
    """Any value as text that HTML, XML and UTF-8 can hold; not escaped yet."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value)
    text = value if isinstance(value, str) else _json(value)
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        return str(value)


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of the row, else None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def samples(row: Mapping[str, Any]) -> list[float]:
    """The row's samples, empty unless every one is a finite number above 0."""
    values = row.get("samples")
    if not isinstance(values, (list, tuple)):
        return []
    read = [number({"v": value}, "v") for value in values]
    return [v for v in read if v is not None and v > 0] if all(v is not None and v > 0 for v in read) else []


def records(document: Document, key: str = "rows") -> list[Row]:
    """The dictionaries under a key of the document; anything else there is left out."""
    values = document.get(key)
    return [row for row in values if isinstance(row, dict)] if isinstance(values, (list, tuple)) else []


def part(document: Document, key: str) -> dict[str, Any]:
    """A dictionary of the document, empty where it has none."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.get("status")]


def unmeasured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("status")]


def figure(value: float, digits: int = 3) -> str:
    """Three significant digits, whole numbers in full, ten thousand and more with narrow spaces."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞" if value < 0 else "not a number"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.1e}"
    decimals = max(0, digits - 1 - size)
    rounded = round(value, decimals)
    if abs(rounded) >= 10000:
        return f"{rounded:,.0f}".replace(",", "\u202f")
    text = f"{rounded:.{decimals}f}"
    if float(value).is_integer() and "." in text:
        return f"{value:.0f}"
    return text.rstrip("0") if abs(value) < 1 and "." in text else text


def percent(value: float) -> str:
    shown = value * 100
    return f"{shown:.0f} %" if abs(shown) >= 10 or shown == 0 else f"{figure(shown, 2)} %"


def times(value: float) -> str:
    """A factor: 1.07×, 8.4×, 30×."""
    if not math.isfinite(value):
        return f"{figure(value)}×"
    return f"{value:.{2 if value < 2 else 1 if value < 10 else 0}f}×"


def system_name(name: Any) -> str:
    text = clean(name, 40)
    return SYSTEMS.get(text, text) or "unnamed"


def mode_name(row: Mapping[str, Any]) -> str:
    """The mode with what sets it apart: tokens recomputed, a tier other than host memory."""
    mode = clean(row.get("mode"), 40)
    words = [MODES.get(mode, mode)] if MODES.get(mode, mode) else []
    share = number(row, "recompute")
    if share and mode not in ("full", "text"):
        words.append(f"{percent(share)} recomputed")
    tier = clean(row.get("tier"), 40)
    if tier and tier != "host":
        words.append(TIERS.get(tier, tier))
    return ", ".join(words)


def label(row: Mapping[str, Any]) -> str:
    """What a row measured: system and mode, or the method, or the backend."""
    if row.get("system"):
        mode = mode_name(row)
        return system_name(row["system"]) + (f": {mode}" if mode else "")
    if row.get("method"):
        method = clean(row["method"], 40)
        return METHODS.get(method, method)
    if row.get("retriever"):
        retriever = clean(row["retriever"], 40)
        return RETRIEVERS.get(retriever, retriever)
    return system_name(row.get("backend") or row.get("op") or row.get("ceiling") or row.get("name"))


def is_ours(row: Mapping[str, Any]) -> bool:
    """Whether the row measured this package."""
    if isinstance(row.get("ours"), bool):
        return bool(row["ours"])
    if row.get("system") is not None:
        return bool(row["system"] == OURS)
    if row.get("method") is not None:
        return bool(row["method"] == OURS)
    backend = clean(row.get("backend")).lower()
    return any(backend == name or backend.startswith((f"{name}-", f"{name}:")) for name in OUR_BACKENDS)


def distinct(rows: Sequence[Row], *keys: str) -> list[tuple[Any, ...]]:
    """The combinations of values that occur under the keys, in order of first sight."""
    seen: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for row in rows:
        values = tuple(row.get(key) for key in keys)
        seen.setdefault(tuple(_json(v) for v in values), values)
    return list(seen.values())


def where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows that have just these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
