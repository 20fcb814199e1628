"""The kernels of attention, rotary positions and the sigmoid loss beside their plain PyTorch.

Kernels run in Triton's interpreter, which has to be chosen before Triton is imported. So the tests
that launch some run in a process of their own, which test_kernels.py starts; to run them directly:
TRITON_INTERPRET=1 python -m pytest -k kernels
"""
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import lib.attention
import train_vit
from conftest import odd_config, random_document
from data import collate
from kernels import angles, attention, norm_rotary, rotary_qk, Segments, sigmoid_loss
from lib import dispatch
from lib.captions import Captions, TwoTowers
from model import GLMV, init
from pretrain import loss_sum
from vit import RMSNorm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def shapes(names: str, *cases):
    """The first three belong to `make test`, the rest to `make test-all`."""
    return pytest.mark.parametrize(names, [
        case if i < 3 else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(cases)], ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rotations(total: int, c: int) -> tuple:
    freqs = 3 * torch.randn(total, c // 2)
    return freqs.cos(), freqs.sin()


def both(function, *given):
    """What the kernels and what plain PyTorch make of it: results, then gradients of all that is
    given. Checks that only the first has launched a kernel."""
    made = []
    for forced in "1", "0":
        launched = []
        with mock.patch.object(dispatch, "FORCED", forced), mock.patch.object(
                dispatch.Kernel, "__getitem__", counted(launched)):
            torch.manual_seed(1)
            copies = [x.detach().clone().requires_grad_() for x in given]
            outs = function(*copies)
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.autograd.backward(outs, [torch.randn_like(x) for x in outs])
        assert bool(launched) == (forced == "1")
        made.append([x.detach() for x in outs] + [x.grad for x in copies])
    return made


def counted(launched: list):
    launch = dispatch.Kernel.__getitem__

    def note(self, grid):
        launched.append(self.name)
        return launch(self, grid)
    return note


def agree(function, *given, most: float = 1e-4):
    for got, want in zip(*both(function, *given), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.numel():
            error = (got.float() - want.float()).abs().max()
            assert error <= most * want.float().abs().max() + 1e-6


# ---- in the interpreter -------------------------------------------------------------------------

ROTARY = [(0, 1, 1, 8), (1, 1, 1, 2), (5, 3, 1, 10)]
ROTARY += [(total, heads, groups, c) for total in (1, 2, 7, 9, 17)
           for heads, groups, c in ((1, 1, 6), (2, 1, 34), (6, 3, 16), (5, 5, 64), (16, 8, 12),
                                    (3, 3, 130))]


@interpreted
@shapes("total,heads,_,c", *ROTARY)
def test_kernels_norm_rotary(total, heads, _, c):
    cos, sin = rotations(total, c)

    def function(qkv, q_weight, k_weight):
        norms = RMSNorm(c, 1e-5), RMSNorm(c, 1e-5)
        for norm, weight in zip(norms, (q_weight, k_weight)):
            del norm.weight
            norm.weight = weight
        return norm_rotary(qkv, *norms, cos, sin)

    agree(function, torch.randn(total, 3, heads, c), torch.rand(c) + 0.5, torch.rand(c) + 0.5)


@interpreted
@shapes("total,heads,groups,c", *ROTARY)
def test_kernels_rotary_qk(total, heads, groups, c):
    cos, sin = rotations(total, c)
    agree(lambda q, k: rotary_qk(q, k, cos, sin), torch.randn(total, heads, c),
          torch.randn(total, groups, c))


@interpreted
@shapes("lengths,heads,groups,c,causal",
        ((5, 0, 17, 1, 17), 4, 2, 8, True), ((3, 1, 0, 1, 70), 2, 1, 5, False),
        ((130, 3), 1, 1, 16, True),
        *((lengths, heads, groups, c, causal)
          for lengths in ((1,), (0, 0, 1, 0), (2, 129, 1, 1), (64, 64), (33, 31, 128, 5), (200,))
          for heads, groups, c in ((1, 1, 16), (6, 2, 10), (3, 1, 33), (2, 2, 100))
          for causal in (True, False)))
def test_kernels_attention(lengths, heads, groups, c, causal):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu[-1])
    agree(lambda q, k, v: attention(q, k, v, Segments(cu, causal)),
          *(torch.randn(total, n, c) for n in (heads, groups, groups)))


@interpreted
@shapes("n,m,width,paired", (1, 1, 1, True), (3, 130, 5, False), (129, 65, 70, True),
        *((n, m, width, paired) for n in (1, 2, 127, 150) for m in (1, 64, 131)
          for width, paired in ((3, True), (65, False), (33, True))))
def test_kernels_sigmoid_loss(n, m, width, paired):
    x, y = (F.normalize(torch.randn(rows, width), dim=-1) for rows in (n, m))
    agree(lambda *given: sigmoid_loss(*given, paired), x, y, torch.tensor(9.7), torch.tensor(-4.0))


@interpreted
def test_kernels_take_many_texts_in_several_parts():
    """With 2 ** 20 texts only 128 images would be taken at a time."""
    x, y = (F.normalize(torch.randn(n, 4), dim=-1) for n in (300, 290))
    real = lib.sigmoid.LIMIT
    with mock.patch.object(lib.sigmoid, "LIMIT", 290 * 140):
        assert real > 290 * 140
        agree(sigmoid_loss, x, y, torch.tensor(9.7), torch.tensor(-4.0))


@interpreted
def test_kernels_of_the_sigmoid_loss_keep_small_losses():
    """Far from a pair, log(1 + exp(-20)): 1 + exp(-20) is 1 in fp32."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for got, want in zip(*both(lambda *given: sigmoid_loss(*given, False), x, y,
                               torch.tensor(10.0), torch.tensor(-20.0))):
        assert torch.allclose(got, want, rtol=1e-4, atol=0)


@pytest.mark.slow
@interpreted
def test_kernels_in_bf16():
    """As near to fp32 as bf16 is, which the interpreter itself computes wrongly."""
    cu = torch.tensor([0, 5, 9]).int()
    q, k, v = (torch.randn(9, n, 16).bfloat16() for n in (4, 2, 2))
    agree(lambda *given: attention(*given, Segments(cu, True)), q, k, v, most=0.03)
    cos, sin = rotations(9, 16)
    agree(lambda *given: rotary_qk(*given, cos, sin), q, k, most=0.02)
    norms = RMSNorm(16, 1e-5).bfloat16(), RMSNorm(16, 1e-5).bfloat16()
    agree(lambda qkv: norm_rotary(qkv, *norms, cos, sin), torch.randn(9, 3, 4, 16).bfloat16(),
          most=0.03)
    x, y = (F.normalize(torch.randn(40, 64), dim=-1) for _ in range(2))
    agree(lambda x, y: sigmoid_loss(x, y, torch.tensor(9.7), torch.tensor(-4.0),
                                    dtype=torch.bfloat16), x, y, most=0.02)


@pytest.mark.slow
@interpreted
def test_kernels_read_views_where_they_are():
    """q, k and v as the tower's fused matrix product leaves them, and gradients that are views."""
    cu = torch.tensor([0, 3, 7]).int()
    agree(lambda qkv: attention(*qkv.unbind(1), Segments(cu, False)), torch.randn(7, 3, 2, 8))
    agree(lambda qkv: attention(*qkv.unbind(2), Segments(cu, True)).mT, torch.randn(7, 2, 3, 8))
    cos, sin = rotations(7, 8)
    agree(lambda both: rotary_qk(both[:, :4], both[:, 4:], cos, sin), torch.randn(7, 6, 8))
    norm = RMSNorm(8, 1e-5)
    agree(lambda qkv: tuple(x.mT for x in norm_rotary(qkv.transpose(1, 2), norm, norm, cos, sin)),
          torch.randn(7, 2, 3, 8))


def gradients(model, loss) -> list:
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *grads]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "pretrain"])
def test_kernels_give_a_training_step_its_loss_and_gradients(stage):
    config = odd_config(1)
    if stage == "align":
        args = train_vit.Args(batch=3, side=112)
        model = TwoTowers(train_vit.tower(args, config), config)
        init(model, 0)
        stream = Captions(config, (36, 64), 3, 0, "train", 112)
        pairs = [stream(i) for i in range(3)]
    else:
        model = GLMV(config, seed=1)
        batch = collate([random_document(config, ((4, 6), (2, 2)), 9)], config)
    steps = []
    for forced in "1", "0":
        launched = []
        with mock.patch.object(dispatch, "FORCED", forced), mock.patch.object(
                dispatch.Kernel, "__getitem__", counted(launched)):
            loss = (train_vit.contrastive_loss(model, pairs, args)[0] if stage == "align"
                    else loss_sum(model, batch, 0)[0])
            steps.append(gradients(model, loss))
        expected = {"norm_rotary", "norm_rotary_backward", "rotary_qk", "attention", "attention_dq",
                    "attention_dkv"} | ({"sigmoid_grad"} if stage == "align" else set())
        assert (expected <= set(launched)) == (forced == "1")
    for got, want in zip(*steps, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max() + 1e-6


# ---- without the interpreter --------------------------------------------------------------------

def test_angles_divide_the_frequencies_among_the_axes():
    positions = torch.randint(50, (3, 7))
    got = angles(positions, (1, 3, 4), 20.0)
    frequency = 20.0 ** -(torch.arange(8) / 8)
    axis = [0, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(got, positions[axis].T.float() * frequency)


def test_lengths_that_are_known_are_not_asked_of_the_device():
    cu = torch.tensor([0, 3, 8], dtype=torch.int32, device="meta")      # has no numbers to give
    assert Segments(cu, True, longest=5).longest == 5
    host = torch.tensor([0, 3, 8], dtype=torch.int32)
    segments = Segments(cu, False, host=host)
    assert segments.longest == 5
    with mock.patch.object(torch.Tensor, "to", lambda x, *_: x):
        assert segments.layout[0] == [(1, 3), (1, 5)]
    with pytest.raises(NotImplementedError):
        Segments(cu, True).longest


def test_spans_of_tokens():
    start, stop = Segments(torch.tensor([0, 0, 3, 3, 5], dtype=torch.int32), True).spans(7)
    assert start.tolist() == [0, 0, 0, 3, 3, 5, 5] and stop.tolist() == [3, 3, 3, 5, 5, 7, 7]
    assert start.dtype == stop.dtype == torch.int32


NORM = RMSNorm(8, 1e-5)
BAD = [
    (lambda **given: norm_rotary(q_norm=NORM, k_norm=NORM, **given),
     dict(qkv=torch.randn(5, 3, 2, 8), cos=torch.randn(5, 4), sin=torch.randn(5, 4))),
    (rotary_qk, dict(q=torch.randn(5, 4, 8), k=torch.randn(5, 2, 8), cos=torch.randn(5, 4),
                     sin=torch.randn(5, 4))),
    (lambda **given: attention(segments=Segments(torch.tensor([0, 5]).int(), True), **given),
     dict(q=torch.randn(5, 4, 8), k=torch.randn(5, 2, 8), v=torch.randn(5, 2, 8))),
    (sigmoid_loss, dict(x=torch.randn(5, 4), y=torch.randn(6, 4), scale=torch.tensor(1.0),
                        bias=torch.tensor(0.0)))]
WRONG = {"type": lambda x: x.int(), "device": lambda x: x.to("meta"), "shape": lambda x: x[None],
         "stride": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x[None]}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", BAD, ids=["norm_rotary", "rotary_qk", "attention", "sigmoid_loss"])
def test_a_wrong_argument_is_named(call, wrong):
    function, given = call
    function(**given)
    for i, (name, x) in enumerate(given.items()):
        if wrong == "device" and i == 0:        # the others would be on the wrong device
            continue
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            function(**given | {name: WRONG[wrong](x)})


def test_what_else_is_refused():
    q, cu = torch.randn(5, 4, 8), torch.tensor([0, 5]).int()
    with pytest.raises(ValueError, match="k has 3 heads, which do not divide q's 4"):
        attention(q, q[:, :3], q[:, :3], Segments(cu, True))
    with pytest.raises(ValueError, match="an odd number"):
        rotary_qk(q[..., :7], q[..., :7], torch.randn(5, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match="dtype is torch.float16"):
        sigmoid_loss(q[:, 0], q[:, 0], torch.tensor(1.0), torch.tensor(0.0), dtype=torch.float16)


@pytest.mark.parametrize("shares", [True, False])
def test_the_library_gets_keys_without_copies_if_it_can(shares):
    """Torch 2.13's varlen kernel shares key heads; 2.11's does not know enable_gqa."""
    q, k = torch.randn(5, 4, 8).bfloat16(), torch.randn(5, 2, 8).bfloat16()
    segments = Segments(torch.tensor([0, 5]).int(), True)
    with mock.patch.multiple(lib.attention, SHARES_KEYS=shares, varlen_attn=mock.Mock()), (
            mock.patch.object(torch.Tensor, "is_cuda", True)):
        attention(q, k, k, segments)
        (_, keys, *_, longest, _), options = lib.attention.varlen_attn.call_args
    assert longest == 5 and options["window_size"] == (-1, 0)
    assert (keys is k and options["enable_gqa"]) if shares else keys.shape == q.shape
