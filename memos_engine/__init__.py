"""Memory inside the decoder: see docs/architecture.md for the life of a request."""

from __future__ import annotations

__version__ = "0.1.0"
