"""One self-contained HTML page of a run: questions and answers, curves, tables, settings.

    python -m lab.report out/pretrain      any run folder of pretrain.py, train_vit.py, rl.py, lab/
    python -m lab.report out/demo
    python -m lab.report fields            explain the fields of log.jsonl

The page is out/pretrain/report.html. It contains its pictures and fetches nothing, so it can be
mailed. It is made of what the scripts leave in a run folder: log.jsonl and config.json (also one
folder down), report.json or eval.json, and pictures. For a run of pretrain.py the newest checkpoint
also answers a dozen held-out tasks; the answers are kept in the run's report.json.
"""
import lib  # first of all, before torch: see lib/__init__.py

import base64
import dataclasses
import html
import math
import shlex
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import gym
import pretrain
import rl
import train_vit
from data import parse_mix, sight, task_pixels
from lab.fields import CHARTS, field_of, print_fields
from lib.checkpoint import load_model
from lib.cli import cli, field_comments, main, UserError
from lib.common import clock, read_json, read_log, setup, write_json, write_text
from lib.runs import checkpoints
from model import Config
from sample import readable, run_tasks
from tasks.base import Task
from tokenizer import Tokenizer, tokenizer_of

QUESTIONS = 12                # tasks that a run of pretrain.py answers on its page
FIRST_SEED = 2_000_000        # of these tasks; the split `test` keeps them apart from training
SCRIPTS = {"pretrain.py": pretrain.Args, "train_vit.py": train_vit.Args, "rl.py": rl.Args}
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


@dataclass
class Args:
    run: str = ""                 # run folder, also as a bare word; or the word `fields`


# ---- logs ---------------------------------------------------------------------------------------

def numbers(row: dict) -> dict:
    """The values of `row` that can be drawn. NaN, of a step that was skipped or of rollouts that
    were all errors, is none of them."""
    return {key: value for key, value in row.items()
            if type(value) in (int, float) and abs(value) < 1e30}


def usable(lines: list) -> list[dict]:
    """The lines of a log without what is damaged: of each line its numbers, and those in `by`. A
    line without a step is left out."""
    kept = []
    for line in lines:
        if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
            continue
        by = line.pop("by", {})
        kept.append(numbers(line))
        if isinstance(by, dict) and by:
            kept[-1]["by"] = {name: numbers(row) for name, row in by.items()
                              if isinstance(row, dict)}
    return kept


# ---- charts -------------------------------------------------------------------------------------

def smooth(points: list, share: float = 0.02) -> list:
    """Means over consecutive stretches of `share` of the points, 50 points by default."""
    size = max(1, int(len(points) * share))
    stretches = [points[i:i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
            for part in stretches]


def ticks(most: float, count: int) -> list[float]:
    """Round numbers from 0 to `most`, at most `count` of them behind the 0."""
    size = 10.0 ** math.floor(math.log10(most / count))
    step = next(k * size for k in (1, 2, 5, 10) if most / (k * size) <= count)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]


def curve(series: dict[str, list], title: str, unit: str = "step", high: int = 300,
          clip: bool = False) -> str:
    """{name: [(x, y), ...]} as a chart of full width, axes from 0 to the largest x and y; nothing
    where every series has less than two points. The legend shows the last value of each series.

    clip: end the y axis at four times the median, for losses, whose first values are far larger
    than the rest.
    """
    if not any(len(points) > 1 for points in series.values()):
        return ""
    series = {name: points for name, points in series.items() if points}
    right = max(x for points in series.values() for x, _ in points) or 1
    heights = sorted(y for points in series.values() for _, y in points)
    most = min(heights[-1], 4 * statistics.median(heights)) if clip else heights[-1]
    most = most if most > 0 else 1
    least = min(0, heights[0])

    def at_x(x):
        return LEFT + x / right * (WIDE - LEFT - RIGHT)

    def at_y(y):
        share = (min(y, most) - least) / (most - least)
        return high - BOTTOM - share * (high - BOTTOM - TOP)

    parts = []
    for y in ticks(most, 5):
        parts.append(f'<path d="M{LEFT} {at_y(y):.1f}H{WIDE - RIGHT}" stroke="#e1e7ee"/>'
                     f'<text x="{LEFT - 9}" y="{at_y(y) + 5:.1f}" text-anchor="end">'
                     f"{number(y)}</text>")
    for x in ticks(right, 8):
        parts.append(f'<text x="{at_x(x):.1f}" y="{high - BOTTOM + 21}" text-anchor="middle">'
                     f"{number(x)}</text>")
    parts.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{high - 5}" text-anchor="middle">'
                 f"{html.escape(unit)}</text>")
    legend = []
    for i, (name, points) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        if len(points) > 1:
            line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" '
                         'stroke-width="2.5" stroke-linejoin="round"/>')
        if len(points) <= 20:               # few measurements: show where they are
            parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4" fill="{color}"/>'
                      for x, y in points]
        legend.append(f'<span><i style="background:{color}"></i>{html.escape(name)} '
                      f'<b>{number(points[-1][1])}</b></span>')
    if heights[-1] > most:
        legend.append(f"<span>values above {number(most)} are cut off</span>")
    return (f"<figure><figcaption>{html.escape(title)}</figcaption>"
            f'<div class="legend quiet">{"".join(legend)}</div>'
            f'<svg viewBox="0 0 {WIDE} {high}" role="img" aria-label="{html.escape(title)}" '
            f'font-size="15" fill="#5f6b7a">{"".join(parts)}</svg></figure>')


def charts(lines: list[dict]) -> str:
    """All charts of CHARTS for which the lines of one log have fields, each field in one chart;
    the minor ones are folded away."""
    shown, folded = [], []
    for chart in CHARTS:
        series = {}
        for key, name in chart.lines.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            series[name] = smooth(points) if chart.smooth else points
        drawn = curve(series, chart.title, high=220 if chart.minor else 300,
                      clip="loss" in chart.lines)
        (folded if chart.minor else shown).append(drawn)
    if any(folded):
        shown.append(f"<details><summary>More curves: time, gradient, learning rate</summary>"
                     f"{''.join(folded)}</details>")
    return "".join(shown)


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


def by_category(lines: list[dict]) -> dict[str, dict]:
    """Rewards and passes of RL's sampled rollouts, {category: {column: mean}}, over the first and
    the last tenth of the steps."""
    size = max(1, len(lines) // 10)
    rows = defaultdict(lambda: defaultdict(list))
    for when, part in (("first", lines[:size]), ("last", lines[-size:])):
        for line in part:
            for name, row in line.get("by", {}).items():
                for key, value in row.items():
                    rows[name][f"{key}, {when}"].append(value)
    return {name: {key: sum(row[key]) / len(row[key]) for key in sorted(row)}
            for name, row in sorted(rows.items()) if row}


# ---- questions and answers ----------------------------------------------------------------------

def tasks_of(mix: str, levels: int, config: Config, count: int = QUESTIONS) -> list[Task]:
    """`count` held-out tasks, spread evenly over the categories and levels of a mix, as a model of
    this configuration sees them."""
    names = [name for name, _ in parse_mix(mix, sight(config)) if name in gym.names()]
    if not names:
        return []
    chosen = sorted(i * len(names) // count for i in range(count))  # some twice, or some left out
    return [Task(names[k], FIRST_SEED + i, i % levels, "test", task_pixels(names[k], config))
            for i, k in enumerate(chosen)]


def answer(model, tokens: Tokenizer, tasks: list[Task], folder: Path) -> list[dict]:
    """Let the model do `tasks`, greedily: question, answer, truth and reward of each. The pictures
    that it saw are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for task, played in zip(tasks, run_tasks(model, tokens, tasks)):
        replies = played.replies(tokens)
        frames, goal = frames_of(task, replies)
        files = []
        for i, frame in enumerate(frames):
            files.append(f"{task.category}-{task.seed}-{i}.png")
            times = max(1, 192 // max(frame.size))      # small pictures become large pixels
            size = (frame.width * times, frame.height * times)
            frame.resize(size, Image.Resampling.NEAREST).save(folder / files[-1])
        samples.append({
            "category": task.category, "level": task.level, "pictures": files, "question": goal,
            "truth": " → ".join(map(readable, gym.play_out(task)[1])),
            "reward": played.score.reward, "answer": " → ".join(map(readable, replies))})
    return samples


def frames_of(task: Task, replies: list[str]) -> tuple[list[Image.Image], str]:
    """The pictures that the model saw while it gave `replies`, and the question."""
    episode = gym.drive(gym.make(task))
    messages = next(episode)
    question = messages[-1].text.replace("<|image|>", "").strip()
    frames = list(messages[-1].images)
    for reply in replies[:-1]:
        frames += episode.send(reply)[-1].images
    return frames, question


def answer_questions(run: Path, config: dict):
    """Let the newest checkpoint of a run of pretrain.py answer QUESTIONS held-out tasks, and keep
    them in the run's report.json, unless it has answered already."""
    path, found = run / "report.json", checkpoints(run)
    facts = read_json(path) if path.exists() else {}
    mix, levels = config.get("mix"), config.get("levels")
    if not isinstance(mix, str) or levels not in range(1, 6):
        raise UserError(f"{run / 'config.json'} is damaged: mix is {mix!r}, levels is {levels!r}")
    if not found or facts.get("answered_by", "") == found[-1].name or "table" in facts:
        return
    hw = setup(config.get("device", "auto"))
    model = load_model(found[-1], hw.device, hw.dtype)
    tasks = tasks_of(mix, levels, model.config)
    if not tasks or not model.config.n_ranks:       # a mix of text only; another tokenizer
        return
    samples = answer(model, tokenizer_of(model.config), tasks, run / "pictures")
    write_json(path, {**facts, "samples": samples, "answered_by": found[-1].name,
                      "parameters": model.counts()})


def card(sample: dict, pictures: Path) -> str:
    """One question as HTML: at most six pictures, question, answer, and the truth where the answer
    is wrong."""
    files = [name for name in sample["pictures"] if (pictures / name).is_file()][:6]
    images = "".join(f'<img alt="" src="{inline(pictures / name)}">' for name in files)
    right = sample["reward"] > 0.999
    verdict = "right" if right else "wrong"
    truth = "" if right else f'<p class="quiet">truth: {html.escape(sample["truth"])}</p>'
    said = html.escape(sample["answer"]) or "(nothing)"
    layout = ("frames", "frames", "frames two", "frames many")[min(len(files), 3)]
    return (f'<div class="card"><div class="{layout}">{images}</div>'
            f'<small>{sample["category"]}, level {sample["level"]}</small>'
            f'<p>{html.escape(sample["question"])}</p>'
            f'<p class="{verdict}">{"✓" if right else "✗"} {said}</p>{truth}</div>')


def inline(path: Path) -> str:
    """A picture file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# ---- settings -----------------------------------------------------------------------------------

def script_of(config: dict):
    """(name, Args) of the script whose options a config.json holds; (None, None) for others."""
    def shared(args):
        return len({field.name for field in dataclasses.fields(args)} & config.keys())

    name, args = max(SCRIPTS.items(), key=lambda pair: shared(pair[1]))
    if shared(args) < 0.7 * len(dataclasses.fields(args)):
        return None, None
    return name, args


def settings(config: dict) -> str:
    """The options of a run: a command line, those that differ from the defaults, and the rest
    folded away. Nothing for a config.json that is not of a script."""
    script, args = script_of(config)
    if script is None:
        return ""
    comments, changed, rest = field_comments(args), [], []
    for field in dataclasses.fields(args):
        value, meaning = config.get(field.name, field.default), comments.get(field.name, "")
        if value != field.default and field.name != "resume":
            changed.append((field.name, value, field.default, meaning))
        else:
            rest.append((field.name, value, meaning))
    words = [f"--{name}={shlex.quote(str(value))}" for name, value, *_ in changed]
    command = " ".join(["python", script, *words])
    parts = [f"<h3>Settings</h3><pre>{html.escape(command)}</pre>"]
    if changed:
        parts.append(text_table(("option", "value", "default", "meaning"), changed))
    parts.append(f"<details><summary>{len(rest)} options at their defaults</summary>"
                 f"{text_table(('option', 'value', 'meaning'), rest)}</details>")
    return "".join(parts)


# ---- the page -----------------------------------------------------------------------------------

def summary(lines: list[dict], parameters: int = 0) -> list[tuple[str, str]]:
    """(name, value) of the few numbers that describe a log in short."""
    def last(key):
        return next((line[key] for line in reversed(lines) if key in line), None)

    def end(key):       # single steps vary: a mean over the last twentieth
        values = [line[key] for line in lines[-max(1, len(lines) // 20):] if key in line]
        return statistics.fmean(values) if values else None

    tiles = [("steps", f"{lines[-1]['step']:,}"),
             ("training time", clock(sum(line.get("dt", 0.0) for line in lines)))]
    if parameters:
        tiles.append(("parameters", f"{parameters / 1e6:.2f}M"))
    values = (("training loss", end("loss")), ("held-out loss", last("held_out")),
              ("sampled reward", end("reward")), ("held-out accuracy", last("accuracy")),
              ("tokens a second", end("tok/s")))
    return tiles + [(name, number(value)) for name, value in values if value is not None]


def tiles_html(tiles: list[tuple[str, str]]) -> str:
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><small>{name}</small><b>{value}</b></div>' for name, value in tiles
    ) + "</div>"


def glossary(lines: list[dict]) -> str:
    """What the fields of the logs mean, for those that occur."""
    keys = dict.fromkeys(key for line in lines for key in line)
    fields = dict.fromkeys(field for field in map(field_of, keys) if field)
    rows = [(", ".join(field.keys.split()), field.unit, field.meaning) for field in fields]
    return ("<h2>Fields of log.jsonl</h2><details><summary>What each of the "
            f"{len(keys)} fields means</summary>{text_table(('field', 'unit', 'meaning'), rows)}"
            "</details>") if rows else ""


def header(run: Path, facts: dict, config: dict, logs: dict) -> str:
    """Title, where the run took place, and its summary."""
    parts = [f"<h1>{html.escape(facts.get('title', run.name))}</h1>"]
    line = [facts.get("hardware") or str(config.get("hardware", ""))]
    if "torch" in facts:
        line.append(f"torch {facts['torch']}")
    if "seed" in facts or "seed" in config:
        line.append(f"seed {facts.get('seed', config.get('seed'))}")
    if "training_seconds" in facts:
        line.append(f"{facts['steps']} steps of pretraining in {clock(facts['training_seconds'])}, "
                    f"{clock(facts['seconds'])} in all")
    parts.append(f'<p class="quiet">{html.escape("; ".join(filter(None, line)))}</p>')
    parameters = facts.get("parameters", {}).get("total", 0)
    if len(logs) == 1:
        parts.append(tiles_html(summary(*logs.values(), parameters)))
    return "".join(parts)


def section(name: str, lines: list[dict], config: dict, alone: bool) -> str:
    """One log: summary (where the page has several logs), charts, rewards, settings."""
    parts = [f"<h2>{'Curves' if alone else html.escape(name)}</h2>"]
    if not alone:
        parts.append(tiles_html(summary(lines)))
    parts.append(charts(lines))
    if table := by_category(lines):
        parts.append("<p>Sampled rollouts, means over the first and the last tenth of the steps:"
                     "</p>" + one_table(table))
    used = settings(config)
    if used and not alone:
        used = f"<details><summary>Settings</summary>{used}</details>"
    return "".join(parts) + used


def page(run: Path) -> str:
    """The page's HTML. Raises UserError where the folder holds nothing to show."""
    logs = {path.parent: usable(read_log(path))
            for path in sorted([*run.glob("log.jsonl"), *run.glob("*/log.jsonl")])}
    logs = {folder: lines for folder, lines in logs.items() if lines}
    found = next((run / n for n in ("report.json", "eval.json") if (run / n).exists()), None)
    if not logs and not found:
        raise UserError(f"nothing to show in {run}: no log.jsonl, report.json or eval.json")
    facts = read_json(found) if found else {}
    configs = {folder: read_json(folder / "config.json")
               for folder in (run, *logs) if (folder / "config.json").exists()}
    try:
        return page_of(run, facts, configs, logs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if found is None:
            raise
        raise UserError(f"{found} is damaged ({repr(error)[:100]}): remove it to go on") from None


def page_of(run: Path, facts: dict, configs: dict, logs: dict) -> str:
    """The page's HTML. facts: of report.json or eval.json; configs, logs: {folder: config.json},
    {folder: lines of log.jsonl}."""
    order = list(facts.get("figures", {}))          # stages in the order in which they ran
    logs = dict(sorted(logs.items(), key=lambda pair: (
        order.index(pair[0].name) if pair[0].name in order else len(order))))
    parts = [header(run, facts, configs.get(run, {}), logs)]
    if facts.get("stages"):
        parts.append("<h2>What each stage improves</h2>" + stages_html(facts["stages"]))
    if facts.get("samples"):
        cards = "".join(card(sample, run / "pictures") for sample in facts["samples"])
        by = f" by {facts['answered_by']}" if "answered_by" in facts else ""
        parts.append(f"<h2>Questions and answers</h2><p>Held-out tasks, answered greedily{by}. "
                     f'✓ earns the full reward.</p><div class="cards">{cards}</div>')
    if "table" in facts:
        parts.append("<h2>Held-out tasks</h2>" + table_html(facts["table"]))
    if facts.get("figures"):
        parts.append("<h2>Figures</h2>" + figures_html(facts["figures"]))
        parts.append(f'<p class="quiet">{html.escape(facts.get("note", ""))}</p>')
    for name, caption in facts.get("pictures", []):
        if (run / name).is_file():
            parts.append(f'<p class="wide"><img alt="" src="{inline(run / name)}"><br>'
                         f"<small>{html.escape(caption)}</small></p>")
    parts += [curve(series, title, facts.get("unit", "step"))
              for title, series in facts.get("curves", {}).items()]
    for folder, lines in logs.items():
        parts.append(section(folder.name, lines, configs.get(folder, {}), len(logs) == 1))
    parts.append(glossary([line for lines in logs.values() for line in lines]))
    title = html.escape(facts.get("title", run.name))
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
            f"<body>{''.join(parts)}</body></html>\n")


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


def write(run) -> Path:
    """Make report.html in a run folder and return its path."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    path = run / "report.html"
    write_text(path, page(run))
    return path


def report(args: Args):
    """The command line: print the fields, or make a run's page and print its path."""
    if args.run == "fields":
        return print_fields()
    if not args.run:
        raise UserError("which run? give its folder, or the word `fields`")
    run = Path(args.run)
    config = read_json(run / "config.json") if (run / "config.json").exists() else {}
    if script_of(config)[0] == "pretrain.py":
        try:
            answer_questions(run, config)
        except UserError as error:      # a damaged checkpoint: the curves can still be shown
            print(f"no questions are answered: {error}")
    print(write(run))


if __name__ == "__main__":
    main(lambda: report(cli(Args, about=__doc__, positional="run")))
