"""report=FILE.html: one page that needs nothing else; bars with the range of the rounds."""

import html
from collections.abc import Callable

from ghostnet.tools.benchmark.results import Result, columns, gib, lines, number

STYLE = """
:root { color-scheme: light dark; --ours: #0b6bcb; --peer: #8a8f98; --line: #c9ccd1; --text: #1b1d21; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ours: #5aa9f5; --peer: #8d939e; --line: #444a53; --text: #e6e8eb; --back: #16181c; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
code { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
svg text { fill: var(--text); font-size: 14px; }
.ours { fill: var(--ours); } .peer { fill: var(--peer); } .range { stroke: var(--text); stroke-width: 1.5; }
"""
WIDTH, LABEL, BAR, ROW = 900, 250, 500, 34


def page(result: Result) -> str:
    """The whole page, every text in it escaped."""
    unit = "less is better" if result["unit"] == "seconds" else "more is better"
    per = "CPU seconds" if result["unit"] == "seconds" else "CPU seconds for 1,000 images"
    what = "seconds" if result["unit"] == "seconds" else "speed"
    parts = [
        f"<h1>{_text('benchmark ' + result['benchmark'])}</h1>",
        f"<p><code>{_text(result['command'])}</code></p>",
        _table(result),
        *(f"<p>{_text(line)}</p>" for line in lines(result)),
        _chart(result, what, f"{result['unit']} ({unit})", number),
        _chart(result, "cpu_seconds", f"{per} (less is better)", number),
        _chart(result, "memory", "peak memory (less is better)", gib),
        _chart(result, "card_memory", "peak memory on the card (less is better)", gib),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(result["benchmark"])}'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )


def _table(result: Result) -> str:
    shown = columns(result)
    head = "".join(f"<th>{_text(heading)}</th>" for heading, _ in shown)
    rows = ["".join(f"<td>{_text(cell(row))}</td>" for _, cell in shown) for row in result["subjects"]]
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>"


def _chart(result: Result, key: str, title: str, form: Callable[[float], str]) -> str:
    """A bar for each subject, as long as its median, and a line over the range of its rounds."""
    rows = [row for row in result["subjects"] if key in row["median"]]
    most = max((measured[key] for row in rows for measured in row["rounds"]), default=0)
    if not most:
        return ""
    bars = []
    for place, row in enumerate(rows):
        values, top = [measured[key] for measured in row["rounds"]], place * ROW
        low, high, length = (LABEL + BAR * v / most for v in (min(values), max(values), row["median"][key]))
        kind, middle = "ours" if row["peer"] is None else "peer", top + ROW / 2
        bars.append(
            f'<text x="0" y="{middle + 5:.0f}">{_text(row["name"])}</text>'
            f'<rect class="{kind}" x="{LABEL}" y="{top + 6}" width="{length - LABEL:.1f}" height="{ROW - 12}"/>'
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.0f}" y2="{middle:.0f}"/>'
            f'<text x="{max(high, length) + 8:.1f}" y="{middle + 5:.0f}">{_text(form(row["median"][key]))}</text>'
        )
    height = ROW * len(rows)
    return (
        f'<h2>{_text(title)}</h2>\n<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(title)}">\n'
        + "\n".join(bars)
        + "\n</svg>"
    )


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)
