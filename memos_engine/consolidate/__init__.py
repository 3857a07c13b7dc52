"""Consolidation: memories that are asked for often, from text into a small LoRA, through gates.

Experimental. The text stays the truth; an adapter is stored beside it, is used only once every gate passed,
and goes with any memory that it was made from.
"""

from memos_engine.consolidate.facts import Fact, read_facts
from memos_engine.consolidate.gates import Gates, Report
from memos_engine.consolidate.recipe import Recipe
from memos_engine.consolidate.run import consolidate

__all__ = ["Fact", "Gates", "Recipe", "Report", "consolidate", "read_facts"]
