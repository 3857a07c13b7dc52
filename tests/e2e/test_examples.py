"""The examples run and say the right thing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.mark.smollm2
def test_custom_stack(smollm2_path):
    spec = importlib.util.spec_from_file_location("custom_stack", FOLDER / "custom_stack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = module.main(str(smollm2_path))
    assert "4862" in answers[0]
    assert len((FOLDER / "custom_stack.py").read_text().splitlines()) < 70
