"""Muon, AdamW, fp32 masters and the schedules."""
import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conftest import odd_config, on_ranks
from lib.common import sum_over_ranks
from model import GLMV
from optim import divide, fused_parts, is_matrix, newton_schulz, OptimConfig, Optimizer, schedule

LR = 1e-2
PLAIN = OptimConfig(lr=LR, weight_decay=0.0, clip=math.inf)


def random_gradients(optimizer, seed=0, size=1.0):
    """Fill the buffer, as a backward pass does."""
    optimizer.grad.normal_(generator=torch.Generator().manual_seed(seed)).mul_(size)


def update(optimizer, rate=1.0) -> float:
    """One step of one process; returns the norm."""
    norm = optimizer.reduce().sqrt().item()
    optimizer.step(rate, norm)
    return norm


def masters_of(optimizer) -> dict[str, torch.Tensor]:
    return {name: master.clone() for name, master in optimizer.gather()[0].items()}


def moved(optimizer, rate=1.0) -> dict[str, torch.Tensor]:
    """How far one step moves each master."""
    before = masters_of(optimizer)
    update(optimizer, rate)
    return {name: master - before[name] for name, master in masters_of(optimizer).items()}


# ---- Newton-Schulz ------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 64, 16), (1, 16, 64), (1, 48, 48), (1, 96, 256),
                                   (3, 40, 24), (2, 8, 8)])
def test_newton_schulz_makes_matrices_orthogonal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(x))
    if shape[-1] != shape[-2]:
        assert values.min() > 0.6
    assert values.max() < 1.3 and values.median() > 0.65


def test_newton_schulz_keeps_the_singular_vectors():
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    middle = u.T @ newton_schulz(x[None])[0] @ v.T
    assert (middle - middle.diag().diag()).abs().max() < 1e-3


def test_newton_schulz_ignores_the_scale():
    x = torch.randn(1, 10, 20, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(newton_schulz(x), newton_schulz(1000 * x), atol=1e-4)
    assert torch.isfinite(newton_schulz(0 * x)).all()


# ---- which optimizer moves which parameter, and how far ------------------------------------------

def test_muon_takes_the_hidden_matrices_only(model):
    optimizer = Optimizer(model.named_parameters(), PLAIN)
    muon, adam = set(optimizer.names["muon"]), set(optimizer.names["adam"])
    assert not muon & adam and muon | adam == optimizer.params.keys()
    ends = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert ends <= adam and {n for n in adam if optimizer.params[n].ndim == 2} == ends
    assert any("patch_embed" in n for n in adam) and not any("patch_embed" in n for n in muon)
    assert not any("norm" in n or n.endswith("bias") for n in muon)
    assert {n.split(".")[-2] for n in muon} >= {"qkv", "q_proj", "o_proj", "gate_up_proj",
                                                "down_proj"}
    held = [p for group in optimizer.adam.param_groups for p in group["params"]]
    assert sum(map(len, held)) == sum(optimizer.params[n].numel() for n in adam)


def test_updates_have_one_size(model):
    """RMS 0.2 lr for each of Muon's matrices; lr for AdamW's first step."""
    optimizer = Optimizer(model.named_parameters(), PLAIN)
    random_gradients(optimizer)
    for name, change in moved(optimizer, rate=0.5).items():
        rms = change.pow(2).mean().sqrt() / (0.5 * LR)
        low, high = (0.12, 0.25) if name in optimizer.names["muon"] else (0.99, 1.01)
        assert low < rms < high, name


def test_updates_go_against_the_gradient(model):
    optimizer = Optimizer(model.named_parameters(), PLAIN)
    random_gradients(optimizer)
    gradients = {name: g.clone() for name, g in optimizer.grads.items()}
    for name, change in moved(optimizer).items():
        assert (change * gradients[name]).sum() < 0, name


def test_fused_matrices_are_orthogonal_part_by_part():
    """A part with a gradient a thousand times larger does not drown the others."""
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(24, 72)
            self.gate_up_proj = nn.Linear(24, 80)

    module = Attention()
    optimizer = Optimizer(module.named_parameters(), PLAIN)
    random_gradients(optimizer)
    optimizer.grads["qkv.weight"][:24] *= 1000
    optimizer.grads["gate_up_proj.weight"][:40] *= 1000
    changes = moved(optimizer)
    for name in optimizer.names["muon"]:
        for part in changes[name].chunk(fused_parts(name)):
            scale = 0.2 * LR * math.sqrt(max(part.shape))
            values = torch.linalg.svdvals(part / scale)
            assert values.max() < 1.3 and values.median() > 0.6, name
    assert fused_parts("a.qkv.weight") == 3 and fused_parts("a.gate_up_proj.weight") == 2
    assert fused_parts("a.q_proj.weight") == fused_parts("a.down_proj.weight") == 1
    assert is_matrix("a.qkv.weight", module.qkv.weight)


def test_scales_by_module(model):
    config = OptimConfig(LR, 0.0, clip=math.inf, scales=(("model.visual", 0.1),))
    scaled = Optimizer(model.named_parameters(), config)
    plain = Optimizer(model.named_parameters(), PLAIN)
    for optimizer in (scaled, plain):
        random_gradients(optimizer)
    have, want = moved(scaled), moved(plain)
    for name in want:
        factor = 0.1 if name.startswith("model.visual") else 1.0
        assert torch.allclose(have[name], factor * want[name], atol=1e-6), name


def test_a_large_gradient_is_clipped(model):
    """Both gradients are longer than the limit, so both leave the same momenta."""
    config = OptimConfig(LR, 0.0, clip=1.0)
    states = []
    for size in (1.0, 1000.0):
        optimizer = Optimizer(GLMV(model.config, 1).named_parameters(), config)
        random_gradients(optimizer, size=size)
        assert update(optimizer) == pytest.approx(size * len(optimizer.flat) ** 0.5, rel=0.02)
        states.append(optimizer.state_dict()["momenta"])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in
               zip(*(state.values() for state in states)))
    assert sum(m.pow(2).sum() for m in states[0].values()) < 1.0


def test_weight_decay_is_for_matrices(model):
    """Without a gradient only decay moves anything, and norms and biases stay."""
    optimizer = Optimizer(model.named_parameters(), OptimConfig(LR, 0.1))
    before = masters_of(optimizer)
    update(optimizer)
    for name, master in masters_of(optimizer).items():
        factor = 1 - LR * 0.1 if master.ndim >= 2 else 1.0
        assert torch.allclose(master, factor * before[name], rtol=1e-5, atol=1e-8), name


# ---- masters ------------------------------------------------------------------------------------

def test_bfloat16_loses_no_small_update(config):
    """A hundred updates, each far below bf16's resolution, arrive in masters and model."""
    model = GLMV(config, seed=1).bfloat16()
    optimizer = Optimizer(model.named_parameters(), OptimConfig(1e-5, 0.0))
    name = "lm_head.weight"
    start = masters_of(optimizer)[name]
    for _ in range(100):
        optimizer.grad.fill_(1.0)
        update(optimizer)
    masters = masters_of(optimizer)
    assert masters[name].dtype == torch.float32
    assert torch.allclose(start - masters[name], torch.tensor(1e-3), rtol=0.02)
    for n, p in model.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, masters[n].bfloat16())


def test_gradients_are_added_up_in_fp32_and_freed():
    layer = nn.Linear(4, 3).bfloat16()
    optimizer = Optimizer(layer.named_parameters(), PLAIN)
    for value in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        (layer.weight * value).sum().backward()
        assert layer.weight.grad is None
    assert (optimizer.grads["weight"] == 258).all()
    update(optimizer)
    assert (optimizer.grad == 0).all()


def test_weights_may_change_their_dtype_after_the_optimizer_is_made():
    """train_vit.py makes the masters from fp32 weights, and rounds the model afterwards."""
    layer = nn.Linear(4, 3)
    optimizer = Optimizer(layer.named_parameters(), PLAIN)
    layer.weight.data = layer.weight.data.bfloat16()
    layer.weight.sum().backward()
    assert (optimizer.grads["weight"] == 1).all() and layer.weight.grad is None
    update(optimizer)
    assert torch.equal(layer.weight, masters_of(optimizer)["weight"].bfloat16())


def test_a_frozen_matrix_stays(model):
    """Not even its decay, as long as it is frozen; the others move, also those of its shape."""
    optimizer = Optimizer(model.named_parameters(), OptimConfig(LR, 0.1))
    layer = model.model.language_model.layers[0].requires_grad_(False)
    random_gradients(optimizer)
    changes = moved(optimizer)
    frozen = {id(p) for p in layer.parameters()}
    for name in optimizer.names["muon"]:
        assert (changes[name].abs().max() == 0) == (id(optimizer.params[name]) in frozen), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(model, value):
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    random_gradients(optimizer)
    update(optimizer)

    def everything():
        masters, state = optimizer.gather()
        adam = [v for s in optimizer.adam.state.values() for v in s.values()]
        return [t.clone() for t in (*masters.values(), *state["momenta"].values(), *adam,
                                    *model.state_dict().values())]
    before = everything()
    random_gradients(optimizer)
    optimizer.grad[17] = value
    assert not math.isfinite(update(optimizer))
    random_gradients(optimizer)
    optimizer.step(1.0, 1.0, apply=False)       # the loss is not finite
    assert all(map(torch.equal, before, everything()))
    random_gradients(optimizer)
    update(optimizer)
    assert all(torch.isfinite(t).all() for t in everything())
    assert not any(map(torch.equal, before[:20], everything()))


def test_a_saved_state_goes_on_the_same(model):
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    random_gradients(optimizer, 1)
    update(optimizer)
    weights = masters_of(optimizer)
    other = GLMV(model.config, seed=9)
    resumed = Optimizer(other.named_parameters(), OptimConfig())
    resumed.load_masters(weights)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, resumed):
        random_gradients(each, 2)
        update(each, 0.5)
    assert torch.equal(optimizer.flat, resumed.flat)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_resumed_run_may_change_the_decay(model):
    """The options are those of the command line, not of the file."""
    saved = Optimizer(model.named_parameters(), OptimConfig(weight_decay=0.05)).state_dict()
    optimizer = Optimizer(model.named_parameters(), OptimConfig(weight_decay=0.5))
    optimizer.load_state_dict(saved)
    assert {group["weight_decay"] for group in optimizer.adam.param_groups} == {0.0, 0.5}


# ---- several ranks ------------------------------------------------------------------------------

CONFIG = OptimConfig(1e-2, 0.1, clip=0.5, scales=(("model.visual", 0.5),))


def loss_of(model, step: int, row: int) -> torch.Tensor:
    """Something with a gradient for all parameters; where row is odd, for the decoder's only, as of
    a row without images."""
    draws, loss = torch.Generator().manual_seed(10 * step + row), 0.0
    for name, p in model.named_parameters():
        if row % 2 == 0 or "visual" not in name:
            loss = loss + (p * p * torch.randn(p.shape, generator=draws)).sum()
    return loss


def train_part(rank, world, folder, steps, start=None):
    """One rank of a training with three rows a step: some ranks have more rows than others, or
    none. Leaves its last state in folder/world, and what it holds in folder/world.rank."""
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/store{world}", rank=rank,
                                world_size=world)
    model = GLMV(odd_config(), seed=1)
    optimizer = Optimizer(model.named_parameters(), CONFIG)
    if start:
        weights, state = torch.load(start)
        optimizer.load_masters(weights)
        optimizer.load_state_dict(state)
    for step in steps:
        rows = range(3)[rank::world]
        for row in rows:
            if row == rows[-1] and step % 2:        # with and without overlap
                optimizer.last_backward()
            loss_of(model, step, row).backward()
        squares = sum_over_ranks(optimizer.reduce())
        optimizer.step(1.0, squares.sqrt().item())
    whole = optimizer.gather()
    if rank == 0:
        torch.save(whole, folder / str(world))
    held = [optimizer.flat, optimizer.momentum, optimizer.moments]
    torch.save(({n: p.detach() for n, p in model.named_parameters()}, sum(x.numel() for x in held)),
               folder / f"{world}.{rank}")


def same_state(folder, other, tolerance: float = 0.0):
    """Whether the checkpoints of two runs are equal, up to rounding."""
    (a, a_state), (b, b_state) = torch.load(folder), torch.load(other)
    assert a_state["updates"] == b_state["updates"]
    kinds = "momenta", "means", "squares"
    for x, y in ((a, b), *((a_state[kind], b_state[kind]) for kind in kinds)):
        assert x.keys() == y.keys() and x
        for name in x:
            assert (x[name] - y[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow),
                                   pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_a_share_each_are_one_process(tmp_path, world):
    """After five steps: the same weights on all ranks, and the state of one process. A rank holds
    its part of the state, up to the size of a matrix."""
    on_ranks(1, train_part, tmp_path, range(5))
    on_ranks(world, train_part, tmp_path, range(5))
    same_state(tmp_path / "1", tmp_path / str(world), 1e-5)
    weights = torch.load(tmp_path / str(world))[0]
    whole, share = torch.load(tmp_path / "1.0")[1], []
    for rank in range(world):
        own, held = torch.load(tmp_path / f"{world}.{rank}")
        assert all(torch.equal(own[name], weights[name]) for name in weights)
        share.append(held / whole)
    assert sum(share) == pytest.approx(1) and max(share) < 1.25 / world


@pytest.mark.parametrize("before,after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow),
                                          pytest.param(4, 3, marks=pytest.mark.slow)])
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, before, after):
    """What is loaded is what was saved, to the last bit; and training goes on as in one run."""
    on_ranks(before, train_part, tmp_path, range(3))
    saved = (tmp_path / str(before)).rename(tmp_path / "saved")
    on_ranks(after, train_part, tmp_path, [], saved)
    same_state(saved, tmp_path / str(after))
    (tmp_path / f"store{after}").unlink(missing_ok=True)
    on_ranks(after, train_part, tmp_path, range(3, 5), saved)
    (tmp_path / str(after)).rename(tmp_path / "resumed")
    on_ranks(1, train_part, tmp_path, range(5))
    same_state(tmp_path / "1", tmp_path / "resumed", 1e-5)


def test_a_gradient_after_the_last_one_is_an_error(model):
    """Its share has travelled already: it would be lost."""
    optimizer = Optimizer(model.named_parameters(), PLAIN)
    optimizer.awaited = [set()]
    with pytest.raises(RuntimeError, match="lm_head.weight has a gradient after the last"):
        model.lm_head.weight.sum().backward()


def test_matrices_are_dealt_out_by_cost():
    assert divide([1, 1, 1, 3], 2) == [0, 0, 0, 1] and divide([5, 1], 1) == [0, 0]
    assert divide([1.0] * 6, 3) == [0, 0, 1, 1, 2, 2] and divide([1], 4) == [2]


# ---- schedules ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind,step,want", [
    ("constant", 0, 0.1), ("constant", 9, 1.0), ("constant", 10, 1.0), ("constant", 99, 1.0),
    ("linear", 0, 0.1), ("linear", 4, 0.5), ("linear", 10, 1.0), ("linear", 60, 1.0),
    ("linear", 80, 0.5), ("linear", 99, 0.025), ("linear", 100, 0.0),
    ("cosine", 0, 0.1), ("cosine", 10, 1.0), ("cosine", 55, 0.55), ("cosine", 100, 0.1)])
def test_schedules_at_key_points(kind, step, want):
    """100 steps, 10 of them warm-up, the last 40% linear."""
    assert schedule(step, 100, 10, kind, 0.4) == pytest.approx(want)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_rise_once_and_fall_once(kind):
    rates = [schedule(step, 100, 10, kind, 0.4) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < min(rates) and max(rates) == 1
    assert schedule(0, 100, 0, kind) == 1.0


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="constant, linear or cosine"):
        schedule(50, 100, 10, "square")
