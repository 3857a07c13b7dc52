"""The report as one HTML file: no script, no request to anywhere, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from memos_engine.bench.report import tables
from memos_engine.bench.report.headlines import Headline, headlines
from memos_engine.bench.report.plots import Plot
from memos_engine.bench.report.standings import Standing, standings
from memos_engine.bench.report.style import css
from memos_engine.bench.report.tables import Cell, Table
from memos_engine.bench.report.values import Document, clean, figure, measured, number, part, records
from memos_engine.bench.report.verdicts import summary_of
from memos_engine.bench.report.words import BENCHES, heading, lead, reading

ORDER = tuple(BENCHES)
# A table with more rows is folded: SOME where a summary stands above it, LONG where nothing does.
SOME, LONG = 8, 24
INSTALL = "pip install 'memos-engine[bench]'"


def render(documents: Sequence[Document], plots: Mapping[int, Sequence[Plot]], drawn: bool) -> str:
    """The page. plots: by position in `documents`; drawn: whether plots could be made at all."""
    order = sorted(range(len(documents)), key=lambda i: (_place(documents[i]), i))
    names = _anchors([documents[i] for i in order])
    body = [_header(documents, [documents[i] for i in order], names)]
    body.append("<main>")
    body.append(_summary(documents, drawn))
    body.append(_reading(documents))
    for i, name, title in zip(order, names, headings([documents[i] for i in order]), strict=True):
        body.append(_section(documents[i], name, title, plots.get(i, ())))
    body.append(_machines(documents))
    body.append("</main>")
    body.append(_footer(documents))
    page_title = f"memos_engine: benchmark report{_of(documents)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(page_title)}</title>\n<style>{css()}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#summary">To the summary</a>\n' + "\n".join(body) + "\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Any value, cleaned and escaped, also for use in an attribute."""
    return escape(str(clean(value)), quote=True)


def command_html(command: str) -> str:
    """A command whose lines break between options only, never inside one."""
    groups: list[str] = []
    for word in clean(command).split():
        if groups and not word.startswith("-") and groups[-1].startswith("-") and " " not in groups[-1]:
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    return " ".join(f"<span>{text(group)}</span>" for group in groups)


def _place(document: Document) -> int:
    bench = clean(document.get("bench"))
    return ORDER.index(bench) if bench in ORDER else len(ORDER)


def _anchors(documents: Sequence[Document]) -> list[str]:
    return [f"s{i + 1}" for i in range(len(documents))]


def _of(documents: Sequence[Document]) -> str:
    cpus = dict.fromkeys(_device(document) for document in documents)
    return f", {next(iter(cpus))}" if len(cpus) == 1 and next(iter(cpus)) else ""


def _device(document: Document) -> str:
    machine = part(document, "machine")
    return str(clean(machine.get("gpu") or machine.get("cpu"), 80))


def _header(documents: Sequence[Document], ordered: Sequence[Document], names: Sequence[str]) -> str:
    machines = list(dict.fromkeys(d for d in map(_device, documents) if d))
    models = list(dict.fromkeys(m for d in documents if (m := clean(part(d, "config").get("model"), 60))))
    commits = list(dict.fromkeys(c for d in documents if (c := clean(d.get("commit"), 40))))
    dates = sorted({clean(d.get("started"), 40)[:10] for d in documents if d.get("started")})
    words = [", ".join(machines[:3]), ", ".join(models[:4])]
    words.append(f"commit {', '.join(commits[:3])}" if commits else "")
    words.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "")
    links = "".join(
        f'<li><a href="#{name}">{text(title)}</a></li>'
        for title, name in zip(headings(ordered), names, strict=True)
    )
    return (
        '<header>\n<p class="eyebrow">memos_engine</p>\n<h1>Benchmark report</h1>\n'
        f'<p class="lead">{text(" · ".join(w for w in words if w))}</p>\n{_partial(documents)}'
        '<nav aria-label="Sections"><ul><li><a href="#summary">Summary</a></li>'
        f'<li><a href="#reading">How to read this</a></li>{links}'
        '<li><a href="#machine">Machine and versions</a></li></ul></nav>\n</header>'
    )


def _partial(documents: Sequence[Document]) -> str:
    names = [_heading(d) for d in documents if d.get("complete") is False]
    if not names:
        return ""
    return (
        f'<p class="box alert"><b>Incomplete.</b> The run of {text(", ".join(names))} was interrupted: what '
        "is missing has not been measured. Run it again with <code>--resume</code>.</p>\n"
    )


def _heading(document: Document) -> str:
    return str(heading(clean(document.get("bench"), 60) or "unnamed bench"))


def headings(documents: Sequence[Document]) -> list[str]:
    """Titles of sections; where a bench ran several times, its dtype and model tell the runs apart."""
    plain = [_heading(document) for document in documents]
    titles = []
    for document, title in zip(documents, plain, strict=True):
        config = part(document, "config")
        words = [w for key in ("dtype", "model") if (w := clean(config.get(key), 40))]
        titles.append(f"{title} ({', '.join(words)})" if plain.count(title) > 1 and words else title)
    return titles


def _summary(documents: Sequence[Document], drawn: bool) -> str:
    cards = "".join(map(_card, headlines(documents)))
    found = [(d, item) for d in documents for item in standings(d)]
    pieces = ['<section id="summary" aria-labelledby="summary-h"><h2 id="summary-h">Summary</h2>']
    if cards:
        pieces.append(f'<div class="cards">{cards}</div>')
    elif not any(records(d) for d in documents):
        pieces.append('<p class="box alert">No rows: nothing has been measured yet.</p>')
    if found:
        pieces.append(_where_we_stand([item for _, item in found]))
    if not drawn:
        pieces.append(
            "<p class='box'>This page has no plots, because matplotlib is not installed. "
            f"<code>{text(INSTALL)}</code> brings it; then write the report again.</p>"
        )
    pieces.append("</section>")
    return "\n".join(pieces)


_MARKS = {"ahead": "ahead", "behind": "behind", "level": "level"}


def _card(card: Headline) -> str:
    mark = f'<span class="mark {card.tone}">{_MARKS[card.tone]}</span>' if card.tone else ""
    return (
        f'<article class="card {card.tone}"><h3>{text(card.title)}{mark}</h3>'
        f'<p class="big">{text(card.number)}</p><p>{text(card.meaning)}</p>'
        f'<p class="from">{text(card.n)}<br><code>{command_html(card.command)}</code></p></article>'
    )


def _where_we_stand(found: Sequence[Standing]) -> str:
    lines = "".join(
        f"<li>{said}<small>{note}</small></li>"
        for said, note in ((text(a), text(b)) for a, b in summary_of(found)[1])
    )
    listed = f'<ul class="ledger">{lines}</ul>' if lines else ""
    behind = any(item.verdict == "behind" for item in found)
    return (
        f'<div class="box"><h3>{"Where others are ahead" if behind else "Where ours stands"}</h3>'
        f"<p>{text(summary_of(found)[0])}</p>{listed}</div>"
    )


def _reading(documents: Sequence[Document]) -> str:
    terms = "".join(
        f"<div><dt>{text(term)}</dt><dd>{text(words)}</dd></div>"
        for term, words in reading({clean(d.get("bench")) for d in documents})
    )
    return (
        '<section id="reading" aria-labelledby="reading-h"><h2 id="reading-h">How to read this</h2>'
        f'<dl class="terms box">{terms}</dl></section>'
    )


def _section(document: Document, name: str, title: str, plots: Sequence[Plot]) -> str:
    bench = clean(document.get("bench"), 60)
    command = clean(document.get("command")) or f"memos-engine bench {bench}"
    pieces = [f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{text(title)}</h2>']
    if words := lead(bench):
        pieces.append(f"<p>{text(words)}</p>")
    if document.get("complete") is False:
        done = document.get("units")
        count = f" {len(done)} units of work are here." if isinstance(done, list) else ""
        pieces.append(
            f'<p class="box alert"><b>Incomplete run.</b>{count} Absent rows were not measured.</p>'
        )
    pieces.append(f'<code class="command">{command_html(command)}</code>{_when(document)}')
    if plots:
        pieces.append(f'<div class="plots">{"".join(_plot(plot, command) for plot in plots)}</div>')
    pieces += [table_html(table, command) for table in tables.overview(document)]
    ranking = tables.ranking(standings(document))
    if ranking is not None:
        pieces.append(_fold(ranking, command, ranking.caption, folded=len(ranking.rows) > SOME))
    if (ratios := tables.ratios(document)) is not None:
        pieces.append(_fold(ratios, command, ratios.caption, folded=len(ratios.rows) > LONG))
    pieces.append(_all_rows(document, command))
    if (absent := tables.missing(document)) is not None:
        pieces.append(table_html(absent, command))
    pieces.append(_notes(document))
    pieces += [_more(table) for table in (tables.ceilings(document), tables.config(document)) if table]
    pieces.append("</section>")
    return "\n".join(piece for piece in pieces if piece)


def _all_rows(document: Document, command: str) -> str:
    """In the open where it is the only table, else one click away."""
    table = tables.listing(document)
    if not table.rows:
        return ""
    words = f"All {len(table.rows)} measured rows"
    folded = len(table.rows) > LONG or bool(tables.overview(document))
    return _fold(table, command, words, folded, kind=' class="rows"')


def _fold(table: Table, command: str, words: str, folded: bool, kind: str = "") -> str:
    shown = table_html(table, command)
    return f"<details{kind}><summary>{text(words)}</summary>{shown}</details>" if folded else shown


def _more(table: Table) -> str:
    shown = table_html(table, "")
    return f'<details class="rows"><summary>{text(table.caption)}</summary>{shown}</details>'


def _notes(document: Document) -> str:
    notes = document.get("notes")
    lines = [text(note) for note in notes] if isinstance(notes, (list, tuple)) else []
    over = sum((number(row, "share_of_limit") or 0) > 1.05 for row in measured(records(document)))
    if over:
        lines.append(
            text(
                f"Rows above 100 % of the limit: {over}. The ceilings were measured at a worse moment, so "
                "shares of this run are too high."
            )
        )
    load = number(part(document, "machine"), "load_average")
    cores = number(part(document, "machine"), "cores")
    if load is not None and cores and load > 1.25 * cores:
        lines.append(
            text(
                f"The machine was busy: load average {figure(load)} on {figure(cores)} cores; times are high."
            )
        )
    if not lines:
        return ""
    return f'<h3>Notes</h3><ul class="notes">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def _when(document: Document) -> str:
    seconds, started = number(document, "seconds"), clean(document.get("started"), 40)
    words = [f"begun {started.replace('T', ' ').replace('+00:00', ' UTC')}" if started else ""]
    words.append(f"took {figure(seconds)} s" if seconds else "")
    words.append(f"commit {clean(document.get('commit'), 40)}" if document.get("commit") else "")
    said = ", ".join(word for word in words if word)
    return f'<p class="when">{text(said)}</p>' if said else ""


def _plot(plot: Plot, command: str) -> str:
    return (
        f'<figure class="box"><figcaption><b>{text(plot.title)}</b><span>{text(plot.caption)}</span>'
        f"<code>{command_html(command)}</code></figcaption>"
        f'<div class="plot wide">{plot.wide}</div><div class="plot narrow">{plot.narrow}</div></figure>'
    )


def table_html(table: Table, command: str) -> str:
    """A table in a box of its own that scrolls sideways, with its command above."""
    caption = text(table.caption)
    head = "".join(f'<th scope="col"{_class(cell, "")}>{text(cell.text)}</th>' for cell in table.head)
    rows = []
    paired = {j for row in table.rows for j, cell in enumerate(row) if cell.numeric and cell.small}
    for i, row in enumerate(table.rows):
        mark = ' class="ours"' if i in table.ours else ""
        cells = "".join(_cell(cell, first=j == 0, paired=j in paired) for j, cell in enumerate(row))
        rows.append(f"<tr{mark}>{cells}</tr>")
    shown = f"<code>{command_html(command)}</code>" if command else ""
    return (
        f'<figure class="tablebox"><figcaption><b>{caption}</b>{shown}</figcaption>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>'
        f'<caption class="hidden">{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def _cell(cell: Cell, first: bool, paired: bool) -> str:
    """paired: the column holds second numbers, so their place is kept where there is none."""
    small = f"<small>{text(cell.small)}</small>" if cell.small or (paired and cell.text) else ""
    shown = f"<b>{text(cell.text)}</b>" if cell.tone else text(cell.text)
    if first:
        return f'<th scope="row"{_class(cell, _width(cell))}>{shown}{small}</th>'
    kind = "" if cell.numeric else f"text {_width(cell)}".strip()
    return f"<td{_class(cell, kind)}>{shown}{small}</td>"


def _width(cell: Cell) -> str:
    """Long text gets room, short text stays on its line; only words too long for any column may break."""
    words = f"{cell.text} {cell.small}".split()
    room = "long" if len(cell.text) > 40 else "short" if len(cell.text) <= 14 and not cell.small else ""
    return f"{room} breaks".strip() if any(len(word) > 26 for word in words) else room


def _class(cell: Cell, kind: str) -> str:
    words = [w for w in ("num" if cell.numeric else "", kind, cell.tone) if w]
    return f' class="{" ".join(words)}"' if words else ""


FACTS = (
    ("cpu", "CPU"), ("gpu", "GPU"), ("cores", "cores"), ("threads", "threads"), ("memory_gib", "memory, GiB"),
    ("system", "system"), ("python", "Python"), ("torch", "torch"), ("transformers", "transformers"),
    ("memos_engine", "memos_engine"),
)  # fmt: skip


def _machines(documents: Sequence[Document]) -> str:
    """One list where all runs share it, with a warning where they do not."""
    seen: dict[tuple[str, ...], list[Document]] = {}
    for document in documents:
        machine = part(document, "machine")
        seen.setdefault(tuple(clean(machine.get(key), 120) for key, _ in FACTS), []).append(document)
    pieces = [
        '<section id="machine" aria-labelledby="machine-h"><h2 id="machine-h">Machine and versions</h2>'
    ]
    if len(seen) > 1:
        pieces.append(
            '<p class="box alert"><b>Several machines.</b> The runs below were not made in one setting: '
            "their times do not compare with each other.</p>"
        )
    for values, own in seen.items():
        facts = [(name, value) for (_, name), value in zip(FACTS, values, strict=True) if value]
        loads = [figure(v) for d in own if (v := number(part(d, "machine"), "load_average")) is not None]
        facts.append(("load average", " / ".join(loads))) if loads else None
        commits = dict.fromkeys(clean(d.get("commit"), 60) or "not recorded" for d in own)
        facts += [("commit", ", ".join(commits)), ("benches", ", ".join(_heading(d) for d in own))]
        lines = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts)
        pieces.append(f'<dl class="facts box">{lines}</dl>')
        ops = part(part(own[0], "machine"), "ops")
        systems: dict[str, Any] = {}
        for document in own:
            systems |= part(part(document, "machine"), "systems")
        found = (tables.pairs("Systems and their versions", systems), tables.pairs("Kernels in use", ops))
        pieces += [_more(table) for table in found if table]
    return "\n".join([*pieces, "</section>"])


def _footer(documents: Sequence[Document]) -> str:
    commands = list(dict.fromkeys(clean(d.get("command")) for d in documents if d.get("command")))
    lines = "".join(f'<code class="command">{command_html(command)}</code>' for command in commands)
    again = f"<p>The commands that make this report:</p>{lines}" if lines else ""
    return (
        f"<footer>{again}<p>This page loads nothing: it can be read, kept and sent as one file.</p></footer>"
    )
