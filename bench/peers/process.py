"""The harness's side of the peer protocol: a process that answers, or is ended with its reason."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from memos_engine.errors import MemosEngineError

_GLANCE = 0.25  # seconds between looks whether a silent process is still there


class PeerError(MemosEngineError):
    """A peer cannot go on. `status` for the row: absent, unsupported, failed, crashed, timeout."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class PeerProcess:
    """One worker. After crashed or timeout its process is gone and every further call says the same."""

    def __init__(self, name: str, argv: list[str], env: dict[str, str], timeout: float) -> None:
        self.name = name
        self.timeout = timeout
        self._ended: PeerError | None = None
        self._gone = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        try:
            self._process = subprocess.Popen(
                argv,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **env},
                start_new_session=True,  # a peer may have children: all of them end with it
            )
        except OSError as error:
            self._log.close()
            raise PeerError("absent", f"{name} could not be started: {error}.") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._buffer = b""

    def call(self, op: str, timeout: float | None = None, **arguments: Any) -> Any:
        """One operation's value. Raises PeerError; a peer that is silent for `timeout` seconds is ended."""
        if self._ended is not None:
            raise self._ended
        allowed = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + allowed
        line = json.dumps({"op": op, **arguments}).encode() + b"\n"
        try:
            if not (self._send(line, deadline) and self._receive(deadline)):
                raise self._end("timeout", f"{self.name} did not answer {op} within {allowed:g} s; ended.")
        except OSError as error:
            raise self._end("crashed", f"{self.name} ended{self._status()} during {op}.") from error
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = _answer(line)
        if answer is None:
            shown = line[:80].decode("utf-8", "replace")
            raise self._end("crashed", f"{self.name} gave no answer to {op} but {shown!r}; ended.")
        if "error" in answer:
            status = "unsupported" if answer.get("kind") == "unsupported" else "failed"
            raise PeerError(status, f"{self.name}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        """Ends the process and its children."""
        if not self._gone:
            with suppress(OSError):
                os.write(self._in, b'{"op": "close"}\n')
            with suppress(OSError, subprocess.TimeoutExpired):
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process.wait(5)
        self._kill()
        self._log.close()
        self._ended = self._ended or PeerError("crashed", f"{self.name} was closed.")

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, line: bytes, deadline: float) -> bool:
        """Writes a call; a peer that does not read may let a long one fill the pipe. False: out of time."""
        while line:
            if not self._ready(self._in, selectors.EVENT_WRITE, deadline):
                return False
            with suppress(BlockingIOError):
                line = line[os.write(self._in, line) :]
        return True

    def _receive(self, deadline: float) -> bool:
        """Reads until a line is there. False: out of time."""
        while b"\n" not in self._buffer:
            if not self._ready(self._out, selectors.EVENT_READ, deadline):
                return False
            with suppress(BlockingIOError):
                piece = os.read(self._out, 1 << 16)
                if not piece:
                    raise _Closed()
                self._buffer += piece
        return True

    def _ready(self, handle: int, event: int, deadline: float) -> bool:
        """Waits until the pipe can be used. A peer's child may hold the pipe open after the peer itself has
        ended, so that this is looked at, too."""
        with selectors.DefaultSelector() as selector:
            selector.register(handle, event)
            while True:
                gone = self._process.poll() is not None
                left = deadline - time.monotonic()
                if selector.select(0 if gone else max(0.0, min(left, _GLANCE))):
                    return True
                if gone:
                    raise _Closed()
                if left <= 0:
                    return False

    def _status(self) -> str:
        with suppress(subprocess.TimeoutExpired, ValueError):
            code = self._process.wait(1)
            return f" with status {code}" if code >= 0 else f" by {signal.Signals(-code).name}"
        return ""

    def _end(self, status: str, message: str) -> PeerError:
        self._kill()
        last = self.last_lines()
        self._ended = PeerError(status, f"{message}{' It last said: ' + last if last else ''}")
        return self._ended

    def _kill(self) -> None:
        """Once only: later the number may be another process's."""
        if self._gone:
            return
        self._gone = True
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()

    def last_lines(self, count: int = 2) -> str:
        """The end of what the peer wrote to standard error, for a reason that helps."""
        with suppress(OSError, ValueError):
            handle = self._log.fileno()  # the peer writes at this file's position: it is not moved here
            size = os.fstat(handle).st_size
            text = os.pread(handle, 4096, max(0, size - 4096)).decode("utf-8", "replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return " | ".join(line[:300] for line in lines[-count:])
        return ""


class _Closed(OSError):
    """The other end of a pipe is closed."""


def _answer(line: bytes) -> dict[str, Any] | None:
    """What the protocol allows, or None."""
    with suppress(ValueError):
        answer = json.loads(line)
        if isinstance(answer, dict) and ("ok" in answer or "error" in answer):
            return answer
    return None


def worker_path(name: str) -> str:
    """The script of a worker, to be run by whichever Python its environment has."""
    return str(Path(__file__).parent / f"run_{name}.py")
