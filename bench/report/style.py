"""The page's style sheet: light and dark, phone to desktop, and paper."""

from __future__ import annotations

from memos_engine.bench.report.palette import ROLES, variable

# role: (light, dark)
PAGE = {
    "bg": ("#f5f4f1", "#121418"),
    "surface": ("#ffffff", "#1b1e24"),
    "ink": ("#1b1f26", "#e7e9ed"),
    "muted": ("#565e6a", "#a3abb7"),
    "line": ("#dcdad4", "#333842"),
    "accent": ("#b53c06", "#ff8f5c"),
    "tint": ("#fdf1ea", "#2a2220"),
    "code": ("#f0eeea", "#15171c"),
    "good": ("#136b3f", "#5fd39a"),
    "bad": ("#a3154a", "#ff8fb0"),
    "badtint": ("#fbe9ef", "#33202a"),
    "even": ("#565e6a", "#a3abb7"),
}

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--bg);color:var(--ink);line-height:1.55;
 font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:1rem;
 overflow-wrap:anywhere}
main,header,footer{max-width:74rem;margin:0 auto;padding:0 1.5rem}
header{padding-top:2.75rem}
h1{font-size:clamp(1.7rem,1.2rem + 2.2vw,2.7rem);line-height:1.12;letter-spacing:-.022em;margin:.2rem 0 .7rem;
 text-wrap:balance}
h2{font-size:clamp(1.35rem,1.1rem + 1vw,1.8rem);line-height:1.2;letter-spacing:-.015em;margin:0 0 .5rem}
h3{font-size:1.02rem;margin:2rem 0 .6rem}
p{margin:.4rem 0 .9rem;max-width:46rem;text-wrap:pretty}
a{color:var(--accent);text-underline-offset:.18em}
a:focus-visible,.scroll:focus-visible,summary:focus-visible{outline:3px solid var(--accent);
 outline-offset:2px}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.86em}
.eyebrow{color:var(--accent);font-weight:650;letter-spacing:.02em;margin:0}
.lead{font-size:1.08rem;color:var(--muted)}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--surface);padding:.5rem 1rem;z-index:9}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:.8rem 0;margin:1.2rem 0 0;
 border-block:1px solid var(--line)}
section{padding-top:3.2rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1rem;
 margin:1.2rem 0}
.card{background:var(--surface);border:1px solid var(--line);border-radius:.75rem;padding:1.1rem 1.2rem 1rem;
 display:flex;flex-direction:column}
.card h3{margin:0;font-size:.92rem;font-weight:600;color:var(--muted);display:flex;gap:.6rem;
 justify-content:space-between;align-items:baseline}
.card .big{font-size:2.65rem;line-height:1.15;font-weight:700;letter-spacing:-.03em;margin:.25rem 0 .2rem;
 font-variant-numeric:tabular-nums}
.card.ahead .big{color:var(--accent)}
.card p{margin:0 0 .8rem}
.card .from{margin:auto 0 0;padding-top:.7rem;border-top:1px solid var(--line);color:var(--muted);
 font-size:.84rem}
.mark{font-size:.78rem;font-weight:650;white-space:nowrap}
.ahead>.mark,td.ahead b,.mark.ahead{color:var(--good)}
.behind>.mark,td.behind b,.mark.behind,td.failed b{color:var(--bad)}
.level>.mark,td.level b,.mark.level{color:var(--even)}
.box{background:var(--surface);border:1px solid var(--line);border-radius:.75rem;padding:1.1rem 1.3rem;
 margin:1rem 0}
.box.alert{border-color:var(--bad);background:var(--badtint)}
.box>:first-child{margin-top:0}.box>:last-child{margin-bottom:0}
.command{display:block;background:var(--code);border:1px solid var(--line);border-radius:.5rem;
 padding:.55rem .8rem;margin:.3rem 0 1rem;overflow-wrap:anywhere}
.terms{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem 2rem;margin:0}
.terms dt{font-weight:650}.terms dd{margin:.1rem 0 0;color:var(--muted);font-size:.95rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.7rem 2rem;
 margin:0}
.facts dt{color:var(--muted);font-size:.84rem}.facts dd{margin:0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,31rem),1fr));gap:1rem;
 align-items:start;margin:1.2rem 0}
figure{margin:0;min-width:0}
figure.box{margin:0;max-width:47rem}
figcaption{margin-bottom:.7rem}
figcaption b{display:block;line-height:1.35}
figcaption span{display:block;color:var(--muted);font-size:.88rem;margin-top:.2rem}
figcaption code{color:var(--muted);font-size:.78rem}
.plot svg{display:block;width:100%;height:auto;overflow:visible}
.plot svg *{stroke-linejoin:round;stroke-linecap:butt}
.plot text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif!important}
.plot.narrow{display:none}
.tablebox{margin:1rem 0 1.6rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.6rem;background:var(--surface);
 -webkit-overflow-scrolling:touch}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.9rem;overflow-wrap:normal}
.when{color:var(--muted);font-size:.88rem;margin-top:-.6rem}
code span{display:inline-block;max-width:100%}
.tablebox figcaption{margin-bottom:.45rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
th,td{padding:.42rem .8rem;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:600;font-size:.82rem;line-height:1.25;vertical-align:bottom;
 background:var(--surface)}
tbody th{font-weight:500;min-width:6rem;max-width:22rem}
td{min-width:3rem;max-width:30rem}
td.text{min-width:5rem}
td.long,th.long{min-width:13rem}
td.short{white-space:nowrap}
.breaks{overflow-wrap:anywhere;min-width:8rem}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
thead th.num{white-space:normal;min-width:4.6rem}
tr.ours>*{background:var(--tint)}
tr.ours>th{font-weight:700;box-shadow:inset 3px 0 0 var(--accent)}
td.num small{display:inline-block;min-width:3.3em;margin-left:.35em;text-align:right}
td small,th small{display:block;color:var(--muted);font-size:.8em;font-weight:400}
td b{font-weight:600}
details{margin:.8rem 0}
summary{cursor:pointer;font-weight:600;padding:.3rem 0}
.notes{padding-left:1.2rem;max-width:46rem}.notes li{margin:.25rem 0}
.ledger{list-style:none;padding:0;margin:.6rem 0 0}
.ledger li{padding:.45rem 0;border-top:1px solid var(--line)}
.ledger small{color:var(--muted);display:block}
footer{padding-block:3rem;color:var(--muted);font-size:.9rem}
@media(max-width:40rem){
 main,header,footer{padding-inline:1rem}
 header{padding-top:1.6rem}
 section{padding-top:2.4rem}
 .box,.card{padding:.9rem 1rem}
 figure.box{padding:.9rem .65rem}figcaption{padding-inline:.35rem}
 .plot.wide{display:none}.plot.narrow{display:block}
 th,td{padding:.4rem .6rem}
 td.num small{display:block;margin:0}
 tbody th{position:sticky;left:0;background:var(--surface);max-width:9.5rem;font-size:.84rem;z-index:1;
  box-shadow:inset -1px 0 0 var(--line)}
 tr.ours>th{box-shadow:inset 3px 0 0 var(--accent),inset -1px 0 0 var(--line)}
}
@media print{
 :root{color-scheme:light}
 @page{margin:14mm}
 html{font-size:9pt}body{background:#fff}
 main,header,footer{max-width:none;padding-inline:0}
 nav,.skip{display:none}
 section{padding-top:1.4rem}
 .card,figure,.tablebox,tr{break-inside:avoid}
 h2,h3,figcaption{break-after:avoid}
 .scroll{overflow:visible;border:0}
 th,td{padding:.2rem .4rem}td,th,td.text,td.long,thead th.num,tbody th{min-width:0}
 .plots{grid-template-columns:1fr 1fr}
 .plot.wide{display:none}.plot.narrow{display:block}
 details:not(.rows)::details-content{content-visibility:visible;block-size:auto}
}
"""


def _variables(column: int) -> str:
    page = [f"--{role}:{colours[column]}" for role, colours in PAGE.items()]
    plots = [f"{variable(role)}:{colours[column]}" for role, colours in ROLES.items()]
    return ";".join([*page, *plots])


def css() -> str:
    """The whole sheet. Dark only on screens: paper is light."""
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}"
    return f":root{{color-scheme:light dark;{_variables(0)}}}\n{dark}{_RULES}"
