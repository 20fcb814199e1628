"""Every policy gives the same gradients and keeps less; torch.compile computes the same."""
import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import weakref
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mmtp
import pretrain
import rl
import train_vit
from conftest import odd_config, random_document
from data import collate
from lab import bench_memory
from lib import memory
from lib.captions import TextTower
from lib.cli import UserError
from lib.common import ROOT, setup
from lib.memory import (chunks_of, compile_blocks, HostCopy, Memory, parse_memory,
                        POLICIES)
from lib.tensors import load_tensors
from model import GLMV, init, sized
from pretrain import loss_sum
from vit import CogViT

ALL = [parse_memory(text) for text in
       ("none", "recompute", "offload", "vit:offload,decoder:recompute", "adapter:recompute")]


def images(count: int, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grids of images of 4 x 4 patches."""
    shape = 16 * count, 1, 3 * config.vision.patch_size ** 2
    return torch.randint(0, 256, shape, dtype=torch.uint8), torch.tensor([[1, 4, 4]] * count)


def models(depths: int = 0) -> tuple[GLMV, object]:
    config = odd_config()
    model = GLMV(config, seed=1)
    if depths:
        mmtp.attach(model, depths)
    documents = [random_document(config, ((4, 6), (2, 4)), seed=0),
                 random_document(config, ((8, 8),), 20, seed=1), random_document(config, (), 9)]
    return model, collate(documents, config, 160)


def gradients(model, batch, how: Memory, depths: int = 0, **options):
    """The losses of a row, and the gradient of every parameter."""
    how.use_in(model)
    model.zero_grad(set_to_none=True)
    loss, further = loss_sum(model, batch, depths, **options)
    (loss + sum(further)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return [loss.detach(), *(x.detach() for x in further)], found


def same(a, b) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a[0], b[0])) and \
        a[1].keys() == b[1].keys() and all(
            a[1][name] is g or torch.equal(a[1][name], g) for name, g in b[1].items())


@pytest.mark.parametrize("option", mmtp.OPTIONS)
def test_gradients_are_equal_under_every_policy(option):
    """Bit for bit, with a head whose one layer is run three times."""
    model, batch = models(depths=3)
    plain = gradients(model, batch, ALL[0], 3, option=option)
    for how in ALL[1:]:
        assert same(plain, gradients(model, batch, how, 3, option=option)), how


def test_the_towers_of_stage_1_and_2_as_well():
    """A frozen input, a mask token outside the tower, and images in chunks."""
    config = odd_config(2)
    patches, grids = images(6, config)
    visual, token = CogViT(config.vision), nn.Parameter(torch.randn(40))
    init(visual, 1)
    mask, found = torch.rand(len(patches)) < 0.35, []
    for how in (*ALL, *(replace(how, chunk_patches=len(patches) // 2) for how in ALL)):
        how.use_in(visual)
        visual.zero_grad(), setattr(token, "grad", None)
        visual(patches, grids, mask, token).square().sum().backward()
        found.append([token.grad, *(p.grad for p in visual.blocks.parameters())])
    whole, chunked = found[:len(ALL)], found[len(ALL):]
    for group in (whole, chunked):
        assert all(torch.equal(a, b) for other in group for a, b in zip(group[0], other))
    assert any(not torch.equal(a, b) for a, b in zip(whole[0], chunked[0]))
    for a, b in zip(whole[0], chunked[0]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_chunks_hold_whole_images():
    assert chunks_of([4, 4, 9, 2], 8) == [(0, 2), (2, 3), (3, 4)]
    assert chunks_of([9, 1], 4) == [(0, 1), (1, 2)] and chunks_of([4, 4], 8) == [(0, 2)]
    assert chunks_of([], 8) == [(0, 0)]


def test_the_tower_keeps_as_much_for_64_images_as_for_a_chunk():
    """And less than a tenth of what it keeps without a policy. Counted through forward and
    backward, every storage that autograd holds; the pixels are the batch's own."""
    model = GLMV(odd_config())
    chunk, many = (images(n, model.config) for n in (4, 64))
    Memory().use_in(model)
    everything = bench_memory.saved(model, *many)[0]
    parse_memory("recompute", chunk_patches=len(chunk[0])).use_in(model)
    some, flat = (bench_memory.saved(model, *given)[0] for given in (chunk, many))
    assert some <= flat <= 1.01 * some and flat < 0.1 * everything


def test_a_policy_keeps_the_inputs_of_blocks_and_offload_moves_them():
    """After the forward: everything; one input a block; nothing on the device."""
    config = odd_config(2)
    model = GLMV(config)
    given, kept = images(2, config), {}
    for policy in memory.POLICIES:
        parse_memory(f"vit:{policy}").use_in(model)
        book = bench_memory.SavedBytes([*model.parameters(), given[0]])
        with book:
            y = model.model.visual(*given)
        kept[policy], inputs = book.now, config.vision.depth * y.nbytes
        del y
        assert book.now == 0
    assert kept["recompute"] - kept["offload"] == inputs < kept["none"] / 10


def test_a_copy_on_the_host_is_fetched_once_and_brings_the_one_before():
    x, y = torch.randn(2, 3, 4)
    first = HostCopy(x)
    second = HostCopy(y, first)
    assert first.host is not x
    for copy in (first, second):
        copy.finish()
        assert copy.x is None
    assert torch.equal(second.fetch(), y) and first.back is not None and first.host is None
    assert torch.equal(first.fetch(), x)
    with pytest.raises(RuntimeError, match="no second one"):
        first.fetch()


class FakeStream:
    """A stream of a GPU that is not here: it only notes who waits for whom."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for all of {other.name}")

    def record_event(self):
        return self.log[-1]

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


class NotedLinear(nn.Linear):
    def forward(self, x):
        self.log.append(self.name)
        return super().forward(x)


def test_copies_go_on_beside_the_computation(monkeypatch):
    """The order of what is queued, as on a GPU: a copy waits for its tensor, a tensor is freed
    behind its copy, and in the backward each copy begins before the block ahead of it."""
    log = []
    compute, side = FakeStream("compute", log), FakeStream("copy", log)
    copy, empty_like = torch.Tensor.copy_, torch.empty_like

    def noted(self, other, non_blocking=False):
        assert non_blocking
        number = int(other.flatten()[0])        # every block adds 1 to its input
        log.append(f"x{number}")
        return copy(self, other)
    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    monkeypatch.setattr(memory, "on_gpu", lambda x: True)
    monkeypatch.setattr(memory, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty_like", lambda x, pin_memory=False, **options: empty_like(
        x, **options))
    blocks = [NotedLinear(2, 2) for _ in range(3)]
    x, run = torch.zeros(2), memory.Runner("offload")
    for i, block in enumerate(blocks):
        block.name, block.log = f"block {i}", log
        block.weight.data, block.bias.data = torch.eye(2), torch.ones(2)
        x = run(block, x)
    copied = "copy waits for all of compute"
    assert log == [line for i in range(3) for line in (
        copied, f"x{i}", f"block {i}", f"compute waits for x{i}")]
    log.clear()
    x.sum().backward()
    assert log == [copied, "x2", "compute waits for x2", copied, "x1", "block 2",
                   "compute waits for x1", copied, "x0", "block 1",
                   "compute waits for x0", "block 0"]
    assert torch.equal(blocks[0].weight.grad, torch.zeros(2, 2))
    assert torch.equal(blocks[2].weight.grad, torch.full((2, 2), 2.0))


def test_nothing_is_held_after_the_backward():
    """Not even the host's copies, while the loss is still there."""
    model, batch = models()
    copies, made = [], HostCopy.__init__

    def note(self, *args):
        made(self, *args)
        copies.append(weakref.ref(self.host))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopy, "__init__", note)
        parse_memory("offload").use_in(model)
        loss = loss_sum(model, batch)[0]
        assert copies and all(copy() is not None for copy in copies)
        loss.backward()
    assert all(copy() is None for copy in copies)


@pytest.mark.parametrize("text", ["half", "vit", "vit:half", "tower:offload", "vit:none,decoder",
                                  "recompute,vit:none"])
def test_a_wrong_policy_names_those_that_there_are(text):
    with pytest.raises(UserError, match="none, recompute, offload .* vit, adapter, decoder") as e:
        parse_memory(text)
    assert "\n" not in str(e.value) and text.split(",")[-1].split(":")[0] in str(e.value)


def test_what_is_asked_for():
    assert parse_memory("none") == Memory()
    assert parse_memory("offload", 64) == Memory("offload", "offload", "offload", 64)
    assert parse_memory("vit:offload,adapter:recompute") == Memory("offload", "recompute", "none")


# ---- in the training scripts --------------------------------------------------------------------

SMALL = dict(steps=2, rows=2, row_tokens=256, mix="counting", mtp_share=1.0, eval_every=0,
             workers=0, device="cpu", dtype="float32")


def equal_checkpoints(a, b) -> bool:
    states = [tree_leaves(torch.load(folder / "train.pt", weights_only=True)["optimizer"])
              for folder in (a, b)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (a, b)]
    return weights[0] == weights[1] and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*states, strict=True))


@pytest.mark.slow
def test_a_checkpoint_does_not_depend_on_the_policy(tmp_path):
    """A run without one; another that changes it on the way. The bytes are the same."""
    pretrain.run(pretrain.Args(**SMALL, out=str(tmp_path / "plain")))
    for policy in ("offload", "vit:recompute"):
        pretrain.run(pretrain.Args(**SMALL, out=str(tmp_path / "kept"), memory=policy, resume=True,
                                   save_every=1))
        (tmp_path / "kept/step_000002").rename(tmp_path / policy.replace(":", "_"))
    for name in ("offload", "vit_recompute"):
        assert equal_checkpoints(tmp_path / "plain/step_000002", tmp_path / name)


@pytest.mark.slow
def test_two_ranks_under_a_policy(tmp_path):
    runs = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "pretrain.py", *(f"--{key}={value}" for key, value in SMALL.items()),
         f"--memory={policy}", f"--out={tmp_path / policy}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) for policy in ("none", "offload")]
    assert [run.wait(200) for run in runs] == [0, 0]
    assert equal_checkpoints(tmp_path / "none/step_000002", tmp_path / "offload/step_000002")


def test_rl_learns_the_same_under_a_policy():
    config = odd_config()
    model = GLMV(config, seed=1)
    mmtp.attach(model, 2)
    batch = collate(rl.to_sample([random_document(config)], 0.5), config, 64)
    found = []
    for how in ALL:
        how.use_in(model)
        model.zero_grad(set_to_none=True)
        rl.row_loss(model, batch, rl.Args())[0].backward()
        found.append([p.grad for p in model.parameters()])
    assert all(a is b or torch.equal(a, b) for other in found for a, b in zip(found[0], other))


def test_the_text_tower_learns_the_same_under_a_policy():
    tower, found = TextTower(odd_config().text), []
    init(tower, 0)
    ids, borders = torch.arange(9), torch.tensor([0, 4, 9], dtype=torch.int32)
    for policy in POLICIES:
        Memory(decoder=policy).use_in(tower)
        tower.zero_grad(set_to_none=True)
        tower(ids, borders).square().sum().backward()
        found.append([p.grad for p in tower.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_the_options_reach_the_models(tmp_path):
    hw, how = setup("cpu"), parse_memory("offload", 64)
    options = dict(memory="offload", chunk_patches=64, out=str(tmp_path))
    for model in (rl.prepare(rl.Args(**options), hw)[0],
                  pretrain.build(pretrain.Args(**options), hw)[0]):
        assert model.model.visual.memory == model.model.language_model.memory == how
    args = train_vit.check(train_vit.Args(**options))
    model = train_vit.build("semantic", args, sized("tiny"), hw)[0]
    assert model.visual.memory == model.text.trunk.memory == Memory(
        "offload", decoder="offload", chunk_patches=64)


@pytest.mark.parametrize("script", [pretrain, rl], ids=lambda script: script.__name__)
def test_a_wrong_policy_is_refused_at_once(script, tmp_path):
    with pytest.raises(UserError, match="not 'half'"):
        script.run(script.Args(memory="half", plan=True, out=str(tmp_path)))


# ---- too little memory --------------------------------------------------------------------------

@pytest.mark.parametrize("script, options, flags", [
    ("pretrain.py", ["--mix=counting"], {"--row_tokens", "--memory", "--chunk_patches"}),
    ("train_vit.py", ["--stage=teachers", "--probes=16"],
     {"--micro", "--memory", "--chunk_patches"}),
    ("rl.py", ["--eval_every=0"], {"--row_tokens", "--slots", "--context", "--memory"})])
def test_too_little_memory_names_the_options(script, options, flags, tmp_path, monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    monkeypatch.setattr(CogViT, "forward", too_large)
    common = ["--steps=1", "--workers=0", "--device=cpu", f"--out={tmp_path}"]
    monkeypatch.setattr("sys.argv", [script, *common, *options])
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT,
                                                           signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    line, = capsys.readouterr().err.splitlines()[-1:]
    assert end.value.code == 2 and line.startswith("error: the memory does not suffice")
    known = {f"--{field.name}" for field in fields(importlib.import_module(script[:-3]).Args)}
    assert set(re.findall(r"--\w+", line)) == flags <= known


# ---- torch.compile ------------------------------------------------------------------------------

def test_without_a_compiler(monkeypatch):
    def compiled(_):
        def call(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH...")
        return call
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(UserError, match=r"\(InvalidCxxCompiler: No .* found\): install one"):
        compile_blocks(nn.Linear(1, 1), nn.Linear, torch.device("cpu"))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(tmp_path):
    """One step with the MTP head, under a policy: the loss, the gradient's norm, and the names of
    the weights. Compiled code adds up in another order."""
    found = {}
    for name in ("plain", "compile"):
        out = tmp_path / name
        pretrain.run(pretrain.Args(
            steps=1, rows=1, row_tokens=256, mix="counting", mtp_share=1, eval_every=0, workers=0,
            device="cpu", dtype="float32", out=str(out), memory="recompute",
            compile=name == "compile"))
        line = json.loads((out / "log.jsonl").read_text())
        found[name] = [line[key] for key in ("loss", "norm", "mtp1", "mtp3")]
        found[name + "d"] = load_tensors(out / "step_000001").keys()
    assert found["compile"] == pytest.approx(found["plain"], rel=1e-4)
    assert found["compiled"] == found["plaind"]
