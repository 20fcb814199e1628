"""Several runs on one page: `python -m lab.report out/A out/B out/C`.

Runs whose config.json differs in nothing but the seed, and in what does not change the training,
are a group. The page has a curve for each group and field of log.jsonl, the mean over the group's
runs with an interval; a table of their final figures; and the options in which the groups differ.
A run that has not ended is named, and counts only where no run of its group has ended.
"""
import html
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import train_vit
from lab.drawing import curve, number, page_html, smooth, text_table
from lab.fields import Chart, CHARTS, usable
from lib.cli import UserError
from lib.common import read_json, read_log, write_text

# Options, and other entries of config.json, that two runs of a group may differ in.
WITHOUT_EFFECT = {"seed", "out", "resume", "keep", "max_hours", "save_every", "log_every",
                  "workers", "plan", "on", "parameters", "hardware"}
# Student's t for 95% of 3 to 21 values, with 2 to 20 degrees of freedom.
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
           2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


# ---- runs and groups ----------------------------------------------------------------------------

@dataclass
class Run:
    """A run folder. logs: {stage: its lines}, "" for the folder's own log.jsonl."""
    folder: Path
    config: dict = field(default_factory=dict)
    logs: dict[str, list[dict]] = field(default_factory=dict)
    damaged: str = ""           # why it can't be used, else ""
    lost: int = 0               # lines of its logs that are damaged

    @property
    def steps(self) -> int:
        """The last step that is logged, of the stage that is furthest behind."""
        return min(lines[-1]["step"] for lines in self.logs.values())

    @property
    def ended(self) -> bool:
        """Whether all its steps are done; true if config.json does not say how many they are."""
        wanted = self.config.get("steps")
        return type(wanted) is not int or self.steps >= wanted

    def state(self) -> str:
        """One line for the page."""
        if self.damaged:
            return f"left out: {self.damaged}"
        done = "ended" if self.ended else f"not ended: step {self.steps} of {self.config['steps']}"
        return done + (f"; damaged lines of its log: {self.lost}" if self.lost else "")


def read_run(folder: Path) -> Run:
    """Read what a run has left in its folder; damage is noted and never raised."""
    run = Run(folder)
    if not folder.is_dir():
        run.damaged = "there is no such folder"
        return run
    try:
        for path in sorted([*folder.glob("log.jsonl"), *folder.glob("*/log.jsonl")]):
            lines = usable(read_log(path))
            run.lost += len(path.read_bytes().splitlines()) - len(lines)
            if lines:
                stage = path.parent.name if path.parent != folder else ""
                run.logs[stage] = lines
                options = path.parent / "config.json"
                if not run.config and options.exists():
                    run.config = read_json(options)
    except (UserError, OSError) as error:
        run.damaged = str(error)
    if not run.logs and not run.damaged:
        run.damaged = "no log.jsonl with a line that can be read"
    return run


def differing(configs: list[dict]) -> list[str]:
    """The options whose values differ between the configs, in the configs' order."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if name not in WITHOUT_EFFECT
            and len({json.dumps(config.get(name), sort_keys=True) for config in configs}) > 1]


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """{name: runs} of runs that have the same options, but for those WITHOUT_EFFECT. A name is a
    number and the options that differ."""
    options, found = differing([run.config for run in runs]), {}
    for run in runs:
        values = [f"{name}={run.config.get(name)}" for name in options]
        found.setdefault(", ".join(values), []).append(run)
    return {f"{k}: {shortened(values) or 'all runs'}": members
            for k, (values, members) in enumerate(found.items(), 1)}


def shortened(text: str, most: int = 60) -> str:
    """The text, cut off after `most` characters."""
    return text if len(text) <= most else text[:most - 1] + "…"


def counted(runs: list[Run]) -> list[Run]:
    """The runs of a group that its figures are made of: those that have ended, else all."""
    return [run for run in runs if run.ended] or runs


# ---- figures ------------------------------------------------------------------------------------

def spread(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95% interval of the mean by Student's t; of two values the smaller and
    the larger one; of one value nothing but itself."""
    mean, n = statistics.fmean(values), len(values)
    if n < 3:
        return mean, min(values), max(values)
    student = STUDENT[min(n - 3, len(STUDENT) - 1)]     # of more values a little too wide
    half = student * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def final(lines: list[dict], key: str) -> float | None:
    """The final figure of a field. Where most steps have it, that is the mean over the last
    twentieth of the steps, since single steps vary; otherwise its last value. None if no step has
    it."""
    values = [line[key] for line in lines if key in line]
    if len(values) <= len(lines) / 2:
        return values[-1] if values else None
    end = [line[key] for line in lines[-max(1, len(lines) // 20):] if key in line]
    return statistics.fmean(end or values[-1:])


def group_curve(logs: list[list[dict]], key: str, smoothed: bool) -> tuple[list, list]:
    """([(step, mean)], [(step, low, high)]) of a field over the runs that have it, at the steps
    that all of them have."""
    tables = [{line["step"]: line[key] for line in lines if key in line} for lines in logs]
    tables = [table for table in tables if table]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    curves = [[(step, table[step]) for step in steps] for table in tables]
    if smoothed:
        curves = [smooth(points) for points in curves]
    means, band = [], []
    for points in zip(*curves):
        mean, low, high = spread([y for _, y in points])
        means.append((points[0][0], mean))
        band.append((points[0][0], low, high))
    return means, band if len(tables) > 1 else []


# ---- the page -----------------------------------------------------------------------------------

def chart_html(chart: Chart, key: str, name: str, groups: dict[str, list[list[dict]]]) -> str:
    """The curves of one field, a line for each group. groups: {name: logs of its runs}."""
    series, bands = {}, {}
    for group, logs in groups.items():
        series[group], bands[group] = group_curve(logs, key, chart.smooth)
    title = chart.title if len(chart.lines) == 1 else f"{chart.title}: {name}"
    return curve(series, title, height=220 if chart.minor else 300, clip="loss" in chart.lines,
                 bands=bands)


def stage_html(groups: dict[str, list[list[dict]]]) -> str:
    """Curves and final figures of one stage."""
    everything = [line for logs in groups.values() for lines in logs for line in lines]
    shown, folded, rows = [], [], []
    for chart in CHARTS:
        for key, name in chart.fields(everything).items():
            (folded if chart.minor else shown).append(chart_html(chart, key, name, groups))
            for group, logs in groups.items():
                values = [value for lines in logs if (value := final(lines, key)) is not None]
                if values:
                    mean, low, high = spread(values)
                    between = f"{number(low)} – {number(high)}" if len(values) > 1 else ""
                    rows.append((key, group, len(values), number(mean), between))
    if any(folded):
        shown.append("<details><summary>More curves: time, gradient, learning rate</summary>"
                     f"{''.join(folded)}</details>")
    head = ("field", "group", "runs", "mean", "interval")
    return f"{''.join(shown)}<h3>Final figures</h3>{text_table(head, rows)}"


def in_order(stages: set[str]) -> list[str]:
    """Names of stages in the order in which train_vit.py runs them, then others by the alphabet."""
    known = list(train_vit.STAGES)
    return sorted(stages, key=lambda s: (known.index(s) if s in known else len(known), s))


def page(runs: list[Run]) -> str:
    """The page's HTML. Raises UserError where no run can be used."""
    usable_runs = [run for run in runs if not run.damaged]
    if not usable_runs:
        raise UserError("none of these runs can be shown: "
                        + "; ".join(f"{run.folder}: {run.damaged}" for run in runs))
    groups = grouped(usable_runs)
    parts = [f"<h1>{len(runs)} runs in {len(groups)} group{'s' * (len(groups) > 1)}</h1>",
             '<p class="quiet">A group is of runs whose options differ in nothing but the seed. '
             "Lines and means are over its runs. The shaded band and the interval are the 95% "
             "interval of the mean by Student's t; of two runs, they reach from the smaller to the "
             "larger value; one run has none. A run that has not ended counts only where none of "
             "its group has. Final figures are means over the last twentieth of "
             "the steps, or the last value of what is measured now and then.</p>"]
    names = {id(run): name for name, members in groups.items() for run in members}
    parts.append(text_table(("run", "group", "seed", "state"), [
        (run.folder, names.get(id(run), ""), run.config.get("seed", ""), run.state())
        for run in runs]))
    options = differing([run.config for run in usable_runs])
    if options:
        head = ("option", *(f"group {k}" for k in range(1, len(groups) + 1)))
        parts.append("<h2>Options that differ</h2>" + text_table(head, [
            (option, *(members[0].config.get(option, "") for members in groups.values()))
            for option in options]))
    for stage in in_order({stage for run in usable_runs for stage in run.logs}):
        logs = {name: [run.logs[stage] for run in counted(members) if stage in run.logs]
                for name, members in groups.items()}
        parts.append(f"<h2>{html.escape(stage) or 'Curves'}</h2>"
                     + stage_html({name: found for name, found in logs.items() if found}))
    return page_html(f"{len(runs)} runs", parts)


def write(folders: list[Path], out: str) -> Path:
    """Make the page of several runs and return its path."""
    write_text(out, page([read_run(folder) for folder in folders]))
    return Path(out)
