"""The one place that touches what transformers does not document. Tested with transformers 5.23.

Only the use of memories in calls that this decoder does not run needs it; where it is missing, those calls go
without memories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def decoding_loop(model: Any, mode: Any) -> Callable[..., Any] | None:
    """The function that the model's `generate()` calls for a generation mode once all is prepared; None where
    there is none, or where it would be fetched from elsewhere."""
    try:
        from transformers.generation.utils import GENERATION_MODES_MAPPING as names
    except ImportError:
        return None
    loop = getattr(type(model), str(names.get(mode)), None)
    return loop if callable(loop) else None
