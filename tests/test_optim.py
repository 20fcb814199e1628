"""Muon, AdamW, fp32 masters and the schedules."""
import copy
import math

import pytest
import torch
from torch import nn

from model import GLMV
from optim import fused_parts, is_matrix, newton_schulz, OptimConfig, Optimizer, schedule

LR = 1e-2
PLAIN = OptimConfig(lr=LR, weight_decay=0.0, clip=math.inf)


def random_gradients(optimizer, seed=0, size=1.0):
    """Fill the buffer, as `accumulate` does."""
    optimizer.flat_grad.normal_(generator=torch.Generator().manual_seed(seed)).mul_(size)


def moved(optimizer, rate=1.0) -> dict[str, torch.Tensor]:
    """How far one step moves each master."""
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    optimizer.step(rate)
    return {name: master - before[name] for name, master in optimizer.masters.items()}


# ---- Newton-Schulz ------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (48, 48), (96, 256), (3, 40, 24), (2, 8, 8)])
def test_newton_schulz_makes_matrices_orthogonal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(x))
    if shape[-1] != shape[-2]:
        assert values.min() > 0.6
    assert values.max() < 1.3 and values.median() > 0.65


def test_newton_schulz_keeps_the_singular_vectors():
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    middle = u.T @ newton_schulz(x) @ v.T
    assert (middle - middle.diag().diag()).abs().max() < 1e-3


def test_newton_schulz_ignores_the_scale():
    x = torch.randn(10, 20, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(newton_schulz(x), newton_schulz(1000 * x), atol=1e-4)
    assert torch.isfinite(newton_schulz(0 * x)).all()


# ---- which optimizer moves which parameter, and how far ------------------------------------------

def test_muon_takes_the_hidden_matrices_only(model):
    optimizer = Optimizer(model.named_parameters(), PLAIN)
    muon, adam = set(optimizer.muon), optimizer.params.keys() - set(optimizer.muon)
    ends = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert ends <= adam and {n for n in adam if optimizer.params[n].ndim == 2} == ends
    assert any("patch_embed" in n for n in adam) and not any("patch_embed" in n for n in muon)
    assert not any("norm" in n or n.endswith("bias") for n in muon)
    assert {n.split(".")[-2] for n in muon} >= {"qkv", "q_proj", "o_proj", "gate_up_proj",
                                                "down_proj"}
    held = [id(p) for group in optimizer.adam.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(optimizer.masters[n]) for n in adam)


def test_updates_have_one_size(model):
    """RMS 0.2 lr for each of Muon's matrices; lr for AdamW's first step."""
    optimizer = Optimizer(model.named_parameters(), PLAIN)
    random_gradients(optimizer)
    for name, change in moved(optimizer, rate=0.5).items():
        rms = change.pow(2).mean().sqrt() / (0.5 * LR)
        low, high = (0.12, 0.25) if name in optimizer.momenta else (0.99, 1.01)
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
    for name in optimizer.muon:
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
        assert optimizer.step(1.0) == pytest.approx(size * optimizer.flat.numel() ** 0.5, rel=0.02)
        states.append(optimizer.momenta)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in
               zip(*(state.values() for state in states)))
    assert sum(m.pow(2).sum() for m in states[0].values()) < 1.0


def test_weight_decay_is_for_matrices(model):
    """Without a gradient only decay moves anything, and norms and biases stay."""
    optimizer = Optimizer(model.named_parameters(), OptimConfig(LR, 0.1))
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    optimizer.step(1.0)
    for name, master in optimizer.masters.items():
        factor = 1 - LR * 0.1 if master.ndim >= 2 else 1.0
        assert torch.allclose(master, factor * before[name], rtol=1e-5, atol=1e-8), name


# ---- masters ------------------------------------------------------------------------------------

def test_bfloat16_loses_no_small_update(config):
    """A hundred updates, each far below bf16's resolution, arrive in masters and model."""
    model = GLMV(config, seed=1).bfloat16()
    optimizer = Optimizer(model.named_parameters(), OptimConfig(1e-5, 0.0))
    name = "lm_head.weight"
    start = optimizer.masters[name].clone()
    for _ in range(100):
        optimizer.flat_grad.fill_(1.0)
        optimizer.step(1.0)
    assert optimizer.masters[name].dtype == torch.float32
    assert torch.allclose(start - optimizer.masters[name], torch.tensor(1e-3), rtol=0.02)
    for n, p in model.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, optimizer.masters[n].bfloat16())


def test_gradients_are_collected_in_fp32():
    layer = nn.Linear(4, 3).bfloat16()
    optimizer = Optimizer(layer.named_parameters(), PLAIN)
    for value in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        layer.weight.grad = torch.full_like(layer.weight, value)
        optimizer.accumulate()
        assert layer.weight.grad is None
    assert (optimizer.grads["weight"] == 258).all()
    optimizer.step(1.0)
    assert (optimizer.flat_grad == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(model, value):
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    random_gradients(optimizer)
    optimizer.step(1.0)

    def everything():
        state = optimizer.state_dict()
        adam = [v for s in state["adam"]["state"].values() for v in s.values()]
        return [t.clone() for t in (*optimizer.masters.values(), *state["momenta"].values(), *adam,
                                    *model.state_dict().values())]
    before = everything()
    random_gradients(optimizer)
    optimizer.flat_grad[17] = value
    assert not math.isfinite(optimizer.step(1.0))
    assert all(map(torch.equal, before, everything()))
    random_gradients(optimizer)
    optimizer.step(1.0)
    assert all(torch.isfinite(t).all() for t in everything())


def test_a_saved_state_goes_on_the_same(model):
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    random_gradients(optimizer, 1)
    optimizer.step(1.0)
    weights = {name: master.clone() for name, master in optimizer.masters.items()}
    other = GLMV(model.config, seed=9)
    resumed = Optimizer(other.named_parameters(), OptimConfig())
    resumed.load_masters(weights)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, resumed):
        random_gradients(each, 2)
        each.step(0.5)
    assert torch.equal(optimizer.flat, resumed.flat)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_resumed_run_may_change_the_decay(model):
    """The options are those of the command line, not of the file."""
    saved = Optimizer(model.named_parameters(), OptimConfig(weight_decay=0.05)).state_dict()
    optimizer = Optimizer(model.named_parameters(), OptimConfig(weight_decay=0.5))
    optimizer.load_state_dict(saved)
    assert {group["weight_decay"] for group in optimizer.adam.param_groups} == {0.0, 0.5}


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
