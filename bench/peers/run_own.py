"""Worker: our own decoder. Full prefill, exact pages, spliced records, and the question alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.limits import REFINE, REFINED
from memos_engine.bench.target import random_weights as random_weights_of
from serve import Unsupported, now_ms, serve

import memos_engine
from memos_engine import ops
from memos_engine.config import DecoderConfig, Recompute, SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, Span, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights

Ids = tuple[int, ...]
_ONCE = SamplingParams(max_new_tokens=1)


class Worker:
    """See `serve` for the protocol. Modes: full, prefix, splice, refine, query_only."""

    def load(
        self, model: str, dtype: str, threads: int, max_tokens: int, device: str, random_weights: str | None
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        folder, kind = Path(model), getattr(torch, dtype)
        spec = ModelSpec.from_folder(folder)
        if random_weights is None:
            weights = Weights.from_folder(folder, spec, kind)
            if device != "cpu":
                moved = {name: tensor.to(device) for name, tensor in weights.tensors.items()}
                weights = Weights(moved, spec)
        else:
            weights = random_weights_of(spec, kind, torch.device(device))
        pool = min(max_tokens + 64, spec.max_positions)
        # Each request splices anew: what is reused are records, not what an earlier request made of them.
        config = DecoderConfig(dtype=dtype, pool_tokens=pool, share_spliced=False)
        self.engine = DecoderEngine(spec, weights, config)
        self.folder = folder
        self.tokenizer: Any = None
        self._records: dict[tuple[Ids, Ids], KVRecord] = {}
        shown = ops.describe()
        return {
            "versions": {"memos_engine": memos_engine.__version__, "torch": torch.__version__},
            "notes": [f"kernel level {shown['cpu']['isa']}"] if device == "cpu" else [],
        }

    def first_token(self, mode: str, parts: list[list[int]]) -> dict[str, Any]:
        if mode != "prefix":
            self.engine.forget_prefixes()
        else:
            before = tuple(t for part in parts[:-1] for t in part)
            list(self.engine.generate([TextSpan(before)], _ONCE))  # now its pages are there
        whole = self._spans("full" if mode == "prefix" else mode, parts)
        again = Recompute(REFINED if mode == REFINE else 0.0)
        (out,) = self.engine.generate(whole, _ONCE, recompute=again)
        stats = out.sequence.stats
        return {
            "ms": stats.ttft_ms,
            "token": out.token,
            "splice_ms": stats.splice_ms,
            "probe_ms": stats.probe_ms,
            "prefill_ms": stats.prefill_ms,
        }

    def build(self, parts: list[list[int]]) -> dict[str, Any]:
        """Encodes every memory of a prompt behind the anchor, as a store does once."""
        anchor = tuple(parts[0])
        begun = now_ms()
        for part in parts[1:-1]:
            self.engine.encode_span(anchor, tuple(part))
        if self.engine.runner.device.type == "cuda":
            torch.cuda.synchronize()
        return {"ms": now_ms() - begun}

    def request(self, text: str) -> dict[str, Any]:
        from memos_engine.prompt import load_tokenizer

        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.folder)
            self.tokenizer(text)
        self.engine.forget_prefixes()
        begun = now_ms()
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        (out,) = self.engine.generate([TextSpan(tuple(ids))], _ONCE)
        return {"ms": now_ms() - begun, "token": out.token}

    def decode(self, context: list[int], batch: int, steps: int, int8: bool = False) -> dict[str, Any]:
        """`batch` requests side by side: the time of each step that gives all of them a token.

        int8: with weights rounded to eight bits (`DecoderConfig.int8_decode`).
        """
        engine = self.engine
        engine.runner.model.int8 = int8
        ahead = batch * len(context) // engine.config.prefill_beside + 2  # steps until all prompts are done
        params = SamplingParams(max_new_tokens=ahead + steps)
        engine.forget_prefixes()
        engine.grow(batch * (len(context) + ahead + steps + engine.pool.page))
        requests = [engine.add_request([TextSpan(tuple(context))], params, b"%d" % i) for i in range(batch)]
        while any(request.stats.ttft_ms == 0.0 for request in requests):
            engine.step()  # prompts, and tokens of those that are ahead
        times: list[float] = []
        for _ in range(steps):
            before = now_ms()
            engine.step()
            times.append(now_ms() - before)
        for request in requests:
            engine.abort(request)
        engine.runner.model.int8 = False
        return {"step_ms": times}

    def traffic(
        self,
        mode: str,
        answer: int,
        clients: int,
        seconds: float,
        requests: list[list[list[int]]],
        due: list[float],
    ) -> dict[str, Any]:
        """Runs requests through `add_request` and `step`: those whose time has come (`due`, seconds from
        now), or, with `clients` > 0, a new one whenever one of that many ends. Stops after `seconds`."""
        engine, params = self.engine, SamplingParams(max_new_tokens=answer)
        engine.forget_prefixes()
        spans = [self._spans(mode, parts) for parts in requests]
        started: dict[int, float] = {}
        latest: dict[int, float] = {}
        ttft: list[float] = []
        itl: list[float] = []
        sent = finished = tokens = 0
        begun = now_ms()

        def send(at: float) -> None:
            nonlocal sent
            started[engine.add_request(spans[sent], params).id] = at
            sent += 1

        for _ in range(min(clients, len(spans))):
            send(begun)
        while (now := now_ms()) < begun + seconds * 1e3:
            while not clients and sent < len(due) and begun + due[sent] * 1e3 <= now:
                send(begun + due[sent] * 1e3)
            if engine.idle:
                if clients or sent == len(due):
                    break
                time.sleep(max(0.0, (begun + due[sent] * 1e3 - now_ms()) / 1e3))
                continue
            outputs = engine.step()
            now = now_ms()
            for out in outputs:
                seq = out.sequence
                tokens += 1
                (itl if seq.id in latest else ttft).append(now - latest.get(seq.id, started[seq.id]))
                latest[seq.id] = now
                if out.finish_reason is not None:
                    finished += 1
                    engine.forget_prefixes()  # every request is new: what is reused are records
                    if clients and sent < len(spans):
                        send(now)
        spent = now_ms() - begun
        for left in [*engine.batcher.waiting, *engine.batcher.running]:
            engine.abort(left)
        asked = sent if clients else len(due)
        return {
            "requests": asked,
            "finished": finished,
            "unfinished": asked - finished,
            "ttft_ms": ttft,
            "itl_ms": itl,
            "tokens": tokens,
            "seconds": spent / 1e3,
        }

    def _spans(self, mode: str, parts: list[list[int]]) -> list[Span]:
        """A prompt's spans: memories from their records (splice), or everything to compute (full)."""
        anchor, memories, query = tuple(parts[0]), [tuple(p) for p in parts[1:-1]], tuple(parts[-1])
        if mode == "full":
            return [TextSpan(tuple(t for part in parts for t in part))]
        if mode == "query_only":
            memories = []
        elif mode not in ("splice", REFINE):
            raise Unsupported(f"memos_engine has no mode {mode!r}")
        stored = [KVSpan(self._record(anchor, memory)) for memory in memories]
        return [KVSpan(self._record((), anchor), memory=False), *stored, TextSpan(query)]

    def _record(self, left: Ids, span: Ids) -> KVRecord:
        key = left, span
        if key not in self._records:
            k, v = self.engine.encode_span(left, span)
            self._records[key] = KVRecord(k, v, span, "bench", ids_digest(left))
        return self._records[key]


if __name__ == "__main__":
    serve(Worker())
