"""The native CPU module, the dtypes that it knows, and what its statuses mean."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from memos_engine.errors import KernelContractError

native: Any = importlib.import_module("memos_engine._cpu")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAGE_DTYPES = {**DTYPES, torch.int8: 3}
_MESSAGES = {
    1: "query_start must ascend from 0 and stay within the rows of q",
    2: "a request sees more keys than its row of block_table has blocks for",
    3: "block_table names a block outside the pages",
    4: "slot_mapping names a slot outside the pages",
    5: "a position is negative or has no row in cos_sin; build a longer table with ops.rope_table",
    6: "key_start must ascend from 0 and stay within key_slots",
    7: "key_slots names a slot outside the pages",
    8: "k_scale has no group for some token; first_token counts from the record's beginning",
    9: "the segments of LoraRows must ascend from 0 and name rows, slots and a layer that are there",
}


def check_status(status: int) -> None:
    if status:
        raise KernelContractError(f"{_MESSAGES[status]} (docs/kernels.md has the contract)")
