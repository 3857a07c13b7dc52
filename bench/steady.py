"""Steady state: does a first token take as long after hundreds of requests as at the beginning, and are the
records that it comes from still the same bytes?

Each request asks something new of memories in an order that no request had before, as `UserMemory.chat` does
for a user; host memory holds half of the records, so that the vault is read throughout. A store that keeps
what requests computed decays under such traffic: its entries fit the orders that they were made in. Ours
stores what a memory is alone, and nothing that a request did to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from memos_engine.bench import stats
from memos_engine.bench.document import Document, Row
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.steady_store import difference, fingerprints
from memos_engine.bench.steady_traffic import GROUP, HELD, NEW, Bed, opened, store_folder, traffic_of
from memos_engine.bench.systems import OURS
from memos_engine.bench.target import open_target

from memos_engine.config import ConfigError, Recompute, SamplingParams
from memos_engine.errors import MemosEngineError
from memos_engine.preparing import Ask
from memos_engine.reply import Reply

REQUESTS = (500, 30)  # with --quick the second; memories, warm-up and generations follow from it
GREEDY = SamplingParams(max_new_tokens=NEW)

NOTES = (
    "Every request is a UserMemory.chat of its own: a question never asked before over memories drawn by "
    "chance, in an order that no request of the run had before. An embedder of the bench's makes retrieval "
    "find just these, in this order; what embedding a question with a sentence model takes is not in the "
    "times.",
    f"Host memory holds {HELD:.0%} of the records' bytes (least recently used go first) and is full before "
    "the first measured request; a tenth as many requests warm up before it. Exact pages of earlier "
    "requests (the anchor, a first memory) are found again as in any engine: prefix tokens.",
    "host share: of the records that a row's requests took, those that waited in host memory; the others "
    "were read from the vault and checked. Files may come from the page cache.",
    f"The last row: twice as many answers as requests, {GROUP} at once in one batch, each over an order of "
    "its own. Then the SHA-256 of every vault file and the rows that name them are compared with those "
    "before the first request: changed (or lost), added, written.",
)


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench steady`; a unit is a share of tokens that are computed again."""
    if options.random_weights is not None or options.device != "cpu":
        raise ConfigError("bench steady measures a pulled model on the CPU; leave those options out.")
    requests = options.rounds(*REQUESTS)
    if requests < 2:
        raise ConfigError("n=1: the last requests are compared with the first, so at least 2.")
    shares = tuple(dict.fromkeys(options.recompute)) or (0.0,)
    units = {f"r = {share:g}": share for share in shares}
    document = Document("steady", options)
    lacking = {unit: share for unit, share in units.items() if not document.has(unit)}
    if lacking:
        document.note(*NOTES)
        with open_target(options) as target, store_folder(options) as folder:
            traffic = traffic_of(options, target, requests)
            for i, (unit, share) in enumerate(lacking.items()):

                def tell(text: str, done: int, u: str = unit, i: int = i) -> None:
                    progress(f"{u}: {text}", i * traffic.units + done, len(lacking) * traffic.units)

                with opened(traffic, folder, tell) as bed:
                    document.add(unit, *_measured(bed, unit, share))
    return document.finish()


def _measured(bed: Bed, unit: str, share: float) -> tuple[list[Row], list[Row], list[str]]:
    """Rows, ratios and notes of one share."""
    one_by_one(bed, share, bed.traffic.warmup)
    parts = _parts(bed.traffic.requests)
    rows = []
    for first, last in parts:
        reads = bed.vault.reads
        replies = one_by_one(bed, share, last - first)
        forms = [form for reply in replies for form in reply.forms.values()]
        fields = _times(replies) | _shares(forms, bed.vault.reads - reads)
        rows.append(_row(bed, share, f"{first + 1} to {last}", fields))
    ratios = [_ratio(rows, parts, share, what, key) for what, key in _RATIOS]
    for row in rows:
        row.pop("splice_samples")
    count, reads, begun = bed.traffic.answers, bed.vault.reads, time.perf_counter()
    forms, tokens = generations(bed, share, count)
    speed = round(tokens / (time.perf_counter() - begun), 1)
    fields = {"n": count, **_shares(forms, bed.vault.reads - reads), "tokens_per_s": speed}
    fields |= difference(bed.before, fingerprints(bed.engine, bed.person))
    fields |= {"records_written": bed.vault.writes}
    rows.append(_row(bed, share, f"{count} answers, {GROUP} at once", fields))
    return rows, ratios, _alarms(unit, rows)


def _parts(requests: int) -> list[tuple[int, int]]:
    """Hundreds, or fifths of fewer than five hundred: where each begins and ends."""
    count = requests // 100 if requests >= 500 else min(5, requests)
    ends = [i * requests // count for i in range(count + 1)]
    return list(pairwise(ends))


def one_by_one(bed: Bed, share: float, count: int) -> list[Reply]:
    """Requests as a user sends them, one after the other."""
    replies = []
    for _ in range(count):
        question, ids = bed.next()
        reply = bed.person.chat(question, GREEDY, form="kv", recompute=share)
        if tuple(reply.forms) != ids:
            raise MemosEngineError(
                "A request took other memories, or in another order, than the bench chose."
            )
        replies.append(reply)
        bed.shown("requests")
    return replies


def generations(bed: Bed, share: float, count: int) -> tuple[list[str], int]:
    """Answers in groups whose requests run together; the forms of their memories, and tokens made."""
    engine, caller = bed.engine, bed.person.principal
    layout, decoder = engine.layout, engine.decoder
    decoder.grow(GROUP * (bed.traffic.longest + decoder.pool.page))
    forms: list[str] = []
    tokens = 0
    for first in range(0, count, GROUP):
        group = []
        for _ in range(min(GROUP, count - first)):
            question, _ids = bed.next()
            tail = layout.query(question)
            prepared = engine.prepare(
                caller, question, layout.anchor, tail, Ask("kv", recompute=share, answer=NEW)
            )
            again = Recompute(prepared.plan.recompute)
            request = decoder.add_request(prepared.spans, GREEDY, engine.salt(caller), recompute=again)
            group.append((prepared, request))
        while any(request.finish_reason is None for _, request in group):
            decoder.step()
        for prepared, request in group:
            if request.error is not None:
                raise request.error
            engine.after_reply(prepared)
            forms += [segment.form for segment in prepared.plan.segments]
            tokens += len(request.output)
        bed.shown("answers at once", len(group))
    return forms, tokens


# -- rows --------------------------------------------------------------------------------------------


def _row(bed: Bed, share: float, part: str, fields: Row) -> Row:
    named = {"system": OURS, "mode": "splice", "scope": "request", "part": part}
    sized = {"stored": len(bed.ids), "memories": bed.traffic.taken, "recompute": share}
    return {**named, **sized, "dtype": bed.traffic.dtype, **fields, **bed.sizes()}


def _times(replies: Sequence[Reply]) -> Row:
    splice = [reply.timings["splice"] for reply in replies]
    return {
        **stats.timing([reply.ttft_ms for reply in replies], "ttft_ms"),
        "splice_ms_p50": round(statistics.median(splice), 3),
        "splice_samples": splice,
        "fetch_ms_p50": round(statistics.median(reply.timings["fetch"] for reply in replies), 3),
        "memory_tokens": round(statistics.fmean(reply.plan.tokens for reply in replies), 1),
        "prefix_tokens": round(statistics.fmean(reply.stats.prefix_tokens for reply in replies), 1),
    }


def _shares(forms: Sequence[str], reads: int) -> Row:
    """What part of the memories entered as KV, and what part of their records waited in host memory."""
    kv = forms.count("kv")
    host = max(0.0, 1 - reads / max(1, kv))
    return {"kv_share": round(kv / max(1, len(forms)), 4), "host_share": round(host, 4)}


_RATIOS = (("time to first token", "samples"), ("splice", "splice_samples"))


def _ratio(rows: Sequence[Row], parts: Sequence[tuple[int, int]], share: float, what: str, key: str) -> Row:
    (a, b), (c, d) = parts[0], parts[-1]
    found = stats.ratio_of_medians(rows[-1][key], rows[0][key])
    return {"name": f"{what}, last {d - c} / first {b - a} requests", "recompute": share, **found.public()}


def _alarms(unit: str, rows: Sequence[Row]) -> list[str]:
    """Sentences about what must not happen."""
    last, short = rows[-1], sum(row["kv_share"] < 1 for row in rows)
    notes = [
        f"{unit}: {what} while requests ran: {last[key]}; none should be."
        for key, what in (
            ("records_changed", "records changed or lost"),
            ("records_added", "records added"),
            ("records_written", "records written"),
        )
        if last[key]
    ]
    return [*notes, *([f"{unit}: not every memory entered as KV in {short} rows."] if short else [])]
