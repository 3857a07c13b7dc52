"""The report: one page that needs nothing, whatever the documents hold."""

from __future__ import annotations

import builtins
import copy
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memos_engine.bench import report
from memos_engine.bench.report import palette, style, values
from memos_engine.bench.report.headlines import headlines
from memos_engine.bench.report.standings import standings
from memos_engine.bench.report.tables import listing, overview

documents = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("report_documents.py"))))

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements nest, collects ids, references and the text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style",):
            self.text.append(data)

    def has(self, words: str) -> bool:
        return words in re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def built():
    return report.build(documents.all_documents())


@pytest.fixture(scope="module")
def page(built):
    return Page(built[0])


def test_the_page_is_whole_and_asks_nothing_of_any_server(built, page):
    html, plots = built
    assert len(plots) >= 10
    assert "http:" not in html
    assert "https:" not in html
    assert not re.search(r"url\((?!#)|@import|<script|<link|<img|\ssrc=", html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 2 * len(plots)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag


def test_ids_are_unique_and_every_reference_meets_one(built, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", built[0]))
    for _, attributes in page.tags:
        used |= {value[1:] for name, value in attributes.items() if name in ("href", "xlink:href")}
        used |= set((attributes.get("aria-labelledby") or "").split())
    assert used <= set(ids)
    assert used


def test_text_in_plots_stays_text_and_colours_follow_the_page(built):
    svg = built[1][0].wide
    assert "<text" in svg
    assert "memos_engine: spliced" in svg
    assert "var(--p-ours)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "<style" not in svg


def test_tables_and_plots_can_be_read_without_seeing(page):
    figures = [a for tag, a in page.tags if tag == "svg"]
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 40 for a in figures)
    heads = [a for tag, a in page.tags if tag == "th"]
    assert heads
    assert all(a.get("scope") in ("col", "row") for a in heads)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") > 8
    assert dict(page.tags)["html"]["lang"] == "en"


def test_each_section_names_its_command_its_counts_and_its_notes(page):
    for bench in ("ttft", "decode", "quality", "kernels", "roofline", "load", "paper-table5", "memory"):
        assert page.has(f"memos-engine bench {bench} --quick") or page.has(f"bench {bench}")
    assert page.has("n = 9 rounds")
    assert page.has("A note.")
    assert page.has("torch 2.13.0")


def test_whoever_is_ahead_of_us_is_named_at_the_top(page):
    assert page.has("Where others are ahead")
    assert page.has("llama.cpp: full prefill is ahead 1.25× in 2 of 2 groups: everything computed.")
    assert page.has("vLLM is ahead 1.11× in 2 of 2 groups: time per token.")
    assert page.has("torch is ahead 1.33× in 1 of 1 group: time per call.")


def test_an_interrupted_run_and_rows_without_numbers_are_seen(page):
    assert page.has("Incomplete. The run of Quality was interrupted")
    assert page.has("over its time limit")
    assert page.has("over 120 s")
    assert page.has("no GPU")


def test_the_same_documents_give_the_same_bytes(built):
    again = report.build(documents.all_documents())
    assert again[0] == built[0]
    assert [p.png for p in again[1]] == [p.png for p in built[1]]


def test_files_are_written_whole(tmp_path):
    found = [documents.document("ttft", documents.ttft_rows())]
    paths = report.write(tmp_path / "new" / "folder", found)
    assert paths[0].name == "report.html"
    assert len(paths) == 2
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)


def test_without_matplotlib_the_page_says_how_to_get_plots(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    (path,) = report.write(tmp_path, documents.all_documents())
    page = Page(path.read_text())
    assert page.has("pip install 'memos-engine[bench]'")
    assert "svg" not in [tag for tag, _ in page.tags]
    assert page.has("Who is first in each comparable group")


def _spoiled(value):
    """Every string of a document made hostile."""
    if isinstance(value, dict):
        return {key: _spoiled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spoiled(item) for item in value]
    return documents.NASTY if isinstance(value, str) else value


def test_hostile_strings_are_shown_not_obeyed(tmp_path):
    spoiled = []
    for found in documents.all_documents():
        bench = found["bench"]
        spoiled.append({**_spoiled(found), "bench": bench})
    spoiled.append(documents.document(documents.NASTY, [{documents.NASTY: documents.NASTY, "x": 1}]))
    kept = documents.all_documents()[0]
    for row in kept["rows"]:
        row["system"] = row["system"] if row["system"] == "memos_engine" else f"_$x${documents.NASTY}"
    paths = report.write(tmp_path, [*spoiled, kept])
    html = paths[0].read_bytes().decode("utf-8")
    page = Page(html)
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script" not in html
    assert "\x00" not in html
    assert all(re.fullmatch(r"[a-z0-9-]+\.(png|html)", path.name) for path in paths)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"bench": "ttft"},
        {"bench": "ttft", "rows": None, "machine": None, "config": [], "ratios": "x", "notes": 3},
        {"bench": "ttft", "rows": [{}, None, 5, {"system": "memos_engine"}, {"mode": ["x"], "context": "y"}]},
        {"bench": "decode", "rows": [{"system": None, "ms_per_token_p50": float("nan"), "batch": []}]},
        {"bench": "quality", "rows": [{"method": "memos_engine", "kl_mean": 0.0, "recompute": 0.0}]},
        {"bench": "quality", "rows": [{"method": "memos_engine", "kl_mean": -1.0, "recompute": 2}]},
        {"bench": "roofline", "rows": [{"ceiling": "gemm", "rows": 1, "value": 0.0}]},
        {"bench": "load", "rows": [{"system": "memos_engine", "traffic": "open", "offered_per_s": 0}]},
        {"bench": "paper-table5", "rows": [{"reduction": -3.0}, {"reduction": float("inf")}]},
        {"bench": "kernels", "rows": [{"share_of_limit": 0.0, "op": {}, "us_p50": 0}]},
        {"bench": "compare", "rows": [{"row": "x", "ratio": None}], "regressions": 0},
        {"bench": "other", "rows": [{"a": {"b": [1]}, "c": True, "d": 1e300, "e": -1e-300}]},
    ],
)
def test_whatever_is_missing_or_odd_a_page_comes_out(found):
    html, _ = report.build([found])
    Page(html)


_scalar = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5000), st.floats(), st.text(max_size=8), st.just([1, "x"])
)
_NAMES = """
    system mode scope context query memories recompute dtype tier ttft_ms_p50 ttft_ms_p95 batch status reason
    ms_per_token_p50 share_of_limit method kl_mean kl_low kl_high op shape backend us_p50 ceiling rows value
    traffic offered_per_s clients goodput_per_s objective_ms model reduction paper_reduction samples n
"""
_keys = st.sampled_from(_NAMES.split())
_bench = st.sampled_from(["ttft", "decode", "quality", "kernels", "roofline", "load", "paper-table5", "x"])


@settings(max_examples=40, deadline=None)
@given(_bench, st.lists(st.dictionaries(_keys, _scalar, max_size=9), max_size=4))
def test_no_row_breaks_the_tables(bench, rows):
    from memos_engine.bench.report.page import render

    found = documents.document(bench, rows)
    Page(render([found], {}, drawn=False))
    report.figures.drawings(found)


def test_documents_of_earlier_versions_are_shown():
    kept = ("bench", "version", "machine", "config", "rows")
    found = [{k: d[k] for k in kept} for d in documents.all_documents()]
    for row in found[0]["rows"]:
        del row["samples"]
    page = Page(report.build(found)[0])
    assert page.has("Spliced memory")
    assert page.has("memos-engine bench ttft")


def test_where_the_time_of_a_request_goes_has_a_table_of_its_own():
    rows = documents.ttft_rows()
    rows[2]["stages_ms"] = {"retrieve": 1.5, "splice": 0.25}
    found = documents.document("ttft", rows)
    stages = overview(found)[-1]
    assert [cell.text for cell in stages.head] == ["system", "retrieve", "splice"]
    assert [cell.text for cell in stages.rows[0]] == ["memos_engine", "1.50", "0.25"]
    assert "stages ms" not in [cell.text for cell in listing(found).head]


def test_a_comparison_shows_what_changed_and_hides_what_did_not():
    rows = [
        {"row": "a", "metric": "x", "a": 1.0, "b": 1.0, "ratio": 1.0, "verdict": "same"},
        {"row": "b", "metric": "x", "a": 1.0, "b": 9.0, "ratio": 9.0, "verdict": "faster"},
        {
            "row": "c",
            "metric": "x",
            "a": 1.0,
            "b": 2.0,
            "ratio": 2.0,
            "verdict": "slower",
            "regression": True,
        },
    ]
    found = documents.document("compare", rows, ratios=[], regressions=1)
    assert [row[0].text for row in overview(found)[0].rows] == ["c", "b"]
    page = Page(report.build([found])[0])
    assert page.has("What changed, 2 of 3")
    assert page.has("All 3 measured rows")


def test_shares_above_the_limit_are_called_out():
    rows = documents.ttft_rows()
    rows[0]["share_of_limit"] = 2.25
    page = Page(report.build([documents.document("ttft", rows)])[0])
    assert page.has("Rows above 100 % of the limit: 1.")


def test_headlines_carry_meaning_count_and_command():
    cards = headlines(documents.all_documents())
    assert 3 <= len(cards) <= 6
    assert all(card.number and card.meaning and card.n and card.command for card in cards)
    splice = cards[0]
    assert splice.number == "4.0×"
    assert splice.tone == "ahead"
    behind = next(card for card in cards if card.title == "Full prefill against others")
    assert behind.tone == "behind"
    assert behind.number == "0.80×"
    assert "llama.cpp" in behind.meaning


def test_standings_say_level_where_the_run_cannot_tell():
    rows = documents.ttft_rows()
    for row in rows:
        if row["system"] == "llamacpp":
            ours = next(
                r for r in rows if r["mode"] == "full" and r["context"] == row["context"] and r is not row
            )
            row.update(documents.timed(list(reversed(ours["samples"]))))
    found = [s for s in standings(documents.document("ttft", rows)) if s.route == "everything computed"]
    assert {s.verdict for s in found} == {"level"}
    assert all(s.lead.low <= 1 <= s.lead.high for s in found)


def test_without_samples_there_is_no_interval_but_a_lead():
    rows = documents.ttft_rows()
    for row in rows:
        del row["samples"]
    found = [s for s in standings(documents.document("ttft", rows)) if s.route == "everything computed"]
    assert {(s.verdict, s.firm) for s in found} == {("behind", False)}


def test_unknown_columns_are_shown_and_samples_are_not():
    rows = copy.deepcopy(documents.ttft_rows()[:1])
    rows[0]["something_new"] = 7
    titles = [cell.text for cell in listing(documents.document("ttft", rows)).head]
    assert "something new" in titles
    assert "samples" not in titles


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (133.062, "133"), (25.064, "25.1"), (9.04, "9.04"), (2119.4, "2119"), (25.0, "25"),
        (0.042123, "0.0421"), (0.13, "0.13"), (1.24e-6, "1.2e-06"), (-3.456, "-3.46"),
        (12345.6, "12\u202f346"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_figures(value, text):
    assert values.figure(value) == text


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("column", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough_for_text_and_for_lines(column):
    card = palette.ROLES["card"][column]
    for role, colours in palette.ROLES.items():
        if role not in ("card", "grid"):
            assert _contrast(colours[column], card) >= (4.5 if role in ("ink", "muted") else 3.0), role
    page = {role: colours[column] for role, colours in style.PAGE.items()}
    for ink in ("ink", "muted", "accent", "good", "bad"):
        for ground in ("bg", "surface", "tint", "badtint"):
            assert _contrast(page[ink], page[ground]) >= 4.5, (ink, ground)


def test_light_colours_are_distinct_so_that_each_maps_to_one_variable():
    light = [colours[0] for colours in palette.ROLES.values()]
    assert len(light) == len(set(light))
