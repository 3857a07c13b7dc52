"""Peak memory of a whole process: open, remember, full prefill, splice, answer.

`overhead_mb` is the peak beyond model and KV pool; pages that no request has used yet cost nothing, so
`overhead_full_pool_mb` is taken once more after a prompt that fills the pool to its last page.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

from memos_engine.bench.machine import machine
from memos_engine.bench.texts import facts

from memos_engine.errors import MemosEngineError


def run(model: str = "smollm2", dtype: str = "bfloat16") -> dict[str, Any]:
    """Returns the result document; the measured process is a child, so nothing else counts."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from memos_engine.bench.memory import child; child()",
                model,
                dtype,
                folder,
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            check=False,
        )
    if done.returncode != 0:
        raise MemosEngineError(f"The measured process ended with status {done.returncode}.")
    row = json.loads(done.stdout.splitlines()[-1])
    config = {"model": model, "dtype": dtype}
    return {"bench": "memory", "version": 1, "machine": machine(), "config": config, "rows": [row]}


def child() -> None:
    """Measured process: `model dtype store`."""
    from memos_engine.api import MemoryEngine
    from memos_engine.config import DecoderConfig, SamplingParams
    from memos_engine.decoder.sequence import TextSpan

    model, dtype, folder = sys.argv[1:4]
    with MemoryEngine.open(model, f"{folder}/store", decoder=DecoderConfig(dtype=dtype)) as engine:
        person = engine.user("bench")
        for seed in range(4):
            person.remember(facts(seed, 14))
        params = SamplingParams(max_new_tokens=8)
        question = "Where does Anna live?"
        person.chat(question, params, form="text")
        person.warm()
        reply = person.chat(question, params, form="kv")
        weights, cache = engine.decoder.runner.model.weights, engine.decoder.runner.cache
        peak = _peak_mb()
        filling = tuple(range(100, 100 + engine.decoder.pool_tokens - 8))
        list(engine.decoder.generate([TextSpan(filling)], SamplingParams(max_new_tokens=1)))
        full = _peak_mb()
        model_mb, pool_mb = weights.nbytes / 2**20, cache.nbytes / 2**20
        row = {
            "system": "memos_engine",
            "dtype": dtype,
            "peak_mb": round(peak, 1),
            "model_mb": round(model_mb, 1),
            "pool_mb": round(pool_mb, 1),
            "overhead_mb": round(peak - model_mb - pool_mb, 1),
            "overhead_full_pool_mb": round(full - model_mb - pool_mb, 1),
            "spliced_tokens": reply.stats.spliced_tokens,
        }
        print(json.dumps(row))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
