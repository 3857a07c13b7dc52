"""Triton kernels, one operation per file; `memos_engine.ops` decides when they run (docs/kernels.md)."""
