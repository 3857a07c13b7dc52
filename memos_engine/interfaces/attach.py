"""The Hugging Face drop-in: the same model object, whose `generate()` runs here and may use memories.

What the decoder does not run yet goes to the model's own `generate()` with one logged reason.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memos_engine.api import MemoryEngine
from memos_engine.config import DecoderConfig, MemoryConfig, SamplingParams
from memos_engine.decoder.sequence import TextSpan
from memos_engine.errors import ContextLengthError, MemoryInputError, ModelError
from memos_engine.memory.governance import Principal

log = logging.getLogger("memos_engine")

_HANDLED = {
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id",
    "pad_token_id", "bos_token_id", "use_cache", "transformers_version", "_from_model_config",
}  # fmt: skip
# What transformers takes where a setting is left open (its documented defaults).
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beam_groups": 1, "diversity_penalty": 0.0, "min_length": 0,
    "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "assistant_lookbehind": 10,
    "target_lookbehind": 10, "assistant_confidence_threshold": 0.4, "early_stopping": False,
}  # fmt: skip


def attach(
    model: Any,
    tokenizer: Any,
    store: str | Path | None = None,
    user: str | None = None,
    *,
    decoder: DecoderConfig | None = None,
    memory: MemoryConfig | None = None,
) -> Any:
    """Lets `model.generate()` run in this decoder, with the memories of `user` from `store`.

    Parameters are shared, nothing is copied. Extra arguments of the new `generate()`: user, memory_query
    (text to search memories by; default: the prompt's own text), memory_form (auto, kv, text, none). Returned
    ids never hold memory ids. Returns the same model; `detach` undoes it.

    Raises MemoryInputError when a store comes without a user and `generate()` names none.
    """
    detach(model)
    engine: MemoryEngine | None = None
    try:
        reason = _unfit(model)
        if reason is None:
            settings = decoder or DecoderConfig(dtype=str(model.dtype).removeprefix("torch."))
            engine = MemoryEngine.from_model(model, tokenizer, store, decoder=settings, memory=memory)
    except ModelError as error:
        reason = str(error)
    model._memos_engine = _Attached(model, engine, user, reason)
    model.generate = model._memos_engine.generate
    return model


def detach(model: Any) -> Any:
    """Gives the model its own `generate()` back and closes the store."""
    attached = model.__dict__.pop("_memos_engine", None)
    if attached is not None:
        model.__dict__.pop("generate", None)
        if attached.engine is not None:
            attached.engine.close()
    return model


def _unfit(model: Any) -> str | None:
    if str(model.dtype) not in ("torch.float32", "torch.bfloat16"):
        return f"the model's dtype is {model.dtype}; float32 and bfloat16 run here"
    if model.training:
        return "the model is in training mode; call model.eval()"
    return None


class _Attached:
    """The state behind an attached model."""

    def __init__(self, model: Any, engine: MemoryEngine | None, user: str | None, reason: str | None) -> None:
        self.model, self.engine, self.user = model, engine, user
        self.original = model.generate
        self.reason = reason

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *positional: Any, **kwargs: Any
    ) -> Any:
        user = kwargs.pop("user", self.user)
        query = kwargs.pop("memory_query", None)
        form = kwargs.pop("memory_form", None)
        given = dict(kwargs)
        twice = inputs is not None and kwargs.get("input_ids") is not None
        ids = kwargs.pop("input_ids", inputs)
        mask = kwargs.pop("attention_mask", None)
        config = self._settings(generation_config, kwargs)
        reason = self.reason or self._cannot(ids, mask, config, kwargs)
        if any(value is not None for value in positional) or twice:
            reason = "it has further positional arguments, or both inputs and input_ids"
        if reason is not None or self.engine is None:
            log.warning("memos_engine: this call runs in the model's own generate(): %s.", reason)
            return self.original(inputs, generation_config, *positional, **given)
        if self.engine.store is not None and user is None:
            raise MemoryInputError("The model is attached to a store: name a user, generate(..., user=...).")
        assert isinstance(ids, Tensor)
        prompt = [int(t) for t in ids[0].tolist()]
        new = self._decode(self.engine, prompt, config, user, query, form)
        return torch.cat([ids.long(), torch.tensor([new], device=ids.device)], dim=1)

    # -- one call --------------------------------------------------------------------------------

    def _decode(
        self,
        engine: MemoryEngine,
        prompt: list[int],
        config: dict[str, Any],
        user: str | None,
        query: Any,
        form: Any,
    ) -> list[int]:
        params = _sampling(config, len(prompt))
        if engine.store is None or user is None:
            engine.refresh()
            outputs = engine.decoder.generate([TextSpan(tuple(prompt))], params)
            return [out.token for out in outputs]
        cut = _memory_place(prompt, engine)
        head = tuple(prompt[:cut]) if cut else engine.layout.anchor
        tail = tuple(prompt[cut:])
        text = query or engine.tokenizer.decode(tail, skip_special_tokens=True)
        try:
            prepared = engine.prepare(
                Principal("default", user), text, head, tail, form=form, answer=params.max_new_tokens
            )
        except (MemoryInputError, ContextLengthError) as error:
            if query is not None:
                raise
            log.warning("memos_engine: no memory enters this prompt: %s", error)
            return [out.token for out in engine.decoder.generate([TextSpan(tuple(prompt))], params)]
        if not prepared.plan.segments:  # no memory entered: the prompt is the caller's own, to the token
            prepared.spans[:] = [TextSpan(tuple(prompt))]
        new: list[int] = []
        engine.run(prepared, params, lambda out: new.append(out.token))
        engine.after_reply(prepared)
        return new

    def _settings(self, generation_config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's settings: the model's, then generation_config, then keyword arguments."""
        base = generation_config or self.model.generation_config
        own = self.model.generation_config.to_dict()
        settings = {**own, **{k: v for k, v in base.to_dict().items() if v is not None}}
        for name in list(kwargs):
            if name in settings or name in _HANDLED or name in _NEUTRAL:
                value = kwargs.pop(name)
                settings[name] = 0 if name == "top_k" and value is None else value  # None: no top-k at all
        return settings

    def _cannot(self, ids: Any, mask: Any, config: dict[str, Any], rest: dict[str, Any]) -> str | None:
        """Why the decoder here cannot run this call, or None."""
        if self.model.training:
            return "the model is in training mode; call model.eval()"
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return "no input_ids were given"
        if ids.shape[0] != 1:
            return f"a batch of {ids.shape[0]} prompts"
        if ids.shape[1] == 0:
            return "an empty prompt"
        if mask is not None and not bool((mask == 1).all()):
            return "an attention mask with padding"
        pad, eos = config.get("pad_token_id"), _stops(config)
        if mask is None and pad is not None and pad not in eos and bool((ids == pad).any()):
            return "pad tokens in the prompt, for which transformers makes an attention mask"
        odd = [name for name, value in rest.items() if value is not None]
        odd += [
            name
            for name, value in config.items()
            if name not in _HANDLED
            and value is not None
            and value is not False
            and value != _NEUTRAL.get(name)
        ]
        if odd:
            return f"it uses {', '.join(sorted(odd))}"
        longest = config.get("max_length")
        if config.get("max_new_tokens") is None and longest is not None and longest <= ids.shape[1]:
            return f"max_length={longest} leaves no room behind {ids.shape[1]} prompt tokens"
        if config.get("do_sample") and not (
            _given(config, "temperature", 1.0) > 0 and 0 < _given(config, "top_p", 1.0) <= 1
        ):
            return "temperature or top_p out of range"
        assert self.engine is not None
        room = min(self.engine.decoder.spec.max_positions, self.engine.decoder.pool_tokens)
        need = ids.shape[1] + _limit(config, ids.shape[1])
        if need > room:
            return f"prompt and answer need {need} tokens, the KV pool here holds {room} (pool_tokens)"
        if config.get("use_cache") is False:
            return "use_cache=False"
        return None


def _given(config: dict[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def _limit(config: dict[str, Any], prompt_len: int) -> int:
    """New tokens the call may make."""
    limit = config.get("max_new_tokens")
    if limit is None:
        limit = max(1, int(_given(config, "max_length", 20 + prompt_len)) - prompt_len)
    return int(limit)


def _sampling(config: dict[str, Any], prompt_len: int) -> SamplingParams:
    limit, stops = _limit(config, prompt_len), _stops(config)
    if not _given(config, "do_sample", False):
        return SamplingParams(max_new_tokens=limit, stop_token_ids=stops)
    return SamplingParams(
        max_new_tokens=limit,
        temperature=float(_given(config, "temperature", 1.0)),
        top_k=int(_given(config, "top_k", 50)),
        top_p=float(_given(config, "top_p", 1.0)),
        stop_token_ids=stops,
    )


def _stops(config: dict[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    eos = eos.tolist() if isinstance(eos, Tensor) else eos
    return () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)


def _memory_place(prompt: list[int], engine: MemoryEngine) -> int:
    """Where memories go: behind the anchor or, with another system prompt, behind the first turn.

    0: in front of the prompt, with an anchor of their own.
    """
    anchor = list(engine.layout.anchor)
    if anchor and prompt[: len(anchor)] == anchor and len(prompt) > len(anchor):
        return len(anchor)
    opening, closing = list(engine.layout.turn_open), list(engine.layout.turn_close)
    size = len(opening)
    starts_with_user = opening in (prompt[:size], prompt[1 : 1 + size])  # without or with BOS
    if opening and closing and not starts_with_user:
        for start in range(1, len(prompt) - len(closing)):
            if prompt[start : start + len(closing)] == closing:
                cut = start + len(closing)
                return cut if prompt[cut : cut + size] == opening else 0
    return 0
