"""Lab sheets: a claim of the paper as an experiment with an answer.

A sheet is a file of lab/sheets/ with a docstring (its first line is the claim), a function that
measures one run, and a `Sheet` with the tests. Each test has a number, fixed before the run, that
says how large an effect the claim speaks of. `python -m lab` lists and runs the sheets.

One seed runs every arm, on the same samples where it can, and gives one effect: a difference
between arms. The effect of the sheet is the mean over the seeds, with a 95% interval by Student's
t. `detectable` is the least effect that so many seeds, which differ so much, would show in four of
five studies. From these four numbers, `Gain.verdict` and `NoLoss.verdict` say what was found:

    reproduced          the effect is there, and not smaller than the claim's
    not at this scale   an effect as large as the claim's would have been seen, but was not
    contradicted        the opposite is there
    underpowered        these runs can't tell; more seeds or longer runs could
"""
import hashlib
import importlib
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from lab import drawing
from lab.git import git_or_none
from lib.cli import UserError
from lib.common import clock, read_json, ROOT, setup, write_json, write_text

FOLDER = ROOT / "lab" / "sheets"
MEANING = {                         # of the verdicts, from the best to the worst
    "reproduced": "the effect is there, and not smaller than the claim's; where the claim is that "
                  "little is lost: no more is lost than it allows",
    "underpowered": "these runs can't tell; more seeds or longer runs could",
    "not at this scale": "an effect as large as the claim's would have been seen, but was not",
    "contradicted": "the opposite is there"}
VERDICTS = tuple(MEANING)

# Student's t: its 97.5% and 80% quantiles, by the number of seeds; the degrees of freedom are one
# less.
T = {2: (12.706, 1.376), 3: (4.303, 1.061), 4: (3.182, 0.978), 5: (2.776, 0.941),
     6: (2.571, 0.920), 7: (2.447, 0.906), 8: (2.365, 0.896), 9: (2.306, 0.889),
     10: (2.262, 0.883)}


def effect(values: list[float]) -> dict[str, float]:
    """An effect from one value a seed: mean, ends of its 95% interval, and the least effect that
    would be seen with a probability of 80%; of a single seed the mean alone."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return {"mean": mean}
    sure, often = T[min(n, max(T))]     # with more than ten seeds a little more than needed
    error = statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - sure * error, "high": mean + sure * error,
            "detectable": (sure + often) * error}


# ---- what a sheet consists of --------------------------------------------------------------------

@dataclass(frozen=True)
class Gain:
    """The claim: something gets better, by `claimed` or more.

    name: the effect with its unit. of: {arm: figures} of one seed -> the effect of this seed, a
    positive number if the claim is right. claimed: the effect that the claim speaks of. source:
    where that number comes from, with [C], [R] or [O].
    """
    name: str
    of: Callable[[dict], float]
    claimed: float
    source: str

    def verdict(self, found: dict) -> str:
        """found: as `effect` returns it."""
        if len(found) == 1:                     # one seed has no interval
            return "underpowered"
        if found["high"] < 0:
            return "contradicted"
        if found["low"] > 0 and found["high"] >= self.claimed:
            return "reproduced"
        return "not at this scale" if found["detectable"] < self.claimed else "underpowered"


@dataclass(frozen=True)
class NoLoss(Gain):
    """The claim: nothing is lost, or less than `claimed`. A loss is a negative effect."""

    def verdict(self, found: dict) -> str:
        if len(found) == 1:
            return "underpowered"
        if found["low"] >= -self.claimed:
            return "reproduced"
        return "contradicted" if found["high"] < -self.claimed else "underpowered"


@dataclass(frozen=True)
class Sheet:
    """measure(arm, seed, folder) does one run in a folder of its own, or the rest of one that was
    interrupted, and returns {figure: number}; a figure may also be a list of points (x, y), which
    is drawn as a curve. What several runs begin from is made by the first one that needs it.
    """
    arms: tuple[str, ...]
    measure: Callable[[str, int, Path], dict]
    tests: tuple[Gain, ...]
    equal: str                      # what the arms have in common: steps, samples, CPU minutes
    minutes: float                  # of all runs, of `seeds` seeds, on one core; measured
    kind: str = "bench"             # bench: 20 minutes on two cores at most; night: longer
    seeds: int = 3

    def minutes_of(self, seeds: int) -> float:
        """Of all arms of so many seeds, on one core."""
        return self.minutes * seeds / self.seeds


def names() -> list[str]:
    """The names of all sheets."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(name: str):
    """The module of a sheet: its docstring is the text, `SHEET` the experiment."""
    if name not in names():
        raise UserError(f"there is no sheet '{name}', only {', '.join(names())}")
    return importlib.import_module(f"lab.sheets.{name}")


def claim(name: str) -> str:
    """The first line of a sheet's docstring."""
    return load(name).__doc__.strip().splitlines()[0]


def kept(name: str) -> dict | None:
    """The answer that lies beside the sheet, if it was measured."""
    path = FOLDER / f"{name}.json"
    return read_json(path) if path.exists() else None


# ---- runs ----------------------------------------------------------------------------------------

def digest(name: str) -> str:
    """Of a file of this repository; of one that is gone, an empty string."""
    path = ROOT / name
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""


def sources() -> list[str]:
    """The files of this repository that are imported now."""
    names = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    paths = [Path(name).resolve() for name in names if "site-packages" not in name]
    return sorted(str(path.relative_to(ROOT)) for path in paths
                  if path.is_relative_to(ROOT) and path.is_file())


def check_sources(folder: Path):
    """Note in `folder` the code that its runs are made with. Raises UserError if the runs that are
    there were made with other code: they would be taken for runs of this one."""
    path = folder / "code.json"
    before = read_json(path) if path.exists() else {}
    for name, was in before.items():
        if digest(name) != was:
            raise UserError(f"{name} has changed since the runs in {folder} were made: take "
                            "another folder, such as --out=out/changed")
    write_json(path, before | {name: digest(name) for name in sources()})


def shared_start(folder: Path, name: str) -> Path:
    """The folder of a model that runs of several sheets begin from: beside the sheets' own folders.
    folder: that of a run. Raises UserError if the model was made with other code, for whichever
    sheet."""
    start = folder.parent.parent / name
    check_sources(start)
    return start


def rule_of(name: str) -> dict | None:
    """The commit in which a sheet's file was last changed: {commit, date}. None if it has changes
    that are not committed, or if git does not know it."""
    path = f"lab/sheets/{name}.py"
    changes = git_or_none("status", "--porcelain", "--", path, where=ROOT)
    last = git_or_none("log", "-1", "--format=%h %cI", "--", path, where=ROOT)
    if changes or not last:
        return None
    return dict(zip(("commit", "date"), last.split()))


def answer(name: str, runs: dict[int, dict]) -> dict:
    """The answer of a sheet from {seed: {arm: figures}}: an entry for each test, and the verdict of
    the sheet, which is the worst of its tests'."""
    tests = {}
    for test in load(name).SHEET.tests:
        values = [test.of(runs[seed]) for seed in runs]
        found = effect(values)
        tests[test.name] = {"seeds": values, **found, "claimed": test.claimed,
                            "source": test.source, "kind": type(test).__name__,
                            "verdict": test.verdict(found)}
    worst = max((test["verdict"] for test in tests.values()), key=VERDICTS.index)
    return {"claim": claim(name), "verdict": worst, "tests": tests}


def run(name: str, first: int = 0, seeds: int = 0, out: Path = Path("out/lab")) -> dict:
    """Run a sheet, or what is missing of it: every arm of a seed, then the next seed. Returns its
    answer, which is also written to out/NAME/answer.json, with the page out/NAME/report.html."""
    sheet, folder = load(name).SHEET, Path(out) / name
    numbers = range(first, first + (seeds or sheet.seeds))
    todo = [(seed, arm) for seed in numbers for arm in sheet.arms]
    check_sources(folder)
    hw, began, measured = setup("cpu"), time.time(), 0
    runs, first_began = {}, began           # runs: {seed: {arm: figures}}
    for done, (seed, arm) in enumerate(todo, 1):
        own = folder / f"{re.sub('[^A-Za-z0-9]', '_', arm)}-{seed}"
        path = own / "figures.json"
        if not path.exists():
            write_json(path, {"began": began, "figures": sheet.measure(arm, seed, own)})
            measured += 1
        one = read_json(path)
        runs.setdefault(seed, {})[arm] = one["figures"]
        first_began = min(first_began, one["began"])
        # Runs that were there already say nothing about the time that the others will take.
        each = 60 * sheet.minutes_of(1) / len(sheet.arms)
        if measured:
            each = (time.time() - began) / measured
        print(f"{name}: {done} of {len(todo)} runs, seed {seed}, {arm}: "
              + ", ".join(f"{key} {drawing.number(value)}"
                          for key, value in one["figures"].items() if not is_curve(value))
              + f"; about {clock(each * (len(todo) - done))} left", flush=True)
    found = answer(name, runs) | {
        "rule": rule_of(name), "where": hw.description,
        "began": datetime.fromtimestamp(int(first_began), timezone.utc).isoformat(),
        "runs": {f"{arm}, seed {seed}": {key: value for key, value in figures.items()
                                         if not is_curve(value)}
                 for seed, arms in runs.items() for arm, figures in arms.items()}}
    write_json(folder / "answer.json", found)
    write_text(folder / "report.html", page(name, found, curves(runs)))
    return found


def check_rule(name: str, rule: dict | None, seeds: int):
    """Raise UserError unless an answer by this rule (see `rule_of`), from so many seeds, may be
    kept."""
    if rule is None:
        raise UserError(f"lab/sheets/{name}.py is not committed: commit the rule, then run it")
    if seeds < 3:
        raise UserError("an answer needs three seeds")


def keep(name: str, found: dict):
    """Put an answer beside the sheet. Raises UserError unless the rule was committed before the
    first run began, and at least three seeds were run."""
    rule = found["rule"]
    check_rule(name, rule, min(len(test["seeds"]) for test in found["tests"].values()))
    if datetime.fromisoformat(rule["date"]) > datetime.fromisoformat(found["began"]):
        raise UserError(f"lab/sheets/{name}.py was committed ({rule['date']}) after the first run "
                        f"began ({found['began']}): remove its runs and run it again")
    write_json(FOLDER / f"{name}.json", found)


# ---- what is shown -------------------------------------------------------------------------------

def is_curve(value) -> bool:
    return isinstance(value, list)


def curves(runs: dict[int, dict]) -> dict[str, dict]:
    """{figure: {arm: points}} of the figures that are curves: x and y are means over the seeds,
    as x may be minutes, which differ."""
    found: dict[str, dict] = {}
    for arm in next(iter(runs.values())):
        rows = [arms[arm] for arms in runs.values()]
        for key in [key for key, value in rows[0].items() if is_curve(value)]:
            places = zip(*(row[key] for row in rows))       # at each the points of all seeds
            found.setdefault(key, {})[arm] = [
                tuple(map(statistics.fmean, zip(*points))) for points in places]
    return found


def in_words(test: dict) -> str:
    """A test's effect as one line: mean, interval, least effect, what was claimed."""
    number = drawing.number
    if "low" not in test:
        return f"{test['mean']:+.3g}, one seed; claimed {number(test['claimed'])}"
    claimed = ("a gain of" if test["kind"] == "Gain" else "a loss below") + " "
    return (f"{test['mean']:+.3g} [{number(test['low'])} to {number(test['high'])}], detectable "
            f"{number(test['detectable'])}; the claim is {claimed}{number(test['claimed'])}")


def show(name: str, found: dict):
    """Print an answer."""
    print(f"\n{found['claim']}")
    for title, test in found["tests"].items():
        seeds = ", ".join(f"{value:+.3g}" for value in test["seeds"])
        print(f"  {title}\n    {in_words(test)} ({test['source']})\n    each seed: {seeds}\n"
              f"    {test['verdict']}")
    print(f"verdict: {found['verdict']}")
    if found["rule"] is None:
        print(f"the rule in lab/sheets/{name}.py has changes that are not committed")


def forest(tests: dict[str, dict]) -> str:
    """A picture for each test: zero and the claimed effect as lines, each seed as a dot, the mean
    and its interval as a diamond on a bar."""
    wide, high, parts = 960, 96, []
    for title, test in tests.items():
        claimed = test["claimed"] * (1 if test["kind"] == "Gain" else -1)
        ends = [0, claimed, *test["seeds"], test.get("low", 0), test.get("high", 0)]
        least, most = min(ends), max(ends)
        room = (most - least) or 1

        def at(value):
            return 40 + (value - least) / room * (wide - 80)

        marks = [f'<path d="M{at(0):.1f} 8V66" stroke="#1d2733"/>'
                 f'<text x="{at(0):.1f}" y="84" text-anchor="middle">0</text>',
                 f'<path d="M{at(claimed):.1f} 8V66" stroke="#d97706" stroke-dasharray="6 4"/>'
                 f'<text x="{at(claimed):.1f}" y="84" text-anchor="middle" fill="#d97706">'
                 f"{drawing.number(claimed)}</text>"]
        marks += [f'<circle cx="{at(value):.1f}" cy="22" r="5" fill="#2f6fd0" opacity="0.7"/>'
                  for value in test["seeds"]]
        if "low" in test:
            marks.append(f'<path d="M{at(test["low"]):.1f} 48H{at(test["high"]):.1f}" '
                         'stroke="#2f6fd0" stroke-width="4"/>')
        mean = at(test["mean"])
        marks.append(f'<path d="M{mean - 8:.1f} 48L{mean:.1f} 39L{mean + 8:.1f} 48L{mean:.1f} 57Z" '
                     'fill="#2f6fd0"/>')
        parts.append(f"<figure><figcaption>{drawing.html.escape(title)}</figcaption>"
                     f'<svg viewBox="0 0 {wide} {high}" font-size="15" fill="#5f6b7a">'
                     f'{"".join(marks)}</svg></figure>')
    return "".join(parts)


def page(name: str, found: dict, drawn: dict[str, dict]) -> str:
    """The answer of a sheet as one HTML page. drawn: what `curves` returns."""
    escape = drawing.html.escape
    text = load(name).__doc__.strip().split("\n\n")
    paragraphs = [re.sub("`([^`]+)`", r"<code>\1</code>", escape(" ".join(part.split())))
                  for part in text[1:]]
    rows = [(title, in_words(test), test["source"], test["verdict"])
            for title, test in found["tests"].items()]
    rule = found["rule"]
    when = f"rule of {rule['date']} ({rule['commit']})" if rule else "rule not committed"
    return drawing.page_html(f"{name}: {found['verdict']}", [
        f"<h1>{escape(found['claim'])}</h1>",
        drawing.tiles_html([("verdict", found["verdict"]), ("sheet", escape(name))]),
        f'<p class="quiet">{found["verdict"].capitalize()}: {MEANING[found["verdict"]]}. '
        "Of several tests the worst verdict counts.</p>",
        *(f"<p>{part}</p>" for part in paragraphs),
        "<h2>Effects</h2>", drawing.text_table(("effect", "found", "source", "verdict"), rows),
        forest(found["tests"]),
        '<p class="quiet">Dots: seeds. Diamond and bar: mean and 95% interval. Dashed: the effect '
        "that the claim speaks of, or the loss that it allows. Detectable: the least effect that "
        "so many seeds would show in four of five studies.</p>",
        *(drawing.curve(series, key, "CPU minute" if "minutes" in key else "step")
          for key, series in drawn.items()),
        "<h2>Runs</h2>", drawing.figures_html(found["runs"]),
        f'<p class="quiet">Equal in all arms: {escape(load(name).SHEET.equal)}. '
        f"{escape(found['where'])}; {when}, first run {found['began']}.</p>"])
