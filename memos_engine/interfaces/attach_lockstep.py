"""A batch in lockstep, as transformers runs it: all rows' scores together, one draw for the batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from memos_engine.config import SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.sequence import Sequence
from memos_engine.errors import ModelError
from memos_engine.interfaces.attach_memory import Prompt
from memos_engine.interfaces.attach_work import Work


class Lockstep:
    """One call of `generate()` over the engine's pages.

    prompts: one for each prompt of the caller's batch. copies: rows made of each (`num_return_sequences`).
    new: most new tokens of a row. Use as a context manager: pages come back however it ends.
    """

    def __init__(self, engine: DecoderEngine, prompts: Seq[Prompt], copies: int, new: int) -> None:
        self.engine, self.prompts, self.copies = engine, prompts, copies
        self.params = SamplingParams(max_new_tokens=new)
        self.rows: list[list[Sequence]] = [[] for _ in prompts]

    def __enter__(self) -> Lockstep:
        """Queues all rows and computes the prompts; copies of a prompt share the pages of its first row."""
        try:
            for copy in range(self.copies if self.copies == 1 else 2):
                for prompt, row in zip(self.prompts, self.rows, strict=True):
                    for _ in range(1 if copy == 0 else self.copies - 1):
                        row.append(self._add(prompt))
                self.wait(self.sequences)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for seq in self.sequences:
            self.engine.abort(seq)

    @property
    def sequences(self) -> list[Sequence]:
        return list(chain.from_iterable(self.rows))

    def wait(self, rows: Seq[Sequence]) -> None:
        """Steps until every row has logits. Raises what ended one of them."""
        while waiting := [seq for seq in rows if seq.logits is None]:
            for seq in waiting:
                if seq.finish_reason is not None:
                    raise seq.error or ModelError("A row of this batch was ended by somebody else.")
            self.engine.step()

    def generate(self, work: Work, streamer: Any = None, cache: Any = None) -> Any:
        """Decodes all rows to their ends.

        cache: an empty transformers cache to fill with the rows' K and V. Returns ids
        `[rows, length + new] int64`, or a GenerateDecoderOnlyOutput.
        """
        ids, config, criteria = work.ids, work.config, work.criteria
        seqs = self.sequences
        has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        full = config.return_dict_in_generate
        # Rows that are done run on only where somebody sees what they compute.
        run_on = not has_eos or full or cache is not None
        scores: tuple[Tensor, ...] | None = () if full and config.output_scores else None
        logits: tuple[Tensor, ...] | None = () if full and config.output_logits else None
        open_rows = torch.ones(len(seqs), dtype=torch.long, device=ids.device)
        latest: list[Tensor] = [torch.empty(0)] * len(seqs)
        live = list(range(len(seqs)))
        while True:
            self.wait([seqs[i] for i in live])
            for i in live:
                latest[i] = seqs[i].logits  # type: ignore[assignment]  # wait() saw to it
            raw = torch.stack(latest).to(ids.device)
            chosen_from = work.processors(ids, raw)
            if scores is not None:
                scores += (chosen_from,)
            if logits is not None:
                logits += (raw,)
            tokens = _choose(chosen_from, config.do_sample)
            if has_eos:
                tokens = tokens * open_rows + _pad(config) * (1 - open_rows)
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            open_rows = open_rows & ~criteria(ids, scores)
            if streamer is not None:
                streamer.put(tokens.cpu())
            going = open_rows.tolist()
            if not any(going):
                break
            if not run_on:
                for i in [i for i in live if not going[i]]:
                    self.engine.finish(seqs[i])
                live = [i for i in live if going[i]]
            chosen = tokens.tolist()
            for i in live:
                self.engine.feed(seqs[i], chosen[i])
        if streamer is not None:
            streamer.end()
        filled = cache is not None and self.fill(cache, _columns(work.mask, ids))
        for i in live:
            self.engine.finish(seqs[i])
        if not full:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids, scores=scores, logits=logits, past_key_values=cache if filled else None
        )

    def fill(self, cache: Any, mask: Tensor, copies: int = 1) -> bool:
        """Copies the rows' K and V into an empty transformers cache, each row `copies` times; False where
        another request took pages away.

        mask: `[rows, length] bool`: the columns that hold a row's first tokens; the others stay zero.
        """
        seqs, pages = self.sequences, self.engine.runner.cache
        if not all(seq.blocks for seq in seqs):
            return False
        layers, _, _, heads, width = pages.k.shape
        dtype = self.engine.runner.model.weights.dtype
        columns = [row.nonzero()[:, 0] for row in mask.to(pages.k.device)]
        blocks = [torch.tensor(seq.blocks, device=pages.k.device) for seq in seqs]
        for layer in range(layers):
            shape = (*mask.shape, heads, width)
            both = [torch.zeros(shape, dtype=dtype, device=pages.k.device) for _ in range(2)]
            for row, (where, places) in enumerate(zip(blocks, columns, strict=True)):
                for out, source in zip(both, pages.layer(layer).read(where, dtype), strict=True):
                    out[row, places] = source.view(-1, heads, width)[: len(places)]
            cache.update(*(out.transpose(1, 2).repeat_interleave(copies, dim=0) for out in both), layer)
        return True

    def _add(self, prompt: Prompt) -> Sequence:
        return self.engine.add_request(
            prompt.spans,
            self.params,
            prompt.root,
            sampled=False,
            recompute=prompt.recompute,
            start_by=prompt.start_by,
            adapter=prompt.bound,
        )


def _choose(scores: Tensor, sample: bool) -> Tensor:
    if not sample:
        return torch.argmax(scores, dim=-1)
    return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)


def _columns(mask: Tensor, ids: Tensor) -> Tensor:
    """The columns whose K and V were computed: all but padding and the last token."""
    columns = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool, device=ids.device)
    columns[:, : mask.shape[1]] = mask != 0
    return columns


def _pad(config: Any) -> int:
    """What rows that are done are filled with: the pad token, else the first end token."""
    pad, eos = config.pad_token_id, config.eos_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, (list, tuple)) or (isinstance(eos, Tensor) and eos.dim()) else eos
    return int(pad)
