"""The demo: two users, their memories, ten fixed questions, answered three ways.

The first process remembers and stores the KV records; a second one, started afresh, answers. Greedy decoding,
the same prompt ids whether a memory enters as text or as KV, page reuse switched off between runs so that
each time to first token stands alone. The small model's mistakes are shown.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.text import Text

from memos_engine.errors import MemosEngineError
from memos_engine.interfaces.options import show_table

MODES = {"none": "no memory", "text": "as text", "kv": "spliced"}
ANSWER_TOKENS = 48
LONG = 500  # tokens of a prompt that holds the document


def load_data() -> dict[str, Any]:
    """Users with their memories, and the questions."""
    folder = resources.files("memos_engine.interfaces") / "demo_data"
    data: dict[str, Any] = json.loads((folder / "data.json").read_text())
    for memories in data["users"].values():
        for memory in memories:
            if "file" in memory:
                memory["text"] = (folder / memory["file"]).read_text().strip()
    return data


def run(store: Path | None, model: str, dtype: str, as_json: bool, console: Console) -> None:
    """Runs both processes and shows the result."""
    with tempfile.TemporaryDirectory(prefix="memos-engine-demo-") as temporary:
        folder = (store or Path(temporary) / "memory").resolve()
        remembered = _child("remember", folder, model, dtype)
        if not as_json:
            console.print(
                f"Process {remembered['pid']} remembered {remembered['memories']} memories of two users "
                f"(the longest has {remembered['longest']} tokens) and stored their KV: "
                f"{remembered['kv_mb']:.0f} MB. It has ended.",
                highlight=False,
            )
        answers = _child("answer", folder, model, dtype)
    result = {"demo": 1, **remembered, **answers}
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _show(answers, console)


def _child(phase: str, store: Path, model: str, dtype: str) -> dict[str, Any]:
    """A phase in a process of its own; the store directory is all that passes from one to the next."""
    # Without the current folder on the path: in a checkout it holds `kernels`, a name others import.
    code = "import sys; sys.path = [p for p in sys.path if p]; "
    code += "from memos_engine.interfaces.demo import child; child()"
    done = subprocess.run(
        [sys.executable, "-c", code, phase, str(store), model, dtype],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        why = lines[-1] if lines else f"it ended with status {done.returncode}."
        raise MemosEngineError(f"The demo's {phase} process failed: {why}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def child() -> None:
    """Entry point of a phase: `phase store model dtype`; prints one JSON line."""
    phase, store, model, dtype = sys.argv[1:5]
    from memos_engine.api import MemoryEngine
    from memos_engine.config import DecoderConfig, MemoryConfig

    try:
        with MemoryEngine.open(
            model, store, decoder=DecoderConfig(dtype=dtype), memory=MemoryConfig(build=False)
        ) as engine:
            print(json.dumps({"remember": _remember, "answer": _answer}[phase](engine, load_data())))
    except MemosEngineError as error:
        print(error)  # for the parent process
        raise SystemExit(1) from None


def _bar(items: list[Any], what: str) -> Any:
    return track(items, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _remember(engine: Any, data: dict[str, Any]) -> dict[str, Any]:
    work = [(name, memory) for name, memories in data["users"].items() for memory in memories]
    for name, memory in _bar(work, "remembering"):
        person = engine.user(name)
        cube = person.remember(memory["text"], tags=memory["tags"], idempotency_key=memory["text"][:200])
        person.warm([cube.id])
    longest = max(len(engine.layout.memory(memory["text"])) for _, memory in work)
    return {
        "pid": os.getpid(),
        "memories": len(work),
        "longest": longest,
        "kv_mb": engine.store.stats()["kv_bytes"] / 1e6,
    }


def _answer(engine: Any, data: dict[str, Any]) -> dict[str, Any]:
    from memos_engine.config import SamplingParams

    owned = {name: {c.id for c in engine.user(name).memories()} for name in data["users"]}
    params = SamplingParams(max_new_tokens=ANSWER_TOKENS)
    engine.ready()
    rows, foreign = [], 0
    for question in _bar(data["questions"], "answering"):
        person = engine.user(question["user"])
        row: dict[str, Any] = {"user": question["user"], "question": question["question"], "modes": {}}
        for mode in MODES:
            engine.decoder.forget_prefixes()
            reply = person.chat(question["question"], params, form=mode)
            right = any(answer.lower() in reply.text.lower() for answer in question["answers"])
            foreign += len(set(reply.forms) - owned[question["user"]])
            row["modes"][mode] = {
                "answer": reply.text,
                "right": right,
                "ttft_ms": round(reply.ttft_ms, 1),
                "forms": list(reply.forms.values()),
                "prompt_tokens": reply.stats.computed_tokens + reply.stats.spliced_tokens,
            }
        rows.append(row)
    summary = {
        mode: {
            "right": sum(row["modes"][mode]["right"] for row in rows),
            "of": len(rows),
            "ttft_ms_p50": _median_ttft(rows, mode),
            "ttft_ms_p50_long": _median_ttft(
                [r for r in rows if r["modes"]["text"]["prompt_tokens"] >= LONG], mode
            ),
        }
        for mode in MODES
    }
    return {
        "answering_pid": os.getpid(),
        "dtype": str(engine.decoder.runner.model.weights.dtype).removeprefix("torch."),
        "questions": rows,
        "summary": summary,
        "foreign_memories": foreign,
    }


def _median_ttft(rows: list[dict[str, Any]], mode: str) -> float | None:
    times = [row["modes"][mode]["ttft_ms"] for row in rows]
    return round(statistics.median(times), 1) if times else None


def _show(result: dict[str, Any], console: Console) -> None:
    console.print(f"Process {result['answering_pid']} opens the store and answers ({result['dtype']}).\n")
    for row in result["questions"]:
        console.print(f"{row['user']}: {row['question']}", style="bold")
        for mode, label in MODES.items():
            cell = row["modes"][mode]
            text = textwrap.shorten(cell["answer"], 110, placeholder="...")
            forms = f", {len(cell['forms'])} memories" if cell["forms"] else ""
            mark = ("right", "green") if cell["right"] else ("wrong", "red")
            rest = f" {cell['ttft_ms']:6.0f} ms  {text}  ({cell['prompt_tokens']} tokens{forms})"
            console.print(Text.assemble(f"  {label:<9} ", mark, rest))
    rows = []
    for mode, label in MODES.items():
        s = result["summary"][mode]
        right = f"{s['right']} of {s['of']}"
        rows.append((label, right, f"{s['ttft_ms_p50']:.0f} ms", f"{s['ttft_ms_p50_long']:.0f} ms"))
    show_table(["", "right answers", "first token (median)", "with the document"], rows, "Ten questions")
    console.print(f"Memories of another user that entered a prompt: {result['foreign_memories']}.")
