"""Steps for pipelines, by name: a pipeline can be kept as JSON and used again as a template.

pipeline_of({"name": "note", "steps": [{"do": "retrieve", "k": 3}, {"do": "augment"}, {"do": "create"}]})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.governance import Principal
from memos_engine.memory.memory_api import ApiReply, MemoryAPI
from memos_engine.memory.pipeline import Act, Pipeline, PipelineState, Step


def retrieve(k: int = 8, min_score: float | None = None) -> Act:
    """Puts the `k` memories that fit the state's text best into `cubes`."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        reply = _kept(state, "retrieve", api.query(state.text, k))
        keep = [f.cube for f in reply.candidates if min_score is None or f.score >= min_score]
        state.cubes = keep

    return act


def augment(write: Callable[[str, list[str]], str] | None = None) -> Act:
    """Makes a new text of the state's text and its memories' texts (default: all lines, each once)."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        bodies = [cube.body or "" for cube in state.cubes]
        if write is not None:
            state.text = write(state.text, bodies)
        else:
            lines = (line for text in (*bodies, state.text) for line in text.splitlines())
            state.text = "\n".join(dict.fromkeys(lines))

    return act


def create(**fields: Any) -> Act:
    """Stores the state's text as a memory, derived from `cubes`, which it then is alone."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        named = {"derived_from": [cube.id for cube in state.cubes], **fields}
        state.cubes = list(_kept(state, "create", api.create(state.text, **named)).cubes)

    return act


def update(mode: str = "merge") -> Act:
    """Gives the first of `cubes` a new version of the state's text, if it is still what was read; stores a
    new memory where there is none."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        if not state.cubes:
            create()(api, state)
            return
        first = state.cubes[0]
        reply = api.update(first.id, state.text, mode, if_version=first.version)
        state.cubes[0] = _kept(state, "update", reply).cube

    return act


def archive(first: bool = False) -> Act:
    """Archives `cubes`; without `first`, all but the first one, which the steps before wrote."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        put_away = state.cubes if first else state.cubes[1:]
        moved = [api.store.archive(api.principal, cube.id) for cube in put_away]
        state.cubes = moved if first else [*state.cubes[:1], *moved]

    return act


def transfer(to: str | None = None, keep: bool = True) -> Act:
    """Copies `cubes` to another user of the tenant (default: the caller); `cubes` are the copies then."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        target = None if to is None else Principal(api.principal.tenant, to)
        replies = [_kept(state, "transfer", api.transfer(c.id, target, keep=keep)) for c in state.cubes]
        state.cubes = [reply.cube for reply in replies]

    return act


def compose(archive: bool = False) -> Act:
    """Makes one memory of all of `cubes`, if there are at least two."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        if len(state.cubes) > 1:
            reply = api.compose([cube.id for cube in state.cubes], archive=archive)
            state.cubes = [_kept(state, "compose", reply).cube]

    return act


def alike() -> Act:
    """Puts memories of the same words as the first of `cubes` behind it (edges `resembles`), in place of all
    others."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        if not state.cubes:
            return
        edges = api.store.lineage(api.principal, state.cubes[0].id)
        ids = [e for edge in edges if edge.kind == "resembles" for e in (edge.source, edge.target)]
        found = api.store.get_many(api.principal, [one for one in ids if one != state.cubes[0].id])
        state.cubes = [state.cubes[0], *found.values()]

    return act


def rollback(to: str | datetime | None = None) -> Act:
    """Takes all of the caller's memories back to a moment (default: the run's value `to`)."""

    def act(api: MemoryAPI, state: PipelineState) -> None:
        moment = state.values.get("to") if to is None else to
        if moment is None:
            raise MemoryInputError("rollback needs a moment; run the pipeline with to=.")
        state.values["rollback"] = api.store.rollback_to(api.principal, moment)

    return act


READING = ("retrieve", "augment", "alike")
STEPS: dict[str, Callable[..., Act]] = {
    step.__name__: step
    for step in (retrieve, augment, create, update, archive, transfer, compose, alike, rollback)
}
# The pipelines that the paper's figures name; `remember` is its chain of retrieve, augment, update, archive.
TEMPLATES: dict[str, list[dict[str, Any]]] = {
    "remember": [
        {"do": "retrieve", "k": 1},
        {"do": "augment"},
        {"do": "update", "mode": "overwrite"},
        {"do": "archive"},
    ],
    "purification": [{"do": "retrieve", "k": 1}, {"do": "alike"}, {"do": "compose", "archive": True}],
    "transfer": [{"do": "retrieve"}, {"do": "transfer"}],
    "rollback": [{"do": "rollback"}],
}


def pipeline_of(template: str | Mapping[str, Any]) -> Pipeline:
    """A pipeline by its name in `TEMPLATES`, or of `{"name": ..., "steps": [{"do": ..., ...}]}`.

    Every step has `do`, one of `STEPS`, and that step's arguments; `name`, `isolated` and `after` are the
    pipeline's (see `Step`). Raises `MemoryInputError`.
    """
    if isinstance(template, str):
        if template not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise MemoryInputError(f"there is no pipeline {template!r}; there are {known}.")
        template = {"name": template, "steps": TEMPLATES[template]}
    try:
        name, given = str(template["name"]), list(template["steps"])
        return Pipeline(name, [_step(dict(one)) for one in given])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, MemoryInputError):
            raise
        raise MemoryInputError(
            f'a pipeline is {{"name": ..., "steps": [{{"do": ...}}]}}; this one is not: {error}.'
        ) from error


def _step(given: dict[str, Any]) -> Step:
    do = given.pop("do")
    if do not in STEPS:
        raise MemoryInputError(f"there is no step {do!r}; there are {', '.join(STEPS)}.")
    name, isolated, after = given.pop("name", do), given.pop("isolated", False), given.pop("after", None)
    try:
        act = STEPS[do](**given)
    except TypeError as error:
        raise MemoryInputError(f"step {do!r} takes no such arguments: {error}.") from error
    order = None if after is None else tuple(after)
    return Step(name, act, writes=do not in READING, isolated=bool(isolated), after=order)


def _kept(state: PipelineState, step: str, reply: ApiReply) -> ApiReply:
    state.replies.setdefault(step, []).append(reply)
    return reply.require()
