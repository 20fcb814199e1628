"""One self-contained HTML page of a run: questions and answers, curves, tables, settings.

    python -m lab.report out/pretrain      any run folder of pretrain.py, train_vit.py, rl.py, lab/
    python -m lab.report out/demo
    python -m lab.report out/eval_own      an evaluation of sample.py: figures and examples
    python -m lab.report out/A out/B out/C      several runs on one page: see lab/compare.py
    python -m lab.report out/demo --reference   are my runs right? See lab/reference.py
    python -m lab.report fields            explain the fields of log.jsonl

The page is out/pretrain/report.html. It contains its pictures and fetches nothing, so it can be
mailed. It is made of what the scripts leave in a run folder: log.jsonl and config.json (also one
folder down), report.json or eval.json, and pictures. For a run of pretrain.py the newest checkpoint
also answers a dozen held-out tasks; the answers are kept in the run's report.json.
"""
import lib  # first of all, before torch: see lib/__init__.py

import dataclasses
import html
import shlex
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import gym
from data import parse_mix, sight, task_pixels
from lab import compare, reference
from lab.drawing import (curve, figures_html, groups_html, inline, number, one_table, page_html,
                         smooth, stages_html, summary_html, table_html, text_table, tiles_html)
from lab.fields import CHARTS, field_of, print_fields, usable
from lab.reference import script_of
from lib.checkpoint import load_model
from lib.cli import cli, field_comments, main, UserError
from lib.common import clock, read_json, read_log, setup, write_json, write_text
from lib.evaluation import run_tasks
from lib.runs import checkpoints
from model import Config
from sample import readable
from tasks.base import Task
from tokenizer import Tokenizer, tokenizer_of

QUESTIONS = 12                # tasks that a run of pretrain.py answers on its page
FIRST_SEED = 2_000_000        # of these tasks; the split `test` keeps them apart from training


@dataclass
class Args:
    run: list[str] = dataclasses.field(default_factory=list)    # run folders, or `fields`
    out: str = "out/compare.html"       # file for the page of several runs
    reference: bool = False     # is the run right? Compare it with the curves in lab/references


# ---- curves and tables of a log -----------------------------------------------------------------

def charts(lines: list[dict], known: dict | None = None) -> str:
    """All charts of CHARTS for which the lines of one log have fields, each field in one chart;
    the minor ones are folded away. known: the curves of a reference, which are drawn beside."""
    shown, folded = [], []
    for chart in CHARTS:
        series, bands, dashed = {}, {}, {}
        for key, name in chart.fields(lines).items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            series[name] = smooth(points) if chart.smooth else points
            if key in (known or {}):
                beside, rows = f"{name}, reference", known[key]["points"]
                series[beside] = [(step, mean) for step, mean, _, _ in rows]
                bands[beside] = [(step, low, high) for step, _, low, high in rows]
                dashed[beside] = name
        drawn = curve(series, chart.title, height=220 if chart.minor else 300,
                      clip="loss" in chart.lines, bands=bands, dashed=dashed)
        (folded if chart.minor else shown).append(drawn)
    if any(folded):
        shown.append(f"<details><summary>More curves: time, gradient, learning rate</summary>"
                     f"{''.join(folded)}</details>")
    return "".join(shown)


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
    if not mix:         # a run on own data alone
        return []
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
    for task in tasks:
        # One by one, each with the room that its own category needs: a model that has learnt
        # nothing uses up all of it, and that of the longest category would take minutes.
        played, = run_tasks(model, tokens, [task])
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
    if not tasks:       # a mix of text only
        return
    samples = answer(model, tokenizer_of(model.config), tasks, run / "pictures")
    write_json(path, {**facts, "samples": samples, "answered_by": found[-1].name,
                      "parameters": model.counts()})


def card(sample: dict, pictures: Path) -> str:
    """One question as HTML: at most six pictures, question, answer, and the truth where the answer
    is wrong. detail: what stands beside the category; of a task of the gym, its level."""
    files = [name for name in sample["pictures"] if (pictures / name).is_file()][:6]
    images = "".join(f'<img alt="" src="{inline(pictures / name)}">' for name in files)
    right = sample["reward"] > 0.999
    verdict = "right" if right else "wrong"
    truth = "" if right else f'<p class="quiet">truth: {html.escape(sample["truth"])}</p>'
    said = html.escape(sample["answer"]) or "(nothing)"
    layout = ("frames", "frames", "frames two", "frames many")[min(len(files), 3)]
    detail = sample["detail"] if "detail" in sample else f"level {sample['level']}"
    return (f'<div class="card"><div class="{layout}">{images}</div>'
            f'<small>{html.escape(sample["category"])}, {html.escape(detail)}</small>'
            f'<p>{html.escape(sample["question"])}</p>'
            f'<p class="{verdict}">{"✓" if right else "✗"} {said}</p>{truth}</div>')


# ---- settings -----------------------------------------------------------------------------------

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


def section(name: str, lines: list[dict], config: dict, alone: bool,
            known: dict | None = None) -> str:
    """One log: summary (where the page has several logs), charts, rewards, settings. known: the
    curves of a reference."""
    parts = [f"<h2>{'Curves' if alone else html.escape(name)}</h2>"]
    if not alone:
        parts.append(tiles_html(summary(lines)))
    parts.append(charts(lines, known))
    if table := by_category(lines):
        parts.append("<p>Sampled rollouts, means over the first and the last tenth of the steps:"
                     "</p>" + one_table(table))
    used = settings(config)
    if used and not alone:
        used = f"<details><summary>Settings</summary>{used}</details>"
    return "".join(parts) + used


def page(run: Path, compared: tuple = ()) -> str:
    """The page's HTML. compared: logs beside their references, reference.Compared. Raises UserError
    where the folder holds nothing to show."""
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
        return page_of(run, facts, configs, logs, compared)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if found is None:
            raise
        raise UserError(f"{found} is damaged ({repr(error)[:100]}): remove it to go on") from None


def page_of(run: Path, facts: dict, configs: dict, logs: dict, compared: tuple = ()) -> str:
    """The page's HTML. facts: of report.json or eval.json; configs, logs: {folder: config.json},
    {folder: lines of log.jsonl}; compared: see `page`."""
    order = list(facts.get("figures", {}))          # stages in the order in which they ran
    logs = dict(sorted(logs.items(), key=lambda pair: (
        order.index(pair[0].name) if pair[0].name in order else len(order))))
    parts = [header(run, facts, configs.get(run, {}), logs)]
    if compared:
        parts.append("<h2>Is this run right?</h2><pre>"
                     f"{html.escape(reference.in_words(run, compared))}</pre>")
    if facts.get("stages"):
        parts.append("<h2>What each stage improves</h2>" + stages_html(facts["stages"]))
    if "groups" in facts:
        parts.append("<h2>Own questions</h2>" + groups_html(facts))
    if facts.get("samples"):
        cards = "".join(card(sample, run / "pictures") for sample in facts["samples"])
        by = f" by {facts['answered_by']}" if "answered_by" in facts else ""
        what = f"Questions of {facts['data']}" if "data" in facts else "Held-out tasks"
        parts.append(f"<h2>Questions and answers</h2><p>{html.escape(what)}, answered greedily{by}."
                     f' ✓ earns the full reward.</p><div class="cards">{cards}</div>')
    if "table" in facts:
        parts.append("<h2>Held-out tasks</h2>" + table_html(facts["table"]))
    if "summary" in facts:
        parts.append("<h2>Means</h2>" + summary_html(facts["summary"]))
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
        known = next((one.reference["curves"] for one in compared
                      if one.folder == folder and one.reference), None)
        parts.append(section(folder.name, lines, configs.get(folder, {}), len(logs) == 1, known))
    parts.append(glossary([line for lines in logs.values() for line in lines]))
    return page_html(facts.get("title", run.name), parts)


def write(run, compared: tuple = ()) -> Path:
    """Make report.html in a run folder and return its path. compared: see `page`."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    path = run / "report.html"
    write_text(path, page(run, compared))
    return path


def report(args: Args):
    """The command line: print the fields, or make the page of one run or of several and print its
    path."""
    if args.run == ["fields"]:
        return print_fields()
    if not args.run:
        raise UserError("which run? give its folder, or the word `fields`")
    if args.reference and len(args.run) > 1:
        raise UserError("--reference takes one run, or one folder of runs")
    if len(args.run) > 1:
        return print(compare.write([Path(run) for run in args.run], args.out))
    run = Path(args.run[0])
    if args.out != Args.out:
        raise UserError(f"--out is for the page of several runs; that of one is {run}/report.html")
    config = read_json(run / "config.json") if (run / "config.json").exists() else {}
    if script_of(config)[0] == "pretrain.py":
        try:
            answer_questions(run, config)
        except UserError as error:      # a damaged checkpoint: the curves can still be shown
            print(f"no questions are answered: {error}")
    compared = reference.compare_all(run) if args.reference else ()
    if compared:
        print(reference.in_words(run, compared))
    print(write(run, compared))


if __name__ == "__main__":
    main(lambda: report(cli(Args, about=__doc__, positional="run")))
