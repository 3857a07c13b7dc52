"""A call as transformers prepared it, and whether this decoder can run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation import GenerationMode

from memos_engine.decoder.engine import DecoderEngine

Ids = tuple[int, ...]

_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


@dataclass
class Work:
    """What `generate()` hands to a decoding loop.

    ids: `[batch * copies, length] int64`. mask: the same shape; 0: padding. copies: rows made of each prompt,
    for beams or `num_return_sequences`. processors, criteria, config: complete, and the call's own. inputs:
    what else the model's forward gets.
    """

    mode: GenerationMode
    ids: Tensor
    mask: Tensor
    processors: Any
    criteria: Any
    config: Any
    inputs: dict[str, Any]

    @classmethod
    def of(
        cls, assistant: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, inputs: dict[str, Any]
    ) -> Work:
        mask = inputs.get("attention_mask")  # None: no padding
        return cls(
            config.get_generation_mode(assistant),
            ids,
            torch.ones_like(ids) if mask is None else mask,
            processors,
            criteria,
            config,
            inputs,
        )

    @property
    def copies(self) -> int:
        return max(int(self.config.num_beams), int(self.config.num_return_sequences))

    @property
    def new(self) -> int:
        """Most new tokens of a row."""
        return int(self.config.max_length) - self.ids.shape[1]

    @property
    def cache(self) -> Any:
        return self.inputs.get("past_key_values")

    @property
    def well_padded(self) -> bool:
        """Whether every row ends in a token of its own."""
        return self.ids.shape[1] > 0 and bool((self.mask[:, -1] == 1).all())

    def others(self) -> list[str]:
        """Names of inputs that are no usual part of a text prompt."""
        return sorted(n for n, value in self.inputs.items() if n not in _INPUTS and value is not None)

    def rows(self) -> list[Ids]:
        """The prompts of the batch, each once, without padding."""
        ids, mask = self.ids[:: self.copies], self.mask[:: self.copies] != 0
        return [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]

    def reason(self) -> str | None:
        """Why only the model's own generate() can run it, or None."""
        if self.mode not in _MODES:
            return f"its generation mode is {self.mode.value}"
        if self.config.use_cache is False:
            return "it uses use_cache=False"
        if self.others():
            return f"it uses {', '.join(self.others())}"
        wanted = (DynamicCache,) if self.config.return_dict_in_generate else (DynamicCache, StaticCache)
        if type(self.cache) not in wanted:
            return f"it uses a {type(self.cache).__name__}"
        if self.ids.dtype not in (torch.int64, torch.int32):
            return f"its ids are {self.ids.dtype}"
        if not self.well_padded:
            return "a prompt is empty or padded on the right"
        if not bool(((self.mask == 0) | (self.mask == 1)).all()):
            return "its attention mask holds other values than 0 and 1"
        usual = (self.mask.long().cumsum(-1) - 1).masked_fill(self.mask == 0, 0)
        positions = self.inputs.get("position_ids")
        if positions is not None and (
            positions.shape[-1:] != usual.shape[-1:] or not bool((positions == usual).all())
        ):
            return "it gives position_ids of its own"
        return None


def make_room(decoder: DecoderEngine, sizes: list[int], new: int) -> str | None:
    """Makes the pool hold rows of these sizes and `new` further tokens each; why it cannot, or None."""
    longest = decoder.spec.max_positions
    if max(sizes) + new > longest:
        return f"prompt and answer need {max(sizes) + new} positions, the model's window is {longest}"
    page = decoder.pool.page
    tokens = sum(-(-(size + new) // page) + 1 for size in sizes) * page  # one page more: copy-on-write
    try:
        decoder.grow(tokens)
    except (RuntimeError, MemoryError, OSError, OverflowError, ValueError) as error:
        return f"there is no memory for the KV of {tokens} tokens ({error})"
    return None
