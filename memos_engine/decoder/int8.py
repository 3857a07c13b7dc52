"""Weights rounded to eight bits, for decoding on a CPU: half as many bytes to read for each token.

Each output has a scale of its own, its largest weight / 127 (symmetric, by row). The rounded weights stand
beside the whole ones, which prompts and KV records go on to use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memos_engine.decoder.weights import LayerWeights, Weights

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Int8Weight:
    """values `[out, in] int8`, scale `[out] float32`: the weight is about `values * scale[:, None]`."""

    values: Tensor
    scale: Tensor


class Int8Weights:
    """The projections of all layers and the output head."""

    def __init__(self, weights: Weights) -> None:
        self.layers = [_layer(layer) for layer in weights.layers]
        self.lm_head = rounded(weights.lm_head)


def rounded(weight: Tensor) -> Int8Weight:
    """The nearest eight bits of `weight [out, in]`."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return Int8Weight((wide / scale[:, None]).round_().to(torch.int8), scale)


def _layer(layer: LayerWeights) -> dict[str, Tensor]:
    """Fields of a `StackLayer`."""
    made = {name: rounded(getattr(layer, name)) for name in PROJECTIONS}
    values = {name: weight.values for name, weight in made.items()}
    return values | {f"{name}_scale": weight.scale for name, weight in made.items()}
