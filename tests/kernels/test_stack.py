"""The native layer stack against the same layers op by op: same model, same pages, same rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memos_engine.decoder.int8 import PROJECTIONS, rounded
from memos_engine.errors import KernelContractError
from memos_engine.ops import reference, rope_table
from memos_engine.ops.int8_kv import quantize_heads
from memos_engine.ops.stack import StackLayer

cpu_stack = pytest.importorskip("memos_engine.ops.cpu_stack", reason="native code was not built")
BLOCKS, PAGE = 40, 16


def make_layers(count, hidden, heads, kv_heads, dim, inner, dtype, seed=0, norm_dtype=None, **features):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=None):
        scale = scale or shape[-1] ** -0.5
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    def norm(n):
        return (1 + 0.1 * torch.randn(n, generator=g)).to(norm_dtype or dtype)

    rotary = features.get("rotary", dim)
    table = rope_table(1.0 / 10000 ** (torch.arange(0, rotary, 2) / rotary), 600)
    layers = []
    for i in range(count):
        layer = {
            "input_norm": norm(hidden), "post_norm": norm(hidden),
            "q": rand(heads * dim, hidden), "k": rand(kv_heads * dim, hidden),
            "v": rand(kv_heads * dim, hidden), "o": rand(hidden, heads * dim),
            "gate": rand(inner, hidden), "up": rand(inner, hidden), "down": rand(hidden, inner),
            "cos_sin": None if features.get("no_rope") and i % 2 else table,
            "window": features.get("window", 0) if i % 2 == 0 else 0,
        }  # fmt: skip
        if features.get("bias"):
            layer |= {"q_bias": rand(heads * dim, scale=0.5), "k_bias": rand(kv_heads * dim, scale=0.5)}
            layer["v_bias"] = rand(kv_heads * dim, scale=0.5)
        if features.get("qk_norm"):
            layer |= {"q_norm": norm(dim), "k_norm": norm(dim)}
        layers.append(StackLayer(**layer))
    return layers, norm(hidden)


def by_ops(layers, final_norm, eps, scale, k_pages, v_pages, hidden, step, rows, wide=False, scales=None):
    """The layers op by op on the reference; `wide` keeps everything in float64. scales: of int8 pages, which
    are written in place."""
    up = (lambda t: t.double()) if wide else (lambda t: t)
    hidden, k_pages, v_pages = up(hidden.clone()), up(k_pages.clone()), up(v_pages.clone())
    slots, positions, query_start, table, lens = step
    n, dim = hidden.shape[0], k_pages.shape[-1]

    def project(x, w, b=None):
        y = x @ up(w).T
        return y if b is None else y + up(b)

    def head_norm(x, w):
        return x if w is None else reference.rms_norm(x.reshape(-1, dim), up(w), eps).view(x.shape)

    for i, w in enumerate(layers):
        x = reference.rms_norm(hidden, up(w.input_norm), eps)
        q, k, v = (
            project(x, a, b).view(n, -1, dim) for a, b in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
        )
        q, k = head_norm(q, w.q_norm).clone(), head_norm(k, w.k_norm)
        if w.cos_sin is not None:
            reference.rope(q, positions, w.cos_sin)
        of_layer = {name: part[i] for name, part in (scales or {}).items()}
        reference.append_kv(k, v, k_pages[i], v_pages[i], slots, positions, w.cos_sin, **of_layer)
        out = reference.paged_attention(
            q, k_pages[i], v_pages[i], table, query_start, lens, positions, scale, w.window, **of_layer
        )
        hidden = hidden + project(out.reshape(n, -1), w.o)
        x = reference.rms_norm(hidden, up(w.post_norm), eps)
        hidden = hidden + project(reference.silu_mul(project(x, w.gate), project(x, w.up)), w.down)
    hidden = hidden if rows is None else hidden[rows]
    return reference.rms_norm(hidden, up(final_norm), eps), k_pages, v_pages


def make_step(lengths, seed=0):
    """Requests of (context, new rows): pages in random order, their contexts filled, the rest NaN."""
    g = torch.Generator().manual_seed(seed)
    free = (torch.randperm(BLOCKS - 1, generator=g) + 1).tolist()
    widest = max(-(-(c + n) // PAGE) for c, n in lengths)
    table = torch.zeros(len(lengths), widest, dtype=torch.int32)
    positions, slots, starts, used = [], [], [0], []
    for b, (context, new) in enumerate(lengths):
        blocks = [free.pop() for _ in range(-(-(context + new) // PAGE))]
        table[b, : len(blocks)] = torch.tensor(blocks)
        at = range(context, context + new)
        positions += at
        slots += [blocks[p // PAGE] * PAGE + p % PAGE for p in at]
        used += [blocks[p // PAGE] * PAGE + p % PAGE for p in range(context)]
        starts.append(starts[-1] + new)
    step = (
        torch.tensor(slots, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        table,
        torch.tensor([c + n for c, n in lengths], dtype=torch.int32),
    )
    return step, torch.tensor(used, dtype=torch.int64)


def make_pages(layers, kv_heads, dim, dtype, used, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(2):
        pages = torch.full((layers, BLOCKS * PAGE, kv_heads, dim), float("nan"), dtype=dtype)
        pages[:, used] = torch.randn(layers, len(used), kv_heads, dim, generator=g).to(dtype)
        out.append(pages.view(layers, BLOCKS, PAGE, kv_heads, dim))
    return out


SHAPES = {
    "smollm2": {"hidden": 96, "heads": 9, "kv_heads": 3, "dim": 64, "inner": 160},
    "odd": {"hidden": 50, "heads": 4, "kv_heads": 1, "dim": 20, "inner": 75},
    "mha": {"hidden": 64, "heads": 2, "kv_heads": 2, "dim": 32, "inner": 96},
    "bias": {"hidden": 64, "heads": 4, "kv_heads": 2, "dim": 16, "inner": 96, "bias": True},
    "qk_norm": {"hidden": 64, "heads": 4, "kv_heads": 2, "dim": 32, "inner": 96, "qk_norm": True},
    "window": {"hidden": 64, "heads": 4, "kv_heads": 2, "dim": 16, "inner": 96, "window": 20},
    "no_rope": {"hidden": 64, "heads": 4, "kv_heads": 2, "dim": 16, "inner": 96, "no_rope": True},
    "partial": {"hidden": 64, "heads": 4, "kv_heads": 2, "dim": 32, "inner": 96, "rotary": 8},
}
BATCHES = [
    [(0, 1)],
    [(70, 1)],
    [(0, 8)],
    [(15, 1), (16, 1), (300, 1)],
    [(100, 1), (0, 21), (33, 5)],
    [(60, 64)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stack_equals_its_ops(shape, dtype):
    fields = dict(SHAPES[shape])
    layers, final = make_layers(3, dtype=dtype, **fields)
    kv_heads, dim, eps, scale = fields["kv_heads"], fields["dim"], 1e-5, fields["dim"] ** -0.5
    for number, lengths in enumerate(BATCHES):
        step, used = make_step(lengths, seed=number)
        k_pages, v_pages = make_pages(3, kv_heads, dim, dtype, used)
        stack = cpu_stack.layer_stack(layers, final, eps, scale, k_pages, v_pages)
        if stack is None:
            pytest.skip("this level leaves such shapes to the single ops")
        n = len(step[0])
        hidden = torch.randn(n, fields["hidden"], generator=torch.Generator().manual_seed(number)).to(dtype)
        rows = None if number % 2 else torch.arange(n - 1, -1, -2)
        truth, k_true, v_true = by_ops(
            layers, final, eps, scale, k_pages, v_pages, hidden, step, rows, wide=True
        )
        plain, k_plain, v_plain = by_ops(layers, final, eps, scale, k_pages, v_pages, hidden, step, rows)
        slots, positions, query_start, table, lens = step
        ours = stack.run(hidden.clone(), slots, positions, query_start, table, lens, rows)
        floor = 1e-4 if dtype == torch.float32 else 2e-2

        def error(found, truth=None):
            return float((found.double() - truth).abs().max())

        assert error(ours, truth) <= 2 * error(plain, truth) + floor, (shape, lengths)
        for found, plainly, exact in ((k_pages, k_plain, k_true), (v_pages, v_plain, v_true)):
            at = [t.flatten(1, 2)[:, slots] for t in (found, plainly, exact)]
            assert error(at[0], at[2]) <= 2 * error(at[1], at[2]) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["smollm2", "odd", "window"])
def test_pages_of_int8(shape, dtype):
    """New keys may be a step of rounding off, as the products before them differ in their last bits."""
    fields = SHAPES[shape]
    layers, final = make_layers(2, dtype=dtype, **fields)
    kv_heads, dim, scale = fields["kv_heads"], fields["dim"], fields["dim"] ** -0.5
    step, used = make_step([(100, 1), (0, 3), (33, 2)])
    sides = [quantize_heads(p) for p in make_pages(2, kv_heads, dim, torch.float32, used)]
    pages, scales = [side[0] for side in sides], [side[1] for side in sides]
    for part in scales:
        part[part == 0] = float("nan")
    stack = cpu_stack.layer_stack(layers, final, 1e-5, scale, *pages, *scales, dtype)
    if stack is None:
        pytest.skip("this level leaves such shapes to the single ops")
    slots, positions, query_start, table, lens = step
    hidden = torch.randn(6, fields["hidden"], generator=torch.Generator().manual_seed(0)).to(dtype)
    names = dict(zip(("k_page_scale", "v_page_scale"), [part.clone() for part in scales], strict=True))
    wanted, k, v = by_ops(layers, final, 1e-5, scale, *pages, hidden, step, None, scales=names)
    ours = stack.run(hidden.clone(), slots, positions, query_start, table, lens)
    off = 0.02 if dtype == torch.float32 else 0.1
    assert (ours.float() - wanted.float()).norm() < off * wanted.float().norm()
    found, expected = (
        torch.stack([x.flatten(1, 2)[:, slots].float() * s.flatten(1, 2)[:, slots, :, None] for x, s in both])
        for both in (zip(pages, scales, strict=True), zip((k, v), names.values(), strict=True))
    )
    assert (found - expected).norm() < off * expected.norm()
    assert found.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_equal_their_products_with_the_scales(shape):
    fields = dict(SHAPES[shape])
    whole, final = make_layers(2, dtype=torch.float32, **fields)
    made = [{name: rounded(getattr(layer, name)) for name in PROJECTIONS} for layer in whole]
    narrow, wide = (
        [
            replace(layer, **{name: part(weight) for name, weight in m.items()}, **more(m))
            for layer, m in zip(whole, made, strict=True)
        ]
        for part, more in (
            (lambda w: w.values, lambda m: {f"{name}_scale": w.scale for name, w in m.items()}),
            (lambda w: w.values.double() * w.scale.double()[:, None], lambda m: {}),
        )
    )
    kv_heads, dim, scale = fields["kv_heads"], fields["dim"], fields["dim"] ** -0.5
    for number, lengths in enumerate([[(0, 1)], [(300, 1)], [(15, 1), (16, 1), (40, 3)], [(5, 8)]]):
        step, used = make_step(lengths, seed=number)
        pages = make_pages(2, kv_heads, dim, torch.float32, used)
        stack = cpu_stack.layer_stack(narrow, final, 1e-5, scale, *pages)
        assert stack.max_rows == 8
        hidden = torch.randn(len(step[0]), fields["hidden"], generator=torch.Generator().manual_seed(number))
        truth, *_ = by_ops(wide, final, 1e-5, scale, *pages, hidden, step, None, wide=True)
        ours = stack.run(hidden.clone(), *step[:2], step[2], step[3], step[4])
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_a_batch_of_one_row_requests_gives_each_its_own_bits():
    fields = SHAPES["smollm2"]
    layers, final = make_layers(2, dtype=torch.float32, **fields)
    step, used = make_step([(50, 1), (300, 1), (3, 1)])
    hidden = torch.randn(3, fields["hidden"])
    k_pages, v_pages = make_pages(2, 3, 64, torch.float32, used)
    stack = cpu_stack.layer_stack(layers, final, 1e-5, 0.125, k_pages, v_pages)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(stack.run(hidden.clone(), *step[:2], step[2], step[3], step[4]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("fault", ["slot", "position", "block", "query_start"])
def test_indices_out_of_range_write_nothing(fault):
    fields = SHAPES["mha"]
    layers, final = make_layers(2, dtype=torch.float32, **fields)
    step, used = make_step([(20, 2)])
    k_pages, v_pages = make_pages(2, 2, 32, torch.float32, used)
    stack = cpu_stack.layer_stack(layers, final, 1e-5, 0.2, k_pages, v_pages)
    slots, positions, query_start, table, lens = (t.clone() for t in step)
    if fault == "slot":
        slots[1] = BLOCKS * PAGE
    elif fault == "position":
        positions[0] = 600
    elif fault == "block":
        table[0, 0] = BLOCKS
    else:
        query_start[1] = 9
    before = k_pages.clone().view(torch.int32)
    with pytest.raises(KernelContractError):
        stack.run(torch.randn(2, 64), slots, positions, query_start, table, lens)
    assert torch.equal(k_pages.view(torch.int32), before)


def test_what_it_does_not_take_is_left_to_the_ops():
    layers, final = make_layers(1, dtype=torch.float64, **SHAPES["mha"])
    pages = torch.zeros(1, BLOCKS, PAGE, 2, 32, dtype=torch.float64)
    assert cpu_stack.layer_stack(layers, final, 1e-5, 0.2, pages, pages) is None
    layers, final = make_layers(1, dtype=torch.bfloat16, **SHAPES["mha"])
    assert cpu_stack.layer_stack(layers, final, 1e-5, 0.2, pages.float(), pages.float()) is None
