"""The examples run and say the right thing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.smollm2
def test_own_loop(smollm2_path):
    answers = example("own_loop").main(str(smollm2_path))
    assert "4862" in answers[0]


@pytest.mark.smollm2
def test_custom_stack(smollm2_path):
    logits, truth = example("custom_stack").main(str(smollm2_path))
    torch.testing.assert_close(logits, truth, rtol=1e-3, atol=1e-3)
    text = (FOLDER / "custom_stack.py").read_text()
    assert len(text.splitlines()) < 80
    assert "sqlite" not in text.lower().replace("no sqlite", "")
