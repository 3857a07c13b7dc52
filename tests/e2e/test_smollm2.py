"""The real SmolLM2-135M-Instruct: greedy tokens equal transformers', spliced prefixes equal full prefill."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine, SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan
from memos_engine.decoder.weights import Weights

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain photosynthesis in one sentence.",
    "List three fruits.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 7?",
    "Name a planet with rings.",
    "How do I boil an egg?",
    "What colour is the sky at night?",
    "Give me a tip for sleeping well.",
    "Tell me a story about a fox and a crow.",
    "What does HTTP stand for?",
    "Why do leaves fall in autumn?",
    "Describe a lighthouse.",
    "What is the largest ocean?",
    "How many days has a leap year?",
    "Write a haiku about rain.",
    "What is a noun?",
    "Say hello in five languages.",
]
NEW = 24


@pytest.fixture(scope="module")
def hf(smollm2_path):
    return AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(hf, smollm2_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    return MemoryEngine.from_model(hf, tokenizer, decoder=DecoderConfig(dtype="float32", pool_tokens=2048))


def answer(engine, spans, count=NEW):
    engine.decoder.forget_prefixes()
    return [o.token for o in engine.decoder.generate(spans, SamplingParams(max_new_tokens=count))]


def test_greedy_tokens_equal_transformers_for_twenty_prompts(hf, engine):
    for text in PROMPTS:
        ids = engine.layout.anchor + engine.layout.query(text)
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)  # left to itself, transformers takes the end-of-turn token for padding
        expected = hf.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
        assert answer(engine, [TextSpan(ids)]) == expected[0, len(ids) :].tolist(), text


def test_a_spliced_prefix_gives_the_tokens_of_full_prefill(engine):
    layout = engine.layout
    for memory, question in zip(PROMPTS[:5], PROMPTS[5:10], strict=True):
        fact = layout.memory(f"Somebody once asked me: {memory} I did not know.")
        query = layout.query(question)
        k, v = engine.decoder.encode_span(layout.anchor, fact)
        record = KVRecord(k, v, fact, "test", ids_digest(layout.anchor))
        full = answer(engine, [TextSpan(layout.anchor + fact + query)])
        assert answer(engine, [TextSpan(layout.anchor), KVSpan(record), TextSpan(query)]) == full


def test_pages_of_int8_answer_almost_alike(hf, engine):
    """Most greedy tokens of an answer are those of whole pages, and the first one's distribution is close."""
    narrow = DecoderEngine(
        engine.decoder.spec,
        Weights.from_model(hf, engine.decoder.spec),
        DecoderConfig(dtype="float32", page_dtype="int8", pool_tokens=2048),
    )
    same, divergences = 0, []
    for text in PROMPTS[:6]:
        spans = [TextSpan(engine.layout.anchor + engine.layout.query(text))]
        found = []
        for decoder in (engine.decoder, narrow):
            decoder.forget_prefixes()
            seq = decoder.add_request(spans, SamplingParams(max_new_tokens=1), sampled=False)
            while seq.logits is None:
                decoder.step()
            found.append(torch.log_softmax(seq.logits.double(), dim=-1))
            decoder.finish(seq)
        whole, rounded = found
        divergences.append(float((whole.exp() * (whole - rounded)).sum()))
        outputs = [
            [o.token for o in d.generate(spans, SamplingParams(max_new_tokens=8))]
            for d in (engine.decoder, narrow)
        ]
        same += sum(a == b for a, b in zip(*outputs, strict=True))
    assert sum(divergences) / len(divergences) < 0.01
    assert same >= 0.5 * 6 * 8  # behind a first difference all may differ
    narrow.check_integrity()


def test_a_memory_is_remembered_spliced_and_used(smollm2_path, tmp_path):
    with MemoryEngine.open(
        smollm2_path,
        tmp_path / "store",
        decoder=DecoderConfig(dtype="float32"),
        memory=MemoryConfig(build=False),
    ) as engine:
        alice = engine.user("alice")
        alice.remember("My brother Marcus lives in Toronto and drives a bus.")
        alice.remember("The password of my garage is 7315.")
        alice.warm()
        reply = alice.chat("Where does my brother Marcus live?", SamplingParams(max_new_tokens=24))
        assert "Toronto" in reply.text
        assert set(reply.forms.values()) == {"kv"}
        assert "Toronto" not in alice.chat("Where does my brother Marcus live?", form="none").text
