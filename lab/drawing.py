"""Pages without a server: curves as SVG, tables and pictures as parts of one HTML file.

lab/report.py draws a run with it, lab/compare.py several.
"""
import base64
import html
import math
import statistics
from pathlib import Path

COLORS = ("#2f6fd0", "#d97706", "#15803d", "#8b4fc0", "#be185d")
WIDE, LEFT, BOTTOM, TOP, RIGHT = 960, 64, 48, 14, 20      # of a chart: width and margins

STYLE = """
:root { --ink: #1d2733; --quiet: #5f6b7a; --line: #e1e7ee; --soft: #f6f8fb; --blue: #2f6fd0 }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; max-width: 62rem;
       margin: 0 auto; padding: 2.2rem 1.4rem 5rem; color: var(--ink); background: #fff }
h1 { margin: 0 0 .2rem; font-size: 2rem; letter-spacing: -.01em }
h2 { margin: 3rem 0 .9rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line);
     font-size: 1.35rem }
h3 { margin: 2rem 0 .4rem; font-size: 1.05rem }
small, .quiet { color: var(--quiet); font-size: .88rem }
code, pre { font: .88rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px;
      padding: .7rem 1rem; white-space: pre-wrap }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom }
td, th { padding: .32rem 1.1rem .32rem 0; text-align: right; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child, td.text, th.text { text-align: left }
td.text { color: var(--quiet) }
.scroll { overflow-x: auto }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.3rem 0 }
.tile { flex: 1 1 8rem; background: var(--soft); border: 1px solid var(--line);
        border-radius: 10px; padding: .65rem .95rem }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums }
.bar { position: relative; width: 12rem; height: 1rem; background: #edf1f5; border-radius: 3px }
.bar i { position: absolute; left: 0; height: 100%; border-radius: 3px }
.bar .got { background: var(--blue) } .bar .blank { background: #d97706; height: 35%; bottom: 0 }
.bar .chance { width: 2px; background: var(--ink); border-radius: 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: 1rem }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .8rem; overflow: hidden;
        overflow-wrap: anywhere }
.card .frames { display: flex; flex-wrap: wrap; gap: 4px; margin-bottom: .5rem }
.card img { image-rendering: pixelated; border-radius: 4px; width: 100%; max-width: 192px }
.card .two img { width: calc(50% - 2px) } .card .many img { width: calc(33.3% - 3px) }
.card p { margin: .2rem 0 }
.right { color: #15803d; font-weight: 600 } .wrong { color: #b91c1c; font-weight: 600 }
figure { margin: 1.4rem 0 2rem } figcaption { font-weight: 600 }
figure svg { display: block; width: 100%; height: auto }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: .15rem 0 .35rem }
.legend i { display: inline-block; width: 1.1rem; height: .25rem; border-radius: 2px;
            margin-right: .45rem; vertical-align: middle }
.wide img { max-width: 100%; border-radius: 6px }
details { margin: .9rem 0 } summary { cursor: pointer; color: var(--blue) }
@media print { details > * { display: block } .card, figure { break-inside: avoid } }
"""

def page_html(title: str, parts: list[str]) -> str:
    """A whole page."""
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}'
            f"</style><body>{''.join(parts)}</body></html>\n")


def inline(path: Path) -> str:
    """A picture file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# ---- charts -------------------------------------------------------------------------------------

def smooth(points: list) -> list:
    """Means of x and y over consecutive stretches: of a long series 50 to 100 of them."""
    size = max(1, len(points) // 50)
    stretches = [points[i:i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
            for part in stretches]


def ticks(most: float, count: int) -> list[float]:
    """Round numbers from 0 to `most`, at most `count` of them behind the 0."""
    size = 10.0 ** math.floor(math.log10(most / count))
    step = next(k * size for k in (1, 2, 5, 10) if most / (k * size) <= count)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]


def curve(series: dict[str, list], title: str, unit: str = "step", height: int = 300,
          clip: bool = False, bands: dict[str, list] | None = None,
          dashed: dict[str, str] | None = None) -> str:
    """{name: [(x, y), ...]} as a chart of full width, axes from 0 to the largest x and y; nothing
    where every series has less than two points. The legend shows the last value of each series.

    clip: end the y axis at four times the median, for losses, whose first values are far larger
    than the rest. bands: {name: [(x, low, high), ...]} that are shaded behind the lines. dashed:
    {name: another}, a dashed line in the other one's color.
    """
    bands, dashed = bands or {}, dashed or {}
    if not any(len(points) > 1 for points in series.values()):
        return ""
    series = {name: points for name, points in series.items() if points}
    right = max(x for points in series.values() for x, _ in points) or 1
    heights = sorted(y for points in [*series.values(), *bands.values()]
                     for _, *values in points for y in values)
    most = min(heights[-1], 4 * statistics.median(heights)) if clip else heights[-1]
    most = most if most > 0 else 1
    least = min(0, heights[0])

    def at_x(x):
        return LEFT + x / right * (WIDE - LEFT - RIGHT)

    def at_y(y):
        share = (min(y, most) - least) / (most - least)
        return height - BOTTOM - share * (height - BOTTOM - TOP)

    parts = []
    for y in ticks(most, 5):
        parts.append(f'<path d="M{LEFT} {at_y(y):.1f}H{WIDE - RIGHT}" stroke="#e1e7ee"/>'
                     f'<text x="{LEFT - 9}" y="{at_y(y) + 5:.1f}" text-anchor="end">'
                     f"{number(y)}</text>")
    for x in ticks(right, 8):
        parts.append(f'<text x="{at_x(x):.1f}" y="{height - BOTTOM + 21}" text-anchor="middle">'
                     f"{number(x)}</text>")
    parts.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{height - 5}" text-anchor="middle">'
                 f"{html.escape(unit)}</text>")
    legend = []
    own = [name for name in series if name not in dashed]       # those with a color of their own
    for name, points in series.items():
        i = own.index(dashed.get(name, name))
        color = COLORS[i % len(COLORS)]
        broken = name in dashed or i // len(COLORS) % 2     # or there are more lines than colors
        if band := bands.get(name):
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            area = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in edge)
            parts.append(f'<polygon points="{area}" fill="{color}" opacity="0.15"/>')
        if len(points) > 1:
            line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" '
                         'stroke-width="2.5" stroke-linejoin="round"'
                         + ' stroke-dasharray="8 5"' * broken + "/>")
        if len(points) <= 20:               # few measurements: show where they are
            parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4" fill="{color}"/>'
                      for x, y in points]
        swatch = f"linear-gradient(90deg,{color} 38%,#fff 38% 62%,{color} 62%)" if broken else color
        legend.append(f'<span><i style="background:{swatch}"></i>{html.escape(name)} '
                      f'<b>{number(points[-1][1])}</b></span>')
    if heights[-1] > most:
        legend.append(f"<span>values above {number(most)} are cut off</span>")
    return (f"<figure><figcaption>{html.escape(title)}</figcaption>"
            f'<div class="legend quiet">{"".join(legend)}</div>'
            f'<svg viewBox="0 0 {WIDE} {height}" role="img" aria-label="{html.escape(title)}" '
            f'font-size="15" fill="#5f6b7a">{"".join(parts)}</svg></figure>')


# ---- tables -------------------------------------------------------------------------------------

def number(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_html(table: dict) -> str:
    """The table of `sample.evaluate`, with a bar for each category."""
    rows = ["<tr><th>category</th><th>accuracy</th><th>95% interval</th><th>grey picture</th>"
            "<th>chance</th><th>tasks</th><th></th></tr>"]
    for name, r in table.items():
        bar = (f'<div class="bar"><i class="got" style="width:{r["accuracy"]:.1%}"></i>'
               f'<i class="blank" style="width:{r["blank"]:.1%}"></i>'
               f'<i class="chance" style="left:{r["chance"]:.1%}"></i></div>')
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{r['accuracy']:.1%}</td>"
                    f"<td>{r['low']:.1%} – {r['high']:.1%}</td><td>{r['blank']:.1%}</td>"
                    f"<td>{r['chance']:.1%}</td><td>{r['n']}</td><td>{bar}</td></tr>")
    return (f'<div class="scroll"><table>{"".join(rows)}</table></div><p class="quiet">Blue: share '
            "of tasks that are solved in full, with seeds, words, colours and layouts that "
            "training never saw. Orange: the same model and tasks, with a grey picture instead. "
            "Black line: the best score without looking at the picture.</p>")


def groups_html(facts: dict) -> str:
    """The table of an evaluation on own questions (lib/own_eval.py), and what was skipped."""
    rows = ["<tr><th>group</th><th>score</th><th>95% interval</th><th>grey picture</th>"
            "<th>chance</th><th>questions</th><th>unread</th><th>mean IoU</th></tr>"]
    for name, r in [*facts["groups"].items(), ("all", facts["all"])]:
        guess = "" if r["chance"] is None else f"{r['chance']:.1%}"
        overlap = f"{r['mean_iou']:.3f}" if "mean_iou" in r else ""
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{r['accuracy']:.1%}</td>"
                    f"<td>{r['low']:.1%} – {r['high']:.1%}</td><td>{r['blank']:.1%}</td>"
                    f"<td>{guess}</td><td>{r['n']:,}</td><td>{r['unread']:,}</td>"
                    f"<td>{overlap}</td></tr>")
    skipped = "".join(f"<li>{count:,} x {html.escape(kind)}, the first: {html.escape(first)}</li>"
                      for kind, (count, first) in facts["skipped"].items())
    if skipped:
        skipped = f'<p>Lines that were skipped:</p><ul class="quiet">{skipped}</ul>'
    return (f'<div class="scroll"><table>{"".join(rows)}</table></div><p class="quiet">Score: the '
            "mean over the questions; of boxes, the share with an IoU of at least 0.5. Grey "
            "picture: the same model and questions without anything to see. Chance: a guess among "
            "the choices, or a random point. Unread: replies that the metric could not read, such "
            f"as one without a number; they count as 0. {facts['cut_off']:,} replies were cut off "
            f"at the longest length that was allowed.</p>{skipped}")


def figures_html(figures: dict[str, dict]) -> str:
    """{row: {column: number}} as tables; not every row has every column. A row that shares no
    column with the rows above begins a new table."""
    tables = []
    for name, row in figures.items():
        known = {key for found in tables[-1].values() for key in found} if tables else set()
        if not row.keys() & known:
            tables.append({})
        tables[-1][name] = row
    return "<p></p>".join(map(one_table, tables))


def summary_html(summary: dict[str, dict[str, dict]]) -> str:
    """The means over categories of lib/summary.py, {kind: {name: mean}}, as a table."""
    rows = {}
    for name, row in [entry for kind in summary.values() for entry in kind.items()]:
        rows[name] = {f"{key}, %": 100 * row[key]
                      for key in ("accuracy", "low", "high", "blank", "chance")}
        rows[name] |= {"categories": row["categories"], "ahead": row["ahead"]}
    return figures_html(rows) + (
        '<p class="quiet">Means over categories, by family and tier, and composites; ahead: how '
        "many are 20 points or more above grey pictures and above chance.</p>")


def one_table(figures: dict[str, dict]) -> str:
    """One HTML table. If it has more than about eight columns, rows and columns are swapped."""
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    if len(columns) > max(8, len(figures)):
        swapped = {name: {row: found[name] for row, found in figures.items() if name in found}
                   for name in columns}
        figures, columns = swapped, list(figures)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    body = []
    for name, row in figures.items():
        cells = "".join(f"<td>{number(row[key])}</td>" if key in row else "<td></td>"
                        for key in columns)
        body.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def text_table(head: tuple, rows: list[tuple]) -> str:
    """Rows of plain text; the first column is set as code."""
    line = "".join(f'<th class="text">{html.escape(name)}</th>' for name in head)
    body = []
    for first, *others in rows:
        cells = "".join(f'<td class="text">{html.escape(str(cell))}</td>' for cell in others)
        body.append(f"<tr><td><code>{html.escape(str(first))}</code></td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{line}</tr>{"".join(body)}</table></div>'


def stages_html(stages: dict[str, dict]) -> str:
    """The stages of the demo, {stage: {figure, random, before, after}}, as a table with bars."""
    rows = ["<tr><th>stage</th><th class='text'>figure that it improves</th><th>random weights,<br>"
            "or a blind guess</th><th>before</th><th>after</th><th></th></tr>"]
    for stage, row in stages.items():
        bar = (f'<div class="bar"><i class="got" style="width:{row["after"]:.1f}%"></i>'
               f'<i class="chance" style="left:{row["before"]:.1f}%"></i></div>')
        random = f"{row['random']:.1f}" if "random" in row else ""
        rows.append(f"<tr><td>{html.escape(stage)}</td><td class='text'>"
                    f"{html.escape(row['figure'])}</td><td>{random}</td><td>{row['before']:.1f}"
                    f"</td><td><b>{row['after']:.1f}</b></td><td>{bar}</td></tr>")
    return (f'<div class="scroll"><table>{"".join(rows)}</table></div><p class="quiet">Blue: after '
            "the stage. Black line: before it.</p>")


def tiles_html(tiles: list[tuple[str, str]]) -> str:
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><small>{name}</small><b>{value}</b></div>' for name, value in tiles
    ) + "</div>"
