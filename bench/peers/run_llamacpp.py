"""Worker: llama.cpp's server inside this process (xllamacpp), asked as its users ask it: over local HTTP.

Only that way it tells token ids; a call without HTTP is half a millisecond faster and gives text. The server
reads weights from a GGUF file, which `gguf_export` makes from the model folder in memos_engine's own
interpreter: this environment has neither torch nor gguf.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
from itertools import pairwise
from typing import Any

from serve import Unsupported, now_ms, serve

SLACK = 64  # tokens beyond the longest sequence
_JSON = {"Content-Type": "application/json"}
_LEAD = 8  # steps that rows may begin one after the other


class Worker:
    """See `serve` for the protocol. Modes: full, prefix."""

    def load(
        self, model: str, dtype: str, threads: int, max_tokens: int, device: str, random_weights: str | None
    ) -> dict[str, Any]:
        if random_weights is not None:
            raise Unsupported("llama.cpp reads weights from a file, and random ones are not written to one")
        if device != "cpu":
            raise Unsupported("this build of llama.cpp computes on the CPU only")
        import xllamacpp

        self.library = xllamacpp
        made = _gguf(model, dtype)
        self.path, self.text = made["path"], made["text"]
        self.dtype, self.threads = dtype, threads
        self.server: Any = None
        self.slots = self.tokens = 0
        self._open(1, max_tokens)
        wide = dtype == "float32"
        return {
            "versions": {"xllamacpp": xllamacpp.__version__},
            "notes": [
                "prefix: the slot still holds all but the last part in memory (cache_prompt), to the token",
                f"weights and KV in {'F32' if wide else 'F16'}"
                + ("" if wide else ", which holds the bfloat16 values: this build's BF16 products are loops"),
                xllamacpp.get_system_info().strip(),
            ],
        }

    def first_token(self, mode: str, parts: list[list[int]]) -> dict[str, Any]:
        ids = [token for part in parts for token in part]
        before = ids[: len(ids) - len(parts[-1])]
        self._open(self.slots, len(ids))
        if mode == "prefix":
            self._ask(before or ids, n_predict=0, cache_prompt=True)  # what the slot still holds is kept
        elif mode != "full":
            raise Unsupported(f"llamacpp has no mode {mode!r}")
        return self._timed(ids, cache_prompt=mode == "prefix" and bool(before))

    def request(self, text: str) -> dict[str, Any]:
        if not self.text:
            raise Unsupported("llama.cpp is not known to split text as this model's tokenizer does")
        return self._timed(text, cache_prompt=False)

    def decode(self, context: list[int], batch: int, steps: int) -> dict[str, Any]:
        """Rows lie in slots of their own and start from a slot that holds the context; steps count while all
        rows are under way."""
        length = steps + 1 + 2 * _LEAD
        self._open(batch, len(context) + length)
        for slot in range(batch):
            self._ask(context, slot, n_predict=0, cache_prompt=False)
        rows = [_Row() for _ in range(batch)]
        threads = [
            threading.Thread(target=self._stream, args=(row, context, slot, length))
            for slot, row in enumerate(rows)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for row in rows:
            if row.error:
                raise RuntimeError(row.error)
        return {"step_ms": _together(rows, steps)}

    def _open(self, slots: int, tokens: int) -> None:
        """A server with this many slots of this many tokens; it has to be started again for more."""
        if self.server is not None and slots <= self.slots and tokens + SLACK <= self.tokens:
            return
        self.slots, self.tokens = max(slots, self.slots), max(tokens + SLACK, self.tokens)
        self.server = None  # the old one's memory goes first
        library, params = self.library, self.library.CommonParams()
        params.model.path = self.path
        params.n_parallel, params.n_ctx = self.slots, self.slots * self.tokens
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        if self.dtype == "float32":
            params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
        params.cache_ram_mib = 0  # no copying of an old prompt's state while a new one is timed
        params.n_ctx_checkpoints = 0
        params.fit_params = False
        params.ctx_shift = False
        params.ui = False
        params.verbosity = 1
        self.server = library.Server(params)

    def _ask(self, prompt: list[int] | str, slot: int = 0, **settings: Any) -> dict[str, Any]:
        answer = self.server.handle_completions(_body(prompt, slot, **settings))
        if "choices" not in answer:
            raise RuntimeError(str(answer.get("error") or answer.get("message") or answer)[:500])
        return dict(answer)

    def _timed(self, prompt: list[int] | str, **settings: Any) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.server.listening_address.partition("//")[2])
        connection.connect()
        begun = now_ms()
        body = _body(prompt, 0, n_predict=1, return_tokens=True, **settings)
        connection.request("POST", "/completion", json.dumps(body).encode(), _JSON)
        answer = json.loads(connection.getresponse().read())
        ms = now_ms() - begun
        connection.close()
        if not answer.get("tokens"):
            raise RuntimeError(str(answer.get("error") or answer)[:500])
        return {"ms": ms, "token": int(answer["tokens"][0]), "computed": int(answer["timings"]["prompt_n"])}

    def _stream(self, row: _Row, context: list[int], slot: int, length: int) -> None:
        settings = {"cache_prompt": True, "ignore_eos": True, "stream": True, "timings_per_token": True}
        body = _body(context, slot, n_predict=length, **settings)
        try:
            self.server.handle_completions(body, row.add)
        except Exception as error:
            row.error = f"{type(error).__name__}: {error}"


class _Row:
    """One streamed answer: when each of its tokens came."""

    def __init__(self) -> None:
        self.came: list[tuple[float, int]] = []
        self.error = ""

    def add(self, piece: dict[str, Any]) -> bool:
        now = now_ms()
        if "choices" not in piece:
            self.error = str(piece)[:500]
            return True
        count = int((piece.get("timings") or {}).get("predicted_n", 0))
        if count > (self.came[-1][1] if self.came else 0):
            self.came.append((now, count))
        return False


def _together(rows: list[_Row], steps: int) -> list[float]:
    """Milliseconds of steps in which every row got a token, as the first row saw them. A token whose text is
    not whole yet comes with the next one: their time is shared out."""
    if not all(row.came for row in rows):
        raise RuntimeError("a row got no token")
    begin, end = max(row.came[0][0] for row in rows), min(row.came[-1][0] for row in rows)
    times: list[float] = []
    came = rows[0].came
    for (before, n), (now, m) in pairwise(came):
        if before >= begin and now <= end:
            times += [(now - before) / (m - n)] * (m - n)
    if len(times) < steps:
        raise RuntimeError(f"only {len(times)} of {steps} steps had all {len(rows)} rows under way")
    return times[:steps]


def _body(prompt: list[int] | str, slot: int, **settings: Any) -> dict[str, Any]:
    """Greedy. Ids are taken as they are; text is split with its special tokens, and none is added."""
    return {"prompt": prompt, "id_slot": slot, "temperature": 0, "top_k": 1, **settings}


def _gguf(model: str, dtype: str) -> dict[str, Any]:
    """Where the model's GGUF is, and whether llama.cpp may be given text."""
    python = os.environ.get("MEMOS_ENGINE_PYTHON", sys.executable)
    env = {**os.environ, "PYTHONPATH": os.environ.get("MEMOS_ENGINE_PYTHONPATH", "")}
    command = [python, "-m", "memos_engine.bench.peers.gguf_export", model, dtype]
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RuntimeError(f"the model could not be written as GGUF: {said[-1] if said else done.returncode}")
    return dict(json.loads(done.stdout.decode("utf-8").strip().splitlines()[-1]))


if __name__ == "__main__":
    serve(Worker())
