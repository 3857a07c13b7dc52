"""A table as plain text: its cells, the titles of columns, and how values are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memos_engine.bench.report.values import (
    CATEGORIES,
    METHODS,
    MODES,
    RETRIEVERS,
    TIERS,
    Row,
    clean,
    figure,
    number,
    percent,
    system_name,
)


@dataclass(frozen=True)
class Cell:
    """small: a second, lesser number; tone: ahead, behind, level or failed."""

    text: str
    small: str = ""
    numeric: bool = False
    tone: str = ""


@dataclass
class Table:
    """Plain text, nothing escaped; `ours` holds the indices of the rows that are this package's."""

    caption: str
    head: list[Cell]
    rows: list[list[Cell]] = field(default_factory=list)
    ours: set[int] = field(default_factory=set)

    def add(self, cells: list[Cell], ours: bool = False) -> None:
        if ours:
            self.ours.add(len(self.rows))
        self.rows.append(cells)


TITLES = {
    "overhead": "times without",
    "byte_bound": "extra / bound",
    "byte_bound_ms": "bound ms",
    "ttft_ms_p50": "TTFT ms, P50",
    "ttft_ms_p95": "TTFT ms, P95",
    "ttft_ms_p99": "TTFT ms, P99",
    "itl_ms_p50": "between tokens ms, P50",
    "itl_ms_p95": "between tokens ms, P95",
    "ms_per_token_p50": "ms per token, P50",
    "ms_per_token_p95": "ms per token, P95",
    "us_p50": "µs, P50",
    "us_p95": "µs, P95",
    "tokens_per_s": "tokens/s",
    "throughput_tokens_per_s": "tokens/s",
    "goodput_per_s": "goodput, requests/s",
    "offered_per_s": "offered, requests/s",
    "objective_ms": "TTFT objective, ms",
    "met_share": "objective met",
    "share_of_limit": "share of limit",
    "budget_ms": "budget, ms",
    "excluded_share": "bare query too slow",
    "predicted_error_p50": "error of the forecast, P50",
    "memories_mean": "memories, mean",
    "recompute_mean": "share computed again, mean",
    "schedule_ms_p50": "scheduling ms, P50",
    "plan_ms_p50": "planning ms, P50",
    "plan_ms_p95": "planning ms, P95",
    "gap_p50": "gap to the bound, P50",
    "gap_p95": "gap to the bound, P95",
    "ttft_ms_mean": "TTFT ms, mean",
    "load": "load, work over capacity",
    "log_loss": "log loss, nats",
    "base_log_loss": "log loss of the base rate",
    "base_rate": "share that is needed",
    "calibration_error": "calibration error",
    "same_first_token": "same first token",
    "kl_mean": "KL mean",
    "gold_kl_mean": "KL from the asked paragraph alone",
    "cubes": "memories",
    "add_ms_p50": "add ms, P50",
    "add_ms_p95": "add ms, P95",
    "fsync_ms_p95": "fsync ms, P95",
    "search_ms_p50": "search ms, P50",
    "search_ms_p95": "search ms, P95",
    "get_ms_p50": "get ms, P50",
    "get_ms_p95": "get ms, P95",
    "past_ms_p50": "get as of ms, P50",
    "past_ms_p95": "get as of ms, P95",
    "first_search_s": "first search s",
    "open_s": "open s",
    "bytes_per_cube": "bytes a memory",
    "call_ms_p50": "ms a call, P50",
    "call_ms_p95": "ms a call, P95",
    "nll": "nats a token",
    "nll_more": "nats more than whole",
    "nll_more_low": "low end",
    "nll_more_high": "high end",
    "kl_low": "KL, low end",
    "kl_high": "KL, high end",
    "kl_p99": "KL, P99",
    "kl_token1": "KL, first token",
    "kl_tokens": "KL, mean over tokens",
    "top1": "same top token",
    "top1_tokens": "same top token, over tokens",
    "answer_f1": "answer F1",
    "answer_contains": "answer contains it",
    "build_ms": "build ms",
    "direct_ms": "direct ms",
    "ours_ms": "ours ms",
    "break_even": "break-even uses",
    "paper_build_s": "paper: build s",
    "paper_kv_s": "paper: KV s",
    "paper_direct_s": "paper: direct s",
    "paper_reduction": "paper: reduction",
    "context": "memory tokens",
    "query": "query tokens",
    "spliced_tokens": "spliced tokens",
    "limit_ms": "limit, ms",
    "limit_us": "limit, µs",
    "requests_per_s": "requests/s",
    "mean_recomputed": "mean share recomputed",
    "paper_model": "paper's model",
    "f1_low": "F1, low end",
    "f1_high": "F1, high end",
    "part": "requests",
    "splice_ms_p50": "splice ms, P50",
    "fetch_ms_p50": "fetch ms, P50",
    "kv_share": "memories as KV",
    "host_share": "records from host memory",
    "vault_mb": "vault, MB",
    "rss_mb": "resident, MB",
    "r_at_5": "R@5",
    "r_at_10": "R@10",
    "r_at_10_low": "R@10, low end",
    "r_at_10_high": "R@10, high end",
    "mrr": "MRR",
    **{f"r_at_10_{name}": f"R@10, {words}" for name, words in CATEGORIES.items()},
}
SHARES = {
    *(
        "share_of_limit",
        "same_first_token",
        "met_share",
        "recompute",
        "top1",
        "top1_tokens",
        "reduction",
        "paper_reduction",
    ),
    *("answer_contains", "difference", "excluded_share", "mean_recomputed", "kv_share", "host_share"),
    *("predicted_error_p50", "recompute_mean", "quality", "gap_p50", "gap_p95", "base_rate"),
}


def title(key: str) -> str:
    return TITLES.get(key) or str(clean(key.replace("_", " "), 60))


def cell(row: Row, key: str) -> Cell:
    """One value as it is shown."""
    value = number(row, key)
    if value is not None:
        share = key in SHARES and abs(value) <= 10
        return Cell(percent(value) if share else figure(value), numeric=True)
    text = clean(row.get(key), 120)
    names: dict[str, dict[str, str]] = {
        "mode": MODES,
        "tier": TIERS,
        "method": METHODS,
        "retriever": RETRIEVERS,
    }
    if key == "system":
        return Cell(system_name(text) if text else "")
    return Cell(names.get(key, {}).get(text, text), tone=verdict_tone(text) if key == "verdict" else "")


def verdict_tone(verdict: str) -> str:
    if verdict in ("slower", "worse", "lost"):
        return "behind"
    return "ahead" if verdict in ("faster", "better") else "level"


def numeric(rows: Sequence[Row], key: str) -> bool:
    return any(number(row, key) is not None for row in rows)
