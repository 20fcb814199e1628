"""Every script as if on a GPU: no operation mixes devices, every copy to the device is pinned and
non_blocking, and the host waits once a step, for the numbers that are logged.

Left untested are the numbers of CUDA's kernels and NCCL: see pretend.py.
"""
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from conftest import random_document
from pretend import Book, pretend
from test_pretrain import after_step, alike, state_of, train

import gym
import pretrain
import rl
import sample
import train_vit
from data import collate, Packer
from engine import Engine
from gym import Score
from lib.cli import UserError
from lib.common import ROOT
from lib.prefetch import lent, pin_weights, Prefetch, send
from lib.runs import checkpoints

# ---- the tool -----------------------------------------------------------------------------------


class Asks(torch.autograd.Function):
    """The host waits in the backward pass only."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if grad.sum().item() else grad


FAULTS = {
    "mixed": [lambda x: x + torch.ones(4), lambda x: torch.cat([x, torch.ones(4)]),
              lambda x: torch.ones(4) @ x, lambda x: x.index_select(0, torch.tensor([1]))],
    "waits": [lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x[x > 0],
              lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x.tolist(),
              lambda x: x.repeat_interleave(x.long()), lambda x: torch.ones(4).copy_(x),
              lambda x: Asks.apply(x.clone().requires_grad_()).sum().backward()],
    "pageable": [lambda x: torch.ones(4).to("cuda"), lambda x: torch.tensor([1.0], device="cuda"),
                 lambda x: x[torch.tensor([1])], lambda x: x.copy_(torch.ones(4)),
                 lambda x: torch.ones(4).pin_memory().to("cuda"),
                 lambda x: torch.ones(4).to("cuda", non_blocking=True)]}


def test_a_planted_fault_is_found_once_and_by_its_line():
    with pretend() as book:
        x = torch.ones(4, device="cuda")
        for kind, faults in FAULTS.items():
            for fault in faults:
                fault(x)
                found = {name: getattr(book, name) for name in FAULTS}
                number = fault.__code__.co_firstlineno
                assert {name: c.total() for name, c in found.items()} == {
                    name: int(name == kind) for name in FAULTS}, (kind, number, found)
                line = next(iter(found[kind])).split(" ")[0]
                assert line.startswith("tests/test_pretend.py:")
                book.end_step()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
    assert not torch.cuda.is_available() and x.device.type == "cpu"


def test_what_does_not_wait_is_no_fault():
    with pretend() as book:
        x = send(torch.arange(4.0), "cuda")
        model = torch.nn.Linear(4, 4)
        pin_weights(model, "cuda")
        with lent(model, "cuda"):
            y = model(x) * 2 + torch.tensor(1.0) + x.new_ones(4)
        assert y.is_cuda and not model.weight.is_cuda
        thread = threading.Thread(target=lambda: send(torch.ones(2), "cuda") + y[:2])
        thread.start()
        thread.join()
    assert book.pinned.total() == 4 and book.launches["addmm"] == 1
    assert not book.mixed + book.waits + book.pageable


# ---- prefetching --------------------------------------------------------------------------------

@pytest.mark.parametrize("ahead", [False, True])
def test_prefetch_gives_every_call_in_order_and_its_error(ahead):
    made, names = [], set()

    def make():
        names.add(threading.current_thread() is threading.main_thread())
        made.append(len(made))
        if len(made) == 4:
            raise OSError("the fourth")
        return made[-1]

    load = Prefetch(make, 5, ahead)
    assert [load() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the fourth"):
        load()
    load.close()
    assert names == {not ahead} and made == [0, 1, 2, 3]
    load = Prefetch(lambda: made.append(9), 2, ahead)
    load(), load(), load.close()
    assert made[4:] == [9, 9]           # and no third call


def test_a_run_whose_rows_are_loaded_ahead_is_the_same(tmp_path, monkeypatch):
    """Bit for bit, also when it is resumed: its position is that of the rows it has learnt from."""
    options = dict(steps=4, rows=1, save_every=2)
    whole = train(tmp_path / "whole", **options)
    monkeypatch.setattr(pretrain, "Prefetch",
                        lambda make, calls, ahead: Prefetch(make, calls, ahead=True))
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: step == 2 and signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **options)
    at_two = [state_of(tmp_path / run / "step_000002") for run in ("whole", "parts")]
    assert alike(*(state["position"] for state in at_two))
    parts = train(tmp_path / "parts", **options, resume=True)
    assert [x["loss"] for x in parts] == [x["loss"] for x in whole]
    at_four = [state_of(tmp_path / run / "step_000004") for run in ("whole", "parts")]
    assert alike(*(state["position"] for state in at_four))
    # A row that can't be loaded: the steps before it are saved.
    calls, batch = itertools.count(1), Packer.batch
    monkeypatch.setattr(Packer, "batch", lambda self: batch(self) if next(calls) < 4 else fail())
    with pytest.raises(UserError, match="no such row"):
        train(tmp_path / "broken", **{**options, "save_every": 100})
    assert checkpoints(tmp_path / "broken")[-1].name == "step_000003"


def fail():
    raise UserError("no such row")


def test_a_batch_brings_what_its_data_alone_decides(config):
    """Places are the same as a search would find, and all but the sizes go to the device."""
    documents = [random_document(config, ((4, 6),), seed=seed) for seed in range(2)]
    batch = collate(documents, config, 80)
    assert torch.equal(batch.slots, (batch.tokens == config.image_token_id).nonzero()[:, 0])
    assert torch.equal(batch.learnt, batch.weights[1:].nonzero()[:, 0]) and len(batch.learnt) < 80
    with pretend() as book:
        for origin in (batch, batch.pinned()):
            sent = origin.to("cuda")
            assert sent.host is origin and origin.host is origin
            assert not sent.grids.is_cuda and all(
                x.is_cuda for name, x in vars(sent).items()
                if isinstance(x, torch.Tensor) and name != "grids")
    assert not book.pageable + book.waits and book.pinned.total() == 2 * 10


# ---- the scripts --------------------------------------------------------------------------------

PRETRAIN = dict(steps=2, rows=2, row_tokens=256, warmup=1, mtp_share=1.0, eval_every=0, workers=0,
                device="cuda")
RL = dict(steps=2, prompts=2, group=2, row_tokens=512, max_new=6, slots=4, eval_every=0, warmup=1,
          rehearse=0.5, mix="counting,gui_click", device="cuda")
VIT = dict(steps=3, batch=8, eval_every=0, probes=16, workers=0, device="cuda")
SCRIPTS = {
    "pretrain": (pretrain, PRETRAIN),
    "embed": (pretrain, PRETRAIN | {"image_option": "embed"}),
    "mask": (pretrain, PRETRAIN | {"image_option": "mask"}),
    "recompute": (pretrain, PRETRAIN | {"memory": "recompute", "chunk_patches": 64}),
    "kl": (rl, RL | {"kl": 0.1}),
    "drafts": (rl, RL | {"drafts": 2}),
    "asynchronous": (rl, RL | {"max_staleness": 1, "workers": 2}),
    "stages": (train_vit, VIT),
    "masked": (train_vit, VIT | {"stage": "distill", "supervise": "masked"}),
    "cached": (train_vit, VIT | {"stage": "align", "micro": 4, "clips": 0.5}),
}


def even(self, task, evidence):
    """A reward that noise gets too: the share of even bytes in a reply."""
    said = str(evidence["reply"]).encode()
    return Score(sum(b % 2 == 0 for b in said) / max(1, len(said)), {})


def check_run(name: str, out) -> Book:
    """Run a script and check its steps; not the copies of the first one, which also sets the run
    up, and not the last one of a stage of train_vit.py, which also evaluates the tower."""
    script, options = SCRIPTS[name]
    fetches, fetch = Counter(), Engine._fetch
    with pretend() as book, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym.Rewards, "score", even)
        patch.setattr(Engine, "_fetch", lambda *a: fetches.update([len(book.steps)]) or fetch(*a))
        script.run(script.Args(**options, out=str(out)))
    assert not sum((step.mixed for step in book.steps), book.mixed)
    for number, step in enumerate(book.steps):
        first = number % options["steps"] == 0
        last = (number + 1) % options["steps"] == 0
        if first or last and script is train_vit:
            continue
        print(f"{name}, step {number}\n{step}")
        engine = sum(n for line, n in step.waits.items() if line.startswith("engine.py"))
        assert engine == fetches[number]        # one for each step of the engine
        assert step.waits.total() - engine == 1 and not step.pageable, str(step)
    return book


def test_a_step_of_pretraining_waits_once(tmp_path):
    book = check_run("pretrain", tmp_path)
    (line, times), = book.steps[1].waits.items()
    assert line.startswith("pretrain.py") and times == 1 and book.steps[1].launches.total() > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("pretrain", "masked")])
def test_all_scripts(name, tmp_path):
    """`pytest -s` prints what is launched, sent and waited for."""
    assert len(check_run(name, tmp_path).steps) >= 2
    if name == "stages":
        check_run("masked", tmp_path)           # another student of the same teachers


@pytest.mark.slow
def test_sample(tmp_path):
    """The engine waits once a step. Only loading the model copies from pageable memory."""
    question = sample.Ask("What color is the diamond?", [str(ROOT / "docs/example.png")],
                          str(rl.DEMO), max_new=4, temperature=1.0, top_p=0.9, device="cuda")
    tasks = sample.Eval([str(rl.DEMO)], mix="counting", levels=1, count=3, device="cuda",
                        out=str(tmp_path / "eval.json"))
    for work, args in ((sample.ask, question), (sample.evaluation, tasks)):
        with pretend() as book:
            work(args)
        assert not book.mixed and book.waits.total() > 1
        assert {line.split(":")[0] for line in book.waits} == {"engine.py"}
        assert not {line.split(":")[0] for line in book.pageable} & {"engine.py", "lib/prefetch.py"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "stages", "asynchronous"])
def test_two_ranks(name, tmp_path):
    """In `asynchronous` rank 1 plays and rank 0 learns. The ranks speak gloo, not NCCL."""
    (tmp_path / "rank.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import test_pretend\ntest_pretend.check_run(*sys.argv[1:])\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "rank.py"), name, str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
