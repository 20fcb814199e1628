"""Each Triton kernel beside the plain PyTorch that says what it computes.

Kernels run in Triton's interpreter, which has to be chosen before Triton is imported. So the tests
that launch some run in a process of their own, which two tests at the end start; to run them
directly: TRITON_INTERPRET=1 python -m pytest -k kernels
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
import mmtp
import optim
from conftest import random_document
from data import collate
from kernels import (
    add_norm, gram, linear_cross_entropy, linear_logp, norm_add, plain_add_norm, plain_gram,
    plain_norm_add, plain_poly, plain_swiglu, poly, swiglu)
from lab import bench
from lib import attention, dispatch, losses, rotary
from lib.losses import logp, plain_logp, plain_softmax_gradient, softmax_gradient
from model import GLMV, sized
from pretrain import loss_sum

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

# Rows and widths: none, one, and multiples of nothing. `make test` tries the first three.
ODD = [(0, 31), (1, 1), (5, 97)]
ODD += [(rows, width) for rows in (0, 1, 2, 7, 19) for width in (1, 2, 30, 129, 1025, 1537)]
ODD += [(3, 4097), (23, 255), (33, 64), (67, 3)]
ODD = [shape if i < 3 else pytest.param(shape, marks=pytest.mark.slow)
       for i, shape in enumerate(ODD)]
odd_shapes = pytest.mark.parametrize("shape", ODD, ids=str)


def close(got, want, most: float = 1e-4):
    """Equal in shape and dtype, and in values up to `most` of the largest one. What is 0 exactly,
    as the gradient through a norm of one element, may be 1e-6."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if want.numel():
        assert (got - want).abs().max() <= most * want.abs().max() + 1e-6


def agree(function, plain, *given, most: float = 1e-4):
    """Both give the same results and the same gradients of all that is given."""
    made = []
    for each in (function, plain):
        torch.manual_seed(1)
        copies = [x.detach().clone().requires_grad_() for x in given]
        outs = each(*copies)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.backward(outs, [torch.randn_like(x) for x in outs])
        made.append([*outs, *(x.grad for x in copies)])
    for got, want in zip(*made, strict=True):
        close(got.detach(), want.detach(), most)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- in the interpreter -------------------------------------------------------------------------

@interpreted
@odd_shapes
def test_kernel_swiglu(shape):
    agree(swiglu, plain_swiglu, random(*shape), random(*shape))
    agree(swiglu, plain_swiglu, random(shape[0], 2 * shape[1]))


@interpreted
@odd_shapes
def test_kernel_add_norm(shape):
    x, residual, weight, inner = random(*shape), random(*shape), random(shape[1]), random(shape[1])
    agree(add_norm, plain_add_norm, x, residual, weight)
    agree(norm_add, plain_norm_add, x, residual, weight)
    agree(lambda *given: add_norm(*given[:3], 1e-3, given[3]),
          lambda *given: plain_add_norm(*given[:3], 1e-3, given[3]), x, residual, weight, inner)


@interpreted
@odd_shapes
def test_kernel_symmetric_products(shape):
    x = random(2, min(shape[1], 300), 3 * shape[0])     # up to three tiles of 128 rows
    transposed = x.mT.contiguous().mT       # what newton_schulz passes for a tall matrix
    close(gram(x), plain_gram(x))
    close(gram(transposed), plain_gram(x))
    a = plain_gram(x) / 50
    close(poly(a), plain_poly(a))


@interpreted
@odd_shapes
def test_kernel_softmax(shape):
    """Rows are tokens, columns the vocabulary."""
    logits, targets = 3 * random(*shape), torch.randint(shape[1], shape[:1])
    weights, copy = random(shape[0]), logits.clone()
    losses = softmax_gradient(copy, targets, weights)
    want = logits.clone()
    close(losses, plain_softmax_gradient(want, targets, weights))
    close(copy, want)
    for got, want in zip(logp(logits, targets), plain_logp(logits, targets), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@interpreted
@odd_shapes
@pytest.mark.parametrize("chunk", [0, 3])
def test_kernel_losses_over_a_vocabulary(shape, chunk):
    """Rows are tokens of each of two groups, columns the vocabulary; gradients too."""
    (rows, vocabulary), width = shape, 13
    hidden, weight = random(2, rows, width), random(vocabulary, width)
    targets = torch.randint(vocabulary, (2, rows))
    weights = torch.rand(2, rows) * (torch.rand(2, rows) > 0.3)

    def plain(hidden, weight):
        every = plain_logp((hidden @ weight.T).flatten(0, 1), targets.flatten())[0]
        return -(every.view(2, rows) * weights).sum()
    agree(lambda *given: linear_cross_entropy(*given, targets, weights, chunk).sum(), plain,
          hidden, weight)
    agree(lambda *given: linear_logp(*given, targets[0], chunk)[0],
          lambda hidden, weight: plain_logp(hidden @ weight.T, targets[0])[0], hidden[0], weight)


@pytest.mark.slow
@interpreted
def test_kernel_rows_that_do_not_lie_side_by_side():
    """Views with gaps between their rows are read where they are, and the gaps stay as they are."""
    wide = random(5, 90)
    agree(lambda x: swiglu(x[:, 3:43], x[:, 50:]), lambda x: plain_swiglu(x[:, 3:43], x[:, 50:]),
          wide)
    agree(lambda x: swiglu(x[:, :40]), lambda x: plain_swiglu(x[:, :40]), wide)
    agree(lambda x: norm_add(x[:, :40], x[:, 40:80], x[0, 5:45]),
          lambda x: plain_norm_add(x[:, :40], x[:, 40:80], x[0, 5:45]), wide)
    close(gram(wide[None, :, :40]), plain_gram(wide[None, :, :40]))
    symmetric = (wide.T @ wide)[None, :40, :40]
    close(poly(symmetric), plain_poly(symmetric))
    copy, targets, weights = wide.clone(), torch.tensor([0, 49, 3, 7, 20]), torch.rand(5)
    softmax_gradient(copy[:, 10:60], targets, weights)
    want = wide.clone()
    want[:, 10:60] = (wide[:, 10:60].softmax(-1) - torch.eye(50)[targets]) * weights[:, None]
    close(copy, want)


@pytest.mark.slow
@interpreted
def test_kernel_bf16():
    """A unit in the last place is allowed: the interpreter cuts digits off, a GPU rounds."""
    half, last = torch.bfloat16, 2 ** -6
    x, residual, w, v = (random(*s, dtype=half) for s in ((9, 70), (9, 70), (70,), (70,)))
    agree(swiglu, plain_swiglu, x, residual, most=last)
    agree(add_norm, plain_add_norm, x, residual, w, most=last)
    agree(lambda *given: add_norm(*given[:3], inner=given[3]),
          lambda *given: plain_add_norm(*given[:3], inner=given[3]), x, residual, w, v, most=last)
    close(gram(x[None]), plain_gram(x[None]), last)
    targets, weights = torch.randint(70, (9,)), torch.rand(9)
    logits, want = x.clone(), x.clone()
    close(softmax_gradient(logits, targets, weights),
          plain_softmax_gradient(want, targets, weights))
    close(logits, want, last)
    hidden, weight = random(9, 16, dtype=half), random(70, 16, dtype=half)
    agree(lambda *given: linear_cross_entropy(*given, targets, weights), lambda h, w: (
        -plain_logp(h @ w.T, targets)[0] * weights).sum(), hidden, weight, most=last)


@interpreted
def test_kernel_target_outside_the_vocabulary():
    logits = random(3, 7)
    values = softmax_gradient(logits, torch.tensor([6, 7, -1]), torch.ones(3))
    assert values.isnan().tolist() == [False, True, True]


@interpreted
@pytest.mark.slow
def test_kernel_launches_of_a_step_of_pretraining(monkeypatch):
    """With MTP at tiny: loss and gradients as without kernels, and each is launched."""
    config, launched = sized("tiny"), set()
    model = GLMV(config)
    mmtp.attach(model, 3)
    batch = collate([random_document(config, ((2, 4),), 8)], config)
    launch = dispatch.Kernel.__getitem__
    monkeypatch.setattr(dispatch.Kernel, "__getitem__",
                        lambda self, grid: launched.add(self.name) or launch(self, grid))

    def step():
        model.zero_grad()
        loss, further = loss_sum(model, batch, 3)
        (loss + 0.3 * sum(further)).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        matrices = next(g for g in gradients if g.ndim == 2)[None, :40]
        return loss.detach(), sum(further).detach(), optim.newton_schulz(matrices), *gradients
    found = step()
    parts = attention, kernels, losses, rotary
    every = {entry[0].name for module in parts for entry in module.KERNELS}
    assert every <= launched
    monkeypatch.setattr(dispatch, "FORCED", "0")
    launched.clear()
    for got, want in zip(found, step(), strict=True):
        close(got, want, 1e-3)
    assert not launched


# ---- anywhere -----------------------------------------------------------------------------------

def case(function, *shapes, **more):
    """A call that is right, by the names of its tensors."""
    return function, {name: random(*shape) for name, shape in shapes}, more


BAD = [
    case(swiglu, ("gate", (4, 6)), ("up", (4, 6))),
    case(add_norm, ("x", (4, 6)), ("residual", (4, 6)), ("weight", (6,)), ("inner", (6,))),
    case(norm_add, ("x", (4, 6)), ("residual", (4, 6)), ("weight", (6,))),
    case(gram, ("x", (2, 4, 6))), case(poly, ("a", (2, 6, 6))),
    case(softmax_gradient, ("logits", (4, 6)), ("weights", (4,)), targets=torch.zeros(4).long()),
    case(logp, ("logits", (4, 6)), targets=torch.zeros(4).long()),
    case(linear_cross_entropy, ("hidden", (4, 6)), ("weight", (9, 6)), ("weights", (4,)),
         targets=torch.zeros(4).long(), used=torch.arange(2)),
    case(linear_logp, ("hidden", (4, 6)), ("weight", (9, 6)), targets=torch.zeros(4).long())]
WRONG = {"dtype": torch.Tensor.half, "shape": lambda x: x[..., None, :1],
         "stride": lambda x: torch.stack([x, x], -1)[..., 0], "device": lambda x: x.to("meta")}


@pytest.mark.parametrize("wrong", ["dtype", "shape", "stride", "device"])
@pytest.mark.parametrize("call", BAD, ids=lambda call: call[0].__name__)
def test_a_wrong_argument_is_named(call, wrong):
    function, tensors, more = call
    given = tensors | more
    first = next(iter(given))
    function(**given)
    for name, x in given.items():
        # A first argument on another device, or of a shape that others must have, may be right.
        if wrong in ("device", "shape") and name == first:
            continue
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            function(**given | {name: WRONG[wrong](x)})


def test_groups_and_used_rows():
    """One call for three groups equals three calls; rows that are not `used` take no part."""
    hidden, weight = random(3, 11, 8), random(29, 8)
    targets, weights = torch.randint(29, (3, 11)), torch.rand(3, 11) * (torch.rand(3, 11) > 0.5)
    used = torch.cat([weights.flatten().nonzero()[:, 0], (weights.flatten() == 0).nonzero()[:2, 0]])
    each = torch.stack([linear_cross_entropy(*given, t, w) for (*given, t, w) in zip(
        hidden, [weight] * 3, targets, weights)])
    close(linear_cross_entropy(hidden, weight, targets, weights), each)
    targets[weights == 0] = 1000        # would be an error if it were looked up
    targets.view(-1)[used[-2:]] = 0
    agree(lambda *given: linear_cross_entropy(*given, targets, weights, used=used).sum(),
          lambda *given: linear_cross_entropy(*given, targets, weights, 4).sum(), hidden, weight)


def test_groups_are_differentiated_together():
    hidden, weight = random(2, 5, 8).requires_grad_(), random(29, 8).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.zeros(2, 5).long(), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="one factor"):
        loss[0].backward()


@pytest.mark.skipif(INTERPRETED, reason="measures plain PyTorch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_cross_entropy_takes_a_third_of_the_memory(dtype, tmp_path):
    result = bench.run(bench.Args("loss", dtype=dtype, rounds=1, device="cpu", out=str(tmp_path)))
    assert 0 < result["memory"] <= 1 / 3


# ---- the interpreter's process ------------------------------------------------------------------

def in_the_interpreter(marks: str):
    """The tests of kernels of this file and of test_attention_kernels.py, in one process."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, here / "test_attention_kernels.py", "-m",
         marks, "-k", "test_kernel_ or test_kernels_"],
        env=os.environ | {"NANOGLMV_KERNELS": "1", "TRITON_INTERPRET": "1"},
        cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " skipped" not in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="runs already")
def test_few_shapes_in_the_interpreter():
    pytest.importorskip("triton")
    in_the_interpreter("not slow")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs already")
def test_all_shapes_in_the_interpreter():
    pytest.importorskip("triton")
    in_the_interpreter("slow")
