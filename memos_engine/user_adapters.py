"""UserAdapters: one user's adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from memos_engine.errors import MemoryInputError
from memos_engine.memory.adapters import AdapterVersion
from memos_engine.memory.governance import Principal
from memos_engine.parameter import AdapterUse, Findings, ParameterMemory, verify_adapters


class UserAdapters:
    """One user's adapters: what `user.adapters` is."""

    def __init__(self, memory: ParameterMemory, principal: Principal, let_go: Callable[[], None]) -> None:
        self.memory, self.principal, self._let_go = memory, principal, let_go

    def list(self, *, everything: bool = False) -> list[AdapterVersion]:
        """Those in use; `everything`: all versions, revoked ones too."""
        return self.memory.store.adapters(self.principal, everything=everything)

    def get(self, given: str, version: int | None = None) -> AdapterVersion:
        """One version, the current one by default."""
        return self.memory.store.adapter(self.principal, given, version)

    def import_(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        sources: Sequence[str] = (),
        promote: bool = True,
    ) -> AdapterVersion:
        """Takes in a PEFT folder, as a new version where there is one of that name. sources: ids of the
        memories that it was trained on: it is then found by them, and goes with them."""
        return self.memory.bring(self.principal, Path(folder), name, sources=sources, promote=promote)

    def export(self, given: str, folder: str | Path, version: int | None = None) -> None:
        """Writes what PEFT reads, into a new folder."""
        self.memory.export(self.principal, given, Path(folder), version)

    def promote(self, given: str, version: int) -> AdapterVersion:
        """Uses a stored version from now on, if it passed its gates."""
        found = self.memory.store.adapter(self.principal, given, version)
        return self.memory.store.promote_adapter(self.principal, found.cube_id, version)

    def rollback(self, given: str, version: int | None = None) -> AdapterVersion:
        """Uses an earlier version again."""
        found = self.memory.store.adapter(self.principal, given)
        return self.memory.store.rollback_adapter(self.principal, found.cube_id, version)

    def verify(self) -> Findings:
        """Reads every stored version in full; what is wrong with each, empty where nothing is."""
        return verify_adapters(self.memory.store, self.principal)

    def delete(self, given: str) -> None:
        """Ends an adapter with all its versions; its payload is removed."""
        self.memory.store.delete(self.principal, self._id(given))
        self._let_go()

    def erase(self, given: str) -> None:
        """Destroys an adapter, its name and reports included."""
        self.memory.store.erase(self.principal, self._id(given))
        self._let_go()

    def use(self, given: str, *, scale: float = 1.0, whole: bool = False) -> AdapterUse:
        """For `chat(adapter=)`, where the name alone does not say it all."""
        return self.memory.use(self.principal, given, scale=scale, whole=whole)

    def compose(self, given: Sequence[str], scales: Sequence[float]) -> AdapterUse:
        """Several as one, for `chat(adapter=)`; see `ParameterMemory.compose`."""
        return self.memory.compose(self.principal, given, scales)

    def _id(self, given: str) -> str:
        every = self.list(everything=True)
        ids = {one.cube_id for one in every if given in (one.name, one.cube_id) and one.revoked_at is None}
        if len(ids) != 1:
            raise MemoryInputError(f"{len(ids)} adapters are called {given!r}; give the id of one.")
        return ids.pop()
