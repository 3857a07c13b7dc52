"""One call of an attached `generate()`: decides who runs it, and hands it over.

transformers itself prepares the call (settings, processors, criteria, padding, copies, errors), by the public
`generate(custom_generate=function)`; the function is `Call.decode`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList, StopStringCriteria

from memos_engine.api import MemoryEngine
from memos_engine.errors import AdapterError
from memos_engine.interfaces.attach_fallback import decode_around
from memos_engine.interfaces.attach_lockstep import Lockstep
from memos_engine.interfaces.attach_memory import Prompt, Wish
from memos_engine.interfaces.attach_work import Work, make_room
from memos_engine.parameter import AdapterUse, use_file

if TYPE_CHECKING:
    from memos_engine.interfaces.attach import Attached

# What only the model's own generate() can do, and where no memories can enter.
_ARGUMENTS = ("custom_generate", "inputs_embeds", "synced_gpus")
_SETTINGS = ("token_healing", "output_attentions", "output_hidden_states")
_NO_MEMORIES = "; no memories enter it"


class Elsewhere(Exception):
    """The call has to run in the model's own generate(); the text says why."""


class Call:
    """arguments: the caller's, by name. wish: whose memories, by what query, in what form."""

    def __init__(self, attached: Attached, arguments: dict[str, Any], wish: Wish) -> None:
        self.attached, self.arguments, self.wish = attached, arguments, wish
        self.model, self.memories = attached.model, attached.memories
        if self.memories is not None and (wish.form or self.memories.config.form) == "none":
            self.memories = None
        self.streamer = arguments.get("streamer")
        self.streamed = False  # whether the streamer has got the prompt
        self.reason: str | None = None

    def run(self) -> Any:
        try:
            self.reason = self._reason()
            if self.reason is not None and self.memories is None:
                raise Elsewhere(self.reason)
            return self.attached.original(**self._arguments(), custom_generate=self.decode)
        except Elsewhere as why:
            self._without_adapter(str(why))
            self.attached.say(str(why))
        arguments = dict(self.arguments)
        if self.streamed and self.streamer is not None:
            arguments["streamer"] = _WithoutPrompt(self.streamer)
        return self.attached.original(**arguments)

    def decode(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **inputs: Any,
    ) -> Any:  # fmt: skip
        """Runs a prepared call. Raises Elsewhere where only the model's own generate() can."""
        self.streamed = True
        work = Work.of(
            self.arguments.get("assistant_model"),
            input_ids, logits_processor, stopping_criteria, generation_config, inputs,
        )  # fmt: skip
        reason, engine, rows = self.reason or work.reason(), self.attached.engine, work.rows()
        if reason is None and engine is not None:
            reason = make_room(engine.decoder, [len(ids) for ids in rows] * work.copies, work.new)
        if reason is None and engine is not None:
            return self._here(engine, work, rows)
        if self.memories is None:
            raise Elsewhere(reason)
        self._without_adapter(str(reason))
        result = decode_around(
            self.attached, self.memories, self.wish, self.arguments, work, healthy=not self.reason
        )
        if result is None:
            raise Elsewhere(f"{reason}{_NO_MEMORIES}")
        self.attached.say(str(reason))
        return result

    # -- who runs it -----------------------------------------------------------------------------

    def setting(self, name: str) -> Any:
        """The call's setting: keyword argument, else generation_config, else the model's default."""
        if name in self.arguments:
            return self.arguments[name]
        config = self.arguments.get("generation_config")
        value = None if config is None else getattr(config, name, None)
        return getattr(self.model.generation_config, name, None) if value is None else value

    def _reason(self) -> str | None:
        """Why the call cannot run here, as far as its arguments tell. Raises Elsewhere where memories cannot
        enter either."""
        never = [name for name in _ARGUMENTS if self.arguments.get(name) is not None]
        never += [name for name in _SETTINGS if self.setting(name)]
        if "paged" in str(self.setting("cache_implementation")):
            never.append("continuous batching")
        if self.setting("stop_strings") is not None and self.arguments.get("tokenizer") is None:
            never.append("stop_strings without a tokenizer")
        past = self.arguments.get("past_key_values")
        if past is not None and (type(past) is not DynamicCache or past.get_seq_length()):
            never.append("past_key_values")
        elif past is not None:  # it is to hold the K and V of the caller's ids
            self.memories = None
        if never or self.model.config.is_encoder_decoder:
            why = f"it uses {', '.join(never)}" if never else "the model is an encoder-decoder"
            if self.memories is not None:
                self.memories.principals(self.wish, _batch(self.arguments))  # refuses as it does elsewhere
                why += _NO_MEMORIES
            raise Elsewhere(why)
        if self.arguments.get("assistant_model") is not None:
            return "it uses assistant_model"
        return self.attached.unfit()

    def _arguments(self) -> dict[str, Any]:
        """The caller's arguments, with stop strings made into a criterion: transformers hands no tokenizer on
        where a custom_generate function is given."""
        arguments = dict(self.arguments)
        strings = self.setting("stop_strings")
        if strings is None:
            return arguments
        criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or ())
        if not any(type(criterion) is StopStringCriteria for criterion in criteria):
            criteria.append(StopStringCriteria(arguments["tokenizer"], strings))
        arguments["stopping_criteria"] = criteria
        arguments.pop("stop_strings", None)
        config = arguments.get("generation_config")
        if config is not None:
            arguments["generation_config"] = copy.deepcopy(config)
            arguments["generation_config"].stop_strings = None
        if getattr(self.model.generation_config, "stop_strings", None) is not None:
            arguments["stop_strings"] = None
        return arguments

    # -- adapters --------------------------------------------------------------------------------

    def _without_adapter(self, why: str) -> None:
        if self.wish.adapter is not None:
            raise AdapterError(
                f"This call runs in the model's own generate(), where no adapter enters: {why}. Pass "
                "adapter=None, or change the call."
            )

    def _uses(self, engine: MemoryEngine, rows: int) -> list[AdapterUse]:
        """Each row's adapter; empty where the call wants none. Raises AdapterError, MemoryNotFoundError."""
        wanted = self.wish.adapter
        if wanted is None:
            return []
        if self.arguments.get("past_key_values") is not None:
            self._without_adapter("it fills past_key_values")
        if not isinstance(wanted, (str, AdapterUse)):
            return [use_file(wanted, engine.decoder)] * rows
        parameter, memories = engine.parameter, self.attached.memories
        if parameter is None or memories is None:
            raise AdapterError(f"There is no store to find adapter {wanted!r} in; give store=, or a Path.")
        return [parameter.use(who, wanted) for who in memories.principals(self.wish, rows)]

    # -- here ------------------------------------------------------------------------------------

    def _here(self, engine: MemoryEngine, work: Work, rows: list[tuple[int, ...]]) -> Any:
        uses = self._uses(engine, len(rows))
        if any(use.whole for use in uses) and self.memories is not None:
            self.wish = replace(self.wish, form="text")  # no stored KV was made under it
        prompts = [Prompt.plain(ids) for ids in rows]
        if self.memories is not None:
            prompts = self.memories.prompts(
                self.wish, rows, partial(self.memories.by_engine, engine=engine, new=work.new)
            )
            reason = make_room(engine.decoder, [p.size for p in prompts] * work.copies, work.new)
            if reason is not None:
                raise Elsewhere(f"{reason}{_NO_MEMORIES}")
        for prompt, use in zip(prompts, uses, strict=False):
            prompt.bind(use)
        cache = None
        if work.config.return_dict_in_generate or self.arguments.get("past_key_values") is not None:
            plain = all(prompt.is_plain and prompt.bound is None for prompt in prompts)
            cache = work.cache if plain else None  # memories stay unseen
        with Lockstep(engine.decoder, prompts, work.copies, work.new) as batch:
            result = batch.generate(work, self.streamer, cache)
        if self.memories is not None:
            self.memories.after(prompts, batch.sequences)
        return result


class _WithoutPrompt:
    """A streamer that has got the prompt already."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.first = streamer, True

    def put(self, value: Any) -> None:
        if not self.first:
            self.streamer.put(value)
        self.first = False

    def end(self) -> None:
        self.streamer.end()


def _batch(arguments: dict[str, Any]) -> int:
    """The number of prompts, as far as the arguments tell."""
    given = (arguments.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return next((int(tensor.shape[0]) for tensor in given if isinstance(tensor, Tensor)), 1)
