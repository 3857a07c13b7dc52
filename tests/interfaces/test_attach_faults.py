"""Faults in the middle of an attached generate(): errors come out, pages return, the model stays usable."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from memos_engine import DecoderConfig, attach

pytestmark = pytest.mark.usefixtures("one_thread")


class Breaks(LogitsProcessor):
    def __init__(self, error, after=2):
        self.error, self.left = error, after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return scores


class BreakingCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise ValueError("criterion")


class BreakingStream:
    def __init__(self, where):
        self.where, self.count = where, 0

    def put(self, value):
        self.count += 1
        if self.where == "put" and self.count == 3:
            raise ValueError("put")

    def end(self):
        if self.where == "end":
            raise ValueError("end")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: {"logits_processor": [Breaks(ValueError("processor"))]}, ValueError),
        (lambda: {"logits_processor": [Breaks(KeyboardInterrupt())]}, KeyboardInterrupt),
        (lambda: {"stopping_criteria": [BreakingCriterion()]}, ValueError),
        (lambda: {"streamer": BreakingStream("put")}, ValueError),
        (lambda: {"streamer": BreakingStream("end")}, ValueError),
        (lambda: {"prefix_allowed_tokens_fn": lambda row, ids: []}, ValueError),
    ],
)
@pytest.mark.parametrize(
    "extra", [{}, {"return_dict_in_generate": True}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_errors_come_out_and_pages_return(
    model, tokenizer, call, error, extra, ids_of, assert_clean, runs_here
):
    attach(model, tokenizer)
    with pytest.raises(error):
        model.generate(ids_of(3), max_new_tokens=8, **call(), **extra)
    assert_clean(model)
    assert runs_here(model)


@pytest.mark.parametrize("error", [RuntimeError("kernel"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_failing_forward_returns_all_pages(
    model, tokenizer, monkeypatch, error, step, ids_of, decoder, assert_clean, runs_here
):
    attach(model, tokenizer)
    runner, calls = decoder(model).runner, []
    run = runner.run

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) > step:
            raise error
        return run(*args, **kwargs)

    monkeypatch.setattr(runner, "run", broken)
    with pytest.raises(type(error)):
        model.generate(ids_of(2), max_new_tokens=8, eos_token_id=None)
    monkeypatch.undo()
    assert_clean(model)
    assert runs_here(model)


def test_threads_may_generate_at_once(model, tokenizer, ids_of, assert_clean, load):
    own = load()
    attach(model, tokenizer, decoder=DecoderConfig(dtype="float32", pool_tokens=64))
    results, errors = {}, []

    def work(index):
        try:
            for turn in range(3):
                ids = ids_of(1 + index % 3, 5 + 7 * index, seed=10 * index + turn)
                results[index, turn] = ids, model.generate(ids, max_new_tokens=10)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for ids, got in results.values():
        assert torch.equal(got, own.generate(ids, max_new_tokens=10))
    assert_clean(model)


def test_a_processor_may_generate(model, tokenizer, ids_of, assert_clean, load):
    class Nested(LogitsProcessor):
        def __init__(self, model):
            self.model = model

        def __call__(self, input_ids, scores):
            inner = self.model.generate(input_ids, max_new_tokens=3, do_sample=False)
            return scores.scatter(1, inner[:, -1:], -1e9)

    own = load()
    attach(model, tokenizer)
    outs = [m.generate(ids_of(2), max_new_tokens=5, logits_processor=[Nested(m)]) for m in (own, model)]
    assert torch.equal(*outs)
    assert_clean(model)


def test_the_pool_grows_with_the_call(model, tokenizer, ids_of, decoder, runs_here):
    attach(model, tokenizer, decoder=DecoderConfig(dtype="float32", pool_tokens=32))
    assert runs_here(model, ids_of(5, 300))
    assert decoder(model).pool_tokens >= 5 * 306


def test_no_memory_for_the_pool_goes_there(model, tokenizer, caplog, monkeypatch, decoder, runs_here):
    attach(model, tokenizer)

    def refuse(tokens):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(decoder(model), "grow", refuse)
    assert not runs_here(model)
    assert "Cannot allocate" in caplog.text
