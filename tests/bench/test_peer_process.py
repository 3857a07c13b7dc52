"""The harness's side of a worker: it crashes, hangs, prints and refuses, and is always told from the rest."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memos_engine.bench.peers.process import PeerError, PeerProcess, worker_path

WORKER = """
import os, subprocess, sys, time
sys.path.insert(0, {peers!r})
from serve import Unsupported, serve
class Worker:
{body}
serve(Worker())
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., PeerProcess]]:
    """Starts a worker whose methods are the given source."""
    started = []

    def start(body: str, timeout: float = 10.0) -> PeerProcess:
        script = tmp_path / f"worker{len(started)}.py"
        peers = str(Path(worker_path("own")).parent)
        script.write_text(WORKER.format(peers=peers, body=textwrap.indent(textwrap.dedent(body), "    ")))
        started.append(PeerProcess("fake", [sys.executable, str(script)], {}, timeout))
        return started[-1]

    yield start
    for process in started:
        process.close()


def refused(process: PeerProcess, op: str, **arguments: object) -> PeerError:
    with pytest.raises(PeerError) as caught:
        process.call(op, **arguments)
    return caught.value


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_answers_and_refusals_leave_the_worker_usable(worker):
    process = worker(
        """
        def add(self, a, b): return a + b
        def no(self): raise Unsupported("not that")
        def bad(self): raise ValueError("oh")
        """
    )
    assert process.call("add", a=2, b=3) == 5
    assert refused(process, "nothing").status == "unsupported"
    assert refused(process, "_private").status == "unsupported"
    error = refused(process, "no")
    assert error.status == "unsupported"
    assert "not that" in str(error)
    error = refused(process, "bad")
    assert error.status == "failed"
    assert "ValueError: oh" in str(error)
    assert process.call("add", a=[1], b=[2]) == [1, 2]


def test_a_crash_tells_status_and_last_words_once_and_for_all(worker):
    process = worker("def die(self): print('the end', file=sys.stderr, flush=True); os._exit(7)")
    error = refused(process, "die")
    assert error.status == "crashed"
    assert "status 7" in str(error)
    assert "the end" in str(error)
    assert refused(process, "die") is error


def test_a_killed_worker_names_the_signal(worker):
    process = worker("def die(self): os.kill(os.getpid(), 9)")
    assert "SIGKILL" in str(refused(process, "die"))


def test_a_worker_that_hangs_is_ended_with_its_children(worker):
    process = worker(
        """
        def spawn(self): return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid
        def hang(self): time.sleep(60)
        """
    )
    child = process.call("spawn")
    begun = time.monotonic()
    error = refused(process, "hang", timeout=0.5)
    assert error.status == "timeout"
    assert "0.5 s" in str(error)
    assert time.monotonic() - begun < 5
    assert gone(child)
    assert refused(process, "spawn").status == "timeout"


def test_a_child_that_holds_the_pipe_does_not_hide_the_crash(worker):
    process = worker(
        """
        def die(self):
            if os.fork() == 0:
                time.sleep(60)
            os._exit(3)
        """
    )
    begun = time.monotonic()
    error = refused(process, "die")
    assert error.status == "crashed"
    assert time.monotonic() - begun < 5


def test_a_worker_that_does_not_read_is_ended_in_time(tmp_path):
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    with PeerProcess("deaf", argv, {}, 0.5) as process:
        assert refused(process, "load", ids=list(range(200_000))).status == "timeout"


def test_prints_of_a_library_do_not_reach_the_channel(worker):
    process = worker(
        """
        def noisy(self):
            print("{\\"ok\\": 1}")
            os.write(1, b"raw\\n")
            subprocess.run([sys.executable, "-c", "print('child')"])
            return "clean"
        """
    )
    assert process.call("noisy") == "clean"
    assert process.call("noisy") == "clean"
    assert "child" in process.last_lines(10)


def test_last_lines_do_not_move_where_the_worker_writes(worker):
    process = worker("def say(self, text): print(text, file=sys.stderr, flush=True)")
    for text in ("one", "two", "three"):
        process.call("say", text=text)
        assert text in process.last_lines()
    assert process.last_lines(3) == "one | two | three"


@pytest.mark.parametrize("line", ["garbage", "5", "[]", "{}", '{"fine": 1}'])
def test_garbage_on_the_channel_ends_the_worker(line):
    argv = [sys.executable, "-c", f"import time; print({line!r}, flush=True); time.sleep(60)"]
    with PeerProcess("rude", argv, {}, 10) as process:
        error = refused(process, "load")
    assert error.status == "crashed"
    assert line in str(error)


def test_a_missing_interpreter_is_absent(tmp_path):
    with pytest.raises(PeerError, match="could not be started") as caught:
        PeerProcess("nobody", [str(tmp_path / "python")], {}, 1)
    assert caught.value.status == "absent"


def test_closing_twice_and_calling_after_it(worker):
    process = worker("def one(self): return 1")
    assert process.call("one") == 1
    process.close()
    process.close()
    assert "was closed" in str(refused(process, "one"))
