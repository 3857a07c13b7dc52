"""Worker: transformers, full prefill (sdpa) and exact-prefix reuse by a `DynamicCache`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from serve import Unsupported, now_ms, serve


class Worker:
    """See `serve` for the protocol."""

    def load(
        self, model: str, dtype: str, threads: int, max_tokens: int, device: str, random_weights: str | None
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        kind = getattr(torch, dtype)
        auto = transformers.AutoModelForCausalLM
        if random_weights is None:
            loaded = auto.from_pretrained(
                model, dtype=kind, attn_implementation="sdpa", local_files_only=True
            )
        else:
            config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
            with self.device:
                loaded = auto.from_config(config, dtype=kind, attn_implementation="sdpa")
        self.model = loaded.to(self.device).eval()
        self.tokenizer: Any = None
        self.folder, self.random = model, random_weights is not None
        self._prefix: tuple[tuple[int, ...], Any] | None = None
        return {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "notes": ["prefix: a DynamicCache of all but the last part; attention is torch's sdpa"],
        }

    @torch.inference_mode()
    def first_token(self, mode: str, parts: list[list[int]]) -> dict[str, Any]:
        if mode not in ("full", "prefix"):
            raise Unsupported(f"transformers has no mode {mode!r}")
        ids = [token for part in parts for token in part]
        start = len(ids) - len(parts[-1]) if mode == "prefix" else 0
        prefix = tuple(ids[:start])
        cache = self._cache(prefix) if prefix else None
        if cache is not None:
            self._prefix = None  # if the next lines fail, the cache is not what its ids say
        begun = now_ms()
        token = self._token(self._forward(ids[start:], cache))
        ms = now_ms() - begun
        if cache is not None:
            cache.crop(start - len(ids))  # transformers 5: minus the number of tokens to remove
            self._prefix = prefix, cache
        return {"ms": ms, "token": token, "computed": len(ids) - start}

    @torch.inference_mode()
    def request(self, text: str) -> dict[str, Any]:
        if self.random:
            raise Unsupported("random weights have no tokenizer")
        if self.tokenizer is None:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            self.tokenizer(text)
        begun = now_ms()
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        token = self._token(self._forward(ids, None))
        return {"ms": now_ms() - begun, "token": token}

    @torch.inference_mode()
    def decode(self, context: list[int], batch: int, steps: int) -> dict[str, Any]:
        ids = torch.tensor([context] * batch, device=self.device)
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        token, cache, times = out.logits[:, -1:].argmax(-1), out.past_key_values, []
        for _ in range(steps):
            begun = now_ms()
            out = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()  # the token is wanted on the host
            times.append(now_ms() - begun)
        return {"step_ms": times}

    def _forward(self, ids: list[int], cache: Any) -> torch.Tensor:
        tensor = torch.tensor([ids], device=self.device)
        return self.model(tensor, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def _cache(self, ids: tuple[int, ...]) -> Any:
        """The cache that holds exactly these tokens; only the last one is kept."""
        if self._prefix is not None and self._prefix[0] == ids:
            return self._prefix[1]
        self._prefix = None  # two of them need not fit
        cache = transformers.DynamicCache(config=self.model.config)
        self._forward(list(ids), cache)
        return cache

    @staticmethod
    def _token(logits: torch.Tensor) -> int:
        return int(logits[0, -1].argmax())


if __name__ == "__main__":
    serve(Worker())
