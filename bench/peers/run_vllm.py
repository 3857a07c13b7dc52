"""Worker: vLLM in this process, its scheduler driven by hand, with prefix caching on and a salt a request.

The salt is what makes the modes honest: blocks are found again only under the salt they were computed with.
"full" thus finds nothing, "prefix" what was computed for it just before, never an earlier round's question.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from serve import Unsupported, now_ms, serve

SLACK = 128  # tokens beyond the longest sequence; one block
KV_BYTES = 1 << 30  # at least, for the rows of a batch


class Worker:
    """See `serve` for the protocol. Modes: full, prefix."""

    def load(
        self, model: str, dtype: str, threads: int, max_tokens: int, device: str, random_weights: str | None
    ) -> dict[str, Any]:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch
        import vllm

        self.params, self.one = vllm.SamplingParams, self._sampling(vllm.SamplingParams, 1)
        config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
        window = min(int(config.get("max_position_embeddings", max_tokens)), max_tokens + SLACK)
        self.llm = vllm.LLM(
            model=model,
            dtype=dtype,
            max_model_len=window,
            enable_prefix_caching=True,
            enforce_eager=_eager(device),
            kv_cache_memory_bytes=max(_kv_bytes(config, dtype, 2 * window), KV_BYTES),
            load_format="auto" if random_weights is None else "dummy",
            skip_tokenizer_init=random_weights is not None,
            seed=0,
            **({} if device == "cpu" else {"gpu_memory_utilization": 0.3}),
        )
        self.engine = self.llm.llm_engine
        settings = self.engine.vllm_config
        self.block = int(settings.cache_config.block_size)
        self.blocks = int(settings.cache_config.num_gpu_blocks or 0)
        self.window, self.text, self.sent = window, random_weights is None, 0
        self.known: tuple[list[int], str] = [], ""
        mode = "compiled" if settings.compilation_config.mode else "eager"
        chunk = settings.scheduler_config.max_num_batched_tokens
        return {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "notes": [
                f"prefix: blocks of {self.block} tokens are reused, so up to {self.block - 1} tokens before "
                "the last part are computed again",
                f"{mode}, prefill in pieces of at most {chunk} tokens, in-process engine",
            ],
        }

    def first_token(self, mode: str, parts: list[list[int]]) -> dict[str, Any]:
        ids = [token for part in parts for token in part]
        salt = self._salt()
        if mode == "prefix":
            before = ids[: len(ids) - len(parts[-1])]
            if self.known[0] == before:
                salt = self.known[1]  # its blocks are there, unless others have pushed them out since
            self.known = before, salt
            if before:
                self._finish([self._add(before, salt, self.one)])
        elif mode != "full":
            raise Unsupported(f"vllm has no mode {mode!r}")
        begun = now_ms()
        (out,) = self._finish([self._add(ids, salt, self.one)])
        ms = now_ms() - begun
        computed = len(ids) - int(out.num_cached_tokens or 0)
        return {"ms": ms, "token": int(out.outputs[0].token_ids[0]), "computed": computed}

    def request(self, text: str) -> dict[str, Any]:
        if not self.text:
            raise Unsupported("random weights have no tokenizer")
        prompt = {"prompt": text, "cache_salt": self._salt()}
        begun = now_ms()
        as_it_is = {"add_special_tokens": False}  # the text is a rendered prompt
        (out,) = self.llm.generate([prompt], self.one, use_tqdm=False, tokenization_kwargs=as_it_is)
        return {"ms": now_ms() - begun, "token": int(out.outputs[0].token_ids[0])}

    def decode(self, context: list[int], batch: int, steps: int) -> dict[str, Any]:
        """Rows have a salt each: they share no block, as requests of different users would not."""
        chunk = int(self.engine.vllm_config.scheduler_config.max_num_batched_tokens)
        apart = batch * len(context) // chunk + 2  # steps until the last row's prefill is through
        length = steps + 1 + apart
        whole = len(context) + length
        if whole > self.window:
            raise Unsupported(f"{whole} tokens a row; vllm was loaded for {self.window}")
        if batch * -(-whole // self.block) >= self.blocks:
            raise Unsupported(f"{batch} rows of {whole} tokens do not fit the KV cache of this run")
        params = self._sampling(self.params, length)
        waiting = {self._add(context, self._salt(), params) for _ in range(batch)}
        rows, times = list(waiting), []
        try:
            while waiting:
                waiting -= {out.request_id for out in self.engine.step()}
            for _ in range(steps):
                begun = now_ms()
                outs = self.engine.step()
                times.append(now_ms() - begun)
                if len(outs) != batch:
                    raise RuntimeError(f"a step moved {len(outs)} of {batch} rows")
        finally:
            self.engine.abort_request(rows)
            while self.engine.has_unfinished_requests():
                self.engine.step()
        return {"step_ms": times}

    @staticmethod
    def _sampling(params: Any, tokens: int) -> Any:
        """Greedy, exactly so many tokens, as ids."""
        return params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def _salt(self) -> str:
        self.sent += 1
        return f"bench {self.sent}"

    def _add(self, ids: list[int], salt: str, params: Any) -> str:
        self.sent += 1
        name = str(self.sent)
        self.engine.add_request(name, {"prompt_token_ids": ids, "cache_salt": salt}, params)
        return name

    def _finish(self, names: list[str]) -> list[Any]:
        """Steps until these requests are done."""
        done: dict[str, Any] = {}
        while len(done) < len(names):
            done |= {out.request_id: out for out in self.engine.step() if out.finished}
        return [done[name] for name in names]


def _eager(device: str) -> bool:
    """Compiled, which is vLLM's default and faster, wherever there is a compiler. That takes a minute or two
    the first time for each model; MEMOS_ENGINE_VLLM_EAGER=1 goes without."""
    compilers = (os.environ.get("CXX") or "g++", "c++", "clang++")
    lacking = device == "cpu" and not any(map(shutil.which, compilers))
    return lacking or os.environ.get("MEMOS_ENGINE_VLLM_EAGER", "0") not in ("", "0")


def _kv_bytes(config: dict[str, Any], dtype: str, tokens: int) -> int:
    """KV of so many tokens, with two blocks to spare."""
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    one = 2 * int(config["num_hidden_layers"]) * kv_heads * width * (4 if dtype == "float32" else 2)
    return one * (tokens + 2 * SLACK)


if __name__ == "__main__":
    serve(Worker())
