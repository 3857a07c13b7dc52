"""The ops one by one, at the model's shapes: ours against plain torch, and both against the machine.

Weights and pages are rotated through more memory than the caches hold, as the layers of a model do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from memos_engine.bench import roofline, stats
from memos_engine.bench.document import Document, Row
from memos_engine.bench.limits import Ceilings
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.target import check_device, open_target

from memos_engine import ops
from memos_engine.decoder.spec import ModelSpec
from memos_engine.ops import Backend, backend_for

_CACHES = 96 << 20  # more than the last-level cache of the machines this is likely to meet
_PAGE = 16
_LONG = 8192  # keys of a long context, where reading them is most of a decoding step
_RECORDS = 3  # records in turn, so that none is in a cache when its turn comes


_Pages = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """One op at one shape. flops and moved: what it has to do at least; rate: what bounds the bytes."""

    op: str
    shape: str
    flops: float
    moved: float
    rate: str  # read or copy
    ours: Callable[[int], object]
    torch: Callable[[int], object]


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench kernels`."""
    check_device(options.device)
    with open_target(options) as target, roofline.threads(options.threads):
        document = Document("kernels", options)
        ceilings = roofline.ceilings_for(document, options)
        kind, device = getattr(torch, options.resolved_dtype), torch.device(options.device)
        makers = _makers(target.spec, options, kind, device)
        for done, (unit, maker) in enumerate(makers):
            progress(unit, done, len(makers))
            if not document.has(unit):
                document.add(unit, *_measure(maker(), options, ceilings, device))
        return document.finish()


def _measure(
    case: Case, options: Options, ceilings: Ceilings, device: torch.device
) -> tuple[list[Row], list[Row]]:
    rounds = options.rounds(40, 25)
    backend = backend_for(device)
    arms = {_label(backend): case.ours, "torch": case.torch}
    samples: dict[str, list[float]] = {name: [] for name in arms}
    inner = _repeats(case.ours, device)
    for round_ in range(rounds + 2):
        for name in list(arms) if round_ % 2 else list(arms)[::-1]:
            _wait(device)
            start = time.perf_counter()
            for i in range(inner):
                arms[name](round_ * inner + i)
            _wait(device)
            if round_ >= 2:
                samples[name].append((time.perf_counter() - start) * 1e6 / inner)
    peak = ceilings.gemm.get(options.resolved_dtype) or max(ceilings.gemm.values())
    limit = 1e6 * max(case.flops / peak, case.moved / getattr(ceilings, case.rate))
    rows = []
    for name, values in samples.items():
        median = statistics.median(values)
        rows.append(
            {
                "op": case.op,
                "backend": name,
                "system": "torch" if name == "torch" else "memos_engine",
                "shape": case.shape,
                "dtype": options.resolved_dtype,
                "scope": "engine",
                "reuse": "none",
                **stats.timing(values, "us", 2),
                "limit_us": round(limit, 2),
                "share_of_limit": round(limit / median, 3),
            }
        )
    ours, plain = samples[_label(backend)], samples["torch"]
    name = f"{case.op} {case.shape}, ours / torch"
    return rows, [{"name": name, **stats.ratio(ours, plain).public()}]


def _suffix(int8: bool) -> str:
    return ", int8 pages" if int8 else ""


def _label(backend: Backend) -> str:
    if backend.NAME == "reference":
        return "reference"
    return f"{backend.NAME} {ops.describe()['cpu']['isa']}" if backend.NAME == "native" else backend.NAME


def _repeats(call: Callable[[int], object], device: torch.device) -> int:
    """Calls per sample, so that a sample takes about 2 ms: short ops are timed in groups."""
    for i in range(3):
        call(i)
    _wait(device)
    start = time.perf_counter()
    for i in range(3):
        call(i)
    _wait(device)
    return max(1, min(64, int(2e-3 / max(1e-7, (time.perf_counter() - start) / 3))))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _makers(
    spec: ModelSpec, options: Options, kind: torch.dtype, device: torch.device
) -> list[tuple[str, Callable[[], Case]]]:
    make = _Maker(spec, kind, device, backend_for(device))
    contexts = options.contexts or (1024,)
    out: list[tuple[str, Callable[[], Case]]] = []
    for keys in contexts:
        for rows in (1, 32, keys + 32):
            out.append((f"attention {rows} x {keys}", lambda r=rows, k=keys: make.attention(r, k)))  # type: ignore[misc]
        out.append((f"splice {keys}", lambda k=keys: make.splice(k)))  # type: ignore[misc]
        out.append((f"splice {keys}, int8 pages", lambda k=keys: make.splice(k, int8=True)))  # type: ignore[misc]
    for keys in sorted({*contexts, _LONG}):
        for rows, int8 in ((1, False), (1, True), (32, True)):
            if int8 or keys not in contexts:
                unit = f"attention {rows} x {keys}" + (", int8 pages" if int8 else "")
                out.append((unit, lambda r=rows, k=keys, i=int8: make.attention(r, k, i)))  # type: ignore[misc]
    hidden, inner = spec.hidden_size, spec.intermediate_size
    for rows in (1, 32, 1024):
        out.append((f"gate_up {rows}", lambda r=rows: make.linear("gate_up", r, hidden, 2 * inner)))  # type: ignore[misc]
        out.append((f"down {rows}", lambda r=rows: make.linear("down", r, inner, hidden)))  # type: ignore[misc]
    out.append(("lm_head", lambda: make.linear("lm_head", 1, hidden, spec.vocab_size)))
    for rows in (1, 32):
        out.append((f"append {rows}", lambda r=rows: make.append(r)))  # type: ignore[misc]
        out.append((f"rms_norm {rows}", lambda r=rows: make.rms_norm(r)))  # type: ignore[misc]
        out.append((f"silu_mul {rows}", lambda r=rows: make.silu_mul(r)))  # type: ignore[misc]
    return out


class _Maker:
    """Tensors of each op for one model, on one device."""

    def __init__(self, spec: ModelSpec, kind: torch.dtype, device: torch.device, backend: Backend) -> None:
        self.spec, self.kind, self.device, self.backend = spec, kind, device, backend
        torch.manual_seed(0)

    def attention(self, rows: int, keys: int, int8: bool = False) -> Case:
        """The last `rows` of `keys` positions (all of them, causal, when there are as many); torch has keys
        of the model's dtype either way."""
        s, total = self.spec, max(rows, keys)
        blocks = -(-total // _PAGE) + 1
        size = 1 if int8 else self.kind.itemsize
        copies = max(1, min(64, -(-_CACHES // (2 * total * s.num_kv_heads * s.head_dim * size))))
        pages = self._pages(int8, copies, blocks)
        q = self._rand(rows, s.num_heads, s.head_dim)
        table = self._ints(torch.randperm(blocks - 1)[None] + 1)
        start, lens = self._ints(torch.tensor([0, rows])), self._ints(torch.tensor([total]))
        positions = self._ints(torch.arange(total - rows, total))
        scale = s.head_dim**-0.5
        # torch gets its keys already gathered and contiguous, which a paged cache would have to pay for.
        k, v = (self._rand(copies, 1, s.num_kv_heads, total, s.head_dim) for _ in range(2))
        qt = q.transpose(0, 1)[None]
        mask = positions[:, None] >= torch.arange(total, device=self.device)[None]
        attend = F.scaled_dot_product_attention
        causal = rows == total

        def plain(i: int) -> object:
            j = i % copies
            if causal:
                return attend(qt, k[j], v[j], is_causal=True, enable_gqa=True)
            return attend(qt, k[j], v[j], attn_mask=None if rows == 1 else mask, enable_gqa=True)

        pairs = rows * (total - rows) + rows * (rows + 1) // 2
        of_head = s.head_dim * size + (4 if int8 else 0)

        def ours(i: int) -> object:
            now = i % copies
            return self.backend.paged_attention(
                q, pages[0][now], pages[1][now], table, start, lens, positions, scale,
                k_page_scale=None if pages[2] is None else pages[2][now],
                v_page_scale=None if pages[3] is None else pages[3][now],
            )  # fmt: skip

        return Case(
            "paged_attention",
            f"{rows} rows x {total} keys, {s.num_heads}/{s.num_kv_heads} x {s.head_dim}" + _suffix(int8),
            4.0 * s.num_heads * s.head_dim * pairs, 2.0 * total * s.num_kv_heads * of_head, "read",
            ours, plain,
        )  # fmt: skip

    def splice(self, tokens: int, int8: bool = False) -> Case:
        """A record into shuffled pages of all layers; torch does a plain copy of the same bytes."""
        s = self.spec
        shape = (s.num_layers, tokens, s.num_kv_heads, s.head_dim)
        blocks = -(-(tokens + 5) // _PAGE) + 1
        at = torch.arange(5, tokens + 5)
        slots = ((torch.randperm(blocks - 1) + 1)[at // _PAGE] * _PAGE + at % _PAGE).to(self.device)
        table = ops.rope_table(s.rope.inv_freq(s.head_dim), tokens + 8).to(self.device)
        positions = self._ints(at)
        records = [[self._rand(*shape) for _ in range(2)] for _ in range(_RECORDS)]
        places = [self._pages(int8, s.num_layers, blocks) for _ in range(_RECORDS)]
        copies = [[torch.empty_like(part) for part in record] for record in records]

        def ours(i: int) -> None:
            (k, v), (k_pages, v_pages, k_scale, v_scale) = records[i % _RECORDS], places[i % _RECORDS]
            self.backend.splice_kv(
                k, v, k_pages, v_pages, slots, positions, table, k_page_scale=k_scale, v_page_scale=v_scale
            )

        def plain(i: int) -> None:
            j = i % _RECORDS
            for source, target in zip(records[j], copies[j], strict=True):
                target.copy_(source)

        read = float(sum(part.nbytes for part in records[0]))
        narrow = 2.0 * s.num_layers * tokens * s.num_kv_heads * (s.head_dim + 4)
        moved = read + (narrow if int8 else read)
        name = f"{s.num_layers} layers x {tokens} tokens x {s.num_kv_heads} x {s.head_dim}" + _suffix(int8)
        return Case("splice_kv", name, 0.0, moved, "copy", ours, plain)

    def append(self, rows: int) -> Case:
        s = self.spec
        k, v = (self._rand(rows, s.num_kv_heads, s.head_dim) for _ in range(2))
        k_pages, v_pages = (self._rand(68, _PAGE, s.num_kv_heads, s.head_dim) for _ in range(2))
        at = torch.arange(_PAGE, _PAGE + rows)
        slots, positions = at.to(self.device), self._ints(at)
        table = ops.rope_table(s.rope.inv_freq(s.head_dim), 2048).to(self.device)
        from memos_engine.ops import reference

        return Case(
            "append_kv", f"{rows} tokens x {s.num_kv_heads} x {s.head_dim}",
            0.0, 2.0 * (k.nbytes + v.nbytes), "copy",
            lambda i: self.backend.append_kv(k, v, k_pages, v_pages, slots, positions, table),
            lambda i: reference.append_kv(k, v, k_pages, v_pages, slots, positions, table),
        )  # fmt: skip

    def linear(self, name: str, rows: int, k: int, n: int) -> Case:
        copies = self._copies(k * n)
        weights, x = [self._rand(n, k) for _ in range(copies)], self._rand(rows, k)
        return Case(
            "linear", f"{name}: {rows} x {k} x {n}",
            2.0 * rows * k * n, float(k * n * self.kind.itemsize), "read",
            lambda i: self.backend.linear(x, weights[i % copies]),
            lambda i: F.linear(x, weights[i % copies]),
        )  # fmt: skip

    def rms_norm(self, rows: int) -> Case:
        hidden = self.spec.hidden_size
        x, residual, weight = self._rand(rows, hidden), self._rand(rows, hidden), self._rand(hidden)
        eps = self.spec.rms_eps
        return Case(
            "rms_norm", f"{rows} x {hidden}, with residual",
            0.0, 4.0 * x.nbytes, "copy",
            lambda i: self.backend.rms_norm(x, weight, eps, residual),
            lambda i: F.rms_norm(residual.add_(x), (hidden,), weight, eps),
        )  # fmt: skip

    def silu_mul(self, rows: int) -> Case:
        both = self._rand(rows, 2 * self.spec.intermediate_size)
        gate, up = both.chunk(2, dim=1)
        return Case(
            "silu_mul", f"{rows} x {self.spec.intermediate_size}",
            0.0, 1.5 * both.nbytes, "copy",
            lambda i: self.backend.silu_mul(gate, up),
            lambda i: F.silu(gate) * up,
        )  # fmt: skip

    def _pages(self, int8: bool, layers: int, blocks: int) -> _Pages:
        """K and V and, with int8, their scales; random values."""
        shape = (layers, blocks, _PAGE, self.spec.num_kv_heads, self.spec.head_dim)
        if not int8:
            return self._rand(*shape), self._rand(*shape), None, None
        k, v = (torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device) for _ in range(2))
        k_scale, v_scale = (torch.full(shape[:-1], 0.5 / 127, device=self.device) for _ in range(2))
        return k, v, k_scale, v_scale

    def _copies(self, elements: int) -> int:
        return max(1, min(64, -(-_CACHES // (elements * self.kind.itemsize))))

    def _rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).mul_(0.5).to(self.kind)

    def _ints(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.int32).contiguous().to(self.device)
