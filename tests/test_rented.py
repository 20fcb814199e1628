"""What a run on rented GPUs relies on: rows by size that all ranks share, an end in time, a device
for each rank, and the two recipes, as miniatures on this machine."""
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_pretrain import log_of

import pretrain
import rl
import train_vit
from lib import common, runs
from lib.cli import UserError
from lib.common import ROOT
from lib.runs import checkpoints
from lib.tensors import load_tensors
from model import sized


# ---- the rows of a step -------------------------------------------------------------------------

def rows_of(size, ranks=1, **options) -> tuple[int, int]:
    args = pretrain.with_rows(pretrain.Args(**options), sized(size), ranks)
    return args.rows, args.row_tokens


def test_rows_by_size():
    assert rows_of("tiny") == (2, 2048) and rows_of("mini") == (1, 4096)
    for size, least in (("small", 32), ("base", 64)):
        rows, row_tokens = rows_of(size, ranks=8)
        assert rows % 8 == 0 and rows * row_tokens >= 8 * least * 1024
    assert rows_of("base", rows=3) == (3, 16384) and rows_of("base", row_tokens=99) == (4, 99)


@pytest.mark.parametrize("rows,ranks,words", [
    (2, 8, "--rows=2 can't be dealt out to 8 ranks: take 8$"),
    (10, 8, "--rows=10 can't be dealt out to 8 ranks: take 8 or 16$")])
def test_rows_that_leave_ranks_idle_are_refused(rows, ranks, words):
    with pytest.raises(UserError, match=words):
        rows_of("tiny", ranks, rows=rows)


def test_a_resumed_run_keeps_its_rows_on_another_number_of_ranks(tmp_path):
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "config.json").write_text('{"rows": 6, "row_tokens": 512, "steps": 9}')
    assert rows_of("tiny", 3, resume=True, out=str(tmp_path)) == (6, 512)
    assert rows_of("tiny", 3, resume=True, out=str(tmp_path), row_tokens=99) == (6, 99)
    assert rows_of("tiny", 3, out=str(tmp_path)) == (6, 2048)
    with pytest.raises(UserError, match="--rows=6 can't be dealt out to 4 ranks: take 4 or 8"):
        rows_of("tiny", 4, resume=True, out=str(tmp_path))


@pytest.mark.parametrize("options,words", [
    (dict(batch=10), "8 ranks x --micro=1: take 8 or 16"), (dict(batch=4), "take 8$"),
    (dict(batch=40, micro=2), "8 ranks x --micro=2: take 32 or 48")])
def test_a_batch_that_ranks_cant_share_is_refused(monkeypatch, options, words):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=words):
        train_vit.check(train_vit.Args(**options))


# ---- an end in time -----------------------------------------------------------------------------

PRETRAIN = dict(steps=4, rows=1, row_tokens=256, mix="point", levels=1, mtp=0, workers=0,
                eval_every=0, device="cpu", dtype="float32")
CASES = [
    (pretrain, PRETRAIN, "."),
    (train_vit, dict(steps=4, batch=4, probes=16, workers=0, eval_every=0, device="cpu"),
     "semantic"),
    pytest.param(rl, dict(steps=4, prompts=1, group=2, mix="point", max_new=4, eval_every=0,
                          device="cpu"), ".", marks=pytest.mark.slow)]


class Clock:
    """An hour passes between two looks at it."""

    def __init__(self):
        self.now = common.time.monotonic()

    def __call__(self) -> float:
        self.now += 3600
        return self.now


@pytest.mark.parametrize("script,options,stage", CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_run_ends_when_its_hours_are_over_and_resumes(tmp_path, monkeypatch, capsys, script,
                                                        options, stage):
    """A success, and no later stage begins."""
    options = options | {"out": str(tmp_path), "resume": True}
    monkeypatch.setattr(runs, "monotonic", Clock())
    script.run(script.Args(**options, max_hours=1.5))
    assert [p.name for p in checkpoints(tmp_path / stage)] == ["step_000002"]
    assert "--max_hours are over after step 2 of 4: --resume" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/log.jsonl"))) <= 1
    if script is pretrain:
        script.run(script.Args(**options))
        assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


# ---- a device for each rank ---------------------------------------------------------------------

@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this machine has GPUs; returns a function that says how many, and the list of
    those that ranks have chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def show(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return show, chosen


def test_a_rank_that_sees_one_gpu_takes_it(gpus, monkeypatch):
    """SLURM can show each task its own GPU, as number 0; torchrun's ranks see all of a machine."""
    show, chosen = gpus
    for count, local, index in ((1, 0, 0), (1, 3, 0), (4, 3, 3)):
        show(count)
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert common.setup("cuda").device == torch.device("cuda", index) and chosen[-1] == index
    show(2)
    with pytest.raises(UserError, match="LOCAL_RANK=3, but this machine has 2 GPUs"):
        common.setup("cuda")


def test_ranks_that_would_share_a_gpu_are_named(gpus, monkeypatch):
    """One GPU is visible and two processes were started. Not so on two machines."""
    def join(rank, name):
        try:
            common.check_own_gpu(store, rank, 3, name)
            said.append("")
        except UserError as error:
            said.append(str(error))

    for names, words in ((["GPU-1 of a", "GPU-2 of a", "GPU-1 of a"], "ranks [0, 2] would share"),
                         (["GPU-1 of a", "GPU-2 of a", "GPU-1 of b"], "")):
        store, said = dist.HashStore(), []
        ranks = [threading.Thread(target=join, args=pair) for pair in enumerate(names)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(20)
        assert len(said) == 3 and all(words in line and bool(line) == bool(words) for line in said)
    # setup asks before NCCL would begin.
    gpus[0](1)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda index: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(common, "store_of_this_attempt", lambda *_: store)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 2)]))
    store = dist.HashStore()
    store.set("gpu/1", f"GPU-1 of {common.platform.node()}")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"ranks \[0, 1\] would share GPU GPU-1"):
        common.setup("cuda")


# ---- the recipes --------------------------------------------------------------------------------

def recipe(name: str, *words, **environment) -> subprocess.CompletedProcess:
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WORKERS": "0",
                   "CATEGORIES": "point,counting", "SIZE": "tiny"} | environment
    return subprocess.run(["bash", ROOT / "runs" / name, *map(str, words)], text=True, timeout=900,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, **environment})


@pytest.mark.slow
def test_a_miniature_of_one_gpu(tmp_path):
    """Every stage, with its trial, on the gym and on own data; started again, it has nothing left
    to do."""
    out, pairs = tmp_path / "out", tmp_path / "pairs"
    pairs.mkdir()
    for i in range(30):
        Image.new("RGB", (64, 64), (8 * i, 0, 0)).save(pairs / f"{i}.png")
        (pairs / f"{i}.txt").write_text(f"shade {i}")
    lines = [{"image": f"pairs/{i}.png", "question": "Which?", "answer": str(i)} for i in range(30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own_data = dict(DATA=f"{tmp_path}/*.jsonl:15", PAIRS=str(pairs))
    done = recipe("one_gpu.sh", out, HOURS="0.001", TRIAL="2", **own_data)
    assert done.returncode == 0, done.stdout
    for stage, script in (("vit/align", train_vit), ("pretrain", pretrain), ("sft", pretrain),
                          ("rl", rl)):
        config = json.loads((out / stage / "config.json").read_text())
        assert config.keys() >= {field for field in vars(script.Args())}
        assert len(checkpoints(out / stage)) == 1, done.stdout
        if script is pretrain:
            assert (config["data"], config["mix"]) == (own_data["DATA"], "gym:5")
        assert script is not train_vit or config["pairs"] == str(pairs)
    assert "pairs for training" in done.stdout and "30 records" in done.stdout
    assert json.loads((out / "rl.json").read_text())["table"].keys() == {"point", "counting"}
    assert not (out / "trial").exists()
    again = recipe("one_gpu.sh", out, HOURS="0.001", TRIAL="2", **own_data)
    assert again.returncode == 0 and "steps" not in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_gpu.sh", "nodes.sh"])
def test_a_plan_names_every_stage_and_writes_nothing(tmp_path, name):
    done = recipe(name, "--plan", tmp_path / "out")
    assert done.returncode == 0, done.stdout
    stages = re.findall(r"^(\w+): \d+ steps$", done.stdout, re.M)
    assert stages == ["vit", "pretrain", "sft", "rl"] and not (tmp_path / "out").exists()
    *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"in all +[\d.]+ h, \$[\d.]+ \(computed\)", last)


# `srun COMMAND` as on two nodes: two agents of torchrun on this machine.
SRUN = """#!/usr/bin/env bash
shift   # --kill-on-bad-exit
for node in 0 1; do "$1" "$2" "$3" --local_addr=127.0.0.1 "${@:4}" & done
wait -n && wait -n
"""


@pytest.mark.slow
def test_a_miniature_of_two_nodes(tmp_path):
    """Both agents train all stages, one rank each; in RL the second rank plays. The first job has
    so few hours that it ends in the tower; the second one continues there."""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin/srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = dict(PATH=f"{tmp_path}/bin:{os.environ['PATH']}", HEAD="127.0.0.1", PORT=str(port),
                   SLURM_NNODES="2", GPUS="1", STEPS="2", COUNT="2")
    out = tmp_path / "out"
    first = recipe("nodes.sh", out, HOURS="0.0001", **cluster)
    assert first.returncode == 0 and "vit is not done" in first.stdout, first.stdout
    second = recipe("nodes.sh", out, HOURS="1", **cluster)
    assert second.returncode == 0, second.stdout
    for stage in ("vit/align", "pretrain", "sft", "rl"):
        assert checkpoints(out / stage), second.stdout
        assert "2 processes" in (out / stage / "config.json").read_text()
    assert load_tensors(checkpoints(out / "rl")[-1])
    assert Path(out / "rl.json").exists()
