"""The engine for asyncio servers: one thread steps, every coroutine reads its own request.

decoder = AsyncDecoder(engine)
async for out in decoder.generate(spans, params):
    ...
await decoder.aclose()
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from types import TracebackType

from memos_engine.config import SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.sequence import NO_TOKEN, Span, StepOutput
from memos_engine.decoder.session import Session
from memos_engine.errors import MemosEngineError


class AsyncDecoder:
    """Runs an engine's steps on a thread of its own while there is something to do.

    Requests added to the engine by other means go on as well. The thread starts with the first request.
    """

    def __init__(self, engine: DecoderEngine) -> None:
        self.engine = engine
        self._work = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    async def generate(
        self,
        spans: Seq[Span],
        params: SamplingParams | None = None,
        root: bytes = b"",
        session: Session | None = None,
    ) -> AsyncIterator[StepOutput]:
        """Streams one request's tokens; raises its error. Leaving the loop, or cancelling the task, ends the
        request and returns its pages."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[StepOutput] = asyncio.Queue()

        def tell(output: StepOutput) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, output)

        if self._closed:
            raise MemosEngineError("This AsyncDecoder is closed; make another one over the same engine.")
        seq = self.engine.add_request(spans, params, root, session=session, on_output=tell)
        try:
            self._wake()
            while True:
                output = await queue.get()
                if output.token != NO_TOKEN:
                    yield output
                if output.finish_reason is not None:
                    break
            if seq.error is not None:
                raise seq.error
        finally:
            seq.on_output = None
            # The lock is held during a step: waiting for it here would stop the whole loop.
            await asyncio.shield(loop.run_in_executor(None, self.engine.abort, seq))

    async def aclose(self) -> None:
        """Ends the stepping thread after its step; requests that have not ended stay in the engine."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    async def __aenter__(self) -> AsyncDecoder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _wake(self) -> None:
        with self._work:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memos_engine-decoder", daemon=True)
                self._thread.start()
            self._work.notify_all()

    def _run(self) -> None:
        while True:
            with self._work:
                while self.engine.idle and not self._closed:
                    self._work.wait(timeout=1.0)  # requests that others added wake nobody
                if self._closed:
                    return
            self.engine.step()
