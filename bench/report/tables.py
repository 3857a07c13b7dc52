"""Which columns each bench shows, in which order, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memos_engine.bench.report.cells import Cell, Table, cell, numeric, title, verdict_tone
from memos_engine.bench.report.standings import Standing
from memos_engine.bench.report.values import (
    STATUSES,
    Document,
    Row,
    clean,
    distinct,
    figure,
    is_ours,
    label,
    measured,
    mode_name,
    number,
    part,
    percent,
    records,
    system_name,
    unmeasured,
    where,
)
from memos_engine.bench.report.verdicts import lead_words

ORDER = {
    "ttft": "system mode scope reuse dtype context query memories recompute tier ttft_ms_p50 ttft_ms_p95 "
    "share_of_limit same_first_token n",
    "decode": "system scope dtype context batch ms_per_token_p50 ms_per_token_p95 tokens_per_s "
    "share_of_limit n",
    "quality": "method memories recompute kl_mean kl_low kl_high kl_p99 kl_token1 kl_tokens top1 "
    "top1_tokens answer_f1 answer_contains n",
    "kernels": "op shape dtype backend us_p50 us_p95 share_of_limit n",
    "roofline": "ceiling dtype rows value unit n",
    "load": "system mode traffic offered_per_s clients objective_ms requests goodput_per_s met_share "
    "ttft_ms_p50 ttft_ms_p95 ttft_ms_p99 itl_ms_p50 itl_ms_p95 throughput_tokens_per_s",
    "paper-table5": "model context query build_ms direct_ms ours_ms reduction break_even paper_build_s "
    "paper_kv_s paper_direct_s paper_reduction",
    "memory": "system dtype peak_mb model_mb pool_mb overhead_mb overhead_full_pool_mb spliced_tokens",
    "attach": "system mode dtype context call_ms_p50 call_ms_p95 n",
    "int8": "weights dtype nll nll_more nll_more_low nll_more_high kl_mean top1 n",
    "lora": "mode system variant batch context adapters rank targets dtype ms_per_token_p50 overhead "
    "extra_ms byte_bound_ms byte_bound swap_ms_p50 mb n",
    "retrieval": "dataset retriever r_at_5 r_at_10 r_at_10_low r_at_10_high mrr r_at_10_single_hop "
    "r_at_10_temporal r_at_10_multi_hop r_at_10_open_domain r_at_10_adversarial search_ms_p50 "
    "search_ms_p95 n",
    "steady": "part recompute dtype stored memories memory_tokens ttft_ms_p50 ttft_ms_p95 splice_ms_p50 "
    "fetch_ms_p50 prefix_tokens kv_share host_share records vault_mb rss_mb records_changed records_added "
    "records_written tokens_per_s n",
    "budget": "policy budget_ms requests excluded_share met_share ttft_ms_p50 ttft_ms_p95 "
    "predicted_error_p50 quality kl_mean gold_kl_mean answer_f1 memories_mean kv_share recompute_mean "
    "schedule_ms_p50",
    "planner": "candidates plan_ms_p50 plan_ms_p95 gap_p50 gap_p95 n",
    "distraction": "part tokens memories questions found other_tokens log_likelihood answer_f1",
    "need": "model part tokens questions n base_rate log_loss base_log_loss calibration_error coefficients",
    "budget-simulated": "policy admission load engines cubes requests met_share ttft_ms_p50 ttft_ms_p95 "
    "predicted_error_p50 quality memories_mean kv_share system workload ttft_ms_mean",
    "store": "system cubes add_ms_p50 add_ms_p95 fsync_ms_p95 search_ms_p50 search_ms_p95 get_ms_p50 "
    "get_ms_p95 past_ms_p50 past_ms_p95 first_search_s open_s bytes_per_cube n",
    "compare": "row metric better a b ratio low high verdict why",
}
HIDDEN = {
    *("samples", "direct_samples", "stages_ms", "status", "reason", "identity", "ours", "regression"),
}


# What an overview has room for where there is only one size.
EXTRAS = ("tokens_per_s", "share_of_limit", "same_first_token")


def listing(document: Document) -> Table:
    """Every measured row with every value it has; columns that no row fills are left out."""
    rows = measured(records(document))
    keys = columns(document, rows)
    table = Table("All measured rows", [Cell(title(key), numeric=numeric(rows, key)) for key in keys])
    for row in rows:
        table.add([cell(row, key) for key in keys], ours=is_ours(row))
    return table


def columns(document: Document, rows: Sequence[Row]) -> list[str]:
    """The bench's own columns first, then whatever else the rows hold."""
    known = ORDER.get(clean(document.get("bench")), "").split()
    held = [str(key) for row in rows for key, value in row.items() if value is not None and key not in HIDDEN]
    order = [*known, *dict.fromkeys(held)]
    return [key for key in dict.fromkeys(order) if key in set(held)]


def overview(document: Document) -> list[Table]:
    """The tables a reader wants first: systems down, sizes across."""
    rows = measured(records(document))
    bench = document.get("bench")
    if bench == "ttft":
        return [*_ttft_overview(rows), *_stages(rows)]
    if bench == "decode":
        return _decode_overview(rows)
    if bench == "quality":
        return _quality_overview(rows)
    if bench == "compare":
        return _changes(rows)
    return []


def _ttft_overview(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for scope, dtype, query, memories in distinct(
        [row for row in rows if row.get("context")], "scope", "dtype", "query", "memories"
    ):
        group = [
            row
            for row in where(rows, scope=scope, dtype=dtype, query=query)
            if row.get("memories") == memories or not row.get("context")
        ]
        caption = (
            f"Time to first token in ms: median, with P95 in small ({_words(scope, dtype, query, memories)})"
        )
        table = _pivot(caption + counts(group), group, "context", "tokens", "ttft_ms_p50", "ttft_ms_p95")
        if table is not None:
            tables.append(table)
    return tables


def _changes(rows: Sequence[Row]) -> list[Table]:
    """What differs between two results, regressions first; nothing that is the same or unclear."""
    quiet = ("same", "unclear", "reference", "no reference", "not measured", None)
    found = [row for row in rows if row.get("verdict") not in quiet]
    found.sort(key=lambda row: (not row.get("regression"), -abs((number(row, "ratio") or 1) - 1)))
    table = Table(
        f"What changed, {len(found)} of {len(rows)}",
        [Cell("row"), *(Cell(k, numeric=True) for k in ("a", "b", "b / a")), Cell("verdict")],
    )
    for row in found:
        low, high = number(row, "low"), number(row, "high")
        interval = f"{figure(low)} to {figure(high)}" if low is not None and high is not None else ""
        values = [Cell(cell(row, key).text, numeric=True) for key in ("a", "b")]
        ratio = Cell(cell(row, "ratio").text, interval, numeric=True)
        verdict = clean(row.get("verdict"))
        said = Cell(verdict, clean(row.get("why")), tone=verdict_tone(verdict))
        name = Cell(clean(row.get("row"), 120), clean(row.get("metric")))
        table.add([name, *values, ratio, said], ours=is_ours(row))
    return [table] if found else []


def _stages(rows: Sequence[Row]) -> list[Table]:
    """Where the time of a request goes, stage by stage."""
    staged = [row for row in rows if part(row, "stages_ms")]
    names = list(dict.fromkeys(name for row in staged for name in part(row, "stages_ms")))
    if not staged:
        return []
    head = [Cell("system"), *(Cell(title(str(name)), numeric=True) for name in names)]
    table = Table(f"Stages of a request in ms, medians{counts(staged)}", head)
    for row in staged:
        values = [number(part(row, "stages_ms"), name) for name in names]
        cells = [Cell("" if v is None else figure(v), numeric=True) for v in values]
        size = f", {clean(row['context'])} tokens" if row.get("context") else ""
        named = Cell(system_name(row.get("system")), mode_name(row) + size)
        table.add([named, *cells], ours=is_ours(row))
    return [table]


def _quality_overview(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for (memories,) in distinct(rows, "memories"):
        own = [r for r in where(rows, memories=memories) if number(r, "kl_mean") is not None]
        shares = sorted({share for row in own if (share := number(row, "recompute")) is not None})
        caption = "KL divergence from full prefill in nats, 95 % interval in small, by share recomputed"
        words = f" ({clean(memories)} memories)" if memories is not None else ""
        head = [Cell("method"), *(Cell(percent(share), numeric=True) for share in shares)]
        table = Table(caption + words + counts(own), head)
        for name in dict.fromkeys(label(row) for row in own):
            found = [row for row in own if label(row) == name]
            cells = [_kl(next(iter(where(found, recompute=share)), None)) for share in shares]
            table.add([Cell(name), *cells], ours=is_ours(found[0]))
        if shares:
            tables.append(table)
    return tables


def _kl(row: Row | None) -> Cell:
    if row is None:
        return Cell("", numeric=True)
    low, high = number(row, "kl_low"), number(row, "kl_high")
    small = f"{figure(low, 2)} to {figure(high, 2)}" if low is not None and high is not None else ""
    return Cell(figure(number(row, "kl_mean") or 0), small, numeric=True)


def counts(rows: Sequence[Row]) -> str:
    """`, n = 9`, or from the least to the most."""
    found = sorted({int(n) for row in rows if (n := number(row, "n"))})
    if not found:
        return ""
    return f", n = {found[0]}" + (f" to {found[-1]}" if len(found) > 1 else "")


def _words(scope: Any, dtype: Any, query: Any, memories: Any) -> str:
    words = [f"{clean(scope)} scope" if scope else "", clean(dtype)]
    words += [
        f"{clean(query)}-token query" if query else "",
        f"{clean(memories)} memories" if memories else "",
    ]
    return ", ".join(word for word in words if word) or "all rows"


def _decode_overview(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for batch, dtype in distinct(rows, "batch", "dtype"):
        group = where(rows, batch=batch, dtype=dtype)
        words = ", ".join(w for w in (f"batch {clean(batch)}" if batch else "", clean(dtype)) if w)
        caption = f"Milliseconds per token: median, with P95 in small ({words or 'all rows'})"
        table = _pivot(
            caption + counts(group), group, "context", "tokens", "ms_per_token_p50", "ms_per_token_p95"
        )
        if table is not None:
            tables.append(table)
    return tables


def _pivot(caption: str, rows: Sequence[Row], across: str, unit: str, p50: str, p95: str) -> Table | None:
    """Labels down, values of `across` to the right; rows without it (the bare question) fill every column
    with the median of theirs."""
    sizes = sorted({value for row in rows if (value := number(row, across))})
    if not sizes:
        return None
    extras = [key for key in EXTRAS if len(sizes) == 1 and numeric(rows, key)]
    head = [Cell("system"), *(Cell(f"{figure(size)} {unit}", numeric=True) for size in sizes)]
    table = Table(caption, [*head, *(Cell(title(key), numeric=True) for key in extras)])
    for name in dict.fromkeys(label(row) for row in rows):
        own = [row for row in rows if label(row) == name]
        cells = [Cell(system_name(own[0].get("system")), mode_name(own[0]))]
        for size in sizes:
            found = [row for row in own if number(row, across) == size]
            cells.append(_median(found, p50, p95))
        bare = [row for row in own if not number(row, across)]
        if bare and not any(c.text for c in cells[1:]):
            cells[1:] = [_median(bare, p50, p95)] * len(sizes)
        if any(c.text for c in cells[1:]):
            cells += [cell(own[0], key) for key in extras]
            table.add(cells, ours=any(is_ours(row) for row in own))
    return table if table.rows else None


def _median(rows: Sequence[Row], p50: str, p95: str) -> Cell:
    values = sorted(value for row in rows if (value := number(row, p50)) is not None)
    if not values:
        return Cell("", numeric=True)
    late = number(rows[0], p95) if len(values) == 1 else None
    small = figure(late) if late is not None else ""
    return Cell(figure(values[(len(values) - 1) // 2]), small, numeric=True)


def missing(document: Document) -> Table | None:
    """Rows that could not be measured, each with its reason."""
    rows = unmeasured(records(document))
    if not rows:
        return None
    table = Table("Not measured", [Cell("what"), Cell("why"), Cell("reason given")])
    for (name, at, status, reason), count in _counted(rows).items():
        words = STATUSES.get(status, status)
        times_over = f" ({count} rows)" if count > 1 else ""
        table.add([Cell(name, at), Cell(words + times_over, tone="failed"), Cell(reason or "none given")])
    return table


def _counted(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], int]:
    """Rows that differ in nothing that is shown are one line."""
    counted: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        sizes = [f"{title(k)} {clean(row[k])}" for k in ("context", "batch", "op", "shape") if row.get(k)]
        key = (label(row), ", ".join(sizes), clean(row.get("status")), clean(row.get("reason")))
        counted[key] = counted.get(key, 0) + 1
    return counted


def ranking(found: Sequence[Standing]) -> Table | None:
    """For each comparable group: who is fastest, and by how much."""
    if not found:
        return None
    ahead = sum(item.verdict == "ahead" for item in found)
    head = [Cell("compared"), Cell("first"), Cell("ours against the best other")]
    table = Table(f"Who is first in each comparable group (ours in {ahead} of {len(found)})", head)
    for item in found:
        main, interval = lead_words(item)
        cells = [Cell(item.route, item.group), Cell(item.best), Cell(main, interval, tone=item.verdict)]
        table.add(cells, ours=item.verdict == "ahead")
    return table


def ratios(document: Document) -> Table | None:
    """The document's own ratios, which its systems' turns within one run make steadier than the times."""
    rows = records(document, "ratios")
    if not rows:
        return None
    ends = ("value", "low", "high", "samples")
    words = [k for k in dict.fromkeys(str(k) for row in rows for k in row) if k not in ends]
    words.sort(key=lambda key: key != "name")
    head = [Cell(title(key), numeric=numeric(rows, key)) for key in words]
    valued, minus = numeric(rows, "value"), any(is_difference(row) for row in rows)
    if valued:
        head += [Cell("difference" if minus else "ratio", numeric=True), Cell("95 % interval", numeric=True)]
    kind = "Differences" if minus else "Ratios"
    table = Table(f"{kind} within this run" if valued else "Ratios of both runs", head)
    for row in rows:
        value, low, high = (number(row, key) for key in ends[:3])
        interval = f"{figure(low)} to {figure(high)}" if low is not None and high is not None else ""
        shown = figure(value) if value is not None else ""
        more = [Cell(shown, numeric=True), Cell(interval, numeric=True)] if valued else []
        table.add([*(cell(row, key) for key in words), *more])
    return table


def is_difference(row: Row) -> bool:
    """Whether an entry of `ratios` is a difference: its name says `minus`."""
    return " minus " in clean(row.get("name"))


def pairs(title_: str, values: dict[str, Any]) -> Table | None:
    """A nested dictionary as lines of name and value."""
    flat = list(flatten(values))
    if not flat:
        return None
    table = Table(title_, [Cell("name"), Cell("value")])
    for name, value in flat:
        table.add([Cell(name), Cell(value)])
    return table


def flatten(values: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{before}{clean(str(key), 60)}"
        if isinstance(value, dict) and value and name.count(".") < 4:
            lines += flatten(value, f"{name}.")
        else:
            lines.append((name, clean(value, 300) if value is not None else "default"))
    return lines


def ceilings(document: Document) -> Table | None:
    return pairs("Ceilings that shares of the limit refer to", part(document, "ceilings"))


def config(document: Document) -> Table | None:
    return pairs("Configuration", part(document, "config"))
