"""`bench quality` on a tiny random model: the methods do what they say, and the figures are theirs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from memos_engine.bench import forced, int8, quality, splicing, xquad
from memos_engine.bench.document import read_result, result_path
from memos_engine.bench.options import Options
from memos_engine.bench.records import Stores
from memos_engine.bench.systematic import systematic_shares

from memos_engine.api import MemoryEngine
from memos_engine.config import ConfigError, DecoderConfig
from memos_engine.decoder.sequence import TextSpan
from memos_engine.errors import MemosEngineError
from memos_engine.neutral import left_contexts
from memos_engine.profile import load_profile

KEYS = {
    "method", "recompute", "memories", "kl_mean", "kl_low", "kl_high", "kl_p99", "kl_token1", "top1",
    "answer_f1", "f1_low", "f1_high", "answer_contains", "mean_recomputed", "n", "samples",
}  # fmt: skip


def paragraphs():
    """Invented, nine of them, each with two questions and their answers."""
    rng = random.Random(7)
    for name in ("Ada", "Bela", "Cleo", "Dora", "Egon", "Finn", "Gita", "Hana", "Ivo"):
        town, year, bells = rng.choice(["Ulm", "Bonn", "Graz"]), rng.randint(1900, 1999), rng.randint(2, 90)
        text = f"{name} moved to {town} in {year}. There {bells} bells were kept in a shed. It rained."
        yield text, [(f"When did {name} move?", str(year)), (f"Where did {name} go?", town)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    entries = [
        {
            "context": text,
            "qas": [
                {"id": q, "question": q, "answers": [{"text": a, "answer_start": text.index(a)}]}
                for q, a in asked
            ],
        }
        for text, asked in paragraphs()
    ]
    folder = tmp_path_factory.mktemp("data")
    (folder / "xquad_en").mkdir()
    whole = {"version": "1.1", "data": [{"title": "Invented", "paragraphs": entries}]}
    (folder / "xquad_en" / "xquad.en.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture
def options(tiny_folder, data):
    return Options(
        model=str(tiny_folder), data=data, n=5, memories=(3,), recompute=(0.0, 0.25), threads=1, seed=3
    )


@pytest.fixture(scope="module")
def engine(tiny_folder):
    return MemoryEngine.open(tiny_folder, decoder=DecoderConfig(dtype="float32", pool_tokens=8192))


@pytest.fixture(scope="module")
def make_case(engine, data):
    """make_case(spans=None) -> Case of the data's first prompt, or of other memories."""
    stores = Stores(engine.decoder, engine.layout.anchor, left_contexts(engine.layout, sizes=(1, 2)))
    dataset = xquad.load("xquad_en", data)
    (first,) = xquad.prompts(dataset, engine.layout, 3, Options(seed=5), 1)

    def make(spans=None):
        spans = spans or first.memories
        ids = (*engine.layout.anchor, *(t for span in spans for t in span), *first.query)
        (reference,) = forced.references(engine.decoder, [ids], engine.eos_token_ids)
        kept = stores.anchored(spans), stores.stored(spans)
        return splicing.Case(engine.decoder, stores.anchor, kept[0], first.query, reference, "k", kept[1])

    return make


def outcome(case, plan, stop=(2,)):
    return forced.evaluate(case.engine, [plan], [case.reference], stop)[0]


# -- methods -----------------------------------------------------------------------------------------


def test_computing_everything_again_equals_full_prefill(make_case):
    case = make_case()
    for way in (splicing.everything, splicing.full, splicing.computed):
        plan = way(case, 1.0)
        found = outcome(case, plan)
        assert max(found.kl) < 1e-9
        assert all(found.agree)
        assert found.answer == case.reference.answer
    forced.require_exact(case.engine, splicing.everything(case, 1.0), case.reference, (2,))


def test_a_broken_recompute_is_refused(make_case):
    case = make_case()
    with pytest.raises(MemosEngineError, match="another distribution than full prefill"):
        forced.require_exact(case.engine, splicing.anchored(case, 0.0), case.reference, (2,))


@pytest.mark.parametrize("share", [0.05, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("method", [m for m in splicing.METHODS if m.fixed is None], ids=lambda m: m.name)
def test_a_selection_has_its_size_and_stays_between_slot_0_and_the_query(make_case, method, share):
    case = make_case()
    plan = method.plan(case, share)
    behind = sum(record.num_tokens for record in case.memories[1:])
    assert len(plan.selected) == plan.recomputed == min(round(share * case.memory_tokens), behind)
    assert list(plan.selected) == sorted(set(plan.selected))
    assert min(plan.selected) >= case.starts[1]
    assert max(plan.selected) < len(case.ids) - len(case.query)
    assert tuple(t for span in plan.spans for t in span.token_ids) == case.ids


def test_first_k_takes_the_heads_and_cacheblend_what_deviates_most(make_case):
    case = make_case()
    taken = set(splicing.first_k(case, 0.25).selected)
    for start, record in zip(case.starts[1:], case.memories[1:], strict=True):
        inside = sorted(taken & set(range(start, start + record.num_tokens)))
        assert inside == list(range(start, start + len(inside)))
    chosen = splicing.cacheblend(case, 0.25).selected
    fresh = case.reference.v[1]
    stored = dict(enumerate(torch.cat([r.v[1] for r in case.memories]), case.starts[0]))
    apart = {p: float((fresh[p] - stored[p]).norm()) for p in case.candidates}
    assert min(apart[p] for p in chosen) >= max(apart[p] for p in case.candidates if p not in chosen)
    slot_0 = range(case.starts[0], case.starts[1])
    assert max(float((fresh[p] - stored[p]).abs().max()) for p in slot_0) < 1e-5  # exact as it is stored


def test_a_later_memory_never_changes_an_earlier_recomputed_key(make_case, engine):
    """At a fixed selection: what public code's mask gets wrong. An earlier memory, as a control, does."""

    def keys(spans, selected):
        case = make_case(spans)
        plan = replace(splicing.anchored(case, 0.0), selected=selected)
        runner = engine.decoder.runner
        with forced.laid_out(engine.decoder, [plan]) as (request,):
            forced.forward(engine.decoder, [request], [[*selected, *request.pending]], [1])
            blocks, page = torch.tensor(request.blocks), engine.decoder.pool.page
            at = torch.tensor(selected)
            return runner.cache.k[:, blocks[at // page], at % page].clone()

    base = make_case()
    first, second, third = (record.token_ids for record in base.memories)
    other = tuple(reversed(third))
    middle = range(base.starts[1], base.starts[2])
    inside = tuple(random.Random(0).sample(middle, 12))
    later = tuple(range(base.starts[2] + 3, base.starts[2] + 9))
    selected = tuple(sorted((*inside, *later)))
    before = keys((first, second, third), selected)
    after = keys((first, second, other), selected)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-5)
    assert (before[1:, 12:] - after[1:, 12:]).abs().max() > 1e-2
    turned = keys((tuple(reversed(first)), second, third), selected)
    assert (before[1:, :12] - turned[1:, :12]).abs().max() > 1e-2


def test_recomputed_tokens_see_the_recomputed_ones_before_them(make_case):
    """With a whole leading run computed again, that run is exact, whatever stands behind it."""
    case = make_case()
    run = tuple(range(case.starts[1], case.starts[2]))
    plan = replace(splicing.anchored(case, 0.0), selected=run)
    keys = []
    for one in (plan, splicing.computed(case, 1.0)):
        with forced.laid_out(case.engine, [one]) as (request,):
            forced.forward(case.engine, [request], [[*one.selected, *request.pending]], [1])
            blocks, at = torch.tensor(request.blocks), torch.tensor(run)
            page = case.engine.pool.page
            keys.append(case.engine.runner.cache.k[:, blocks[at // page], at % page].clone())
    torch.testing.assert_close(*keys, rtol=0, atol=1e-5)


def test_an_own_answer_is_the_one_of_decoding_alone(make_case):
    """The answer leaves the reference's path at its first other token; here token by token instead."""
    case = make_case()
    plan = splicing.shuffled_values(case, 0.0)
    found = outcome(case, plan)
    assert found.answer != case.reference.answer
    with forced.laid_out(case.engine, [plan]) as (request,):
        (logits,) = forced.forward(case.engine, [request], [request.pending], [1])
        request.tokens.append(int(logits.argmax()))
        forced.decode(case.engine, [request], (2,))
        assert found.answer == tuple(request.output)


def test_plans_are_scored_alike_alone_and_together(make_case, monkeypatch):
    case = make_case()
    plans = [method.plan(case, 0.25) for method in splicing.METHODS]
    together = forced.evaluate(case.engine, plans, [case.reference] * len(plans), (2,))
    monkeypatch.setattr(forced, "ROWS", 1)
    for plan, found in zip(plans, together, strict=True):
        alone = outcome(case, plan)
        assert alone.answer == found.answer
        assert alone.kl == pytest.approx(found.kl, abs=1e-6)
    case.engine.check_integrity()
    assert case.engine.pool.available == case.engine.pool.num_blocks - 1


def test_records_leave_the_cache_when_room_is_short(engine):
    spans = [engine.layout.memory(f"Number {i}.") for i in range(4)]
    stores = Stores(engine.decoder, engine.layout.anchor, [(5, 6)])
    (record,) = stores.anchored(spans[:1])
    small = Stores(engine.decoder, engine.layout.anchor, [(5, 6)], nbytes=2 * record.nbytes)
    (first,) = small.anchored(spans[:1])
    assert small.anchored(spans[:1])[0] is first
    assert len(small.anchored(spans)) == 4  # more than it keeps
    assert small.anchored(spans[:1])[0] is not first


# -- data --------------------------------------------------------------------------------------------


def test_prompts_have_their_gold_and_an_order_of_their_own(engine, data):
    dataset = xquad.load("xquad_en", data)
    drawn = xquad.prompts(dataset, engine.layout, 3, Options(seed=1), 18)
    assert len(drawn) == len(dataset.questions) == 18
    assert {prompt.gold for prompt in drawn} == {0, 1, 2}
    for prompt in drawn:
        texts = [engine.tokenizer.decode(list(span)) for span in prompt.memories]
        assert len(set(texts)) == 3
        assert prompt.answers[0] in texts[prompt.gold]
    again = xquad.prompts(dataset, engine.layout, 3, Options(seed=1), 5)
    assert again == drawn[:5]
    assert xquad.prompts(dataset, engine.layout, 3, Options(seed=2), 5) != drawn[:5]
    more = xquad.prompts(dataset, engine.layout, 5, Options(seed=1), 5)
    assert [p.query for p in more] == [p.query for p in drawn[:5]]
    with pytest.raises(ConfigError, match="9 paragraphs"):
        xquad.prompts(dataset, engine.layout, 10, Options(), 1)


def test_passages_are_even_whole_sentences_and_never_cut_an_answer():
    text = "One two three. Four five six. Seven eight. Nine ten eleven twelve."
    ranges = xquad.passages(text, [], 6, lambda piece: len(piece.split()))
    assert [text[a:b].strip() for a, b in ranges] == [
        "One two three. Four five six.",
        "Seven eight. Nine ten eleven twelve.",
    ]
    across = text.index("six"), text.index("eight") + 5
    ranges = xquad.passages(text, [across], 4, lambda piece: len(piece.split()))
    assert any(a <= across[0] and across[1] <= b for a, b in ranges)
    assert "".join(text[a:b] for a, b in ranges) == text


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "contains"),
    [
        ("The Denver Broncos.", ["Denver Broncos"], 1.0, True),
        ("the denver broncos won", ["Denver Broncos"], 0.8, True),
        ("Broncos", ["Carolina", "Denver Broncos"], 2 / 3, False),
        ("13080 points", ["308"], 0.0, False),
        ("", ["308"], 0.0, False),
        ("a a an", ["the"], 1.0, True),
    ],
)
def test_answers_are_marked_as_squad_marks_them(answer, gold, f1, contains):
    assert xquad.answer_f1(answer, gold) == pytest.approx(f1)
    assert xquad.answer_contains(answer, gold) is contains


def test_missing_or_foreign_data_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(MemosEngineError, match=r"--data or MEMOS_ENGINE_DATA"):
        quality.run(Options(data=tmp_path))
    monkeypatch.setenv("MEMOS_ENGINE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(MemosEngineError, match="nowhere"):
        xquad.load("xquad_en", None)
    (tmp_path / "other.json").write_text('{"data": [{"paragraphs": 3}]}')
    with pytest.raises(MemosEngineError, match=r"other\.json is not a question set"):
        xquad.load("xquad_en", tmp_path)
    (tmp_path / "more.json").write_text("{}")
    with pytest.raises(MemosEngineError, match="2 JSON files"):
        xquad.load("xquad_en", tmp_path)


# -- runs --------------------------------------------------------------------------------------------


def test_rows_differences_and_controls(options):
    seen = []
    methods = (*splicing.METHODS, *splicing.CONTROLS)
    before = torch.get_num_threads()
    document = quality.run(options, lambda *tick: seen.append(tick), methods)
    assert torch.get_num_threads() == before
    assert document["complete"]
    assert "samples" not in document
    assert [(done, total) for _, done, total in seen] == [(i, 5) for i in range(1, 6)]
    # The engine has a row at each share; the one at 0 stands for it here.
    rows = {row["method"]: row for row in reversed(document["rows"])}
    assert set(rows) == {*(m.name for m in methods), "full_bf16"}
    assert len(document["rows"]) == len(rows) + 1
    for row in document["rows"]:
        assert set(row) == KEYS
        assert row["n"] == len(row["samples"]) == 5
        assert row["kl_low"] <= row["kl_mean"] <= row["kl_high"]
    kl = {name: row["kl_mean"] for name, row in rows.items()}
    assert kl["full"] < 1e-9 < kl["full_bf16"] < kl["memos_engine"] < kl["none"]
    assert min(kl["wrong_positions"], kl["shuffled_values"]) > 1.5 * kl["memos_engine"]
    assert rows["full"]["top1"] == 1.0
    shares = {name: row["mean_recomputed"] for name, row in rows.items()}
    assert shares["full"] == 1
    assert shares["memos_engine"] == shares["none"] == 0
    assert shares["random"] == shares["first_k"] == shares["cacheblend"] == pytest.approx(0.25, abs=0.01)
    assert shares["rank"] == pytest.approx(0.25, abs=0.01)
    names = [entry["name"] for entry in document["ratios"]]
    assert "KL of none minus memos_engine at r=0, 3 memories" in names
    assert "KL of cacheblend minus memos_engine at r=0.25, 3 memories" in names
    assert "answer F1 of memos_engine at r=0 minus full, 3 memories" in names
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in document["ratios"])
    json.dumps(document)


def test_methods_can_be_chosen_by_name(options):
    document = quality.run(replace(options, n=1, methods=("memos_engine", "none")))
    assert {row["method"] for row in document["rows"]} == {"memos_engine", "none", "full_bf16"}
    with pytest.raises(ConfigError, match="'magic' is unknown; bench quality has full, none"):
        quality.run(replace(options, methods=("magic",)))


def test_a_profile_is_kept_for_both_dtypes(options, tmp_path, monkeypatch, engine):
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path))
    document = quality.run(replace(options, profile=True, n=2), methods=splicing.METHODS[:3])
    assert any("The curve is kept" in note for note in document["notes"])
    assert len(list((tmp_path / "profiles").iterdir())) == 2
    found = load_profile(engine.decoder.runner.model.weights.digest, engine.layout.digest)
    assert found is not None
    own = [row for row in document["rows"] if row["method"] == "memos_engine"]
    assert [(p.recompute, p.kl_mean) for p in found.points] == [(r["recompute"], r["kl_mean"]) for r in own]
    assert found.kl(0.0, 3) == own[0]["kl_mean"]


def test_the_systematic_share_is_that_of_the_definition(engine):
    """What is common to all contexts, and what is noise, told apart by brute force."""
    ids = engine.layout.memory
    anchor, spans = engine.layout.anchor, [ids("One."), ids("Two and three.")]
    contexts = [ids("Something."), ids("Something else."), ids("More of it all.")]
    found = systematic_shares(engine.decoder, anchor, spans, contexts)
    for side in (0, 1):
        total = spread = 0.0
        for span in spans:
            base = engine.decoder.encode_span(anchor, span)[side].double()
            each = [engine.decoder.encode_span((*anchor, *c), span)[side].double() - base for c in contexts]
            apart = torch.stack(each)[:, 1:]
            total += float(apart.square().sum()) / 3
            spread += float(apart.var(dim=0).sum())
        assert found[side] == pytest.approx(1 - spread / total, rel=1e-3)
    same = systematic_shares(engine.decoder, anchor, spans, [contexts[0]] * 3)
    assert same == pytest.approx((1.0, 1.0))


@pytest.mark.smollm2
def test_controls_are_clearly_worse_on_the_real_model(options, smollm2_path):
    own = [method for method in splicing.METHODS if method.name in ("full", "none", "memos_engine")]
    document = quality.run(
        replace(options, model=str(smollm2_path), n=2, threads=1), methods=(*own, *splicing.CONTROLS)
    )
    kl = {row["method"]: row["kl_mean"] for row in reversed(document["rows"])}  # the engine's at r = 0
    assert kl["full"] < 1e-7 < kl["full_bf16"]
    assert kl["memos_engine"] < kl["none"]
    assert min(kl["wrong_positions"], kl["shuffled_values"]) > 1.5 * kl["memos_engine"]


def test_differences_are_taken_at_the_same_share_where_the_engine_has_one():
    figures = {"kl": [[0.1, 0.3], [0.2]], "f1": [0.5, 0.0]}
    less = {"kl": [[0.1], [0.1]], "f1": [1.0, 0.0]}
    samples = {("full", 1.0): less, ("memos_engine", 0.15): less, ("random", 0.15): figures}
    found = {entry["name"]: entry for entry in quality.differences(8, samples)}
    assert found["KL of random minus memos_engine at r=0.15, 8 memories"]["value"] == pytest.approx(0.1)
    assert found["answer F1 of random at r=0.15 minus full, 8 memories"]["value"] == pytest.approx(-0.25)


def test_an_interrupted_run_goes_on_and_ends_the_same(options, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "BLOCK", 2)
    whole = quality.run(options)
    assert quality.run(replace(options, seed=4))["rows"] != whole["rows"]
    options = replace(options, out=tmp_path / "out")

    def stop_at_3(text, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quality.run(options, stop_at_3)
    partial = read_result(result_path(options.out, "quality"))
    assert not partial["complete"]
    assert partial["units"] == ["3 memories, prompts 1-2"]
    assert {row["n"] for row in partial["rows"]} == {2}
    seen = []
    resumed = quality.run(replace(options, resume=True), lambda *tick: seen.append(tick[1]))
    assert seen == [3, 4, 5]
    assert resumed["rows"] == whole["rows"]
    assert resumed["ratios"] == whole["ratios"]
    monkeypatch.setattr(quality, "_Scorer", SimpleNamespace())  # nothing is left to measure
    assert quality.run(replace(options, resume=True))["rows"] == whole["rows"]


def test_what_the_protocol_does_not_cover_is_refused(options):
    with pytest.raises(ConfigError, match="leave out --device"):
        quality.run(replace(options, device="cuda"))
    with pytest.raises(ConfigError, match="trained model"):
        quality.run(replace(options, random_weights="qwen3-8b"))


def test_one_memory_is_exact_however_it_is_used(options):
    document = quality.run(replace(options, n=2, memories=(1, 1), recompute=(0.25, 0.25)))
    kl = {row["method"]: row["kl_mean"] for row in document["rows"]}
    assert max(kl[name] for name in ("memos_engine", "random", "first_k", "cacheblend")) < 1e-9
    assert {row["n"] for row in document["rows"]} == {2}  # asked for twice, measured once


def test_a_span_of_text_alone_is_a_plan(make_case):
    case = make_case()
    plan = forced.Plan((TextSpan(case.query),))
    assert outcome(case, plan).kl[0] > 0


def test_the_cost_of_int8_weights(tiny_folder, data):
    document = int8.run(Options(model=str(tiny_folder), dtype="float32", data=data, n=3))
    whole, narrow = document["rows"]
    assert (whole["weights"], narrow["weights"]) == ("whole", "int8")
    assert whole["n"] == narrow["n"] == 3
    assert 0 <= narrow["kl_mean"] < 0.1
    assert narrow["nll"] - whole["nll"] == pytest.approx(narrow["nll_more"], abs=1e-4)
    assert narrow["nll_more_low"] <= narrow["nll_more"] <= narrow["nll_more_high"]
