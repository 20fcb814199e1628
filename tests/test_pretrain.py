"""What pretraining promises: resume, ranks, kills, full disks, bad losses; and that it learns.

The runs happen in this process, a few steps of a few hundred tokens; hooks cause faults at fixed
points.
"""
import errno
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import gym
import pretrain
import rl
import train_vit
from conftest import random_document
from data import collate, Document
from lib import common, runs
from lib.checkpoint import load_model, save_model
from lib.cli import main, UserError
from lib.common import ROOT
from lib.loader import SampleLoader
from lib.runs import checkpoints, find_checkpoint, save_checkpoint
from lib.tensors import load_tensors
from model import GLMV, sized
from mmtp import attach, losses as mtp_losses
from pretrain import Args

SMALL = dict(steps=10, rows=2, row_tokens=256, warmup=3, eval_every=0, workers=0,
             device="cpu", dtype="float32")


def train(out, **changes) -> list[dict]:
    """Run, and return the log."""
    pretrain.run(Args(**{**SMALL, "out": str(out), **changes}))
    return log_of(out)


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def after_step(monkeypatch, act):
    """Call act(step) after each step is logged: the hook that causes faults at fixed points."""
    log = common.Log.step

    def step(self, step, show, **values):
        log(self, step, show, **values)
        act(step)
    monkeypatch.setattr(common.Log, "step", step)


def state_of(folder) -> dict:
    return torch.load(folder / "train.pt", weights_only=True)


def alike(a, b) -> bool:
    """Whether two nests of dicts, lists, tensors and numbers are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# ---- resume and ranks ---------------------------------------------------------------------------

def test_six_steps_are_three_and_resume_and_three(tmp_path, monkeypatch):
    """Bit for bit. SIGTERM stops the first three."""
    whole = train(tmp_path / "whole", steps=6, eval_every=3)
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: step == 3 and signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", steps=6)
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["step_000003"]
    parts = train(tmp_path / "parts", steps=6, resume=True)
    assert [x["loss"] for x in parts] == [x["loss"] for x in whole] and len(whole) == 6
    a, b = tmp_path / "whole/step_000006", tmp_path / "parts/step_000006"
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    a, b = state_of(a), state_of(b)
    assert all(alike(a[key], b[key]) for key in ("step", "position", "optimizer"))
    assert ["held_out" in x for x in whole] == [False, False, True] * 2


def test_a_bfloat16_run_resumes_from_its_fp32_masters(tmp_path):
    train(tmp_path, dtype="bfloat16", steps=4, save_every=2)
    whole = load_tensors(tmp_path / "step_000004")
    (tmp_path / "step_000004").rename(tmp_path / "kept")
    train(tmp_path, dtype="bfloat16", steps=4, save_every=2, resume=True)
    assert alike(whole, load_tensors(tmp_path / "step_000004"))
    assert any((w != w.bfloat16().float()).any() for w in whole.values())


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The folder of a run of one step, made once; tests change a copy."""
    folder = tmp_path_factory.mktemp("one_step")
    train(folder, steps=1)
    return folder


def test_resume_of_a_finished_run_changes_nothing(tmp_path, one_step):
    run = shutil.copytree(one_step, tmp_path / "run")
    before = (run / "step_000001/model.safetensors").read_bytes()
    assert len(train(run, steps=1, resume=True)) == 1
    assert (run / "step_000001/model.safetensors").read_bytes() == before


def test_init_gives_weights_and_no_steps_even_with_resume(tmp_path, one_step):
    """The command of a job that may be restarted has `--init --resume`; at first there is no run to
    resume."""
    log = train(tmp_path, steps=2, init=str(one_step), resume=True, lr=0.0)
    assert [x["step"] for x in log] == [1, 2]
    assert alike(load_tensors(one_step / "step_000001"), load_tensors(tmp_path / "step_000002"))


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, monkeypatch):
    """The same losses and weights on gloo; and one process resumes what two have saved, with
    samples that a worker process makes."""
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    alone = train(tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "pretrain.py", *options, f"--out={tmp_path / 'two'}", "--save_every=5"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=100)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("saved") == 1

    def same_as_alone():
        for a, b in zip(alone, log_of(tmp_path / "two"), strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-5
        one, two = (load_tensors(tmp_path / run / "step_000010") for run in ("one", "two"))
        assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4

    same_as_alone()
    (tmp_path / "two/step_000010").rename(tmp_path / "two/saved_by_two")
    monkeypatch.setattr(pretrain, "SampleLoader", functools.partial(SampleLoader, burst=64))
    train(tmp_path / "two", resume=True, workers=1)
    same_as_alone()


@pytest.mark.parametrize("signalled", [False, True], ids=["head", "tee"])
def test_a_run_saves_and_ends_when_nobody_reads_its_output(tmp_path, monkeypatch, signalled):
    """The reader of the pipe has ended by itself, or by the same Ctrl-C; stderr goes there too."""
    held = [os.dup(1), os.dup(2)]
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w"))

    def leave(step):
        if step == 1:
            os.dup2(writer, sys.stdout.fileno())
            os.dup2(writer, 2)
            os.close(reader)
            signalled and signal.raise_signal(signal.SIGINT)
    try:
        after_step(monkeypatch, leave)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, steps=9, log_every=1)
    finally:
        for stream, own in enumerate(held, 1):
            os.dup2(own, stream)
            os.close(own)
        os.close(writer)
    assert [p.name for p in checkpoints(tmp_path)] == [
        "step_000001" if signalled else "step_000002"]


class Ranks:
    """A torch.distributed in which the other ranks start from `steps`; `signalled` of them have
    received a signal to stop, and the --max_hours of `late` are over."""

    def __init__(self, monkeypatch, steps, signalled=1, late=0):
        for name in ("is_initialized", "get_world_size", "get_rank", "all_reduce"):
            monkeypatch.setattr(dist, name, getattr(self, name))
        self.steps, self.votes = steps, torch.tensor([signalled, late])

    def is_initialized(self):
        return True

    def get_world_size(self, group=None):
        return 1 + len(self.steps)

    def get_rank(self, group=None):
        return 0

    def all_reduce(self, value, group=None):
        value += self.votes if value.is_floating_point() else torch.tensor([0, *self.steps])


@pytest.mark.parametrize("script", [pretrain, train_vit, rl], ids=lambda script: script.__name__)
def test_ranks_that_resume_from_different_steps_are_refused(tmp_path, monkeypatch, script):
    """As on two machines that do not share --out: they would add up gradients of different
    weights."""
    Ranks(monkeypatch, [40, 40])
    common.check_same_start(40, "out")
    with pytest.raises(UserError, match=r"ranks find steps \[0, 40, 40\] in .*run"):
        script.run(script.Args(steps=1, out=str(tmp_path / "run"), device="cpu", resume=True))


def test_a_rank_that_stops_for_another_ends_as_interrupted(tmp_path, monkeypatch):
    Ranks(monkeypatch, [0])
    hw = replace(common.setup("cpu"), world=2)
    watch = runs.Checkpointer(tmp_path, hw, 9, 9, 0,
                                lambda folder: (folder / "it").write_text("all"))
    assert watch.after_step(3) and not watch.stop_signal.received
    with pytest.raises(KeyboardInterrupt):
        watch.close()
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000003"]


def test_a_rank_stops_as_the_hours_of_another_are_over(tmp_path, monkeypatch, capsys):
    Ranks(monkeypatch, [0], signalled=0, late=1)
    hw = replace(common.setup("cpu"), world=2)
    watch = runs.Checkpointer(tmp_path, hw, 9, 9, 0,
                              lambda folder: (folder / "it").write_text("all"))
    assert watch.after_step(3)
    watch.close()
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000003"]
    assert "--max_hours are over after step 3 of 9" in capsys.readouterr().out


# ---- kills and full disks -----------------------------------------------------------------------

def dies_before(operation: int):
    """End this process with code 9 before its n-th operation on files."""
    def count(event, _):
        nonlocal operation
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            operation -= 1
            if operation < 0:
                os._exit(9)
    sys.addaudithook(count)


def child_dies(act) -> bool:
    """Call act() in a fork of this process; return whether that was killed before it was done."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(77)        # an error is not a kill
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended != 77
    return ended != 0


def killed_at(offset: int):
    """From now on the kernel kills this process when a file of its grows beyond `offset` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))


def test_a_run_killed_as_it_resumes_leaves_the_log_as_it_was(tmp_path):
    """Killed before its first step. A line that was cut short, even after an inner brace, is left
    out."""
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": i, "by": {"point": {"reward": 1}}}) for i in range(1, 60)]
    path.write_text("\n".join(lines)[:-1] + "\n")
    assert child_dies(lambda: (common.Log(tmp_path, "rl", 99, start=50), os._exit(9)))
    assert path.read_text().splitlines() == lines[:50]


def test_a_signal_that_comes_while_stderr_is_written_to(monkeypatch, capfd):
    """A progress bar writes all the time, and a file in the middle of a write takes no second."""
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")
    monkeypatch.setattr(sys, "stderr", Busy())
    stop = runs.StopSignal()
    signal.raise_signal(signal.SIGINT)
    assert stop.received == signal.SIGINT and "stopping after this step" in capfd.readouterr().err


def test_a_writer_killed_at_any_byte_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    """Weights come first and are 2.8 MB, then train.pt with 3.4 MB: ten offsets over both."""
    offsets = [0, 1, 9, 5_000, 100_000, 1_000_000, 2_500_000, 2_800_000, 3_100_000, 3_380_000]
    found = []

    def perilous(run, step, write):
        for offset in offsets if step == 2 else ():
            assert child_dies(lambda: (killed_at(offset), save_checkpoint(run, step, write)))
            folder = find_checkpoint(run)
            load_model(folder)
            found.append((folder.name, state_of(folder)["step"]))
        return save_checkpoint(run, step, write)

    monkeypatch.setattr(runs, "save_checkpoint", perilous)
    train(tmp_path, steps=2, save_every=1)
    assert found == [("step_000001", 1)] * 10
    assert find_checkpoint(tmp_path).name == "step_000002"  # what killed runs left is no obstacle
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_kill_between_any_two_operations_leaves_a_whole_checkpoint(tmp_path, step):
    """Also where a third checkpoint replaces the oldest, and where step 3 is saved once more."""
    def write(folder):
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(name)

    for operation in range(100):
        run = tmp_path / str(operation)
        for earlier in (2, 3):
            save_checkpoint(run, earlier, write)
        died = child_dies(lambda: (dies_before(operation), save_checkpoint(run, step, write)))
        folder = find_checkpoint(run)
        assert all((folder / name).read_text() == name for name in
                   ("config.json", "model.safetensors"))
        assert folder.name >= "step_000002"
        if not died:
            break
    assert 5 < operation < 100


def no_room_beyond(size: int):
    """Let files be `size` bytes long at most, so that a write fails as on a full disk; -1: any."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


@pytest.mark.parametrize("room", [100_000, 3_000_000], ids=["weights", "train.pt"])
def test_a_disk_full_for_a_while(tmp_path, monkeypatch, capsys, room):
    """Step 2 can't be saved: the run says so, loses nothing, leaves no files and continues."""
    after_step(monkeypatch, lambda step: no_room_beyond(room if step == 2 else -1))
    try:
        log = train(tmp_path, steps=3, save_every=1)
    finally:
        no_room_beyond(-1)
    assert len(log) == 3
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000001", "step_000003"]
    assert not list(tmp_path.glob("*.part"))
    assert "could not save" in capsys.readouterr().err


def test_a_last_step_that_cant_be_saved_is_an_error(tmp_path, monkeypatch, capsys):
    """The disk fills up after step 1: exit code 2 and a line that names the last checkpoint."""
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    after_step(monkeypatch, lambda step: step == 2 and monkeypatch.setattr(os, "fsync", fsync))
    with pytest.raises(SystemExit) as end:
        main(lambda: train(tmp_path, steps=3, save_every=1))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert "No space left" in lines[0] and lines[-1].startswith("error: step 3 could not be saved")
    assert find_checkpoint(tmp_path).name == "step_000001"
    assert not list(tmp_path.glob("*.part"))
    assert len(log_of(tmp_path)) == 3


# ---- bad losses, long documents, earlier runs, damaged files -------------------------------------

def spoil_losses(monkeypatch, bad):
    """The loss of step i (from 0) becomes NaN where bad(i)."""
    sound, calls = pretrain.loss_sum, []

    def loss_sum(*args):
        calls.append(1)
        main, further = sound(*args)
        return main * (float("nan") if bad(len(calls) - 1) else 1), further
    monkeypatch.setattr(pretrain, "loss_sum", loss_sum)


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, capsys):
    """Nor is anything saved after it, since the weights may be its cause, until a good step."""
    build, weights, saved = pretrain.build, [], []

    def watched(*args):
        parts = build(*args)
        after_step(monkeypatch, lambda _: (
            weights.append({k: v.clone() for k, v in parts[1].gather()[0].items()}),
            saved.append(len(checkpoints(tmp_path)))))
        return parts

    monkeypatch.setattr(pretrain, "build", watched)
    spoil_losses(monkeypatch, lambda i: i in (1, 2))
    log = train(tmp_path, steps=6, save_every=3, rows=1, mix="point")
    assert [x.get("skipped", 0) for x in log] == [0, 1, 2, 2, 2, 2]
    assert capsys.readouterr().out.count("step skipped (1 in a row)") == 1
    assert alike(weights[0], weights[2]) and not alike(weights[2], weights[3])
    assert saved == [0, 0, 0, 0, 1, 1]      # this is noted before the step's own save
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000004", "step_000006"]


@pytest.mark.parametrize("signalled", [False, True])
def test_a_run_does_not_end_with_a_checkpoint_of_such_a_step(tmp_path, monkeypatch, signalled):
    spoil_losses(monkeypatch, lambda i: i == 2)
    after_step(monkeypatch, lambda i: i == 3 and signalled and signal.raise_signal(signal.SIGTERM))
    with pytest.raises(UserError, match="step 3 was not finite; the last checkpoint.* is step 2"):
        train(tmp_path, steps=9 if signalled else 3, save_every=2, rows=1, mix="point")
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000002"]


def test_five_such_losses_in_a_row_end_the_run(tmp_path, monkeypatch):
    spoil_losses(monkeypatch, lambda i: i >= 2)
    with pytest.raises(UserError, match="five steps in a row") as error:
        train(tmp_path, save_every=1, rows=1)
    assert "\n" not in str(error.value)
    assert len(log_of(tmp_path)) == 6


def test_a_document_longer_than_the_row_is_skipped_and_said_once(tmp_path, capsys):
    """Texts have 130 tokens, forms up to 70."""
    log = train(tmp_path, steps=2, row_tokens=100, mix="gui_form,text", levels=1)
    assert log[-1]["skipped"] > 2
    assert capsys.readouterr().out.count("130 tokens, a row 100: skipped") == 1


def test_only_documents_longer_than_the_row_end_the_run(tmp_path):
    with pytest.raises(UserError, match="longer than --row_tokens=100"):
        train(tmp_path, row_tokens=100, mix="text")


def test_an_earlier_run_is_kept(tmp_path, capsys):
    for _ in range(3):
        train(tmp_path / "run", steps=1, rows=1, mix="point")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert capsys.readouterr().out.count("kept as") == 2
    for run in tmp_path.iterdir():
        load_model(find_checkpoint(run))


def test_a_wrong_start_leaves_an_earlier_run_where_it_is(tmp_path):
    (tmp_path / "run/step_000003").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint at"):
        pretrain.run(Args(init=str(tmp_path / "none"), out=str(tmp_path / "run"), device="cpu"))
    assert (tmp_path / "run/step_000003").exists()


@pytest.mark.parametrize("damage", [b"", b"text", b"garbage " * 50, bytes(100), "cut", "short"])
def test_a_damaged_train_pt_says_so(tmp_path, one_step, damage):
    run = shutil.copytree(one_step, tmp_path / "run")
    state = run / "step_000001/train.pt"
    whole = state.read_bytes()
    cuts = {"cut": whole[:1_000_000], "short": whole[:-30]}
    state.write_bytes(damage if isinstance(damage, bytes) else cuts[damage])
    with pytest.raises(UserError, match="can't be resumed") as error:
        train(run, resume=True)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_script_is_refused(tmp_path, one_step):
    run = shutil.copytree(one_step, tmp_path / "run")
    state = state_of(run / "step_000001")
    torch.save({k: v for k, v in state.items() if k != "position"}, run / "step_000001/train.pt")
    (run / "step_000001/digests.json").unlink()
    with pytest.raises(UserError, match="not saved by pretrain.py"):
        train(run, steps=2, resume=True)


@pytest.mark.parametrize("changes,words", [
    (dict(init="nowhere"), "no such folder"), (dict(size="huge"), "tiny, mini, small or base"),
    (dict(mix="point,doc_qa"), "doc_qa, which needs pictures of 256 pixels; .* sees 64,"),
    (dict(mix="pont"), "names 'pont'"), (dict(mix="point:-1"), "weight"),
    (dict(mix="point:many"), "name:weight"), (dict(mix=" "), "--mix"),
    (dict(schedule="square"), "constant, linear or cosine"), (dict(rows=-1), "--rows takes 0"),
    (dict(levels=0), "--levels"), (dict(levels=6), "--levels"), (dict(steps=0), "--steps"),
    (dict(save_every=0), "--save_every"), (dict(log_every=0), "--log_every"),
    (dict(row_tokens=1), "--row_tokens takes 32"), (dict(rows=10 ** 18), "--rows takes 0 or"),
    (dict(row_tokens=10 ** 18), "--row_tokens"), (dict(mtp=10 ** 9), "--mtp takes 0 to 16"),
    (dict(workers=10 ** 9), "--workers"), (dict(pixels=65), "--pixels=65 is more than"),
    (dict(pixels=-1), "--pixels"), (dict(mix="point:nan"), "--mix"), (dict(mix=","), "--mix"),
    (dict(lr=-1.0), "--lr"), (dict(lr=float("inf")), "--lr"), (dict(warmup=-1), "--warmup"),
    (dict(vit="nowhere"), "no such folder"),
    (dict(device="tpu"), "--device"), (dict(dtype="float16"), "--dtype")])
def test_bad_options_end_before_anything_is_made(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(pretrain, "GLMV", None)
    with pytest.raises(UserError, match=words) as error:
        train(tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not checkpoints(tmp_path / "run")


def test_a_run_needs_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^--out is empty"):
        train("")
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_checkpoint_does_not_have_is_refused(tmp_path, one_step):
    """With --init, with --plan and --resume; its own size may be named. The tower has one, too."""
    shutil.copytree(one_step, tmp_path / "tiny")
    for changes in (dict(init=str(tmp_path / "tiny"), out=str(tmp_path / "new")),
                    dict(init=str(tmp_path / "tiny"), out=str(tmp_path / "new"), plan=True),
                    dict(resume=True, out=str(tmp_path / "tiny"))):
        with pytest.raises(UserError, match="^--size=small is not the size of the model in .*$"):
            pretrain.run(Args(**{**SMALL, "size": "small", **changes}))
    with pytest.raises(UserError, match="the tower in .* is not of this model's sizes"):
        train(tmp_path / "new", size="small", vit=str(tmp_path / "tiny"))
    assert len(train(tmp_path / "tiny", size="tiny", steps=2, resume=True)) == 2


def test_the_newest_weights_are_kept_in_bf16(tmp_path):
    """By --keep, at each checkpoint, with the masters' values; a run that is done keeps nothing."""
    options = dict(size="mini", save_every=1, keep=str(tmp_path / "kept"), mix="point")
    train(tmp_path / "run", steps=2, **options)
    newest, kept = (load_tensors(tmp_path / name) for name in ("run/step_000002", "kept"))
    assert newest.keys() == kept.keys()
    assert all(torch.equal(newest[name].bfloat16(), kept[name]) for name in newest)
    assert load_model(tmp_path / "kept").config.text == sized("mini").text
    (tmp_path / "kept/model.safetensors").unlink()
    train(tmp_path / "run", steps=2, resume=True, **options)
    assert not (tmp_path / "kept/model.safetensors").exists()


def test_samples_that_cant_be_loaded_end_a_run_that_saves(tmp_path, monkeypatch):
    """A category fails after the second step."""
    def spoil(step):
        if step == 2:
            monkeypatch.setattr(gym, "demonstrate", None)
    after_step(monkeypatch, spoil)
    with pytest.raises(UserError, match="^sample [0-9]+ can't be made: TypeError: "):
        train(tmp_path, mix="point")
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000002"]


# ---- plans, and learning ------------------------------------------------------------------------

@pytest.mark.parametrize("size,millions", [("tiny", 0.96), ("mini", 3.8), ("small", 60),
                                           ("base", 1100)])
def test_a_plan_prints_and_stops(tmp_path, capsys, size, millions):
    pretrain.run(Args(size=size, plan=True, device="cpu", out=str(tmp_path / "run")))
    printed = capsys.readouterr().out
    rows = dict(line.split(None, 1) for line in printed.splitlines())
    total = float(rows["total"].split("M")[0].replace(",", ""))
    assert millions / 1.3 < total < millions * 1.3
    assert rows.keys() >= {"memory", "tokens", "compute", "time", "price", "loading", "mtp"}
    assert float(rows["mtp"].split("M")[0]) > 0 and not (tmp_path / "run").exists()


def test_a_plan_is_that_of_the_checkpoint_and_printed_by_one_rank(tmp_path, monkeypatch, capsys):
    """Of a checkpoint without MTP head, of another size than --size=auto means without --init."""
    config = replace(sized("tiny"), text=replace(sized("tiny").text, num_hidden_layers=1))
    save_model(GLMV(config), tmp_path / "one")
    totals = {}
    for init, mtp in (("", 0), ("", 3), (str(tmp_path / "one"), 0)):
        pretrain.run(Args(plan=True, device="cpu", init=init, mtp=mtp, steps=10))
        rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        totals[init, mtp] = float(rows["compute"].split()[0])
        assert f"{GLMV(config).counts()['decoder'] / 1e6:,.2f}M" in rows["decoder"] or not init
    assert totals["", 0] < totals["", 3] < 1.3 * totals["", 0]     # in a fifth of the steps
    assert totals[str(tmp_path / "one"), 0] < 0.8 * totals["", 0]
    other = replace(common.setup("cpu"), rank=1)
    monkeypatch.setattr(pretrain, "setup", lambda *_: other)
    pretrain.run(Args(plan=True, device="cpu"))
    assert capsys.readouterr().out == ""


def test_the_run_folder_says_what_ran_and_the_last_step_is_evaluated(tmp_path):
    log = train(tmp_path, steps=3, eval_every=2, mix="point,text", levels=3)
    assert ["held_out" in line for line in log] == [False, True, True]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["mix"], config["levels"], config["steps"]) == ("point,text", 3, 3)
    assert config["parameters"]["total"] > 500_000 and "cpu in float32" in config["hardware"]


def test_loss_sum_is_that_of_the_definition(model):
    """Token by token: the state before a token predicts it, and the loss counts with the weight of
    the predicted token. What a wrong sum would be is computed too, so that a failure names it."""
    rng, documents = np.random.default_rng(0), []
    for seed, sizes in enumerate((((4, 6),), (), ((2, 2), (4, 4)))):
        documents.append(random_document(model.config, sizes, 11 + seed, seed))
        n = len(documents[-1].ids)
        documents[-1].weights[:] = rng.random(n) * (rng.random(n) > 0.4)
    batch = collate(documents, model.config, room=100)
    with torch.no_grad():
        merged = model.encode_images(batch)
        hidden = model(batch, merged)
        logp = model.lm_head(hidden).log_softmax(-1)
    tokens, weights = batch.tokens, batch.weights
    want = own = reading = unweighted = 0.0
    for t in range(1, len(tokens)):
        loss_of_t = -float(logp[t - 1, tokens[t]])
        want += float(weights[t]) * loss_of_t
        reading += float(weights[t - 1]) * loss_of_t
        unweighted += loss_of_t
        own -= float(weights[t] * logp[t, tokens[t]])
    loss, none = pretrain.loss_sum(model, batch)
    for wrong, mistake in ((own, "the state of a token must predict the next token, not its own"),
                           (reading, "the weight is that of the predicted token, not of the read"),
                           (unweighted, "each token's loss is multiplied by its weight"),
                           (want / float(weights.sum()), "a sum is wanted, not a mean")):
        assert loss.item() != pytest.approx(wrong, rel=1e-4), mistake
    assert loss.item() == pytest.approx(want, rel=1e-4)
    assert list(none) == [], "without depths there are no losses of the MTP head"

    attach(model, 2)
    for option in ("token", "embed"):
        again, deep = pretrain.loss_sum(model, batch, 2, option)
        assert again.item() == pytest.approx(want, rel=1e-4), "depths change nothing of the first"
        expected = mtp_losses(model, hidden, batch, merged, 2, option)
        assert deep.tolist() == pytest.approx(expected.tolist(), rel=1e-4), f"option {option}"
    pretrain.loss_sum(model, batch, 2, alone=True)[1].sum().backward()
    assert model.lm_head.weight.grad is None, "`alone`: only the head's own weights may learn"


def test_a_shared_picture_is_counted_once_as_it_is_encoded_once():
    picture, other = np.zeros((16, 24, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    ids, weights = np.zeros(5, np.int32), np.ones(5, np.float32)
    row = [Document(ids, weights, [picture]), Document(ids, weights, [picture, other])]
    assert pretrain.count([row, row[:1]], 8) == (15, 12, 4, 6 + 1 + 6)
    model = GLMV(sized("tiny"))
    n = model.counts()
    assert model.flops(0, 4, 0) == 6 * (4 * n["tower"] + n["adapter"])


@pytest.mark.parametrize("left,want", [
    (100, 0.0), (21, 0.0), (20, 0.3), (7, 0.3), (6, 0.1), (1, 0.1)])
def test_the_mtp_loss_joins_in_the_last_fifth(left, want):
    args = Args(steps=100, mtp_share=0.2)
    assert pretrain.mtp_weight(100 - left, args) == want
    assert pretrain.mtp_weight(100 - left, replace(args, mtp=0)) == 0
    assert pretrain.mtp_weight(100 - left, replace(args, mtp_share=0.0)) == 0


def test_it_learns(tmp_path):
    log = train(tmp_path, steps=16, mix="gui_form", levels=1, row_tokens=512, eval_every=16)
    assert log[-1]["loss"] < log[0]["loss"] / 4
    assert log[-1]["held_out"] < log[0]["loss"] / 4
