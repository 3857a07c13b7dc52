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
from pathlib import Path
from typing import Any

from memos_engine.bench.document import Document
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.texts import facts

from memos_engine.config import ConfigError
from memos_engine.errors import MemosEngineError

_CHILD = "from memos_engine.bench.memory import child; child()"


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench memory`; the measured process is a child, so nothing else counts."""
    if options.random_weights is not None or options.device != "cpu":
        raise ConfigError("bench memory measures a pulled model on the CPU; leave those options out.")
    document = Document("memory", options)
    both = options.dtype == "auto" and not options.quick
    dtypes = ("bfloat16", "float32") if both else (options.resolved_dtype,)
    for done, dtype in enumerate(dtypes):
        progress(dtype, done, len(dtypes))
        if not document.has(dtype):
            document.add(dtype, [_measured(options, dtype)])
    return document.finish()


def _measured(options: Options, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-c", _CHILD, options.model, dtype, folder]
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, cwd=folder, check=False, timeout=options.peer_timeout
            )
        except subprocess.TimeoutExpired as error:
            raise MemosEngineError(f"The measured process took over {error.timeout:g} s.") from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise MemosEngineError(f"The measured process ended with status {done.returncode}: {last[0]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


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
    """Peak resident memory of this program. getrusage would also count the process that started it, from
    before its image was replaced."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
