"""What logits become: a request's next token or its end, or its caller's to choose; and who is told."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from torch import Tensor

from memos_engine.decoder.batcher import Batcher
from memos_engine.decoder.sampler import Sampler, sample
from memos_engine.decoder.sequence import NO_TOKEN, Sequence, StepOutput


class Decider:
    """The end of each step. abort: ends a request now and returns its pages."""

    def __init__(self, batcher: Batcher, abort: Callable[[Sequence], None]) -> None:
        self.batcher, self._abort = batcher, abort
        self._samplers: dict[int, Sampler] = {}

    @property
    def longest(self) -> int:
        """Most tokens of a request: what the window and the pool hold."""
        pool = self.batcher.pool
        return min(self.batcher.max_positions, (pool.num_blocks - 1) * pool.page)

    def add(self, seq: Sequence, sampler: Sampler) -> None:
        self._samplers[seq.id] = sampler

    def forget(self, seq: Sequence) -> None:
        """The request chooses no more tokens. Safe to repeat."""
        self._samplers.pop(seq.id, None)

    def finish(self, seq: Sequence, reason: str) -> None:
        """Ends a request as a success: its exact pages may be reused."""
        seq.finish_reason = reason
        seq.stats.total_ms = seq.stats.since_created()
        self.forget(seq)
        self.batcher.finish(seq)

    def decide(self, ready: list[Sequence], logits: Tensor | None) -> list[StepOutput]:
        """A token for each request whose rows are all computed, or its logits for its caller."""
        outputs: list[StepOutput] = []
        if logits is None or not ready:
            return outputs
        chosen = self._chosen(ready, logits)
        for index, seq in enumerate(ready):
            first = seq.stats.ttft_ms == 0.0
            if first:
                seq.stats.ttft_ms = seq.stats.since_created()
                self.batcher.publish(seq)
            if not seq.sampled:
                seq.logits = logits[index]
                outputs.append(self._tell(StepOutput(seq, NO_TOKEN, None)))
                continue
            token = chosen[index]
            outputs.append(
                self.fail(seq, token) if isinstance(token, Exception) else self._advance(seq, token)
            )
        return outputs

    def fail(self, seq: Sequence, error: BaseException) -> StepOutput:
        """Ends a request by an error; the others go on."""
        seq.error, seq.finish_reason = error, "error"
        self._abort(seq)
        return self._tell(StepOutput(seq, NO_TOKEN, "error"))

    def _chosen(self, ready: Seq[Sequence], logits: Tensor) -> dict[int, int | Exception]:
        """Tokens by row, of the requests that are sampled here."""
        rows = [i for i, seq in enumerate(ready) if seq.sampled]
        samplers = [self._samplers[ready[i].id] for i in rows]
        return dict(zip(rows, sample(samplers, logits, rows), strict=True))

    def _advance(self, seq: Sequence, token: int) -> StepOutput:
        computed, reason = seq.computed, None
        seq.tokens.append(token)
        if token in seq.params.stop_token_ids:
            reason = "stop"
        elif len(seq.output) >= seq.params.max_new_tokens or len(seq.tokens) >= self.longest:
            reason = "length"
        seq.pending = [computed]
        if reason is not None:
            self.finish(seq, reason)
        return self._tell(StepOutput(seq, token, seq.finish_reason))

    def _tell(self, output: StepOutput) -> StepOutput:
        """Hands an output to the request's listener; one that raises ends its own request only."""
        listener = output.sequence.on_output
        if listener is not None:
            try:
                listener(output)
            except Exception as error:
                output.sequence.on_output = None
                if output.sequence.finish_reason is None:
                    return self.fail(output.sequence, error)
                output.sequence.error = output.sequence.error or error
        return output
