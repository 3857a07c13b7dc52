"""The documentation's numbers come from the committed results, and nowhere else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from memos_engine.bench import docs
from memos_engine.bench.document import command, read_result
from memos_engine.bench.options import Options
from typer.main import get_command

from memos_engine.errors import MemosEngineError
from memos_engine.interfaces.cli_bench import bench_app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md"]
PAGES += [ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "scheduling", "parameter-memory")]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_page_is_stale(page):
    text = page.read_text()
    assert "<!-- bench: " in text
    assert docs.refreshed(text, docs.load(docs.RESULTS)) == text, "run `make bench-docs`"


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.name)
def test_results_are_complete_and_say_where_they_come_from(path):
    result = read_result(path)
    assert result["complete"] is True
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", result["commit"])
    assert {"cpu", "cores", "torch", "threads", "load_average"} <= result["machine"].keys()
    assert result["rows"]
    assert not re.search(r'"/[a-z]', json.dumps(result["config"]))  # no path of the machine


def test_every_command_named_in_the_pages_exists():
    commands = get_command(bench_app).commands  # type: ignore[attr-defined]
    for page in PAGES:
        for name, rest in re.findall(r"memos-engine bench ([a-z0-9-]+)([^`\n]*)", page.read_text()):
            assert name in commands, f"{page.name}: bench {name}"
            known = {"--help"} | {opt for p in commands[name].params for opt in p.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_the_command_of_a_run_is_one_that_the_program_takes():
    options = Options(
        contexts=(1,),
        queries=(1,),
        batches=(1,),
        memories=(1,),
        methods=("full",),
        cubes=(1,),
        n=1,
        quick=True,
    )
    known = {opt for p in get_command(bench_app).commands["quality"].params for opt in p.opts}  # type: ignore[attr-defined]
    known |= {opt for p in get_command(bench_app).commands["store"].params for opt in p.opts}  # type: ignore[attr-defined]
    assert set(re.findall(r"--[a-z-]+", command("quality", options))) <= known


def test_a_block_that_nothing_fills_is_an_error(tmp_path):
    with pytest.raises(MemosEngineError, match="make bench-record"):
        docs.refreshed("<!-- bench: ttft command -->\n<!-- end -->", {})
    with pytest.raises(MemosEngineError, match="use one of"):
        docs.refreshed("<!-- bench: ttft nonsense -->\n<!-- end -->", {"ttft": {}})


def test_blocks_are_written_between_their_marks():
    document = {
        "bench": "memory",
        "complete": True,
        "command": "memos-engine bench memory",
        "seconds": 3.0,
        "config": {},
        "machine": {},
        "rows": [{"system": "a|b", "value": 1.5}, {"system": "c", "value": 2.5}],
        "ratios": [],
    }
    page = "before\n<!-- bench: memory listing system=c -->\nold\n<!-- end -->\nafter"
    new = docs.refreshed(page, {"memory": document})
    assert "old" not in new
    assert "2.5" in new
    assert "1.5" not in new
    assert new.startswith("before\n<!-- bench")
    assert new.endswith("<!-- end -->\nafter")
    assert docs.refreshed(new, {"memory": document}) == new
    both = docs.refreshed("<!-- bench: memory listing -->\n<!-- end -->", {"memory": document})
    assert "a\\|b" in both
