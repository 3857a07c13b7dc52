"""Ours and its peers, started for one model, measured in turn; one that fails is marked and left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from memos_engine.bench.document import Document, Row
from memos_engine.bench.options import Options
from memos_engine.bench.peers import registry
from memos_engine.bench.peers.process import PeerError, PeerProcess, worker_path
from memos_engine.bench.target import Target, check_device, check_fits

OURS = "memos_engine"


@dataclass
class Systems:
    """Running systems by name, and why the others do not run."""

    device: str = "cpu"
    running: dict[str, PeerProcess] = field(default_factory=dict)
    failed: dict[str, PeerError] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.running, *(name for name in self.failed if name not in self.running)]

    def call(self, name: str, op: str, **arguments: Any) -> Any:
        """One operation of one system. Raises PeerError; after a crash or a time-out for good."""
        if name in self.failed:
            raise self.failed[name]
        try:
            return self.running[name].call(op, **arguments)
        except PeerError as error:
            if error.status in ("crashed", "timeout"):
                self.failed[name] = error
            raise


def check_systems(options: Options) -> None:
    """Raises ConfigError, before anything is measured, for a device or a peer that cannot be had."""
    check_device(options.device)
    registry.select(options.peers, options.device)


@contextmanager
def open_systems(options: Options, target: Target, max_tokens: int, document: Document) -> Iterator[Systems]:
    """Starts our worker and those of the peers, each with the model loaded."""
    names = [OURS, *registry.select(options.peers, options.device)]
    target.window(max_tokens)
    check_fits(target, options.resolved_dtype, max_tokens, len(names), options.device)
    threads = options.threads or torch.get_num_threads()
    systems = Systems(options.device)
    with ExitStack() as stack:
        for name in names:
            try:
                process = stack.enter_context(_start(name, options, threads))
                systems.running[name] = process
                loaded = process.call(
                    "load",
                    timeout=max(options.peer_timeout, 300),
                    model=str(target.folder),
                    dtype=options.resolved_dtype,
                    threads=threads,
                    max_tokens=max_tokens,
                    device=options.device,
                    random_weights=target.random,
                )
                systems.versions[name] = loaded["versions"]
                document.note(*(f"{name}: {note}" for note in loaded["notes"]))
            except PeerError as error:
                systems.failed[name] = error
                document.note(f"{name} is {error.status}: {error}")
        document.data["machine"]["systems"] = systems.versions
        yield systems


def _start(name: str, options: Options, threads: int) -> PeerProcess:
    if name == OURS:
        argv = [sys.executable, worker_path("own")]
        return PeerProcess(name, argv, registry.thread_variables(threads), options.peer_timeout)
    return registry.start(name, options.peer_timeout, options.device, threads)


@dataclass(frozen=True)
class Arm:
    """One thing that is timed in every round. `call` gets the round's input and returns a measurement."""

    system: str
    mode: str
    call: Callable[[Any], dict[str, Any]]

    @property
    def key(self) -> tuple[str, str]:
        return self.system, self.mode


@dataclass
class Measured:
    """What the rounds gave: the answers of each arm, one a round, or why there are none."""

    answers: dict[tuple[str, str], list[dict[str, Any]]]
    failed: dict[tuple[str, str], PeerError]

    def samples(self, key: tuple[str, str], name: str = "ms") -> list[float]:
        return [float(answer[name]) for answer in self.answers.get(key, [])]

    def status_row(self, key: tuple[str, str], **fields: Any) -> Row:
        """The row of an arm that could not be measured."""
        error = self.failed[key]
        return {"system": key[0], "mode": key[1], **fields, "status": error.status, "reason": str(error)}


def interleave(
    arms: Sequence[Arm],
    inputs: Sequence[Any],
    warmup: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Every arm once per input, a different arm first in each round; the first `warmup` rounds do not count.

    An arm that fails once is dropped with its reason: half a sample compares with nothing.
    """
    measured = Measured({arm.key: [] for arm in arms}, {})
    for round_, given in enumerate(inputs):
        shift = round_ % len(arms)
        for arm in [*arms[shift:], *arms[:shift]]:
            if arm.key in measured.failed:
                continue
            try:
                answer = arm.call(given)
            except PeerError as error:
                measured.failed[arm.key] = error
                measured.answers.pop(arm.key, None)
                continue
            if round_ >= warmup:
                measured.answers[arm.key].append(answer)
        progress(round_ + 1)
    return measured
