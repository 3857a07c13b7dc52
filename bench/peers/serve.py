"""The worker's side of the peer protocol. Standard library only: it runs in the peer's own environment.

One JSON object a line comes in on standard input, one goes out on the channel that was standard output at
the start; whatever a library prints afterwards goes to standard error. A call is `{"op": NAME,
...arguments}`; the answer is `{"ok": value}` or `{"error": text, "kind": "unsupported" | "failed"}`.

Operations of a worker (a class with these methods; missing ones are answered as unsupported):

load(model, dtype, threads, max_tokens, device, random_weights) -> {"versions": {...}, "notes": [...]}
    model: a model folder. max_tokens: the longest sequence that will be asked for.
first_token(mode, parts) -> {"ms": float, "token": int}
    parts: lists of token ids, anchor, memories in order, query. The time runs from here, ids in hand, to the
    first greedy token's id. mode: "full": nothing of the prompt is reused; "prefix": everything but the last
    part was computed before, untimed, and is reused; others are a system's own.
decode(context, batch, steps) -> {"step_ms": [float, ...]}
    context: token ids, the same for every row of the batch, which ends where rows differ in nothing. The
    milliseconds of each of `steps` decode steps after the first token, end-of-text ignored.
request(text, steps=1) -> {"ms": float, "token": int}
    Like first_token "full", from the rendered prompt as text: tokenisation is timed as well.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any


class Unsupported(Exception):
    """This system cannot do that; the row says so and the bench goes on."""


def now_ms() -> float:
    return time.perf_counter() * 1e3


def serve(worker: Any) -> None:
    """Answers calls until standard input ends or `close` is called."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # libraries print; the channel stays clean
    for line in sys.stdin:
        call = json.loads(line)
        name = call.pop("op")
        if name == "close":
            return
        try:
            method = getattr(worker, name, None)
            if method is None or name.startswith("_"):
                raise Unsupported(f"no operation {name!r}")
            answer: dict[str, Any] = {"ok": method(**call)}
        except Unsupported as error:
            answer = {"error": str(error), "kind": "unsupported"}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}", "kind": "failed"}
        channel.write(json.dumps(answer) + "\n")
