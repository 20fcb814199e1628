"""A campaign of faults: kills, damage and hostile input, drawn at random for some minutes.

    python -m lab.campaign --minutes=10
    python -m lab.campaign --kind=bytes --trial=17      one trial again, with its traceback

Each trial is a pure function of (--seed, kind, number). It does one bad thing to a small run, a
checkpoint, a picture or a task, all in a folder of its own that is removed afterwards. What happens
then is one of:

    survived     the right result, as if nothing had happened
    clear line   one line that says what is wrong, and exit code 2
    traceback    an exception that nobody caught, or no end within `LONGEST` seconds
    silent       a wrong result without a word: other weights, no checkpoint, another computation

The last two are faults of ours. The exit code is 1 if there was one. Everything stays on this
machine and is bounded in time and memory; Linux only.
"""
import lib  # first of all, before torch: see lib/__init__.py

import contextlib
import copy
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import gym
import pretrain
import rl
import sample
import train_vit
from data import collate, document, Stream
from lab import report
from lib.checkpoint import load_model
from lib.cli import cli, main, Range, Seed, UserError
from lib.common import ROOT
from lib.images import open_image
from lib.runs import checkpoints
from model import sized
from tasks.base import Task
from tasks.hostile import hostile_reply
from tokenizer import tokenizer_of

LONGEST = 60        # seconds that a trial may take
MEMORY = 12 << 30   # bytes of address space that a script may take; torch alone maps several GiB


class Silent(Exception):
    """A wrong result without a word about it."""


# ---- scripts as a user starts them --------------------------------------------------------------

# The smallest run of each script that saves. {ref} is the folder of the reference runs.
RUNS = {
    "pretrain": "pretrain.py --steps=4 --rows=1 --row_tokens=256 --mix=point --levels=1 --mtp=1 "
                "--device=cpu --workers=0 --eval_every=0 --save_every=1",
    "rl": "rl.py --steps=2 --prompts=1 --group=2 --mix=point --max_new=8 --slots=4 --eval_every=1 "
          "--eval_count=1 --save_every=1 --workers=0 --device=cpu --init={ref}/pretrain",
    "train_vit": "train_vit.py --stage=teachers --steps=2 --batch=4 --probes=16 --eval_every=0 "
                 "--save_every=1 --device=cpu --workers=0",
}
# Commands that only read.
READS = {
    "ask": "sample.py ask --ckpt={ref}/pretrain --max_new=4 --device=cpu --question=Where?",
    "eval": "sample.py eval --ckpt={ref}/pretrain --mix=point --levels=1 --count=2 --device=cpu",
    "show": "gym.py show point --count=2",
    "play": "gym.py play point --script=done()",
}
OPTIONS = {"pretrain": pretrain.Args, "rl": rl.Args, "train_vit": train_vit.Args,
           "ask": sample.Ask, "eval": sample.Eval, "show": gym.Show, "play": gym.Play}


@dataclass
class Ground:
    """Where a trial takes place."""
    ref: Path       # folder of the reference runs: ref/pretrain, ref/rl, ref/train_vit, whole
    folder: Path    # an empty folder of this trial's own
    started: list = dataclasses.field(default_factory=list)     # its processes

    def start(self, name: str, *words: str, shell: str = "", limit: int = 0, **env: str):
        """Start a script in a process of its own and return the Popen.

        words: further options; shell: a redirection such as '>&-'; limit: the largest file in bytes
        that it may write, as on a full disk; env: further environment variables.
        """
        command = {**RUNS, **READS}[name].format(ref=self.ref).split()
        out = [f"--out={self.folder / 'out'}"] if hasattr(OPTIONS[name], "out") else []
        if name in ("show", "play"):
            out = [f"--out={self.folder / 'out.png'}"]

        def restrict():
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        script = [sys.executable, str(ROOT / command[0]), *command[1:], *out, *words]
        if shell:
            script = ["bash", "-c", f'exec "$0" "$@" {shell}', *script]
        process = subprocess.Popen(
            script, cwd=self.folder, preexec_fn=restrict, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env})
        self.started.append(process)
        return process

    def steps(self, name: str, root: Path | None = None) -> dict[str, Path]:
        """{stage: the newest checkpoint of a run}; {} where nothing was saved."""
        root = root or self.folder / "out"
        stages = ("semantic", "texture") if name == "train_vit" else ("",)
        return {stage: found[-1] for stage in stages if (found := checkpoints(root / stage))}

    def final(self, name: str, root: Path | None = None) -> dict[str, bytes]:
        """{stage: the weights' bytes} of the last step of a run."""
        return {stage: (folder / "model.safetensors").read_bytes()
                for stage, folder in self.steps(name, root).items()}


def finish(process, seconds: float = LONGEST) -> str:
    """Wait for a script; returns what it printed. Raises UserError for its one clear line, Silent
    or RuntimeError for an end that is none of those that a user should see."""
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise TimeoutError(f"no end within {seconds} s") from None
    if "Traceback (most recent call last)" in text:
        raise RuntimeError(text[text.index("Traceback (most"):])
    if process.returncode == 2:
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if len(errors) != 1:
            raise Silent(f"exit code 2 with {len(errors)} lines of error: {text[-300:]!r}")
        raise UserError(errors[0])
    if process.returncode not in (0, 130):
        raise Silent(f"exit code {process.returncode}: {text[-300:]!r}")
    return text


def expect_final(ground: Ground, name: str):
    """Raise Silent unless the run in the trial's folder ended with the reference's weights."""
    if ground.final(name) != ground.final(name, ground.ref / name):
        raise Silent(f"{name}: other weights than without the fault")


def resume(ground: Ground, name: str):
    """Go on with a run to its end, without any fault."""
    text = finish(ground.start(name, "--resume"))
    if not ground.final(name):
        raise Silent(f"nothing was saved: {text[-200:]!r}")
    expect_final(ground, name)


# ---- the kinds of trials: each does one bad thing and returns what it did -----------------------

def kill(rng, ground: Ground) -> str:
    """Send a signal to a run at some moment, or kill a process that loads its samples; then resume
    it. Its weights must be those of a run that nobody has touched."""
    name = str(rng.choice(list(RUNS)))
    victim = str(rng.choice(["KILL", "KILL", "TERM", "HUP", "INT", "worker"]))
    what = f"{name}: {victim}"
    words = ["--workers=1"] if victim == "worker" and name != "rl" else []
    process, began = ground.start(name, *words), time.time()
    started = ground.folder / "out" / ("semantic" if name == "train_vit" else "config.json")
    while process.poll() is None and not started.exists() and time.time() - began < LONGEST:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.5))
    if victim == "worker":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for child in children.read_text().split()[-1:] if children.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        finish(process)
        expect_final(ground, name)
        return what
    process.send_signal(getattr(signal, f"SIG{victim}"))
    text = process.communicate(timeout=LONGEST)[0]
    if "Traceback (most recent call last)" in text and victim != "KILL":
        raise RuntimeError(text[text.index("Traceback (most"):])
    resume(ground, name)
    return what


def disk(rng, ground: Ground) -> str:
    """Let no file of a run grow beyond some size, as on a disk that is full; then resume it."""
    name = str(rng.choice(list(RUNS)))
    limit = int(10 ** rng.uniform(2, 6.5))
    try:
        finish(ground.start(name, limit=limit))
    except UserError as error:
        if not any(word in str(error) for word in ("/", "--")):
            raise Silent(f"{name}: {error}: names no file") from None
    resume(ground, name)
    return f"{name}: files up to {limit} bytes"


def beside(rng, ground: Ground) -> str:
    """Start a second run in the folder of one that is running: it must be refused, and the first
    one must not notice."""
    name = str(rng.choice(list(RUNS)))
    first = ground.start(name, "--steps=100000")
    while first.poll() is None and not ground.steps(name):
        time.sleep(0.01)
    try:
        finish(ground.start(name, *(["--resume"] if rng.random() < 0.5 else [])))
        raise Silent(f"{name}: two runs in one folder")
    finally:
        before = ground.steps(name)
        first.terminate()
        finish(first)
        if first.returncode != 130 or ground.steps(name) == before:
            raise Silent(f"{name}: the first run did not go on and save")


ODD = ["-1", "0", "1e400", "nan", "", "word", "-0.5", "18446744073709551616", "\ud800", "../../x"]


def option(rng, ground: Ground) -> str:
    """Give one option of a script an odd value, on the command line."""
    name = str(rng.choice(list(OPTIONS)))
    field = str(rng.choice([f.name for f in dataclasses.fields(OPTIONS[name])]))
    value = ODD[rng.integers(len(ODD))]
    word = f"--{field}={value}".encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    what = f"{name} {word!a}"
    if field in ("out", "keep") and value not in ("", "-1"):     # "../../x" stays in the folder
        word = f"--{field}={ground.folder}/a/b/{value.encode('utf-8', 'replace').decode()}"
    process = ground.start(name, word)
    try:
        process.wait(LONGEST / 2)
    except subprocess.TimeoutExpired:       # a run that goes on, as it was told
        process.terminate()
    text = finish(process)
    saved = list(ground.folder.rglob("step_*")) or name in READS or word in (
        "--plan", "--plan=true", "--plan=1")
    if process.returncode == 0 and not saved:
        raise Silent(f"{what}: exit code 0, nothing saved: {text[-200:]!r}")
    return what


ENVIRONMENTS = [
    {"RANK": "1"}, {"WORLD_SIZE": "abc"}, {"OMP_NUM_THREADS": "2,1"}, {"OMP_NUM_THREADS": "x"},
    {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "3", "WORLD_SIZE": "2"},
    {"RANK": "-1", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "0", "RANK": "0"}, {"LOCAL_RANK": "x"},
    {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}, {"HOME": "/nowhere"}, {"TERM": ""},
    {"OMP_NUM_THREADS": "-3"}, {"OMP_NUM_THREADS": ""}, {"COLUMNS": "0"}, {"TMPDIR": "/nowhere"},
]


def environment(rng, ground: Ground) -> str:
    """Start a run in an odd environment, or with a closed stream."""
    name = str(rng.choice(list(RUNS)))
    if rng.random() < 0.3:
        shell = str(rng.choice([">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"]))
        finish(ground.start(name, shell=shell))
        what = f"{name} {shell}"
    else:
        env = ENVIRONMENTS[rng.integers(len(ENVIRONMENTS))]
        finish(ground.start(name, **env))
        what = f"{name} {env}"
    if not ground.final(name):
        raise Silent(f"{what}: exit code 0, nothing saved")
    return what


def damage(rng, data: bytes) -> tuple[str, bytes]:
    """Some bytes after an accident, and its name."""
    at, what = int(rng.integers(max(1, len(data)))), int(rng.integers(6))
    if what == 0 and data:
        flipped = data[at] ^ 1 << int(rng.integers(8))
        return f"bit of byte {at}", data[:at] + bytes([flipped]) + data[at + 1:]
    if what == 1:
        return f"cut at {at}", data[:at]
    if what == 2:
        return f"zeros from {at}", data[:at] + bytes(len(data[at:at + 4096])) + data[at + 4096:]
    if what == 3:
        return "empty", b""
    if what == 4:
        noise = rng.bytes(64)
        return f"noise at {at}", data[:at] + noise + data[at + 64:]
    return "a tail of noise", data + rng.bytes(100)


def weights_of(model, optimizer) -> list[torch.Tensor]:
    return [*model.state_dict().values(), optimizer.flat]


def damaged_file(rng, ground: Ground) -> str:
    """Damage one file of a checkpoint and resume from it: the same weights and the same optimizer,
    or one clear line."""
    out = ground.folder / "out"
    shutil.copytree(ground.ref / "pretrain", out)
    step = checkpoints(out)[-1]
    files = sorted(path for path in step.iterdir() if path.is_file())
    path = files[rng.integers(len(files))]
    if rng.random() < 0.1:
        path.unlink()
        what = f"{path.name} gone"
    else:
        how, data = damage(rng, path.read_bytes())
        path.write_bytes(data)
        what = f"{path.name}: {how}"
    args = pretrain.Args(resume=True, out=str(out), mtp=1, device="cpu")
    hw = pretrain.setup("cpu")
    model, optimizer, done, _ = pretrain.build(args, hw)
    clean = dataclasses.replace(args, out=str(ground.ref / "pretrain"))
    want_model, want_optimizer, want_done, _ = pretrain.build(clean, hw)
    same = all(map(torch.equal, weights_of(model, optimizer),
                   weights_of(want_model, want_optimizer)))
    if not same or done != want_done or model.config != want_model.config:
        raise Silent(f"{what}: loads as something else")
    return what


# These values of config.json describe a computation that is not built here.
OTHERS = {
    "model_type": ["qwen2_vl", "llava"], "hidden_act": ["gelu", "relu"],
    "rope_type": ["linear", "yarn", "dynamic"], "partial_rotary_factor": [0.5, 0.25],
    "attention_bias": [True], "tie_word_embeddings": [True],
}
ODD_VALUES = [-1, 0, 1, 3, 7.5, 1e9, 10 ** 30, "x", "", None, [], {}, True, False, [1, 2, 3],
              float("inf"), float("nan"), -0.0, {"a": 1}]


def leaves(value, path=()):
    """Yield the path of every value inside nested dicts."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from leaves(inner, (*path, key))


def odd_config(rng, ground: Ground) -> str:
    """Change one value of config.json or preprocessor_config.json, as somebody's model might have
    it, and use the model: a loss that is a number, or one clear line."""
    folder = ground.folder / "model"
    shutil.copytree(checkpoints(ground.ref / "pretrain")[-1], folder)
    (folder / "digests.json").unlink(missing_ok=True)       # as in a model from elsewhere
    file = folder / str(rng.choice(["config.json", "config.json", "preprocessor_config.json"]))
    config = json.loads(file.read_text())
    paths = list(leaves(config))
    path = paths[rng.integers(len(paths))]
    others = OTHERS.get(path[-1], []) if rng.random() < 0.7 else []
    if path == ("vision_config", "attention_bias"):         # true is what is built here
        others = [False]
    values = others or ODD_VALUES
    value = values[rng.integers(len(values))]
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(value)
    file.write_text(json.dumps(config))
    what = f"{file.name}: {'.'.join(path)} = {value!r}"
    model = load_model(folder)
    if others:
        raise Silent(f"{what}: loads")
    if not (model.config.n_ranks or model.config.vocabulary):   # it comes without a tokenizer
        return what
    documents = Stream(model.config, (("point", 1.0),))(0)
    with torch.no_grad():
        loss = pretrain.loss_sum(model, collate(documents, model.config))[0]
    if not bool(torch.isfinite(loss)):
        raise Silent(f"{what}: loss {loss}")
    return what


def picture(rng, ground: Ground) -> str:
    """Open a damaged picture: a picture, or one clear line."""
    image = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    kind = str(rng.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    if kind not in ("JPEG", "WEBP"):
        image = image.convert(str(rng.choice(["RGB", "L", "P", "1"])))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[274], exif[282] = int(rng.integers(1, 9)), 72.0
    image.save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    how, data = damage(rng, buffer.getvalue())
    path = ground.folder / f"picture.{kind.lower()}"
    path.write_bytes(data)
    opened = open_image(path)
    if opened.mode != "RGB" or opened.width < 1:
        raise Silent(f"{kind}, {how}: {opened.mode} {opened.size}")
    return f"{kind}: {how}"


def run_folder(rng, ground: Ground) -> str:
    """Damage a file that a run leaves for people, or one line of its log, and make its page."""
    out = ground.folder / "out"
    out.mkdir()
    source = ground.ref / str(rng.choice(["rl", "pretrain"]))
    for path in source.iterdir():
        if path.is_file():
            shutil.copy(path, out)
    path = out / str(rng.choice(["log.jsonl", "config.json", "report.json"]))
    text = path.read_text() if path.exists() else "{}"
    if path.suffix == ".jsonl" and rng.random() < 0.7:
        lines = text.splitlines()
        at = int(rng.integers(len(lines)))
        lines[at] = str(rng.choice(['5', '[]', 'null', '"x"', '{}', '{"step": "x"}', '{"step": 1}',
                                    '{"step": 1, "loss": "x"}', '{"step": 1, "loss": NaN}',
                                    '{"step": 1, "by": 3}', '{"step": null, "loss": 1}']))
        path.write_text("\n".join(lines) + "\n")
        what = f"line {at}: {lines[at]}"
    elif path.suffix == ".json" and rng.random() < 0.7:
        value = json.loads(text)
        paths = list(leaves(value)) if isinstance(value, dict) else []
        if paths:
            inner, place = value, paths[rng.integers(len(paths))]
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = copy.deepcopy(ODD_VALUES[rng.integers(len(ODD_VALUES))])
            what = f"{path.name}: {'.'.join(place)} = {inner[place[-1]]!r}"
        else:
            value = what = ODD_VALUES[rng.integers(len(ODD_VALUES))]
        path.write_text(json.dumps(value))
    else:
        how, data = damage(rng, text.encode())
        path.write_bytes(data)
        what = f"{path.name}: {how}"
    page = report.write(out).read_text()
    if "</html>" not in page:
        raise Silent(f"{what}: half a page")
    return str(what)


def reply(rng, ground: Ground) -> str:
    """Play a task with replies that no honest model gives: a reward, never an error."""
    name = str(rng.choice(gym.names()))
    task = Task(name, int(rng.integers(1000)), int(rng.integers(5)))
    env, rewards = gym.make(task), gym.Rewards()
    env.reset()
    for _ in range(env.max_turns):
        said = hostile_reply(rng, name)
        if env.step(said).done:
            break
    score = rewards.score(task, env.evidence())
    if score.error:
        raise Silent(f"{name}: {score.error} after {said[:200]!r}")
    if not 0 <= score.reward <= 1:
        raise Silent(f"{name}: a reward of {score.reward}")
    return name


CONFIG = sized("tiny")
TOKENS = tokenizer_of(CONFIG)


def page(rng, ground: Ground) -> str:
    """As `reply`, in the categories where the model writes a page that is rendered."""
    name = str(rng.choice(["ui_to_code", "ui_polish"]))
    task = Task(name, int(rng.integers(1000)), int(rng.integers(5)))
    conversation = gym.drive(gym.make(task))
    messages = next(conversation)
    try:
        while True:     # the marks of pictures in the text must be as many as the pictures
            collate([document(messages, TOKENS, CONFIG, answer=True)], CONFIG)
            messages = conversation.send(hostile_reply(rng, name))
    except StopIteration as end:
        score = gym.Rewards().score(task, end.value)
        if score.error:
            raise Silent(f"{name}: {score.error}") from None
    return name


KINDS = {       # name: (trial, trials a round)
    "reply": (reply, 12), "page": (page, 6), "config": (odd_config, 6), "bytes": (damaged_file, 6),
    "picture": (picture, 8), "folder": (run_folder, 6), "option": (option, 2), "kill": (kill, 1),
    "disk": (disk, 1), "beside": (beside, 1), "environment": (environment, 1),
}


# ---- the campaign -------------------------------------------------------------------------------

@dataclass
class Args:
    minutes: Annotated[float, Range(0, 1440)] = 10.0     # how long to go on; a round is not cut
    seed: Seed = 0                # of all trials
    kind: Literal["all", "reply", "page", "config", "bytes", "picture", "folder", "option", "kill",
                  "disk", "beside", "environment"] = "all"      # which trials
    trial: Annotated[int, Range(-1)] = -1   # only this one of --kind, with its traceback; -1: many


OUTCOMES = "survived", "clear line", "traceback", "silent"


def too_long(*_):
    raise TimeoutError(f"no end within {LONGEST} s")


def attempt(kind: str, number: int, seed: int, ref: Path) -> tuple[str, str]:
    """Run one trial. Returns its outcome and, in words, what was done or what went wrong."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(4 * LONGEST)               # trials that start scripts have limits of their own
    ground = Ground(ref, Path(tempfile.mkdtemp(prefix="campaign-")))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "survived", KINDS[kind][0](rng, ground)
    except UserError as error:
        line = str(error)
        return ("clear line", line) if "\n" not in line else ("traceback", f"many lines: {line}")
    except Silent as error:
        return "silent", str(error)
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
        for process in ground.started:      # a trial that fails leaves some that still run
            process.kill()
            process.wait()
        shutil.rmtree(ground.folder, ignore_errors=True)


def reference(ref: Path):
    """Run every script once without a fault: what the trials are compared with."""
    for name in RUNS:
        part = ref / "part"
        part.mkdir(parents=True)
        finish(Ground(ref, part).start(name))
        (part / "out").rename(ref / name)
        shutil.rmtree(part)


def show(table: dict[str, dict[str, int]], seed: int):
    """Print how often each outcome was seen."""
    print(f"\n{'kind':12}{'tried':>7}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES))
    rows = {**table, "all": {o: sum(row[o] for row in table.values()) for o in OUTCOMES}}
    for kind, row in rows.items():
        if sum(row.values()):
            print(f"{kind:12}{sum(row.values()):7}"
                  + "".join(f"{row[outcome]:12}" for outcome in OUTCOMES))
    print(f"seed {seed}")


def campaign(args: Args) -> int:
    """Run trials for some minutes, print the table, and return the number of faults."""
    if args.trial >= 0 and args.kind == "all":
        raise UserError("--trial needs a --kind")
    torch.set_num_threads(1)
    kinds = list(KINDS) if args.kind == "all" else [args.kind]
    table = {kind: dict.fromkeys(OUTCOMES, 0) for kind in kinds}
    ref = Path(tempfile.mkdtemp(prefix="campaign-reference-"))
    bar = tqdm(total=round(60 * args.minutes), unit="s", disable=not sys.stderr.isatty())
    try:
        reference(ref)
        began, tried = time.time(), 0
        while time.time() - began < 60 * args.minutes or not tried:
            for kind in kinds:
                for _ in range(KINDS[kind][1]):
                    number = sum(table[kind].values()) if args.trial < 0 else args.trial
                    outcome, words = attempt(kind, number, args.seed, ref)
                    table[kind][outcome] += 1
                    tried += 1
                    if outcome in ("traceback", "silent"):
                        words = words if args.trial >= 0 else words.strip().splitlines()[-1][:300]
                        bar.write(f"{outcome}: {words}\n    python -m lab.campaign --kind={kind} "
                                  f"--trial={number} --seed={args.seed}")
                    if args.trial >= 0:
                        print(f"{outcome}: {words}")
                        return int(outcome in ("traceback", "silent"))
                    bar.update(min(round(time.time() - began), bar.total) - bar.n)
    except KeyboardInterrupt:
        print("interrupted: the table so far")
    finally:
        bar.close()
        shutil.rmtree(ref, ignore_errors=True)
    show(table, args.seed)
    return sum(row["traceback"] + row["silent"] for row in table.values())


def entry():
    if campaign(cli(Args, about=__doc__)):
        sys.exit(1)


if __name__ == "__main__":
    main(entry)
