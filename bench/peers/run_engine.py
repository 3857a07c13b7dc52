"""Worker: `MemoryEngine` over a store of its own: retrieval, fetch, splice, prefill, as a user meets them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from serve import Unsupported, now_ms, serve

import memos_engine
from memos_engine.api import MemoryEngine
from memos_engine.config import DecoderConfig, MemoryConfig, SamplingParams

FORMS = {"splice": "kv", "full": "text", "query_only": "none"}


class Worker:
    """See `serve` for the protocol. The store lies in a folder that goes with the process."""

    def load(
        self,
        model: str,
        dtype: str,
        threads: int,
        max_tokens: int,
        device: str,
        random_weights: str | None,
        folder: str,
        memories: int,
    ) -> dict[str, Any]:
        if random_weights is not None:
            raise Unsupported("request scope needs a model with a tokenizer")
        torch.set_num_threads(threads)
        self.store = Path(tempfile.mkdtemp(dir=folder, prefix="store-"))
        os.environ["MEMOS_ENGINE_KEYS"] = str(self.store / "keys")
        self.engine = MemoryEngine.open(
            model,
            self.store / "store",
            decoder=DecoderConfig(dtype=dtype, pool_tokens=max_tokens, share_spliced=False),
            memory=MemoryConfig(
                max_memories=memories, min_score=-1.0, distraction=0.0, build=False, host_bytes=1 << 30
            ),
        )
        self.person = self.engine.user("bench")
        return {
            "versions": {"memos_engine": memos_engine.__version__},
            "notes": [f"request scope retrieves with {self.engine.embedder.model_id}"],
        }

    def remember(self, texts: list[str]) -> dict[str, Any]:
        """Stores the memories and builds their records."""
        for text in texts:
            self.person.remember(text)
        self.engine.ready()
        return {"built": self.person.warm()}

    def chat(self, mode: str, tier: str | None, question: str) -> dict[str, Any]:
        """One answer's first token. tier: where the records are at the start (host, disk-warm, disk-cold)."""
        engine, activation = self.engine, self.engine.activation
        assert activation is not None
        once = SamplingParams(max_new_tokens=1)
        if tier is not None:
            engine.decoder.forget_prefixes()
            self.person.chat(question, once, form=FORMS[mode])  # reads every record once
            if tier != "host":
                activation.evict()
            if tier == "disk-cold":
                self._drop_pages()
        engine.decoder.forget_prefixes()
        reply = self.person.chat(question, once, form=FORMS[mode])
        return {
            "ms": reply.ttft_ms,
            "token": reply.token_ids[0] if reply.token_ids else -1,
            "forms": sorted(reply.forms.values()),
            "timings": {name: round(ms, 3) for name, ms in reply.timings.items()},
            "memory_tokens": sum(len(engine.layout.memory(t)) for t in self._texts(reply)),
            "query_tokens": len(engine.layout.query(question)),
            "anchor_tokens": len(engine.layout.anchor),
        }

    def prompt(self, question: str) -> dict[str, Any]:
        """The prompt that pastes the same memories as text, and what finding them took."""
        begun = now_ms()
        found = self.person.recall(question, k=self.engine.config.max_memories)
        ms = now_ms() - begun
        layout = self.engine.layout
        ids = [*layout.anchor, *(t for c in found for t in layout.memory(c.cube.body or ""))]
        return {"ms": ms, "text": self.engine.tokenizer.decode([*ids, *layout.query(question)])}

    def _texts(self, reply: Any) -> list[str]:
        memories = {cube.id: cube.body or "" for cube in self.person.memories()}
        return [memories[cube_id] for cube_id in reply.forms]

    def _drop_pages(self) -> None:
        if not hasattr(os, "posix_fadvise"):
            raise Unsupported("this system cannot be asked to drop a file from the page cache")
        for path in (self.store / "store").rglob("*.safetensors"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


if __name__ == "__main__":
    serve(Worker())
