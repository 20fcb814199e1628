"""One self-contained HTML page of a run: curves, table, pictures with question and answer.

    python -m lab.report out/demo
    python -m lab.report out/pretrain

Reads what scripts leave in a run folder: log.jsonl (also one folder down), report.json or
eval.json, pictures/. Nothing is fetched; the page can be mailed.
"""
import base64
import html
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lib.cli import cli, main, UserError
from lib.common import read_json, read_log, write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1d2733; background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #dde3ea }
small, .quiet { color: #66717f }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: right }
td:first-child, th:first-child { text-align: left }
.bar { position: relative; width: 12rem; height: 1rem; background: #edf1f5 }
.bar i { position: absolute; left: 0; height: 100% } .bar .got { background: #2f7dd1 }
.bar .blank { background: #e0912f; height: 35%; bottom: 0 }
.bar .chance { width: 2px; background: #1d2733 }
.cards { display: flex; flex-wrap: wrap; gap: 1.2rem } .card { width: 13rem }
.card img { width: 96px; image-rendering: pixelated; margin-right: 3px }
.right { color: #16803c } .wrong { color: #bf2c2c }
"""


# What the lines of a log hold besides loss: {title: {key: name}}.
CHARTS = {
    "probes: shares of right answers": {name: name for name in ("linear", "knn", "dense")},
    "naming and retrieval: shares of right answers":
        {name: name for name in ("zero_shot_en", "zero_shot_zh", "i2t_en", "i2t_zh")},
    "held-out pairs, and which way a thing moves: shares of right answers":
        {name: name for name in ("pairs_i2t", "pairs_t2i", "moves_en", "moves_zh")},
    "cosine to what a teacher says": {"cos_semantic": "semantic", "cos_texture": "texture"},
    "self-distillation: prototypes in use, targets undecided, features apart":
        {name: name for name in ("used", "sure", "spread")},
    "reward in training, accuracy on held-out tasks":
        {"reward": "sampled reward", "pass1": "pass@1", "accuracy": "held-out accuracy"},
    "shares of rollouts, and of tokens outside the clip band":
        {"truncated": "truncated", "errors": "errors", "clipped": "outside the band"},
    "share of groups without signal": {"silent": "silent"},
    "seconds a step": {"dt": "in all", "learning": "learning", "waited": "waiting for rollouts",
                       "idle": "players idle"},
    "updates that tokens lag behind": {"stale": "mean", "stale_max": "most"},
    "entropy, nats a token": {"entropy": "entropy"},
    "mean |log ratio| of training to sampling": {"mismatch": "mismatch"},
    "gradient norm": {"norm": "norm"},
    "tokens a second": {"tok/s": "tok/s"}}


@dataclass
class Args:
    run: str = ""                 # run folder; also as a bare word


def smooth(points: list, share: float = 0.02) -> list:
    """Means over consecutive `share` of the points, so that a long run draws as few."""
    points = [p for p in points if math.isfinite(p[1])]     # steps that were skipped are not
    size = max(1, int(len(points) * share))
    return [tuple(sum(p[k] for p in points[i:i + size]) / len(points[i:i + size]) for k in (0, 1))
            for i in range(0, len(points), size)]


def curve(series: dict[str, list], title: str, wide: int = 620, high: int = 220,
          unit: str = "step") -> str:
    """{name: [(x, y), ...]} as an SVG with axes from 0 to the largest x and y."""
    colors = ("#2f7dd1", "#e0912f", "#16803c", "#8a4fbf")
    drawn = {name: points for name, points in series.items() if len(points) > 1}
    if not drawn:
        return ""
    right = max(x for points in drawn.values() for x, _ in points) or 1
    ys = sorted(y for points in drawn.values() for _, y in points)
    top = ys[-1] or 1
    if "loss" in title:     # the first few tower over the rest: clip at four times the median
        top = min(top, 4 * ys[len(ys) // 2]) or 1

    def place(x, y):
        return (f"{45 + x / right * (wide - 60):.1f},"
                f"{high - 25 - min(y, top) / top * (high - 45):.1f}")

    parts = [f'<svg viewBox="0 0 {wide} {high}" width="{wide}" role="img" aria-label="{title}">',
             f'<text x="45" y="12" font-size="13">{title}</text>']
    form = ",.0f" if top > 100 else ".3g" if top > 10 else ".2g"
    for k in range(5):
        y = high - 25 - k / 4 * (high - 45)
        parts.append(f'<path d="M45 {y}H{wide - 15}" stroke="#e3e8ee"/>'
                     f'<text x="40" y="{y + 4}" font-size="11" text-anchor="end">'
                     f"{top * k / 4:{form}}</text>")
    parts.append(f'<text x="{wide - 15}" y="{high - 8}" font-size="11" text-anchor="end">'
                 f'{unit} {right:,.0f}</text>')
    for (name, points), color in zip(drawn.items(), colors):
        line = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    at = 45
    for (name, _), color in zip(drawn.items(), colors):
        parts.append(f'<text x="{at}" y="{high - 8}" font-size="12" fill="{color}">{name}</text>')
        at += 9 * len(name) + 20
    return "".join(parts) + "</svg>"


def table_html(table: dict) -> str:
    rows = ["<table><tr><th>category</th><th>accuracy</th><th>95% interval</th><th>blank picture"
            "</th><th>chance</th><th>tasks</th><th></th></tr>"]
    for name, r in table.items():
        bar = (f'<div class="bar"><i class="got" style="width:{r["accuracy"]:.1%}"></i>'
               f'<i class="blank" style="width:{r["blank"]:.1%}"></i>'
               f'<i class="chance" style="left:{r["chance"]:.1%}"></i></div>')
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{r['accuracy']:.1%}</td>"
                    f"<td>{r['low']:.1%} – {r['high']:.1%}</td><td>{r['blank']:.1%}</td>"
                    f"<td>{r['chance']:.1%}</td><td>{r['n']}</td><td>{bar}</td></tr>")
    return ("".join(rows) + '</table><p class="quiet">Blue: share of tasks wholly right, on seeds, '
            "words, shades and layouts that training never saw. Orange: the same model and tasks "
            "with the picture replaced by plain grey. Black line: the best guess that does not "
            "look.</p>")


def figures_html(figures: dict[str, dict]) -> str:
    """{row: {column: number}} as a table; not every row has every column. Rows that share none with
    the rows above begin a table of their own."""
    tables = []
    for name, row in figures.items():
        if not tables or not row.keys() & {key for found in tables[-1].values() for key in found}:
            tables.append({})
        tables[-1][name] = row
    return "<p></p>".join(map(one_table, tables))


def one_table(figures: dict[str, dict]) -> str:
    """Wide ones are laid on their side: a page has room for some eight columns."""
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    if len(columns) > max(8, len(figures)):
        figures, columns = {name: {row: found[name] for row, found in figures.items()
                                   if name in found} for name in columns}, list(figures)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    rows = ["".join(f"<td>{number(row[name])}</td>" if name in row else "<td></td>"
                    for name in columns) for row in figures.values()]
    return f"<table><tr>{head}</tr>" + "".join(
        f"<tr><td>{html.escape(name)}</td>{row}</tr>" for name, row in zip(figures, rows)
    ) + "</table>"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def by_category(lines: list[dict]) -> dict[str, dict]:
    """What RL's sampled rollouts earned, {category: {column: mean}}, early and late in a run."""
    size = max(1, len(lines) // 10)
    rows = defaultdict(lambda: defaultdict(list))
    for when, part in (("first", lines[:size]), ("last", lines[-size:])):
        for name, row in (pair for line in part for pair in line.get("by", {}).items()):
            for key, value in row.items():
                rows[name][f"{key}, {when}"] += [value] * math.isfinite(value)  # NaN: all errors
    return {name: {key: sum(row[key]) / len(row[key]) for key in sorted(row) if row[key]}
            for name, row in sorted(rows.items())}


def inline(path: Path) -> str:
    """A picture file as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def card(sample: dict, pictures: Path) -> str:
    images = "".join(f'<img alt="" src="{inline(pictures / name)}">'
                     for name in sample["pictures"][:6])
    right = sample["reward"] > 0.999
    verdict = "right" if right else "wrong"
    return (f'<div class="card">{images}<br><small>{sample["category"]}, level {sample["level"]}'
            f'</small><br><b>{html.escape(sample["question"])}</b><br>'
            f'<span class="{verdict}">{html.escape(sample["answer"]) or "(nothing)"}</span><br>'
            + ("" if right else f'<small>truth: {html.escape(sample["truth"])}</small>') + "</div>")


def page(run: Path) -> str:
    """The page's HTML. Raises UserError where the folder holds nothing to show."""
    logs = {path.parent.name: read_log(path)
            for path in sorted([*run.glob("log.jsonl"), *run.glob("*/log.jsonl")])}
    found = next((run / n for n in ("report.json", "eval.json") if (run / n).exists()), None)
    if not logs and not found:
        raise UserError(f"nothing to show in {run}: no log.jsonl, report.json or eval.json")
    facts = read_json(found) if found else {}
    parts = [f"<h1>{html.escape(facts.get('title', run.name))}</h1>"]
    if "parameters" in facts:
        parts.append(f'<p class="quiet">{html.escape(facts["hardware"])}; torch {facts["torch"]}; '
                     f'seed {facts["seed"]}; {facts["parameters"]["total"] / 1e6:.2f}M parameters; '
                     f'{facts["steps"]} steps in {facts["training_seconds"]} s, '
                     f'{facts["seconds"]} s in all</p>')
    if "table" in facts:
        parts.append("<h2>Held-out tasks</h2>" + table_html(facts["table"]))
    if facts.get("figures"):
        parts.append("<h2>Figures</h2>" + figures_html(facts["figures"]))
        parts.append(f'<p class="quiet">{html.escape(facts.get("note", ""))}</p>')
    parts += [f'<p><img alt="" src="{inline(run / name)}"><br><small>{html.escape(caption)}</small>'
              "</p>" for name, caption in facts.get("pictures", []) if (run / name).exists()]
    parts += [curve(series, title, unit=facts.get("unit", "step"))
              for title, series in facts.get("curves", {}).items()]
    for name, lines in logs.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        loss = smooth([(line["step"], line["loss"]) for line in lines if "loss" in line])
        held = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
        parts.append(curve({"training": loss, "held out": held}, "loss"))
        for title, keys in CHARTS.items():
            drawn = {key: smooth([(line["step"], line[key]) for line in lines if key in line])
                     for key in keys}
            parts.append(curve({keys[key]: points for key, points in drawn.items()}, title,
                               high=150))
        if table := by_category(lines):
            parts.append("<p>Sampled rollouts, means over the first and last tenth of the steps:"
                         "</p>" + figures_html(table))
    if facts.get("samples"):
        cards = "".join(card(sample, run / "pictures") for sample in facts["samples"])
        parts.append(f'<h2>Asked and answered</h2><div class="cards">{cards}</div>')
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{run.name}</title>'
            f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n")


def write(run) -> Path:
    """Make report.html in a run folder and return its path."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    path = run / "report.html"
    write_text(path, page(run))
    return path


if __name__ == "__main__":
    main(lambda: print(write(cli(Args, about=__doc__, positional="run").run)))
