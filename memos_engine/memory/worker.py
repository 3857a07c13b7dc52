"""Work in a thread of its own, beside requests."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TypeVar

Self = TypeVar("Self", bound="Worker")


class Worker(ABC):
    """Starts and stops a thread that repeats `turn`; `with` does both. name: of the thread. every_s: the
    pause after a turn that asks for one."""

    def __init__(self, name: str, every_s: float) -> None:
        self.every_s = every_s
        self._name = name
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def turn(self) -> bool:
        """Does what is due; whether to pause before the next turn."""

    def start(self) -> None:
        """Works in the background, for the first time at once; starting twice is fine."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Waits for the turn that has begun, if any; none begins after."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stop.is_set():
            if self.turn():
                self._stop.wait(self.every_s)

    def __enter__(self: Self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
