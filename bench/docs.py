"""Keeps the numbers in the documentation true: they are generated from `bench/results/*.json`.

Between `<!-- bench: WORDS -->` and `<!-- end -->` stands what these results say; the rest is prose. WORDS:

machine                     what the results were measured on, when, at which commit
headline                    the README's table
BENCH command               the command line that repeats a bench
BENCH overview ...          its tables with sizes across
BENCH listing ...           its rows
BENCH standings ...         who is fastest in each comparable group
BENCH ratios                its ratios with their intervals
BENCH notes                 what its run had to say

`...` chooses rows: KEY=VALUE takes only those with this value (or one of several, with commas), -KEY leaves a
column out.

    python -m memos_engine.bench.docs [--check] PAGE ...
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memos_engine.bench.document import read_result, write_atomically
from memos_engine.bench.report import tables
from memos_engine.bench.report.standings import standings

from memos_engine.errors import MemosEngineError

RESULTS = Path(__file__).resolve().parent / "results"
_BLOCK = re.compile(r"(<!-- bench: (?P<words>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Documents = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the numbers of documentation pages from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is stale")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("pages", nargs="+", type=Path)
    given = parser.parse_args()
    documents, stale = load(given.results), []
    for page in given.pages:
        old = page.read_text()
        new = refreshed(old, documents)
        if new != old:
            stale.append(str(page))
            if not given.check:
                write_atomically(page, new)
    print(f"{'stale' if given.check else 'written'}: {', '.join(stale) or 'nothing'}")
    raise SystemExit(bool(stale and given.check))


def load(folder: Path) -> Documents:
    """Every complete result in a folder, by the name of its file without `.json`."""
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"))}


def refreshed(text: str, documents: Documents) -> str:
    """A page with every block written anew."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}{render(found['words'], documents)}\n{found[3]}"

    return _BLOCK.sub(block, text)


def render(words: str, documents: Documents) -> str:
    """The Markdown of one block. Raises MemosEngineError for a block that no result can fill."""
    name, *more = words.split()
    if name == "machine":
        return _machine(documents)
    if name == "headline":
        return _headline(_document(documents, "ttft"))
    if not more or more[0] not in _VIEWS:
        raise MemosEngineError(
            f"bench block {words!r}: use one of {', '.join(_VIEWS)} after the bench's name."
        )
    return _VIEWS[more[0]](_document(documents, name), more[1:])


def _document(documents: Documents, name: str) -> dict[str, Any]:
    if name not in documents:
        raise MemosEngineError(f"there is no result {name}.json; make it with `make bench-record`.")
    return documents[name]


def _machine(documents: Documents) -> str:
    made = [d for d in documents.values() if "started" in d and d["machine"].get("gpu") is None]
    first, last = min(d["started"] for d in made), max(d["started"] for d in made)
    machine = min(made, key=lambda d: d["started"])["machine"]
    commits = sorted({str(d["commit"]) for d in made})
    versions: dict[str, str] = {}
    for document in made:
        for system in document["machine"].get("systems", {}).values():
            versions |= {k: v for k, v in system.items() if k not in ("memos_engine", "torch")}
    peers = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    stolen = max(d["machine"].get("steal_share", 0.0) for d in made)
    loads = sorted(d["machine"]["load_average"] for d in made)
    first, last = (moment[:16].replace("T", " ") for moment in (first, last))
    return (
        f"{machine['cores']} cores of {machine['cpu']} (kernel level `{machine['ops']['cpu']['isa']}`), "
        f"{machine['memory_gib']} GiB, {machine['threads']} threads; torch {machine['torch']}, {peers}. "
        f"Measured {first} to {last} UTC at commit {', '.join(commits)}; 1-minute load at the start of each "
        f"bench {loads[0]} to {loads[-1]}, at most {100 * stolen:.1f} % of processor time stolen by the host."
    )


def _headline(document: dict[str, Any]) -> str:
    rows = [r for r in document["rows"] if r.get("scope") == "engine" and "status" not in r]
    wanted = [("memos_engine", mode) for mode in ("full", "prefix", "refine", "splice")]
    peers = dict.fromkeys(r["system"] for r in rows if r["system"] != "memos_engine")
    wanted = [(p, m) for p in peers for m in ("full", "prefix")] + wanted
    contexts = sorted({r["context"] for r in rows if r["mode"] == "splice"})
    out = [["ms to the first token", *(f"{c} tokens" for c in contexts)]]
    for system, mode in wanted:
        found = {r["context"]: r["ttft_ms_p50"] for r in rows if (r["system"], _way(r)) == (system, mode)}
        cells = [f"{found[c]:.0f}" if c in found else "" for c in contexts]
        if any(cells):
            ours = "**" if (system, mode) == ("memos_engine", "splice") else ""
            out.append([f"{system}, {_MODES[mode]}", *(f"{ours}{c}{ours}" for c in cells)])
    return f"{_markdown(out)}\n\n`{document['command']}`"


def _way(row: dict[str, Any]) -> str:
    return "refine" if row["mode"] == "splice" and row["recompute"] else str(row["mode"])


_MODES = {
    "full": "full prefill",
    "prefix": "the same memories at the head, in the same order as before",
    "refine": "spliced in any order, 15 % of their tokens computed again",
    "splice": "spliced, any memories in any order",
}


def _command(document: dict[str, Any], words: Sequence[str]) -> str:
    partial = "" if document.get("complete") else " (interrupted: not all of it)"
    return f"`{document['command']}`{partial}, {document['seconds']:.0f} s."


def _overview(document: dict[str, Any], words: Sequence[str]) -> str:
    parts = []
    for table in tables.overview(_selected(document, words)):
        rows = [[c.text for c in table.head]]
        rows += [[f"{c.text} ({c.small})" if c.small else c.text for c in row] for row in table.rows]
        parts.append(f"{table.caption}:\n\n{_markdown(rows)}")
    return "\n\n".join(parts)


def _listing(document: dict[str, Any], words: Sequence[str]) -> str:
    selected = _selected(document, words)
    lines = [_table(tables.listing(selected))]
    missing = tables.missing(selected)
    if missing is not None:
        said = "; ".join(", ".join(c.text for c in row if c.text) for row in missing.rows)
        lines.append(f"Not measured: {said}.")
    return "\n\n".join(lines)


def _selected(document: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The document with only the wanted rows and without the unwanted columns."""
    wanted = dict(word.split("=", 1) for word in words if "=" in word)
    dropped = {word[1:] for word in words if word.startswith("-")} | _ALWAYS_LEFT_OUT
    rows = [
        {key: value for key, value in row.items() if key not in dropped}
        for row in document["rows"]
        if all(str(row.get(key)) in value.split(",") for key, value in wanted.items())
    ]
    return {**document, "rows": rows}


_ALWAYS_LEFT_OUT = {"limit_ms", "limit_us", "stages_ms", "direct_samples"}


def _standings(document: dict[str, Any], words: Sequence[str]) -> str:
    table = tables.ranking(standings(_selected(document, words)))
    return "No other system was measured beside ours." if table is None else _table(table)


def _ratios(document: dict[str, Any], words: Sequence[str]) -> str:
    table = tables.ratios(document)
    return "None." if table is None else _table(table)


def _table(table: tables.Table) -> str:
    rows = [[f"{c.text} ({c.small})" if c.small else c.text for c in row] for row in table.rows]
    return _markdown([[c.text for c in table.head], *rows])


def _notes(document: dict[str, Any], words: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in document.get("notes", ())) or "- Nothing."


_VIEWS = {
    "command": _command,
    "overview": _overview,
    "listing": _listing,
    "ratios": _ratios,
    "standings": _standings,
    "notes": _notes,
}


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
