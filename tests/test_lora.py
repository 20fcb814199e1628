"""--train: what is frozen stays as it is and costs nothing; LoRA starts at the model, learns by its
formula, merges on saving, resumes bit for bit, and plays in RL."""
import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import odd_config, random_document
from test_pretrain import after_step, alike, log_of, SMALL, state_of, train
from test_rl import SMALL as RL, some_reward

import pretrain
import rl
from data import collate
from lab.bench_memory import SavedBytes
from lib import memory
from lib.checkpoint import load_model, save_model
from lib.cli import UserError
from lib.common import ROOT
from lib.lora import (count_learning, learns, let_head_learn, LoraLinear, merged, parse_train,
                      SCALE, set_learning, TARGETS, unmerged)
from lib.memory import parse_memory
from lib.ranks import Transfer
from lib.runs import checkpoints
from lib.tensors import load_tensors
from mmtp import attach, head_of
from model import GLMV, sized
from optim import OptimConfig, Optimizer

FAST = dict(SMALL, steps=4, row_tokens=128, rows=1, mix="point", mtp_share=0.5)


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """The folder of a random tiny model with an MTP head, its weights in fp32."""
    folder = tmp_path_factory.mktemp("begin")
    model = GLMV(sized("tiny"), seed=3)
    attach(model, 3, seed=3)
    save_model(model, folder)
    return folder


def tuned(what: str, head: bool = True, which: int = 0) -> GLMV:
    """A random model of an odd size in which `what` learns, with nothing at 0."""
    model = GLMV(odd_config(which), seed=1)
    if head:
        attach(model, 3, seed=1)
    set_learning(model, what, seed=1)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def row_of(config, length: int = 160):
    return collate([random_document(config, ((4, 6), (2, 4)), seed=0),
                    random_document(config, ((8, 8),), 20, seed=1)], config, length)


def part_of(name: str) -> str:
    if name.startswith("model.visual."):
        return "adapter" if name.split(".")[2] in ("downsample", "merger") else "tower"
    return "lora" if "lora_" in name else "decoder"


# ---- the layer ----------------------------------------------------------------------------------

def test_the_layer_is_its_formula_and_so_are_its_gradients():
    """y = W x + alpha/R B A x, dA = alpha/R B^T dy x^T, dB = alpha/R dy (A x)^T, and dx."""
    generator = torch.Generator().manual_seed(0)
    weight, x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64)
                       for shape in ((7, 5), (11, 5), (11, 7)))
    layer = LoraLinear(torch.nn.Parameter(weight), 3, generator)
    torch.nn.init.normal_(layer.lora_B, generator=generator)
    a, b = layer.lora_A, layer.lora_B
    assert (a.shape, b.shape, SCALE) == ((3, 5), (7, 3), 2.0)
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, x @ (weight + 2 * b @ a).T)
    y.backward(grad)
    torch.testing.assert_close(a.grad, 2 * b.T @ grad.T @ x)
    torch.testing.assert_close(b.grad, 2 * grad.T @ (x @ a.T))
    torch.testing.assert_close(x.grad, grad @ (weight + 2 * b @ a))
    assert layer.weight.grad is None and not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_exactly_at_the_model(dtype):
    """The same hidden states, bit for bit; A depends on the seed alone."""
    plain = GLMV(odd_config(), seed=1).to(dtype)
    batch = row_of(plain.config)
    models = []
    for seed in (5, 5, 6):
        models.append(copy.deepcopy(plain))
        set_learning(models[-1], "lora:4", seed)
    want = plain(batch, plain.encode_images(batch))
    assert torch.equal(models[0](batch, models[0].encode_images(batch)), want)
    a, b, c = (m.state_dict()["model.language_model.layers.1.mlp.down_proj.lora_A"] for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == dtype
    assert 0.6 < a.float().std() * a.shape[1] ** 0.5 < 1.4


def test_merged_weights_are_an_ordinary_model():
    """Its names, and logits to 1e-5; `unmerged` is what brings the other form back."""
    model = tuned("lora:4")
    batch, state = row_of(model.config), model.state_dict()
    plain = GLMV(model.config, seed=9)
    attach(plain, 3)
    plain.load_state_dict(merged(state))
    logits = [m.lm_head(m(batch, m.encode_images(batch))) for m in (model, plain)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()
    layers = model.config.text.num_hidden_layers
    assert len(unmerged(state)) == 3 * (6 * (layers + 1) + 1)      # the head has eh_proj too
    assert alike(dict(state), {**merged(state), **unmerged(state)})
    assert unmerged(plain.state_dict()) == {} and alike(merged(plain.state_dict()),
                                                        dict(plain.state_dict()))


def test_the_rank_adds_what_it_says():
    """R (in + out) parameters a matrix; and the names end as PEFT's do."""
    model, c = tuned("lora:5", head=False), odd_config().text
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    w, i = c.hidden_size, c.intermediate_size
    a_layer = 2 * (w + q) + 2 * (w + kv) + (w + 2 * i) + (i + w)
    assert count_learning(model) == 5 * a_layer * c.num_hidden_layers
    kinds = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert kinds == set(TARGETS) - {"eh_proj"}


# ---- the option ---------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["", "vision", "lora", "lora:", "lora:0", "lora:-1", "lora:x",
                                  "lora:1.5", "lora:²", "lora:1 ", "LORA:1", "lora:" + "9" * 5000,
                                  "all,decoder", "decoder:4"])
def test_wrong_values_are_one_clear_line(text):
    with pytest.raises(UserError, match="^--train takes all, decoder, adapter, or lora:R") as error:
        parse_train(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes,words", [
    (dict(train="vision"), "--train takes"), (dict(train="lora:8"), "would freeze random weights"),
    (dict(train="decoder"), "would freeze random weights"),
    (dict(train="adapter", mtp_alone=True, init="x"), "--mtp_alone does nothing"),
    (dict(train="lora:8", vision_scale=0.1, init="x"), "--vision_scale=0.1 changes nothing")])
def test_what_would_do_nothing_is_refused_before_anything_is_made(tmp_path, monkeypatch, changes,
                                                                  words):
    monkeypatch.setattr(pretrain, "GLMV", None)
    with pytest.raises(UserError, match=words) as error:
        train(tmp_path / "run", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [pretrain, rl], ids=lambda script: script.__name__)
def test_a_rank_above_the_smallest_matrix_is_refused(tmp_path, begin, script):
    with pytest.raises(UserError, match="^--train=lora:100000 is above 96, .* 96 x 96 in this mod"):
        script.run(script.Args(train="lora:100000", init=str(begin), out=str(tmp_path / "run"),
                               device="cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what,parts", [
    ("all", {"tower", "adapter", "decoder"}), ("decoder", {"adapter", "decoder"}),
    ("adapter", {"adapter"}), ("lora:4", {"lora"})])
def test_what_learns_and_what_is_frozen(what, parts):
    """A backward gives a gradient to all that learns, and to nothing else, under each policy of
    --memory alike; the optimizer has state for these alone."""
    model = tuned(what)
    batch, found = row_of(model.config), []
    assert {part_of(n) for n, p in model.named_parameters() if p.requires_grad} == parts
    for policy in ("none", "recompute", "offload"):
        parse_memory(policy, 24 * (policy != "none")).use_in(model)
        model.zero_grad(set_to_none=True)
        loss, further = pretrain.loss_sum(model, batch, 3)
        (loss + sum(further)).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert {part_of(name) for name in grads} == parts
        found.append(grads)
    for name, grad in found[0].items():     # in chunks, sums over images are in another order
        for other in found[1:]:
            torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-4)
    model.zero_grad(set_to_none=True)
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    assert set(optimizer.params) == found[0].keys() | {
        n for n, p in model.named_parameters() if p.requires_grad}
    assert len(optimizer.grad) == len(optimizer.flat) == count_learning(model)


def kept_bytes(model, batch) -> int:
    """What autograd keeps of the forward, beside weights and batch."""
    book = SavedBytes([*model.parameters(), batch.patches, batch.tokens])
    with book:
        pretrain.loss_sum(model, batch)
    return book.most


def test_a_frozen_tower_keeps_no_activations_under_any_policy(monkeypatch):
    """Neither in the graph nor, with offload, on the host. The whole step keeps less as well."""
    model = tuned("lora:4", head=False)
    batch, copies = row_of(model.config), []
    monkeypatch.setattr(memory, "HostCopy", lambda *args: copies.append(args))
    for policy in ("none", "recompute", "offload"):
        parse_memory(policy).use_in(model)
        book = SavedBytes(model.parameters())
        with book:
            merged_tokens = model.encode_images(batch)
        assert book.most == 0 and not merged_tokens.requires_grad and not copies
    parse_memory("none").use_in(model)
    assert kept_bytes(model, batch) < 0.9 * kept_bytes(GLMV(odd_config(), seed=1), batch)


@pytest.mark.slow
def test_the_plan_counts_what_lives(begin, capsys):
    """By the tensors of a real run: weights, gradient buffer, masters, moments. And FLOPs fall."""
    totals = {}
    for what in ("all", "decoder", "adapter", "lora:4"):
        model = load_model(begin)
        set_learning(model, what)
        optimizer = Optimizer(model.named_parameters(), OptimConfig())
        held = [*model.parameters(), optimizer.grad, optimizer.flat, optimizer.momentum,
                optimizer.moments]
        pretrain.run(pretrain.Args(plan=True, train=what, init=str(begin), device="cpu", rows=1,
                                   row_tokens=32, dtype="float32", memory="recompute", mtp=0,
                                   mix="point"))
        lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        assert lines["learning"] == f"{count_learning(model) / 1e6:,.2f}M parameters"
        # Muon's matrices have one momentum, where the plan counts AdamW's two.
        planned = 4 * sum(p.numel() for p in model.parameters()) + 16 * count_learning(model)
        spared = 4 * len(optimizer.momentum)
        assert sum(t.nbytes for t in held) == planned - spared
        totals[what] = float(lines["compute"].split()[0])
    assert totals["all"] > totals["decoder"] > totals["lora:4"] > 0.4 * totals["all"]


def test_flops_of_frozen_parts():
    model = GLMV(sized("tiny"))
    n = model.counts()
    for what, tower, adapter, decoder in (("all", 6, 6, 6), ("decoder", 2, 6, 6),
                                          ("adapter", 2, 6, 4)):
        set_learning(model, what)
        assert model.flops(0, 4, 0) == 4 * tower * n["tower"] + adapter * n["adapter"]
        assert model.flops(0, 0, 1) == decoder * n["head"]


# ---- pretrain.py --------------------------------------------------------------------------------

@pytest.mark.parametrize("what", [pytest.param("decoder", marks=pytest.mark.slow),
                                  pytest.param("adapter", marks=pytest.mark.slow), "lora:4"])
def test_a_bf16_run_keeps_what_is_frozen_bit_for_bit(tmp_path, begin, what):
    """The checkpoint holds its fp32 values, though the model computes with rounded ones; the parts
    that learn have changed, all of them; it is an ordinary model."""
    train(tmp_path, **{**FAST, "dtype": "bfloat16"}, init=str(begin), train=what)
    before, after = load_tensors(begin), load_tensors(tmp_path / "step_000004")
    assert list(before) == list(after)
    learning = GLMV(sized("tiny"))
    attach(learning, 3)
    set_learning(learning, what)
    changes = {name for name, p in learning.named_parameters() if p.requires_grad}
    changes = {name.replace(".lora_A", ".weight") for name in changes if ".lora_B" not in name}
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different == changes
    load_model(tmp_path / "step_000004")


@pytest.mark.parametrize("what", ["lora:4", pytest.param("adapter", marks=pytest.mark.slow)])
def test_four_steps_are_two_and_resume_and_two(tmp_path, begin, monkeypatch, what):
    """Bit for bit, in bf16, with the MTP head joining on the way; SIGTERM stops the first two. What
    --keep gets is the same merged model."""
    options = dict(FAST, dtype="bfloat16", init=str(begin), train=what)
    whole = train(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: step == 2 and signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **options)
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["step_000002"]
    parts = train(tmp_path / "parts", **options, resume=True, keep=str(tmp_path / "kept"))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    assert ["mtp1" in line for line in whole] == [False] * 2 + [what != "adapter"] * 2
    a, b = tmp_path / "whole/step_000004", tmp_path / "parts/step_000004"
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    a, b = state_of(a), state_of(b)
    assert all(alike(a[key], b[key]) for key in ("step", "position", "optimizer", "unmerged"))
    kept, last = (load_tensors(tmp_path / name) for name in ("kept", "parts/step_000004"))
    assert kept.keys() == last.keys()
    assert all(torch.equal(last[name].bfloat16(), kept[name]) for name in last)


def test_another_train_does_not_resume(tmp_path, begin):
    options = {**FAST, "steps": 1, "init": str(begin)}
    train(tmp_path, **options, train="lora:4")
    with pytest.raises(UserError, match="is of a run with --train=lora:4: resume it with the same, "
                                        "or start from its weights") as error:
        train(tmp_path, **{**options, "steps": 2}, train="lora:8", resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_head_learns_only_where_all_or_a_part_of_it_can(tmp_path):
    """LoRA and adapter attach no new head, whose weights would stay random; a head's frozen
    matrices never get a gradient."""
    folder = tmp_path / "plain"
    save_model(GLMV(sized("tiny"), seed=3), folder)
    for what in ("lora:4", "adapter"):
        log = train(tmp_path / what, **FAST, init=str(folder), train=what)
        assert not any("mtp1" in line for line in log)
        assert head_of(load_model(tmp_path / what / "step_000004")) is None
    model = tuned("lora:4")
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    for on in (False, True):
        let_head_learn(model, optimizer, on)
        assert learns(head_of(model)) == on and learns(model)
        assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_step_without_pictures_leaves_the_adapter_alone(tmp_path, begin):
    log = train(tmp_path, **{**FAST, "mix": "text", "steps": 1, "row_tokens": 256}, init=str(begin),
                train="adapter", weight_decay=0.0)
    assert log[0]["norm"] == 0
    assert alike(load_tensors(begin), load_tensors(tmp_path / "step_000001"))


@pytest.mark.slow
def test_lora_learns(tmp_path):
    """From the demo's checkpoint, a task of another level."""
    log = train(tmp_path, steps=12, mix="gui_form", levels=2, rows=1, row_tokens=512, warmup=3,
                init=str(ROOT / "ckpt" / "demo"), train="lora:8", curriculum=0.0, mtp=0,
                eval_every=12)
    assert sum(line["loss"] for line in log[-3:]) < 0.8 * sum(line["loss"] for line in log[:3])


@pytest.mark.slow
def test_two_ranks_with_lora_are_one(tmp_path, begin):
    options = dict(FAST, rows=2, init=str(begin), train="lora:4")
    alone = train(tmp_path / "one", **options)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "pretrain.py", *(f"--{key}={value}" for key, value in options.items()),
         f"--out={tmp_path / 'two'}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=100)
    assert done.returncode == 0, done.stderr
    for a, b in zip(alone, log_of(tmp_path / "two"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
    one, two = (load_tensors(tmp_path / run / "step_000004") for run in ("one", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    frozen = [name for name in one if "layernorm" in name or "visual" in name]
    assert frozen and all(torch.equal(one[name], two[name]) for name in frozen)


def test_a_compiler_can_trace_a_layer_with_lora():
    """By TorchDynamo, without the compiler behind it."""
    model = tuned("lora:4", head=False)
    mlp, x = model.model.language_model.layers[0].mlp, torch.randn(5, 48)
    want = mlp(x)
    torch.testing.assert_close(torch.compile(mlp, backend="eager", fullgraph=True)(x), want)


# ---- rl.py --------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [{}, pytest.param(dict(max_staleness=1), marks=pytest.mark.slow)],
                         ids=["synchronous", "asynchronous"])
def test_rl_moves_the_policy_by_low_rank_matrices(tmp_path, begin, monkeypatch, more):
    """The engine plays with them: all ratios are 1 where it has the newest weights. Frozen tensors
    stay; the checkpoint is an ordinary model, and resumes."""
    some_reward(monkeypatch)
    options = dict(RL, init=str(begin), out=str(tmp_path), train="lora:4", lr=1e-2, **more)
    rl.run(rl.Args(steps=2, **options))
    log = log_of(tmp_path)
    if not more:
        assert all(line["mismatch_max"] < 1e-4 for line in log)
    before, after = load_tensors(begin), load_tensors(tmp_path / "step_000002")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(TARGETS)
    assert before.keys() == after.keys()
    if more:
        rl.run(rl.Args(steps=3, resume=True, **options))
        assert log_of(tmp_path)[2]["step"] == 3


def test_only_what_learns_travels_to_the_players():
    """As much as the low-rank matrices have; loaded by a player's engine, it plays the same."""
    model = tuned("lora:4")
    player = tuned("lora:4")
    transfer = Transfer(model, None)
    assert transfer.buffer.numel() == count_learning(model) < 0.2 * model.counts()["total"]
    for p in player.parameters():
        if p.requires_grad:
            torch.nn.init.zeros_(p)
    engine = rl.make_engine(player, replace(rl.Args(), slots=2, context=64))
    for name, place in transfer.weights.items():
        place.copy_(dict(model.named_parameters())[name].detach())
    engine.load(transfer.weights, 1)
    assert alike(dict(model.state_dict()), dict(player.state_dict()))
