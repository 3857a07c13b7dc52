"""The block pool: who holds which page of the KV cache. Integers only; it never touches a tensor.

A block is free, held (reference count > 0), or cached: nobody holds it but its content is still in the index
and may be taken over by the next request that needs it (least recently used ones are given away first). The
index holds two kinds of pages, each block under one key: exact ones by all that stands up to their end
(`extend_keys`), and those of spliced rows alone by what was spliced (`sharing.spliced_pages`). Block 0 is the
null block and is never handed out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from memos_engine.errors import IntegrityError, OutOfPagesError


def extend_keys(
    keys: list[bytes],
    root: bytes,
    token_ids: Sequence[int],
    page: int,
    state: bytes = b"",
    state_from: int = 0,
) -> None:
    """Appends what `keys` lacks of the keys of all full pages of `token_ids`.

    root: digest of all else that shapes the pages (model, tenant salt). A key covers everything to the left
    of its page's end; SHA-256, so keys are stable. state: what else shapes tokens from position `state_from`
    on (`AdapterBinding.state`); it enters by a hash of its own, so that no root and no tokens can imitate it.
    """
    done = len(keys) * page
    raw = array("I", token_ids[done : len(token_ids) // page * page]).tobytes()
    size = page * array("I").itemsize
    previous = keys[-1] if keys else root
    for start in range(0, len(raw), size):
        previous = hashlib.sha256(previous + raw[start : start + size]).digest()
        if state and (len(keys) + 1) * page > state_from:
            previous = hashlib.blake2s(previous + state, person=b"adapter").digest()
        keys.append(previous)


def chain_keys(root: bytes, token_ids: Sequence[int], page: int) -> list[bytes]:
    """Keys of the full pages of `token_ids`; see `extend_keys`."""
    keys: list[bytes] = []
    extend_keys(keys, root, token_ids, page)
    return keys


class BlockPool:
    """Reference-counted blocks with an index over full pages that others may use."""

    def __init__(self, num_blocks: int, page: int) -> None:
        if num_blocks < 2:
            raise OutOfPagesError(f"A pool of {num_blocks} blocks has no usable block; two are the least.")
        self.num_blocks = num_blocks
        self.page = page
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))  # a stack: pages used before are warm and paid for
        self._cached: OrderedDict[int, None] = OrderedDict()  # refs == 0, still published; oldest first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.epoch = 0  # pages of requests admitted before the last `forget` are not published

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, all or none."""
        if count > self.available:
            raise OutOfPagesError(
                f"{count} pages of {self.page} tokens are needed, {self.available} of {self.num_blocks - 1} "
                "are free. Shorten the prompt or open the engine with a larger pool_tokens."
            )
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._unpublish(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Adds a reference to held or cached blocks."""
        for block in blocks:
            if self._refs[block] == 0:
                if block not in self._cached:
                    raise IntegrityError(f"block {block} is free; it cannot be acquired.")
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drops a reference; the last one frees the block, or leaves it cached when it is published."""
        for block in blocks:
            if block <= 0 or self._refs[block] <= 0:
                raise IntegrityError(f"block {block} was released more often than acquired.")
            self._refs[block] -= 1
            if self._refs[block] == 0 and block in self._key_of:
                self._cached[block] = None
            elif self._refs[block] == 0:
                self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Puts a full, held page into the index. The first block with a key wins, and a block's first key."""
        if self._refs[block] <= 0:
            raise IntegrityError(f"block {block} is not held; it cannot be published.")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Longest run of published blocks for these keys, acquired for the caller."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        self.acquire(blocks)
        return blocks

    def find(self, key: bytes) -> int | None:
        """The published block with this key, acquired for the caller, if there is one."""
        found = self.match([key])
        return found[0] if found else None

    def writable(self, block: int) -> int:
        """Copy-on-write: the block itself if the caller alone holds it and it is not published, else a fresh
        one in exchange for the caller's reference. The caller copies the page when the number differs. Where
        none is free, a block that the caller alone holds leaves the index instead."""
        if self._refs[block] == 1 and block in self._key_of and not self.available:
            self._unpublish(block)
        if self._refs[block] == 1 and block not in self._key_of:
            return block
        fresh = self.allocate(1)[0]
        self.release([block])
        return fresh

    def used(self) -> list[int]:
        """Blocks whose content somebody may still read: held or cached."""
        return [b for b in range(1, self.num_blocks) if self._refs[b] or b in self._cached]

    def grow(self, num_blocks: int) -> None:
        """Adds free blocks up to `num_blocks`."""
        self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)  # below: used pages are warm
        self._refs += [0] * (num_blocks - self.num_blocks)
        self.num_blocks = max(num_blocks, self.num_blocks)

    def forget(self) -> None:
        """Empties the index (weights changed, say); held blocks stay with their holders."""
        self.epoch += 1
        for block in list(self._key_of):
            self._unpublish(block)
        self._free.extend(self._cached)
        self._cached.clear()

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raises IntegrityError unless every block is in exactly one state, the index is a bijection and,
        given the block lists of all holders, every reference is accounted for."""
        held = {b for b in range(1, self.num_blocks) if self._refs[b] > 0}
        free, cached = set(self._free), set(self._cached)
        if self._refs[0] != 0 or min(self._refs) < 0:
            raise IntegrityError("a reference count is wrong (null block held, or negative).")
        apart = len(held) + len(self._free) + len(cached) == len(held | free | cached)
        if not apart or len(held | free | cached) != self.num_blocks - 1:
            raise IntegrityError("a block is in two states or in none.")
        if {b: k for k, b in self._block_of.items()} != self._key_of:
            raise IntegrityError("the prefix index and its inverse disagree.")
        if free & set(self._key_of) or not cached <= set(self._key_of):
            raise IntegrityError("a free block is published, or a cached one is not.")
        if holders is not None:
            counts = Counter(b for blocks in holders for b in blocks)
            wrong = [b for b in range(1, self.num_blocks) if counts[b] != self._refs[b]]
            if wrong:
                raise IntegrityError(f"reference counts of blocks {wrong[:5]} do not match their holders.")

    def _unpublish(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
