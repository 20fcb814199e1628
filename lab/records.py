"""A contest: in how little CPU time does a model learn to solve the demo's tasks?

    python -m lab.records list                      the table of RECORDS.md
    python -m lab.records verify records/NAME.json  measure an entry beside the baseline, 3 seeds
    python -m lab.records verify records/NAME.json --seeds=1       a first look

An entry is a small JSON file with options of pretrain.py, or with a patch of the code; RECORDS.md
has the rules. Machines differ, and so does one machine from hour to hour. So what counts is a
ratio: the entry's CPU time over that of the baseline, measured in turn on the same machine with the
same seed, one thread each. Several entries may be given; then they share the baseline's runs.

Training stops from time to time for an evaluation on held-out tasks, whose CPU time does not count.
A run has reached the goal when the mean over the six categories is at the track's percentage on
COUNT tasks a category. If that does not happen within the track's minutes, or in the steps of the
recipe, its time is the track's minutes, and it is marked as not reached.

A seed gives one ratio. The result is their geometric mean, with a 95% interval by Student's t on
the logarithms. An entry beats the baseline if the interval lies below 1 and each of its own runs
has reached the goal. If verify is started again, finished runs are not repeated and an interrupted
one continues.
"""
import lib  # first of all, before torch: see lib/__init__.py

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from unittest import mock
from zlib import crc32

import pretrain
from data import parse_mix
from lab.demo import MIX, ROW_TOKENS
from lab.git import git
from lab.sheet import effect
from lib.cli import check_options, cli, main, Positive, run_verb, UserError
from lib.common import clock, read_json, ROOT, setup, write_json
from lib.evaluation import run_tasks, tasks_of
from lib.runs import checkpoints, same_options, step_of
from tokenizer import tokenizer_of

# ---- the contest --------------------------------------------------------------------------------

NAMES = [name for name, _ in parse_mix(MIX)]        # the six categories of the demo
FIRST_TASK = 1_000_000          # of the test split, as in `sample.py eval`
COUNT = 200                     # held-out tasks a category that decide
SCREEN, MARGIN = 50, 3.0        # most of them are not played where the first SCREEN of a category
                                # stand more than MARGIN points below the goal: that takes time
SEEDS = 3                       # the least that a result has

# What all runs have in common. No workers: all the work is done by this process, whose CPU time is
# measured. eval_every: the Meter is called after each step. log_every: prints nothing in between.
COMMON = {"workers": 0, "device": "cpu", "resume": True, "save_every": 500, "eval_every": 1,
          "log_every": 10 ** 9}
# The options of pretrain.py that an entry may set.
FREE = {"size", "steps", "rows", "row_tokens", "mix", "levels", "think", "parts", "own_question",
        "curriculum", "lr", "train", "vision_scale", "weight_decay", "warmup", "schedule", "decay",
        "mtp", "mtp_share", "mtp_alone", "image_option", "vit", "dtype"}
TOWERS = ("", "ckpt/semantic")      # what --vit may be: random weights, or this tower, as it is
# What a patch may not touch: tasks, their rewards and how they are played, weights, this contest.
FIXED = ("tasks/", "gym.py", "engine.py", "corpus.txt", "ckpt/", "lab/", "records/", "tests/",
         "lib/evaluation.py", "lib/rollout.py", "lib/episodes.py", "lib/common.py")


@dataclass(frozen=True)
class Track:
    """percent: the goal, as a mean over NAMES. minutes: the most CPU minutes of a run. seconds: CPU
    seconds of training between two evaluations. options: the baseline, as options of pretrain.py.
    kept: those of them that an entry can't set.
    """
    percent: float
    minutes: float
    seconds: float
    options: dict
    kept: tuple[str, ...] = ()


# Baselines leave the MTP head out: in both recipes it learns by itself and changes no reply.
DEMO = {"mix": MIX, "row_tokens": ROW_TOKENS, "levels": 1, "vit": "ckpt/semantic", "mtp": 0}
ONE_ROW = {**DEMO, "rows": 1, "steps": 3000, "own_question": True}      # lab/demo.py
TRACKS = {
    # At 40% ocr_line still stands at 0: to leave it out would be faster, and say nothing.
    "sprint": Track(40.0, 6.0, 15.0, ONE_ROW, ("mix",)),
    "short": Track(75.0, 25.0, 30.0, ONE_ROW),
    "long": Track(90.0, 40.0, 60.0, {**DEMO, "rows": 2, "steps": 2600})}


# ---- entries ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Entry:
    """An entry as its file has it. author, date (2026-11-30), what (what has changed, in a
    sentence): texts. track: a key of TRACKS. options: {option of pretrain.py: value}, beside those
    of the baseline. patch: the name of a file beside the entry, for `git apply`."""
    name: str
    author: str
    date: str
    what: str
    track: str
    options: dict = dataclasses.field(default_factory=dict)
    patch: str = ""


TEXTS = ("author", "date", "what", "track")     # what each entry has to have


def is_line(value) -> bool:
    """Whether a value is a text that fits into a cell of the table."""
    return isinstance(value, str) and value.isprintable() and "|" not in value


def read_entry(path) -> Entry:
    """Read records/NAME.json. Its options are parsed as on a command line, never evaluated. Raises
    UserError in one line where something is missing, unknown or not allowed."""
    path = Path(path)
    found = read_json(path)
    if not re.fullmatch("[a-z0-9_]+", path.stem) or path.stem == "baseline":
        raise UserError(f"{path}: an entry's name has small letters, digits and _, and is not "
                        "'baseline'")
    for name in found:
        if name not in (*TEXTS, "options", "patch"):
            raise UserError(f"{path}: an entry has no '{name}', only {', '.join(TEXTS)}, options "
                            "and patch")
    for name in TEXTS:
        if not is_line(found.get(name)) or not found[name].strip():
            raise UserError(f"{path}: '{name}' has to be a line of text without |")
    options, patch = found.get("options", {}), found.get("patch", "")
    if not isinstance(options, dict):
        raise UserError(f"{path}: 'options' has to be an object, {{\"lr\": 0.004}}")
    if not is_line(patch) or Path(patch).name != patch:
        raise UserError(f"{path}: 'patch' has to be the name of a file beside the entry")
    entry = Entry(path.stem, **found)
    try:
        datetime.strptime(entry.date, "%Y-%m-%d")
    except ValueError:
        raise UserError(f"{path}: the date has to be like 2026-11-30") from None
    if entry.track not in TRACKS:
        raise UserError(f"{path}: there is no track '{entry.track}', only {', '.join(TRACKS)}")
    for name, value in entry.options.items():
        free = FREE - {*TRACKS[entry.track].kept}
        if name not in free:
            raise UserError(f"{path}: an entry can't set '{name}', only {', '.join(sorted(free))}")
        if not isinstance(value, (str, int, float)):        # a bool is an int
            raise UserError(f"{path}: the value of '{name}' has to be a text or a number")
    settings = settings_of(TRACKS[entry.track].options | entry.options, 0, Path("out"))
    fresh = replace(settings, resume=False)
    pretrain.stream_of(fresh, pretrain.start_of(fresh)[1])      # refuses unknown sources
    return entry


def settings_of(options: dict, seed: int, out: Path) -> pretrain.Args:
    """The arguments of a run. Raises UserError where pretrain.py does not take the options."""
    chosen = {**options, **COMMON, "seed": seed, "out": out}
    settings = cli(pretrain.Args, [f"--{name}={value}" for name, value in chosen.items()])
    if settings.vit not in TOWERS:
        raise UserError(f"--vit={settings.vit}: an entry starts from random weights (--vit=) or "
                        f"from {TOWERS[1]}")
    if settings.vit:
        settings.vit = str(ROOT / settings.vit)
    pretrain.check(settings)
    return settings


# ---- a run --------------------------------------------------------------------------------------

class Stop(Exception):
    """The run has reached the goal, or its time is over."""


def examine(model, count: int, first: int = 0) -> int:
    """How many held-out tasks are solved, of tasks first..count-1 of each category, greedily."""
    tokens, solved = tokenizer_of(model.config), 0
    for name in NAMES:
        tasks = tasks_of(name, model.config, 1, count - first, "test", FIRST_TASK + first)
        episodes = run_tasks(model, tokens, tasks)
        failed = next((e.score.error for e in episodes if e.score.error), None)
        if failed:
            raise UserError(f"{name} can't be evaluated: {failed}")
        solved += sum(e.score.solved for e in episodes)
    return solved


class Meter:
    """Called in place of pretrain.held_out_losses, so after each step: it knows the CPU time of
    the training so far, evaluates when it is time, and raises Stop at the end of the run.

    meter.json in the run's folder holds what it knows: `seconds`, pairs of a step and the CPU
    seconds until then, at the steps where a checkpoint may be; and `points`, the evaluations: step,
    seconds, percent, tasks a category. A resumed run goes on from its checkpoint's seconds; the
    second or two that loading takes count once more.

    every: steps between two checkpoints. start: the step of the checkpoint to go on from.
    """

    def __init__(self, folder: Path, track: Track, steps: int, every: int, start: int = 0):
        self.path, self.track, self.steps, self.every = folder / "meter.json", track, steps, every
        known = read_json(self.path) if start and self.path.exists() else {}
        before = [pair for pair in known.get("seconds", []) if pair[0] <= start]
        self.seconds = before or [[0, 0.0]]
        self.points = [p for p in known.get("points", []) if p["step"] <= start]
        self.step, self.spent = start, self.seconds[-1][1]
        # The clock's reading at which the run would have begun, had nothing interrupted it.
        self.began = time.process_time() - self.spent
        self.reached = False

    def __call__(self, model, rows) -> dict[str, float]:
        """model: the one that learns; rows: not used. Returns what is logged beside the step."""
        self.step += 1
        now = time.process_time()
        self.spent = now - self.began
        last = self.points[-1]["seconds"] if self.points else 0.0
        due = self.spent - last >= self.track.seconds or self.step == self.steps
        found = {"percent": self.evaluate(model)} if due else {}
        self.began += time.process_time() - now         # evaluations do not count
        if due or self.step % self.every == 0:
            self.write()
        if self.reached or self.spent >= 60 * self.track.minutes:
            raise Stop
        return found

    def evaluate(self, model) -> float:
        """Percent of held-out tasks that are solved, a new point. See SCREEN for how many tasks."""
        count, solved = SCREEN, examine(model, SCREEN)
        percent = 100 * solved / SCREEN / len(NAMES)
        if percent >= self.track.percent - MARGIN:
            count, solved = COUNT, solved + examine(model, COUNT, SCREEN)
            percent = 100 * solved / COUNT / len(NAMES)
            self.reached = percent >= self.track.percent
        self.points.append({"step": self.step, "seconds": self.spent, "percent": percent,
                            "tasks": count})
        left = 60 * self.track.minutes - self.spent
        print(f"  step {self.step}: {clock(self.spent)} of CPU time, {percent:.1f}% of {count} "
              f"tasks a category; at most {clock(max(0, left))} left", flush=True)
        return percent

    def write(self):
        """Keep what is known, with the seconds of the step that is done."""
        if self.step > self.seconds[-1][0]:
            self.seconds.append([self.step, self.spent])
        write_json(self.path, {"seconds": self.seconds, "points": self.points})

    def end(self) -> dict:
        """The outcome of the run."""
        return {"reached": self.reached, "step": self.step,
                "minutes": self.spent / 60 if self.reached else self.track.minutes,
                "percent": self.points[-1]["percent"] if self.points else 0.0,
                "seconds_a_step": self.spent / max(1, self.step)}


@dataclass
class Trial:
    folder: str = ""              # of the run, with a trial.json


def trial(args: Trial):
    """One run, in a process of its own. verify calls this."""
    check_options(args)
    folder = Path(args.folder)
    if not (folder / "trial.json").exists():
        raise UserError(f"--folder={args.folder} has no trial.json: `verify` starts trials")
    asked = read_json(folder / "trial.json")
    track = Track(**asked["track"])
    settings = settings_of(track.options | asked["options"], asked["seed"], folder / "run")
    done = [step_of(path) for path in checkpoints(settings.out)]
    meter = Meter(folder, track, settings.steps, settings.save_every, done[-1] if done else 0)
    try:
        with mock.patch.object(pretrain, "held_out_losses", meter):
            pretrain.run(settings)
    except Stop:
        pass
    finally:
        meter.write()
    write_json(folder / "end.json", meter.end())


# ---- verification -------------------------------------------------------------------------------

@dataclass
class Verify:
    entries: list[str] = dataclasses.field(default_factory=list)    # files of entries: records/...
    seeds: Positive = SEEDS       # runs of the baseline and of each entry
    out: str = "out/records"      # a folder for each set of entries, with a folder a run


def source() -> str:
    """The commit of this tree; where tracked files have changed since, with "-dirty-" and a
    checksum of the changes."""
    commit = git("rev-parse", "--short", "HEAD", where=ROOT)
    changes = git("diff", "HEAD", where=ROOT)
    return f"{commit}-dirty-{crc32(changes.encode()):08x}" if changes else commit


def patched(entry: Entry, path: Path, tree: Path) -> Path:
    """A worktree of the present commit with the entry's patch, made anew. path: of the entry.
    Raises UserError where the patch does not apply or touches what is FIXED."""
    if "-dirty-" in source():
        raise UserError("a patch is compared with a commit: commit your changes first")
    if tree.exists():
        git("worktree", "remove", "--force", tree, where=ROOT)
    git("worktree", "add", "--force", "--detach", tree, "HEAD", where=ROOT)
    git("apply", "--index", path.with_name(entry.patch).resolve(), where=tree)
    # -z: names as they are, never in quotes. A file that is moved away counts as changed, too.
    names = git("diff", "--cached", "--name-only", "--no-renames", "-z", "HEAD", where=tree)
    for name in names.split("\0"):
        if name.startswith(FIXED):
            raise UserError(f"{entry.patch} changes {name}, which is the same for all entries")
    return tree


def run_trial(folder: Path, tree: Path, track: Track, options: dict, seed: int) -> dict:
    """One run in the source tree `tree`, or the rest of it, or its outcome where it is done."""
    if not (folder / "end.json").exists():
        write_json(folder / "trial.json",
                   {"track": asdict(track), "options": options, "seed": seed})
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        child = subprocess.Popen(
            [sys.executable, "-m", "lab.records", "trial", f"--folder={folder}"], cwd=tree)
        try:
            code = child.wait()
        except SystemExit:          # a Ctrl-C reaches the child without our help
            child.terminate()
            raise
        finally:                    # wait until it has saved what it has done
            child.wait()
        if code:
            raise UserError(f"a run ended with code {code}, see above; the same command continues "
                            "with it")
    return read_json(folder / "end.json")


def compare(runs: dict[str, dict], name: str) -> dict:
    """The figures of an entry. runs: {seed: {arm: end}}, among the arms `baseline` and `name`."""
    logs = [math.log(arms[name]["minutes"] / arms["baseline"]["minutes"])
            for arms in runs.values()]
    ratio = {key: math.exp(value) for key, value in effect(logs).items() if key != "detectable"}
    return {"ratio": ratio, "seeds": {
        seed: {arm: arms[arm] for arm in ("baseline", name)} for seed, arms in runs.items()}}


def beats(result: dict) -> bool:
    """Whether an entry beats the baseline: the interval is below 1, each run has reached it."""
    return result["ratio"].get("high", math.inf) < 1 and not missed(result)


def missed(result: dict) -> list[str]:
    """The seeds in which the entry has not reached the goal."""
    return [seed for seed, arms in result["seeds"].items()
            if not arms[result["entry"]["name"]]["reached"]]


def verdict_on(result: dict) -> str:
    """What a result says about its entry, in words for the table."""
    if seeds := missed(result):
        return f"goal not reached with seed {', '.join(seeds)}"
    if beats(result):
        return "beats the baseline"
    if result["ratio"].get("low", 0.0) > 1:
        return "slower than the baseline"
    return f"no difference that {len(result['seeds'])} seeds show"


def verify(args: Verify):
    """Measure entries beside the baseline, and print their lines of the table. With three seeds or
    more, the result goes to records/NAME.result.json. An entry with a patch runs foreign code: read
    it before."""
    check_options(args)
    paths = [Path(path) for path in args.entries]
    entries = {path: read_entry(path) for path in paths}
    tracks = {entry.track for entry in entries.values()}
    if len(tracks) != 1:
        raise UserError("give one entry, records/NAME.json, or several of the same track")
    [track] = tracks
    names = [entry.name for entry in entries.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two entries have the name '{twice[0]}': their runs would share a folder")
    out = Path(args.out).resolve() / "-".join(names)
    commit = source()
    asked = {"commit": commit, "entries": [asdict(entry) for entry in entries.values()],
             "patches": [path.with_name(entry.patch).read_text("utf-8", "replace")
                         for path, entry in entries.items() if entry.patch]}
    os.environ["OMP_NUM_THREADS"] = "1"         # minutes are those of one thread
    with same_options(out / "config.json", asked):
        arms = {"baseline": (ROOT, {})}
        for path, entry in entries.items():
            tree = patched(entry, path, out / f"tree_{entry.name}") if entry.patch else ROOT
            arms[entry.name] = tree, entry.options
        runs = measure(arms, TRACKS[track], args.seeds, out)
        for tree, _ in arms.values():
            if tree != ROOT:
                git("worktree", "remove", "--force", tree, where=ROOT)
    for path, entry in entries.items():
        result = {"entry": asdict(entry), "date": f"{datetime.now():%Y-%m-%d}", "commit": commit,
                  "hardware": setup("cpu").description, **compare(runs, entry.name)}
        if args.seeds >= SEEDS:
            write_json(path.with_suffix(".result.json"), result)
        print(line_of(result, verdict_on(result)))
    if args.seeds < SEEDS:
        print(f"a look: a result needs {SEEDS} seeds")


def measure(arms: dict, track: Track, seeds: int, out: Path) -> dict[str, dict]:
    """{seed: {arm: end}}. arms: {name: (source tree, options)}. The arms take turns, so that all of
    them meet the machine in the same state. Raises UserError where the source changes meanwhile:
    the runs would be of different programs."""
    runs: dict[str, dict] = {str(seed): {} for seed in range(seeds)}
    todo, walls, begun = [(seed, name) for seed in runs for name in arms], [], source()
    for i, (seed, name) in enumerate(todo):
        if (now := source()) != begun:
            raise UserError(f"the source was {begun} at the first run and is {now} now: verify in "
                            "a tree that stays as it is (git worktree add)")
        tree, options = arms[name]
        print(f"{name}, seed {seed}: run {i + 1} of {len(todo)}", flush=True)
        folder, began = out / f"{name}{seed}", time.time()
        done = (folder / "end.json").exists()
        runs[seed][name] = end = run_trial(folder, tree, track, options, int(seed))
        if not done:
            walls.append(time.time() - began)
        left = clock(sum(walls) / max(1, len(walls)) * (len(todo) - i - 1))
        print(f"{name}, seed {seed}: {end['minutes']:.2f} CPU minutes, {end['step']} steps, "
              f"{end['percent']:.1f}%{'' if end['reached'] else ', not reached'}; about {left} "
              "left", flush=True)
    return runs


# ---- the table ----------------------------------------------------------------------------------

HEAD = ("| verified | entry | time of the baseline | CPU minutes | verdict | what |\n"
        "|---|---|---|---|---|---|")


def line_of(result: dict, verdict: str) -> str:
    """A line of the table: the ratio with its interval, the mean minutes of the entry and of the
    baseline, a verdict."""
    entry, ratio, ends = Entry(**result["entry"]), result["ratio"], list(result["seeds"].values())
    interval = f" [{ratio['low']:.2f} to {ratio['high']:.2f}]" if "low" in ratio else ""
    own, baseline = (sum(arms[arm]["minutes"] for arms in ends) / len(ends)
                     for arm in (entry.name, "baseline"))
    return (f"| {result['date']} | [{entry.name}](records/{entry.name}.json), {entry.author} | "
            f"{ratio['mean']:.2f}{interval} | {own:.1f}, {baseline:.1f} | {verdict} | "
            f"{entry.what} |")


def table(folder: Path, track: str) -> list[str]:
    """The lines of a track, oldest first. A record beats the baseline, and its ratio is smaller
    than that of each record before it. Raises UserError where an entry is not the one that was
    measured."""
    found = []
    for path in folder.glob("*.result.json"):
        entry, result = folder / path.name.replace(".result", ""), read_json(path)
        if asdict(read_entry(entry)) != result["entry"]:
            raise UserError(f"{entry} is not the entry that {path.name} is about: verify it again")
        if result["entry"]["track"] == track:
            found.append(result)
    lines, best = [], 1.0
    for result in sorted(found, key=lambda r: (r["entry"]["date"], r["entry"]["name"])):
        verdict, ratio = verdict_on(result), result["ratio"]["mean"]
        if beats(result) and ratio < best:
            verdict, best = "**record**", ratio
        elif beats(result):
            verdict += ", not the record"
        lines.append(line_of(result, verdict))
    return lines


@dataclass
class List:
    folder: str = str(ROOT / "records")     # of entries and their results


def list_records(args: List):
    """Print the table of each track, as it stands in RECORDS.md."""
    check_options(args)
    if not Path(args.folder).is_dir():
        raise UserError(f"--folder={args.folder}: there is no such folder")
    for name, track in TRACKS.items():
        lines = table(Path(args.folder), name)
        print(f"{name}: {track.percent:g}%, at most {track.minutes:g} CPU minutes")
        print("\n".join([HEAD, *lines]) + "\n" if lines else "no entry yet\n")


VERBS = {"list": (List, list_records, None), "verify": (Verify, verify, "entries"),
         "trial": (Trial, trial, None)}

if __name__ == "__main__":
    main(lambda: run_verb(VERBS, __doc__))
