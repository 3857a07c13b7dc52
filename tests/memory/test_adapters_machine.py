"""Adapters against a model of them: whatever is done in whatever order, what is in use is what should be, and
no file outlives what names it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memos_engine.errors import MemosEngineError
from memos_engine.memory.adapters import NewAdapter
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.store import MemoryStore

ALICE, BOB = Principal("acme", "alice"), Principal("acme", "bob")


class Adapters(RuleBasedStateMachine):
    """model: by name, the versions as (digit, sources, promoted, revoked), and the versions in the order in
    which they came into use."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)
        self.store = MemoryStore.open(path / "store", keyring=KeyRing(path / "keys"))
        self.model: dict[str, list[dict[str, Any]]] = {}
        self.used: dict[str, list[int]] = {}
        self.ids: dict[str, str] = {}
        self.memories: list[str] = []
        self.sources: dict[int, set[str]] = {}  # of each content, ever
        self.gone: set[int] = set()  # contents that came from an ended memory

    @initialize()
    def some_memories(self) -> None:
        self.memories = [self.store.add(ALICE, f"memory {n}").id for n in range(3)]

    def teardown(self) -> None:
        assert self.store.check().sound
        self.store.close()
        self.folder.cleanup()

    def current(self, name: str) -> int | None:
        """The number of the version in use."""
        for version in reversed(self.used.get(name, [])):
            if not self.model[name][version - 1]["revoked"]:
                return version
        return None

    @rule(
        name=st.sampled_from("ab"),
        digit=st.integers(0, 5),
        sources=st.sets(st.integers(0, 2), max_size=2),
        promote=st.booleans(),
        passed=st.sampled_from([True, True, False]),
    )
    def put(self, name: str, digit: int, sources: set[int], promote: bool, passed: bool) -> None:
        ids = [self.memories[n] for n in sorted(sources) if n < len(self.memories)]
        new = NewAdapter(f"{digit:064x}", "f" * 64, 4, 9, None, report={"passed": passed}, sources=ids)
        versions = self.model.get(name, [])
        same = next((n for n, one in enumerate(versions, 1) if one["digit"] == digit), None)
        refused = digit in self.gone
        known = versions[same - 1]["passed"] if same is not None else passed
        refused = refused or (promote and not known and (same is None or self.current(name) != same))
        try:
            got = self.store.put_adapter(ALICE, name, b"payload %d" % digit, new, promote=promote)
        except MemosEngineError:
            assert refused
            return
        assert not refused
        versions = self.model.setdefault(name, [])
        if same is None:
            same = len(versions) + 1
            versions.append({"digit": digit, "revoked": False, "passed": passed})
            self.ids[name] = got.cube_id
        assert got.version == same
        self.sources.setdefault(digit, set()).update(ids)
        self._use(name, same, promote)

    def _use(self, name: str, version: int, promote: bool = True) -> None:
        if promote and self.current(name) != version:
            self.used.setdefault(name, []).append(version)

    @rule(name=st.sampled_from("ab"), version=st.integers(1, 4))
    def promote(self, name: str, version: int) -> None:
        if name not in self.ids:
            return
        versions = self.model[name]
        there = version <= len(versions)
        one = versions[version - 1] if there else None
        allowed = one is not None and not one["revoked"] and (one["passed"] or self.current(name) == version)
        try:
            self.store.promote_adapter(ALICE, self.ids[name], version)
        except MemosEngineError:
            assert not allowed
            return
        assert allowed
        self._use(name, version)

    @rule(name=st.sampled_from("ab"), back=st.one_of(st.none(), st.integers(1, 4)))
    def rollback(self, name: str, back: int | None) -> None:
        if name not in self.ids:
            return
        now = self.current(name)
        usable = [v for v in dict.fromkeys(reversed(self.used.get(name, []))) if v != now]
        usable = [v for v in usable if not self.model[name][v - 1]["revoked"]]
        target = (usable[0] if usable else None) if back is None else back
        try:
            self.store.rollback_adapter(ALICE, self.ids[name], back)
        except MemosEngineError:
            assert target not in usable
            return
        assert target in usable
        self.used[name].append(target)

    @precondition(lambda self: self.memories)
    @rule(which=st.integers(0, 2), erase=st.booleans())
    def end_a_memory(self, which: int, erase: bool) -> None:
        memory = self.memories.pop(which % len(self.memories))
        (self.store.erase if erase else self.store.delete)(ALICE, memory)
        gone = {digit for digit, ids in self.sources.items() if memory in ids}
        for name, versions in list(self.model.items()):
            for one in versions:
                if one["digit"] in gone and not one["revoked"]:
                    one["revoked"] = True
                    self.gone.add(one["digit"])
            if all(one["revoked"] for one in versions):  # the adapter ends; its name is free again
                del self.model[name], self.ids[name]
                self.used.pop(name, None)

    @rule(name=st.sampled_from("ab"), erase=st.booleans())
    def end_an_adapter(self, name: str, erase: bool) -> None:
        if name in self.ids:
            (self.store.erase if erase else self.store.delete)(ALICE, self.ids.pop(name))
            del self.model[name]
            self.used.pop(name, None)

    @invariant()
    def what_is_in_use_is_what_should_be(self) -> None:
        wanted = {name: version for name in self.model if (version := self.current(name)) is not None}
        found = {str(one.name): one.version for one in self.store.adapters(ALICE)}
        assert found == wanted
        assert self.store.adapters(BOB, everything=True) == []
        for one in self.store.adapters(ALICE):
            used = self.store.adapter_in_use(ALICE, one.cube_id, one.version)
            assert used.blob is not None
            digit = self.model[str(one.name)][one.version - 1]["digit"]
            assert bytes(self.store.vault.read(used.blob)) == b"payload %d" % digit

    @invariant()
    def files_are_those_that_versions_name(self) -> None:
        digits = {one["digit"] for versions in self.model.values() for one in versions if not one["revoked"]}
        assert len(list(self.store.vault.directory.glob("??/*"))) == len(digits)


Adapters.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestAdapters = Adapters.TestCase
