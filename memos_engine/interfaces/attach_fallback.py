"""Memories in calls that the model's own code decodes: in the prompt, but hidden from all who look at it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import GenerationMode

from memos_engine.decoder.engine import DecoderEngine
from memos_engine.interfaces.attach_lockstep import Lockstep
from memos_engine.interfaces.attach_memory import Memories, Prompt, Wish
from memos_engine.interfaces.attach_transformers import decoding_loop
from memos_engine.interfaces.attach_work import Work, make_room

if TYPE_CHECKING:
    from memos_engine.interfaces.attach import Attached

_BEAMS = {GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}


def decode_around(
    attached: Attached, memories: Memories, wish: Wish, arguments: dict[str, Any], work: Work, healthy: bool
) -> Any:
    """Runs a prepared call in the model's own loop, with memories; None where none can enter, or none does.

    healthy: the decoder here computes what the model does, so that stored KV may be used.
    """
    model, engine = attached.model, attached.engine
    loop = decoding_loop(model, work.mode)
    if loop is None or not work.well_padded or _tied_to_positions(work):
        memories.principals(wish, len(work.rows()))  # refuses what it would refuse otherwise
        return None
    rows = work.rows()
    sizes = [len(ids) for ids in rows]
    if (
        engine is not None
        and healthy
        and work.mode in _BEAMS
        and type(work.cache) is DynamicCache
        and make_room(engine.decoder, sizes, work.new) is None
    ):
        prompts = memories.prompts(wish, rows, partial(memories.by_engine, engine=engine, new=work.new))
        source: DecoderEngine | None = engine.decoder
    else:
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        prompts = memories.prompts(
            wish, rows, partial(memories.as_text, room=(longest or 1 << 30) - max(sizes) - work.new)
        )
        source = None
    if all(prompt.is_plain for prompt in prompts):
        return None
    long = LongPrompts(work, prompts)
    cache = None if source is None else long.cache(source, model)
    if cache is None and work.cache is not None:
        config = model.config.get_text_config(decoder=True)
        small = isinstance(work.cache, StaticCache)  # made for the caller's prompt
        cache = DynamicCache(config=config) if small else work.cache
    result = loop(model, **long.arguments(loop, arguments, cache))
    memories.after(prompts)
    if isinstance(result, Tensor):
        return long.visible(result)
    fields = {name: value for name, value in result.items() if name != "past_key_values"}
    return type(result)(**(fields | {"sequences": long.visible(result.sequences)}))


class LongPrompts:
    """The longer prompts, with memories, that run in place of the caller's.

    ids, mask: `[batch, width]`, padded on the left. `width` is at least the caller's length: a row's new
    tokens stand behind column `width`.
    """

    def __init__(self, work: Work, prompts: Sequence[Prompt]) -> None:
        self.work, self.prompts = work, prompts
        self.own = work.ids[:: work.copies]
        self.width = max(self.own.shape[1], *(prompt.size for prompt in prompts))
        self.ids = self.own.new_full((len(prompts), self.width), work.config.pad_token_id or 0)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(prompts):
            start = self.width - prompt.size
            self.ids[row, start:] = torch.tensor(prompt.token_ids, device=self.ids.device)
            self.mask[row, start:] = 1

    def visible(self, ids: Tensor) -> Tensor:
        """What the caller may see of `[batch * n, width + new]`: the prompt as it was, and the new tokens."""
        own = self.own.repeat_interleave(ids.shape[0] // self.own.shape[0], dim=0)
        return torch.cat([own, ids[:, self.width :]], dim=1)

    def cache(self, engine: DecoderEngine, model: Any) -> Any | None:
        """K and V of all columns but the last, whose logits the model has to make: spliced and computed here.
        None where there is no room."""
        if make_room(engine, [prompt.size for prompt in self.prompts], 1) is not None:
            return None
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with Lockstep(engine, self.prompts, copies=1, new=1) as batch:
            return cache if batch.fill(cache, self.mask[:, :-1] != 0, self.work.copies) else None

    def arguments(self, loop: Any, given: dict[str, Any], cache: Any) -> dict[str, Any]:
        """Those of a decoding loop of transformers. given: the caller's, of which the loop may know some."""
        work, copies = self.work, self.work.copies
        out = dict(work.inputs)
        known = signature(loop).parameters
        for name in ("streamer", "tokenizer", "assistant_model", "assistant_tokenizer"):
            if name in known and given.get(name) is not None:
                out[name] = given[name]
        if "inputs_tensor" in known:
            out["inputs_tensor"] = self.ids
        out["attention_mask"] = self.mask.repeat_interleave(copies, dim=0)
        if out.get("position_ids") is not None:
            positions = (self.mask.cumsum(-1) - 1).masked_fill(self.mask == 0, 0)
            out["position_ids"] = positions.repeat_interleave(copies, dim=0)
        if "past_key_values" in out:
            out["past_key_values"] = cache
        work.config.max_length += self.width - self.own.shape[1]  # the call's own copy
        return out | {
            "input_ids": self.ids.repeat_interleave(copies, dim=0),
            "logits_processor": LogitsProcessorList([_Hiding(work.processors, self)]),
            "stopping_criteria": StoppingCriteriaList([_Hiding(work.criteria, self)]),
            "generation_config": work.config,
        }


class _Hiding:
    """Processors or criteria, to whom memory ids are not shown."""

    def __init__(self, inner: Any, prompts: LongPrompts) -> None:
        self.inner, self.prompts = inner, prompts
        for each in inner:
            if hasattr(each, "eos_token_id"):
                self.eos_token_id = each.eos_token_id  # by this, loops know that finished rows are padded

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self.inner(self.prompts.visible(input_ids), scores)


def _tied_to_positions(work: Work) -> bool:
    """Whether the model gets further tensors (token types, images), which would not fit a longer prompt."""
    return any(isinstance(work.inputs[name], Tensor) for name in work.others())
