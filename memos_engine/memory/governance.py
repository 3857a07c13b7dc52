"""Who may see what, and the secret that keeps one store's fingerprints from another's.

The key of a store lies outside of its directory, so that a copy of the directory alone can neither
test guesses of an erased text against the stored HMACs nor compute another tenant's KV identities.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from memos_engine.errors import MemoryInputError, StoreError
from memos_engine.memory.values import time_to_text, validate_label

KEY_BYTES = 32
_SEPARATOR = "\x1f"


@dataclass(frozen=True, slots=True, order=True)
class Principal:
    """The caller: a user of a tenant. Both names: 1 to 128 characters, no control characters.

    `branch` names a what-if scope of this user (see `MemoryStore.branch`); it sees its own memories only.
    Names are compared exactly. Raises `MemoryInputError`.
    """

    tenant: str
    user: str
    branch: str = ""

    def __post_init__(self) -> None:
        _check_name("tenant", self.tenant)
        _check_name("user", self.user)
        if self.branch:
            validate_label("a branch's name", self.branch)

    @property
    def key(self) -> str:
        """What the store calls this scope within its tenant. No user's name can hold the separator."""
        return f"{self.user}{_SEPARATOR}{self.branch}" if self.branch else self.user

    @classmethod
    def from_key(cls, tenant: str, key: str) -> Principal:
        """The inverse of `key`."""
        user, _, branch = key.partition(_SEPARATOR)
        return cls(tenant, user, branch)

    def to_dict(self) -> dict[str, str]:
        """JSON-safe; `Principal(**data)` is the inverse."""
        names = {"tenant": self.tenant, "user": self.user}
        return {**names, "branch": self.branch} if self.branch else names


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str):
        raise MemoryInputError(f"a {what} name must be a str, not {type(name).__name__}.")
    if not name.strip() or len(name) > 128:
        raise MemoryInputError(
            f"a {what} name must have 1 to 128 characters, not all of them spaces; this one has {len(name)}."
        )
    bad = next((c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)
    if bad is not None:
        raise MemoryInputError(
            f"a {what} name cannot hold control characters; remove U+{ord(bad):04X} from {name!r}."
        )


@dataclass(frozen=True, slots=True)
class StoreKeys:
    """One store's 32-byte secret and the keys derived from it. `id` names the secret without revealing it."""

    secret: bytes = field(repr=False)

    def _derive(self, purpose: bytes, data: bytes) -> bytes:
        return hmac.new(self.secret, purpose + b"\0" + data, hashlib.sha256).digest()

    @property
    def id(self) -> str:
        return self._derive(b"key-id", b"").hex()[:16]

    def body_hmac(self, text: str) -> bytes:
        """Keyed fingerprint (32 bytes) of a memory's text: plain hashes of short texts can be guessed."""
        return self._derive(b"body", text.encode("utf-8"))

    def gist_hmac(self, owner: Principal, gist: str) -> bytes:
        """Keyed fingerprint (16 bytes) of the words of a text, within its tenant."""
        scope = f"{len(owner.tenant)}:{owner.tenant}"
        return self._derive(b"gist", f"{scope}{gist}".encode())[:16]

    def request_hmac(self, *parts: str) -> bytes:
        """Keyed fingerprint (32 bytes) of what a call asked for."""
        return self._derive(b"request", "".join(f"{len(p)}:{p}" for p in parts).encode("utf-8", "replace"))

    def token_hmac(self, owner: Principal, token: str) -> bytes:
        """Keyed fingerprint (32 bytes) of a caller's idempotency key within its owner's scope."""
        scope = f"{len(owner.tenant)}:{owner.tenant}{len(owner.key)}:{owner.key}"
        return self._derive(b"idempotency", f"{scope}{token}".encode())

    def tenant_salt(self, tenant: str) -> bytes:
        """The tenant's 32-byte salt in KV identities: KV is never shared across tenants."""
        return self._derive(b"tenant", tenant.encode("utf-8"))


@dataclass(frozen=True, slots=True)
class Rule:
    """What opens a memory to others for one action: its visibility or a grant; a denial always wins."""

    visibilities: tuple[str, ...]
    allowed_by: tuple[str, ...]
    denied_by: tuple[str, ...]


RULES = {
    "read": Rule(("shared", "read_only"), ("read", "write", "share"), ("read",)),
    "write": Rule(("shared",), ("write",), ("read", "write")),
    "share": Rule((), ("share",), ("read", "share")),
}
"""By action. Owners may do everything with their own; nobody else does more than these say."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission (or, with effect `deny`, its refusal) for `grantee` (None: everybody of the tenant).

    It is about one memory, or with `cube_id` None about all of the owner's, also later ones. Times in UTC.
    """

    id: int
    owner: Principal
    cube_id: str | None
    grantee: Principal | None
    action: str
    effect: str
    at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; times are ISO 8601 in UTC."""
        return {
            "id": self.id,
            "owner": self.owner.to_dict(),
            "cube_id": self.cube_id,
            "grantee": self.grantee.to_dict() if self.grantee else None,
            "action": self.action,
            "effect": self.effect,
            "at": time_to_text(self.at),
            "expires_at": time_to_text(self.expires_at) if self.expires_at else None,
            "revoked_at": time_to_text(self.revoked_at) if self.revoked_at else None,
        }


def default_key_directory() -> Path:
    """`$MEMOS_ENGINE_KEYS`, else `memos_engine/keys` in the user's data directory."""
    chosen = os.environ.get("MEMOS_ENGINE_KEYS")
    if chosen:
        return Path(chosen).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    base = Path(data) if data and os.path.isabs(data) else Path("~/.local/share").expanduser()
    return base / "memos_engine" / "keys"


class KeyRing:
    """Store keys as files `<store id>.key`, mode 0600, in a directory outside of every store."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_key_directory()

    def _path(self, store_id: str) -> Path:
        return self.directory / f"{store_id}.key"

    def load(self, store_id: str) -> StoreKeys | None:
        """The key of a store, None when there is none. Raises `StoreError` when it cannot be read."""
        path = self._path(store_id)
        try:
            secret = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"the store's key {path} cannot be read ({error.strerror}); fix its permissions."
            ) from error
        if len(secret) != KEY_BYTES:
            raise StoreError(
                f"the store's key {path} has {len(secret)} bytes instead of {KEY_BYTES}; restore it from a "
                "copy, or remove it to have a new one made (stored KV is then rebuilt, text stays readable)."
            )
        return StoreKeys(secret)

    def create(self, store_id: str) -> StoreKeys:
        """Make and keep a key, atomically; another process's earlier key wins. Raises `StoreError`."""
        path = self._path(store_id)
        draft = self.directory / f".{store_id}-{secrets.token_hex(8)}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                self._publish(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"no key can be written to {self.directory} ({error.strerror}); make it writable or name "
                "another directory in MEMOS_ENGINE_KEYS."
            ) from error
        key = self.load(store_id)
        if key is None:
            raise StoreError(f"the store's key {path} vanished while it was made; try again.")
        return key

    @staticmethod
    def _publish(draft: Path, path: Path) -> None:
        try:
            os.link(draft, path)  # unlike rename, never replaces a key that is already there
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(draft, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
