"""The latency harness: every program ends in one JSON line."""
