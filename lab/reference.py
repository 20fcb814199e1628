"""Is my run right? Reference curves that were measured, and the comparison of a run with them.

    python -m lab.report out/demo --reference       compare all runs below a folder
    python -m lab.reference out/a out/b --name=first-look       make a reference of finished runs

A reference is a small JSON file in lab/references. It holds the options of a run, the hardware and
the commit, and of each field of log.jsonl at most 60 points: step, mean, low, high. Each point is
the mean over a stretch of steps, as in the charts of lab.report.

The band from low to high is an estimate from few runs. Of several runs, which differ in the seed,
it reaches from the least to the most, each widened by twice the standard deviation between seeds.
Of one run it is its own curve, two points earlier to two points later, since other seeds learn the
same a little sooner or later, widened by twice the standard deviation of single steps around it;
other seeds may leave such a band, and the file says so. A run differs from its reference where
three points in a row lie outside the band: single points do so by chance.
"""
import lib  # first of all, before torch: see lib/__init__.py

import dataclasses
import json
import math
import re
import shlex
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

import pretrain
import rl
import train_vit
from lab.compare import final, shortened, WITHOUT_EFFECT
from lab.drawing import number
from lab.fields import usable
from lab.git import git_or_none
from lib.cli import cli, main, UserError
from lib.common import read_json, read_log, ROOT, write_text

SCRIPTS = {"pretrain.py": pretrain.Args, "train_vit.py": train_vit.Args, "rl.py": rl.Args}
FOLDER = ROOT / "lab/references"

# Options that change the speed or the memory of a run, or how often it is measured, but not what it
# learns beyond rounding.
IGNORED = WITHOUT_EFFECT | {
    "device", "dtype", "compile", "memory", "chunk_patches", "partition", "micro", "patience",
    "eval_every"}
# Options that are folders. Only the last two names are compared, such as vit/align: a run folder
# may be anywhere.
FOLDERS = "init", "vit", "semantic_teacher", "texture_teacher"

# The fields that are compared, the most telling first: those that show what is learnt.
CURVES = ("loss", "reward", "held_out", "accuracy", "mtp1", "mtp2", "mtp3", "cos_semantic",
          "cos_texture", "linear", "knn", "dense", "zero_shot_en", "zero_shot_zh", "i2t_en",
          "i2t_zh", "entropy")
POINTS = 60             # of a curve, at most
IN_A_ROW = 3            # points outside the band that make a difference
SHIFT = 2               # points by which another seed may be sooner or later
NEIGHBOURS = 5          # points to each side over which a standard deviation is pooled
LEAST = 0.01            # the least standard deviation, as a share of the mean: two seeds may agree
                        # by chance, and other CPUs round differently


@dataclass
class Args:
    run: list[str] = dataclasses.field(default_factory=list)    # run folders of equal options
    name: str = ""              # of the reference, such as demo-pretrain
    command: str = ""           # what makes such a run; default: the script and its options
    commit: str = ""            # of the repository when they ran; default: the present one
    unfinished: bool = False    # take runs that have not ended, too, as far as they go
    out: str = str(FOLDER)      # folder for NAME.json


# ---- the options of a run -----------------------------------------------------------------------

def script_of(config: dict):
    """(name, Args) of the script whose options a config.json holds; (None, None) for others."""
    def shared(args):
        return len({field.name for field in dataclasses.fields(args)} & config.keys())

    name, args = max(SCRIPTS.items(), key=lambda pair: shared(pair[1]))
    if shared(args) < 0.7 * len(dataclasses.fields(args)):
        return None, None
    return name, args


def options_of(folder: Path) -> dict:
    """{"script": its name, option: value} of the run that has left config.json in `folder`, with
    the options that matter for what is learnt. Of train_vit.py `log` stands in place of --stage: it
    is the stage whose folder this is. Raises UserError where there are no options."""
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    script, args = script_of(config)
    if script is None:
        raise UserError(f"{path} is missing or does not hold the options of {', '.join(SCRIPTS)}")
    options = {"script": script}
    for field in dataclasses.fields(args):
        if field.name not in IGNORED:
            value = config.get(field.name, field.default)
            if field.name in FOLDERS and isinstance(value, str):
                value = "/".join(Path(value).parts[-2:])
            options[field.name] = value
    if script == "train_vit.py":
        del options["stage"]                # `all` trains four, each in a folder of its own
        options["log"] = folder.name
    return options


def differences(options: dict, others: dict) -> list[str]:
    """The names of the options that differ; one that is missing has its default."""
    defaults = {field.name: field.default
                for field in dataclasses.fields(SCRIPTS[options["script"]])}
    return [name for name in {**options, **others}
            if options.get(name, defaults.get(name)) != others.get(name, defaults.get(name))]


def command_of(options: dict) -> str:
    """The command line that has these options."""
    words = ["python", options["script"]]
    for field in dataclasses.fields(SCRIPTS[options["script"]]):
        value = options.get(field.name, field.default)
        if value != field.default:
            words.append(f"--{field.name}={shlex.quote(str(value))}")
    return " ".join(words)


# ---- curves -------------------------------------------------------------------------------------

def measured(lines: list[dict], key: str) -> np.ndarray:
    """The (step, value) of a field in the lines of a log: shape (n, 2)."""
    return np.array([(line["step"], line[key]) for line in lines if key in line]).reshape(-1, 2)


def stretches(points: np.ndarray, size: int, whole: bool = False) -> np.ndarray:
    """The means over consecutive stretches of `size` points, (n, 2), as lab.drawing.smooth takes
    them. whole: leave out the last stretch where it is not full."""
    starts = range(0, len(points) - (size - 1) * whole, size)
    return np.array([points[i:i + size].mean(0) for i in starts]).reshape(-1, 2)


def pooled(variances: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each variance and its neighbours, `reach` to each side."""
    return np.array([variances[max(0, i - reach):i + reach + 1].mean()
                     for i in range(len(variances))])


def extremes(values: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most of each value and its neighbours, `reach` to each side."""
    parts = [values[max(0, i - reach):i + reach + 1] for i in range(len(values))]
    return np.array([part.min() for part in parts]), np.array([part.max() for part in parts])


def noise(points: np.ndarray, size: int) -> np.ndarray:
    """The variance of single points around a smooth curve, one for each stretch. A point's distance
    to the mean of its two neighbours has 1.5 times that variance."""
    values = points[:, 1]
    squares = (values[1:-1] - (values[:-2] + values[2:]) / 2) ** 2 / 1.5
    squares = np.concatenate([squares[:1], squares, squares[-1:]])      # the ends have no neighbour
    return stretches(np.stack([points[:, 0], pooled(squares, NEIGHBOURS * size)], 1), size)[:, 1]


def curve_of(logs: list[list[dict]], key: str) -> dict | None:
    """One field of several logs as {"size": log lines a point, "points": [[step, mean, low, high],
    ...]}. None where it is in none of them, or is too short for a band."""
    found = [measured(lines, key) for lines in logs]
    shortest = min(map(len, found))
    if shortest < (1 if len(logs) > 1 else 3):
        return None
    size = math.ceil(shortest / POINTS)
    curves = np.stack([stretches(points[:shortest], size) for points in found])     # (runs, n, 2)
    steps, values = curves[0, :, 0], curves[:, :, 1]
    if len(logs) > 1:
        variances = pooled(values.var(0, ddof=1), NEIGHBOURS)
        low, high = values.min(0), values.max(0)
    else:
        variances = noise(found[0], size)
        low, high = extremes(values[0], SHIFT)
    mean = values.mean(0)
    wider = 2 * np.maximum(np.sqrt(variances), LEAST * np.abs(mean))
    low, high = low - wider, high + wider
    if values.min() >= 0:       # losses and shares are never negative
        low = np.maximum(low, 0)
    rows = zip(steps, mean, low, high)
    return {"size": size, "points": [[float(f"{value:.4g}") for value in row] for row in rows]}


# ---- to make a reference ------------------------------------------------------------------------

def reference_of(folders: list[Path], name: str, command: str = "", commit: str = "",
                 unfinished: bool = False) -> dict:
    """The reference of runs, which have to have ended unless `unfinished` ones are taken. Raises
    UserError where one has not, where they differ in more than the seed, or where two have the same
    seed: they would make the band too narrow."""
    options, logs = options_of(folders[0]), []
    for folder in folders:
        other = options_of(folder)
        if names := differences(options, other):
            raise UserError(f"{folder} differs from {folders[0]} in {', '.join(names)}: a "
                            "reference is of runs that differ in the seed alone")
        logs.append(usable(read_log(folder / "log.jsonl")))
        steps = options["steps"]
        if not logs[-1] or type(steps) is not int:
            raise UserError(f"{folder} holds no log.jsonl of a run")
        if logs[-1][-1]["step"] < steps and not unfinished:
            raise UserError(f"{folder} has not ended: its log does not reach step {steps}; "
                            "--unfinished takes it as far as it goes")
    configs = [read_json(folder / "config.json") for folder in folders]
    seeds = [config.get("seed") for config in configs]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UserError(f"two of the runs have the same seed, {twice[0]}: a reference needs "
                        "different ones")
    curves = {key: curve for key in CURVES if (curve := curve_of(logs, key))}
    finals = {}
    for key in CURVES:
        values = [value for lines in logs if (value := final(lines, key)) is not None]
        if values:
            finals[key] = [float(f"{value:.4g}") for value in values]
    if len(logs) > 1:
        band = (f"from the least to the most of {len(logs)} runs, each widened by twice the "
                "standard deviation between them")
    else:
        band = ("one run only: its curve, two points earlier to two points later, widened by twice "
                "the standard deviation of single steps around it; other seeds may leave it")
    reached = min(lines[-1]["step"] for lines in logs)
    if reached < options["steps"]:
        band += f"; not ended: it knows {reached} of {options['steps']} steps"
    present = git_or_none("rev-parse", "--short", "HEAD", where=ROOT)
    ended = max((folder / "log.jsonl").stat().st_mtime for folder in folders)
    return {"name": name, "command": command or command_of(options), "config": options,
            "seeds": seeds, "reaches": reached, "band": band,
            "hardware": str(configs[0].get("hardware", "unknown")),
            "commit": commit or present or "unknown", "date": date.fromtimestamp(ended).isoformat(),
            "final": finals, "curves": curves}


def as_text(reference: dict) -> str:
    """A reference as JSON, each point in one line."""
    text = json.dumps(reference, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: f"[{' '.join(m[0][1:-1].split())}]", text) + "\n"


# ---- to compare with one ------------------------------------------------------------------------

@dataclass
class Curve:
    """How one field compares. text: in words; points: how many have been compared; differs: the
    step from which on it does, else None; there: the value at that step, and the reference's."""
    text: str
    points: int = 0
    differs: float | None = None
    there: str = ""


@dataclass
class Compared:
    """One log beside its reference, which is None where none fits."""
    folder: Path
    verdict: str
    reference: dict | None = None
    curves: list[Curve] = dataclasses.field(default_factory=list)

    @property
    def differs(self) -> bool:
        return any(curve.differs is not None for curve in self.curves)


def references(folder: Path = FOLDER) -> list[dict]:
    return [read_json(path) for path in sorted(folder.glob("*.json"))]


def first_stretch(outside: np.ndarray) -> int | None:
    """Where the first IN_A_ROW true values in a row begin; of fewer values all have to be true."""
    size = min(IN_A_ROW, len(outside))
    for i in range(len(outside) - size + 1):
        if outside[i:i + size].all():
            return i
    return None


def compare_curve(lines: list[dict], key: str, curve: dict, ended: bool) -> Curve:
    """Compare one field of a log with its reference curve, as far as the log goes, at the steps of
    the reference. What was measured elsewhere (another --eval_every) is left out: between two of
    its points a curve may bend."""
    size, known = curve["size"], np.array(curve["points"])      # (n, 4): step, mean, low, high
    points = stretches(measured(lines, key), size, whole=not ended)
    distances = np.abs(points[:, :1] - known[:, 0])             # (stretches, n), in steps
    there = distances.min(1) <= size / 2
    if not there.any():
        return Curve(f"{key}: not measured in this run" + " so far" * (not ended))
    steps, values = points[there].T
    mean, low, high = known[distances[there].argmin(1), 1:].T

    def at(i):
        return (f"{number(values[i])}, reference {number(mean[i])} ({number(low[i])} to "
                f"{number(high[i])})")

    outside = (values < low) | (values > high)
    text = (f"{key}: within the reference's band at {(~outside).sum()} of {len(steps)} points; "
            f"last {at(-1)}")
    if (first := first_stretch(outside)) is None:
        return Curve(text, len(steps))
    until = "on" if outside[-1] else f"to step {steps[outside][-1]:.0f}"
    return Curve(text, len(steps), float(steps[first]),
                 f"from step {steps[first]:.0f} {until}: {key} {at(first)}")


def nearest(options: dict, known: list[dict]) -> tuple[dict | None, str]:
    """(the reference of these options, ""), or (None, one line that says why there is none)."""
    known = [reference for reference in known
             if reference["config"]["script"] == options["script"]]
    if not known:
        return None, f"there is no reference of {options['script']}"
    best = min(known, key=lambda reference: len(differences(options, reference["config"])))
    names = differences(options, best["config"])
    if not names:
        return best, ""

    def shown(value):
        return shortened(str(value), 30) or "nothing"

    values = [f"{name} {shown(best['config'].get(name))} (yours: {shown(options.get(name))})"
              for name in names[:4]]
    left = len(names) - len(values)
    more = f" and {left} option{'s' * (left > 1)} more" if left else ""
    return None, f"no reference fits; the nearest, {best['name']}, has {', '.join(values)}{more}"


def compare(folder: Path, known: list[dict]) -> Compared:
    """Compare the run that has left log.jsonl in `folder` with its reference."""
    try:
        options = options_of(folder)
    except UserError as error:
        return Compared(folder, f"no reference fits: {error}")
    reference, why = nearest(options, known)
    if reference is None:
        return Compared(folder, why)
    lines = usable(read_log(folder / "log.jsonl"))
    done = lines[-1]["step"] if lines else 0
    curves = [compare_curve(lines, key, curve, done >= options["steps"])
              for key, curve in reference["curves"].items()]
    for key, values in reference["final"].items():      # what was measured too rarely for a band
        if key not in reference["curves"] and done >= options["steps"]:
            if (value := final(lines, key)) is not None:
                others = ", ".join(map(number, values))
                curves.append(Curve(f"{key}: {number(value)} at the end, reference {others}; no "
                                    "band is known"))
    steps, known_until = options["steps"], reference["reaches"]
    so_far = f" as far as it goes, step {done} of {steps}" if done < steps else ""
    if done > known_until:
        so_far = f" as far as the reference goes, step {known_until} of {steps}"
    different = [curve for curve in curves if curve.differs is not None]
    if different:       # of those that begin together the most telling one: min takes the first
        first = min(different, key=lambda curve: curve.differs)
        verdict = f"your run differs {first.there}"
    elif not any(curve.points for curve in curves):
        verdict = f"your run is too short to be compared: step {done} of {steps}"
    else:
        verdict = f"your run looks right{so_far}"
    return Compared(folder, verdict, reference, curves)


def compare_all(run: Path) -> list[Compared]:
    """Compare each log below a folder. Raises UserError where there is none."""
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    folders = sorted(path.parent for path in run.rglob("log.jsonl"))
    if not folders:
        raise UserError(f"nothing to compare in {run}: no log.jsonl")
    known = references()
    return [compare(folder, known) for folder in folders]


def in_words(run: Path, found: list[Compared]) -> str:
    """The comparison as text; its last line is about all logs together."""
    parts = []
    for one in found:
        name = "" if one.folder == run else f"{one.folder.relative_to(run)}: "
        if one.reference is None:
            parts.append(f"{name}{one.verdict}")
            continue
        count = len(one.reference["seeds"])
        what = f"a mean of {count} runs" if count > 1 else "one run"
        parts.append(f"{name}beside {one.reference['name']}, {what} of "
                     f"`{one.reference['command']}`")
        parts += [f"  {curve.text}" for curve in one.curves]
        parts.append(f"  {one.verdict}" if len(found) > 1 else one.verdict)
    compared = [one for one in found if one.reference]
    if len(found) > 1:
        wrong = [one.folder.name for one in compared if one.differs]
        parts.append(f"in all: {len(compared)} of {len(found)} logs have a reference; "
                     + (f"your run differs in {', '.join(wrong)}" if wrong else
                        "your run looks right" if compared else "nothing could be compared"))
    return "\n".join(parts)


def run(args: Args):
    """The command line: make a reference."""
    if not args.run:
        raise UserError("which run? give the folder of a finished run, or of several")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", args.name):
        raise UserError(f"--name takes small letters, digits and -, as first-look; not "
                        f"'{args.name}'")
    path = Path(args.out) / f"{args.name}.json"
    write_text(path, as_text(reference_of(list(map(Path, args.run)), args.name, args.command,
                                          args.commit, args.unfinished)))
    print(path)


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__, positional="run")))
