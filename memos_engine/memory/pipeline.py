"""Memory pipelines: retrieve, augment, update, archive and other steps over one shared state.

After the Memory Pipeline of the MemOS paper (arXiv 2507.03724, section 5.3). The steps that change memories
happen in one transaction: if one of them fails, none has happened; one that is `isolated` takes only itself
back. Nothing is locked before the first of them, so that slow steps (a model's) belong in front.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memos_engine.errors import MemoryInputError, MemosEngineError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.memory_api import ApiReply, MemoryAPI


@dataclass
class PipelineState:
    """What steps hand on: `cubes` the memories they work on, `text` the words, `values` whatever else;
    `replies` of the API calls that were made, by step."""

    text: str = ""
    cubes: list[MemCube] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    replies: dict[str, list[ApiReply]] = field(default_factory=dict)


Act = Callable[[MemoryAPI, PipelineState], Any]


@dataclass(frozen=True)
class Step:
    """One step: `act(api, state)` reads and changes the state; API calls that fail in it must raise
    (`reply.require()`).

    `writes`: it changes memories. `isolated`: when it fails, its own changes are undone, the failure is noted
    and the rest goes on. `after`: names of steps that come first (default: the one in front of it).
    """

    name: str
    act: Act
    writes: bool = True
    isolated: bool = False
    after: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PipelineReply:
    """`ok` unless a step failed that was not isolated: then no memory has changed, and `error` is why.

    `done` are the names of steps that worked, in order; `failed` maps those that did not to their messages.
    """

    name: str
    ok: bool
    done: tuple[str, ...]
    failed: Mapping[str, str]
    state: PipelineState
    error: MemosEngineError | None = None

    def require(self) -> PipelineReply:
        """The reply itself. Raises the error of a pipeline that failed."""
        if self.error is not None:
            raise self.error
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "name": self.name,
            "ok": self.ok,
            "done": list(self.done),
            "failed": dict(self.failed),
            "text": self.state.text,
            "cubes": [cube.to_dict() for cube in self.state.cubes],
        }


class Pipeline:
    """Steps in the order that their `after` asks for. A pipeline holds no state: run it as often as needed.

    Raises `MemoryInputError` for names that are missing or taken twice, and for steps that wait for each
    other.
    """

    def __init__(self, name: str, steps: Sequence[Step]) -> None:
        self.name = name
        self.steps = _ordered(steps)

    def run(self, api: MemoryAPI, text: str = "", **values: Any) -> PipelineReply:
        """Run every step. What is no `MemosEngineError` (a bug, an interrupt) undoes all and is raised."""
        state = PipelineState(text=text, values=dict(values))
        done: list[str] = []
        failed: dict[str, str] = {}
        here = ""
        try:
            with contextlib.ExitStack() as stack:
                begun = False
                for step in self.steps:
                    here = step.name
                    if step.writes and not begun:
                        stack.enter_context(api.store.transaction())
                        begun = True
                    self._run(step, api, state, begun, failed)
                    if here not in failed:
                        done.append(here)
        except MemosEngineError as error:
            failed[here] = str(error)
            return PipelineReply(self.name, False, tuple(done), failed, state, error)
        return PipelineReply(self.name, True, tuple(done), failed, state)

    @staticmethod
    def _run(step: Step, api: MemoryAPI, state: PipelineState, begun: bool, failed: dict[str, str]) -> None:
        if not step.isolated:
            step.act(api, state)
            return
        before = (state.text, list(state.cubes), dict(state.values))
        part = api.store.transaction() if begun else contextlib.nullcontext()
        try:
            with part:
                step.act(api, state)
        except MemosEngineError as error:
            failed[step.name] = str(error)
            state.text, state.cubes, state.values = before

    def to_dict(self) -> dict[str, Any]:
        """The order and settings of the steps, JSON-safe; what they do is code (see `steps.pipeline_of`)."""
        steps = [{"name": s.name, "writes": s.writes, "isolated": s.isolated} for s in self.steps]
        return {"name": self.name, "steps": steps}


def _ordered(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Topologically, otherwise as given."""
    names = [step.name for step in steps]
    if len(set(names)) != len(names):
        raise MemoryInputError(f"two steps have the same name ({', '.join(names)}); rename one.")
    needs = {
        step.name: set(step.after if step.after is not None else names[max(0, i - 1) : i])
        for i, step in enumerate(steps)
    }
    unknown = {need for wanted in needs.values() for need in wanted} - set(names)
    if unknown:
        raise MemoryInputError(f"no step is named {', '.join(sorted(unknown))}; after= names steps.")
    out: list[Step] = []
    waiting = list(steps)
    while waiting:
        ready = next((s for s in waiting if needs[s.name] <= {o.name for o in out}), None)
        if ready is None:
            raise MemoryInputError(
                f"steps {', '.join(s.name for s in waiting)} wait for each other; drop an after=."
            )
        out.append(ready)
        waiting.remove(ready)
    return tuple(out)
