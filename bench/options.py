"""What every bench can be asked: one frozen, validated dataclass behind one set of command-line options."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memos_engine.config import ConfigError, default_dtype

# (what is being done, units done, units in all)
Progress = Callable[[str, int, int], None]

DTYPES = ("float32", "bfloat16", "auto")


def silent(text: str, done: int, total: int) -> None:
    """A progress that shows nothing."""


def rounds_shown(progress: Progress, text: str, before: int, total: int) -> Callable[[int], None]:
    """Shows round n of a unit that comes after `before` rounds of others."""

    def show(round_: int) -> None:
        progress(f"{text}: round {round_}", before + round_, total)

    return show


@dataclass(frozen=True)
class Options:
    """Common options (see `docs/benchmarks.md`). A bench reads those that concern it.

    contexts: memory tokens, split evenly over `memories`; queries: tokens computed behind them; batches:
    requests decoded together; cubes: memories of a store; methods: those of the quality bench (empty: all);
    n: measured rounds or prompts (None: the bench's own default, fewer with `quick`); peers: systems beside
    ours (None: all that are installed); data: folder of evaluation sets; objective_ms: the first token's
    deadline of the load bench; budgets: milliseconds to the first token of the budget bench, which simulate
    runs without a model; profile: keep what `quality` found beside the models, for the scheduler; out:
    folder for JSON, HTML and PNG; resume: keep the units that an interrupted run finished there;
    peer_timeout: seconds one call may take.
    """

    model: str = "smollm2"
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    contexts: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    memories: tuple[int, ...] = ()
    recompute: tuple[float, ...] = ()
    cubes: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    peers: tuple[str, ...] | None = None
    dataset: str = "xquad_en"
    data: Path | None = None
    random_weights: str | None = None
    n: int | None = None
    seed: int = 0
    objective_ms: float | None = None
    budgets: tuple[float, ...] = ()
    simulate: bool = False
    profile: bool = False
    quick: bool = False
    out: Path | None = None
    resume: bool = False
    peer_timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: use float32, bfloat16 or auto.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device={self.device!r}: use cpu or cuda.")
        for name in ("contexts", "queries", "batches", "memories", "cubes"):
            low = [value for value in getattr(self, name) if value < 1]
            if low:
                raise ConfigError(f"{name[:-1]} {low[0]}: must be at least 1.")
        if any(not 0 <= share <= 1 for share in self.recompute):
            raise ConfigError("recompute: a share of the memory tokens, so between 0 and 1.")
        if self.n is not None and self.n < 1:
            raise ConfigError(f"n={self.n}: at least one measured round.")
        if self.objective_ms is not None and self.objective_ms <= 0:
            raise ConfigError("objective-ms: milliseconds, more than 0.")
        if any(budget <= 0 for budget in self.budgets):
            raise ConfigError("budget: milliseconds, more than 0.")
        if self.peer_timeout <= 0:
            raise ConfigError("peer-timeout: seconds, more than 0.")

    @property
    def resolved_dtype(self) -> str:
        return default_dtype() if self.dtype == "auto" else self.dtype

    def rounds(self, full: int, quick: int) -> int:
        """Measured rounds: `n`, or the bench's default."""
        return self.n if self.n is not None else quick if self.quick else full

    def public(self) -> dict[str, Any]:
        """JSON-safe; only what shapes the result, so that two runs can be told to be the same."""
        shown = asdict(self)
        for name in ("out", "resume", "peer_timeout", "profile"):
            shown.pop(name)
        shown["dtype"] = self.resolved_dtype
        shown["data"] = None if self.data is None else self.data.name
        plain: dict[str, Any] = json.loads(json.dumps(shown))  # as it will be read back: lists, not tuples
        return plain
