"""An attached generate() gives what transformers' own gives: ids, scores, streams, errors; equal seeds."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AsyncTextIteratorStreamer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from memos_engine import attach

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _here(pair, caplog):
    """Every call of this file runs in our decoder and returns its pages."""
    caplog.set_level(logging.DEBUG, "memos_engine")
    yield
    assert "own generate" not in caplog.text
    decoder = pair[1]._memos_engine.engine.decoder
    decoder.check_integrity()
    assert not decoder.batcher.running
    assert not decoder.batcher.waiting


def batch(count, length=12, seed=0):
    return torch.randint(3, 259, (count, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, pad=2, seed=0):
    """Left-padded ids and mask."""
    width = max(lengths)
    ids, mask = batch(len(lengths), width, seed), torch.ones(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = pad
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(pair, seed=7, **call):
    """The results of both, from the same seed; `make` in a call builds stateful objects anew for each."""
    results = []
    for model in pair:
        torch.manual_seed(seed)
        arguments = {k: v() if callable(v) and getattr(v, "fresh", False) else v for k, v in call.items()}
        results.append(model.generate(**arguments))
    return results


class Ban(LogitsProcessor):
    """In place, as some are written."""

    def __call__(self, input_ids, scores):
        scores[:, input_ids[0, -1]] = -float("inf")
        return scores


class RowStop(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __call__(self, input_ids, scores, **kwargs):
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return input_ids.shape[1] >= 16 + 2 * rows


CALLS = {
    "greedy": {},
    "default length": {"max_new_tokens": None},
    "max_length": {"max_new_tokens": None, "max_length": 20},
    "many eos": {"eos_token_id": [5, 17, 40, 99, 130, 200], "max_new_tokens": 40},
    "eos tensor": {"eos_token_id": torch.tensor([9, 17, 33]), "max_new_tokens": 40},
    "no eos": {"eos_token_id": None},
    "other pad": {"eos_token_id": list(range(3, 60)), "pad_token_id": 1, "max_new_tokens": 30},
    "sample": {"do_sample": True},
    "sample filters": {"do_sample": True, "temperature": 0.7, "top_k": 12, "top_p": 0.8},
    "sample no top_k": {"do_sample": True, "top_k": None},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "typical_p": {"do_sample": True, "typical_p": 0.7},
    "cutoffs": {"do_sample": True, "epsilon_cutoff": 3e-3, "eta_cutoff": 3e-3},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(3, 120))},
    "min_length": {"min_length": 18, "eos_token_id": list(range(3, 120))},
    "bad words": {"bad_words_ids": [[5], [7, 8]], "suppress_tokens": list(range(20, 90))},
    "sequence_bias": {"sequence_bias": [[[40], 9.0], [[3, 4], -5.0]]},
    "forced": {"forced_eos_token_id": 11, "exponential_decay_length_penalty": (2, 1.3)},
    "guidance": {"guidance_scale": 1.5},
    "processor": {"logits_processor": LogitsProcessorList([Ban()])},
    "criteria": {"stopping_criteria": StoppingCriteriaList([RowStop()])},
    "criteria without eos": {"stopping_criteria": StoppingCriteriaList([RowStop()]), "eos_token_id": None},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [30 + row, 40, 50 + len(ids) % 7]},
    "config": {"generation_config": GenerationConfig(max_new_tokens=15, do_sample=True, temperature=1.3)},
    "config and kwargs": {
        "generation_config": GenerationConfig(max_new_tokens=15, do_sample=True),
        "max_new_tokens": 4,
    },
    "renormalise": {"do_sample": True, "renormalize_logits": True, "remove_invalid_values": True},
    "static cache": {"cache_implementation": "static"},
    "max_time": {"max_time": 1e-9},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("inputs", ["one", "batch", "padded"])
def test_the_same_ids(pair, name, inputs):
    call = CALLS[name]
    prompts = {"one": {"input_ids": batch(1)}, "batch": {"input_ids": batch(3)}, "padded": padded([12, 5, 9])}
    if "generation_config" not in call:
        call = {"max_new_tokens": 12, **call}
    expected, got = both(pair, **prompts[inputs], **call)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype


@pytest.mark.parametrize("sample", [False, True])
def test_return_sequences(pair, sample):
    call = {"do_sample": True, "num_return_sequences": 3} if sample else {}
    expected, got = both(pair, **padded([20, 7]), max_new_tokens=14, eos_token_id=list(range(3, 40)), **call)
    assert torch.equal(got, expected)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_mix_of_arguments(pair, data):
    draw = data.draw
    rows = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    call = {"max_new_tokens": draw(st.integers(1, 16))}
    options = {
        "do_sample": st.booleans(),
        "temperature": st.floats(0.3, 2.0),
        "top_k": st.integers(1, 60),
        "top_p": st.floats(0.2, 1.0),
        "repetition_penalty": st.floats(1.0, 1.6),
        "no_repeat_ngram_size": st.integers(1, 3),
        "min_new_tokens": st.integers(1, 10),
        "eos_token_id": st.lists(st.integers(3, 258), min_size=1, max_size=80, unique=True),
        "pad_token_id": st.integers(0, 2),
        "encoder_repetition_penalty": st.floats(0.8, 1.5),
    }
    for name in draw(st.sets(st.sampled_from(sorted(options)), max_size=6)):
        call[name] = draw(options[name])
    if call.get("do_sample") and draw(st.booleans()):
        call["num_return_sequences"] = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 99))
    expected, got = both(pair, seed=seed, **padded(rows, seed=seed), **call)
    assert torch.equal(got, expected)


def test_equal_in_distribution(pair, tokenizer):
    """A chi-square test over first tokens of many seeds, in a vocabulary of eight."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        probs = torch.softmax(model(ids).logits[0, -1] / 0.8, -1)
    attach(model, tokenizer)
    torch.manual_seed(3)
    n = 4000
    out = model.generate(
        ids, do_sample=True, temperature=0.8, top_k=0, num_return_sequences=n, max_new_tokens=1
    )
    counts = torch.bincount(out[:, -1], minlength=8).double()
    chi = float(((counts - n * probs) ** 2 / (n * probs)).sum())
    assert chi < 24.3  # 7 degrees of freedom, p = 0.001


# -- full outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("lengths", [[9], [12, 5]])
def test_full_outputs(pair, lengths, sample):
    expected, got = both(
        pair, **padded(lengths), max_new_tokens=10, eos_token_id=list(range(3, 50)), do_sample=sample,
        return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.2,
    )  # fmt: skip
    assert type(got) is type(expected)
    assert list(got.keys()) == list(expected.keys())
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        for mine, theirs in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
    transitions = [
        m.compute_transition_scores(r.sequences, r.scores) for m, r in zip(pair, (expected, got), strict=True)
    ]
    torch.testing.assert_close(*transitions, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lengths", [[9], [12, 5, 1]])
def test_the_returned_cache_goes_on(pair, lengths):
    inputs = padded(lengths)
    expected, got = both(
        pair, **inputs, max_new_tokens=8, eos_token_id=list(range(3, 50)), return_dict_in_generate=True
    )
    mine, theirs = got.past_key_values, expected.past_key_values
    assert mine.get_seq_length() == theirs.get_seq_length()
    keep = torch.cat(
        [inputs["attention_mask"], torch.ones(len(lengths), mine.get_seq_length() - max(lengths))], 1
    )
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            torch.testing.assert_close(
                x * keep[:, None, :, None], y * keep[:, None, :, None], atol=2e-5, rtol=2e-5
            )
    mask = torch.cat([keep.long(), torch.ones(len(lengths), 1, dtype=torch.long)], 1)
    ongoing = [
        pair[0].generate(
            r.sequences, attention_mask=mask, past_key_values=r.past_key_values, max_new_tokens=6
        )
        for r in (expected, got)
    ]
    assert torch.equal(*ongoing)


def test_a_callers_empty_cache_is_filled(pair):
    caches = [DynamicCache(config=pair[0].config), DynamicCache(config=pair[0].config)]
    ids = batch(2)
    results = [
        m.generate(ids, past_key_values=c, max_new_tokens=5) for m, c in zip(pair, caches, strict=True)
    ]
    assert torch.equal(*results)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 16
    torch.testing.assert_close(caches[0].layers[1].keys, caches[1].layers[1].keys, atol=2e-5, rtol=2e-5)


# -- streams and stop strings --------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_get_the_prompt_then_tokens_then_the_end(pair, rows):
    seen = []
    for model in pair:
        streamer = Recorder()
        model.generate(batch(rows), max_new_tokens=9, eos_token_id=list(range(3, 60)), streamer=streamer)
        seen.append(streamer.seen)
    assert seen[0] == seen[1]
    assert seen[1][-1] == "end"


def test_text_streamers(pair, tokenizer, capsys):
    for model in pair:
        model.generate(batch(1), max_new_tokens=9, streamer=TextStreamer(tokenizer))
        print("#", end="")
    first, second, _ = capsys.readouterr().out.split("#")
    assert first == second != ""


def test_iterator_streamers(pair, tokenizer):
    texts = []
    for model in pair:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
        thread = threading.Thread(
            target=model.generate, args=(batch(1),), kwargs={"max_new_tokens": 9, "streamer": streamer}
        )
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1]


def test_async_streamers(pair, tokenizer):
    async def read(model):
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=30)
        thread = threading.Thread(
            target=model.generate, args=(batch(1),), kwargs={"max_new_tokens": 9, "streamer": streamer}
        )
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    assert asyncio.run(read(pair[0])) == asyncio.run(read(pair[1]))


def test_an_abandoned_stream_runs_to_its_end(pair, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    thread = threading.Thread(
        target=pair[1].generate, args=(batch(1),), kwargs={"max_new_tokens": 40, "streamer": streamer}
    )
    thread.start()
    next(iter(streamer))
    thread.join()


@pytest.mark.parametrize("where", ["kwargs", "config", "model"])
def test_stop_strings(pair, tokenizer, where):
    ids = batch(2)
    plain = pair[0].generate(ids, max_new_tokens=30, eos_token_id=None)
    texts = [[t for t in map(tokenizer.decode, row[15:].tolist()) if t.isascii()] for row in plain]
    stops = [texts[0][0], texts[1][1]]
    call = {"input_ids": ids, "tokenizer": tokenizer, "max_new_tokens": 30}
    if where == "kwargs":
        call["stop_strings"] = stops
    elif where == "config":
        call.pop("max_new_tokens")
        call["generation_config"] = GenerationConfig(max_new_tokens=30, stop_strings=stops)
    else:
        for model in pair:
            model.generation_config.stop_strings = stops
    try:
        expected, got = both(pair, **call)
    finally:
        for model in pair:
            model.generation_config.stop_strings = None
    assert torch.equal(got, expected)
    assert got.shape[1] < plain.shape[1]
    if where == "config":
        assert call["generation_config"].stop_strings == stops  # the caller's own is left alone


def test_the_models_own_defaults_count(pair):
    for model in pair:
        model.generation_config.update(repetition_penalty=1.5, max_new_tokens=7)
    try:
        expected, got = both(pair, input_ids=batch(2))
        given = both(pair, input_ids=batch(2), generation_config=GenerationConfig(max_new_tokens=9))
    finally:
        for model in pair:
            model.generation_config.update(repetition_penalty=None, max_new_tokens=None)
    assert torch.equal(got, expected)
    assert torch.equal(*given)
    assert given[1].shape[1] == 21


def test_positional_arguments(pair):
    config = GenerationConfig(max_new_tokens=6)
    calls = [m.generate(batch(1), config, LogitsProcessorList([Ban()]), None, None) for m in pair]
    assert torch.equal(*calls)


@pytest.mark.parametrize(
    "call",
    [
        {"input_ids": batch(1), "inputs": batch(1)},
        {"input_ids": batch(1), "num_return_sequences": 2},
        {"input_ids": batch(1), "no_such_argument": 1},
        {"input_ids": batch(1), "max_length": 3, "max_new_tokens": None},
        {"input_ids": batch(1), "do_sample": True, "temperature": 0.0},
        {"input_ids": batch(1), "min_new_tokens": -1},
        {"input_ids": batch(1), "max_new_tokens": 0},
        {"input_ids": batch(1)[0]},
        {"input_ids": batch(1).float()},
        {"input_ids": batch(1), "pad_token_id": -5, "eos_token_id": "x"},
        {"input_ids": batch(1), "attention_mask": torch.ones(1, 2, 2)},
    ],
    ids=str,
)
def test_contradictions_raise_what_they_raised(pair, call, caplog):
    outcomes = []
    for model in pair:
        try:
            outcomes.append(model.generate(**{"max_new_tokens": 4, **call}).tolist())
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    caplog.clear()
