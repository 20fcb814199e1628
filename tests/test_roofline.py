"""lib/roofline.py, lib/meta.py, lab.roofline: sums known by hand, and a whole step of `tiny`."""
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
import pretrain
import rl
import train_vit
from kernels import attention, gram, Segments
from lab import roofline as lab
from lib import attention as attention_kernels, dispatch, losses, roofline, rotary, sigmoid
from lib.cli import UserError
from lib.losses import softmax_gradient
from lib.roofline import find_machine, Trace

H100 = find_machine("H100")
KERNEL_NAMES = {entry[0].name for module in (kernels, attention_kernels, losses, rotary, sigmoid)
                for entry in module.KERNELS}


def meta(*shape, grad=False, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def traced(step, on="H100"):
    trace = Trace(find_machine(on))
    with trace:
        trace.begin("forward")
        step(trace)
        trace.begin("")
    return trace


# ---- one operation ------------------------------------------------------------------------------

def test_an_elementwise_operation_takes_as_long_as_its_bytes():
    x, y = meta(4096, 4096), meta(4096, 4096)
    cost = traced(lambda _: x + y).total()
    assert (cost.launches, cost.flops) == (1, 0)
    assert cost.bytes == 3 * 2 * 4096 ** 2                      # two are read, one is written
    assert math.isclose(cost.seconds, 100.66e6 / (0.85 * 3.35e12), rel_tol=1e-3)
    assert traced(lambda _: x.view(-1, 2)[:5].mT).total().launches == 0       # views are free


def test_a_matrix_product_takes_as_long_as_its_flops():
    """512 tiles of 128 x 256 in 4 waves of 132: 97% of the last wave's room is used."""
    a, b = meta(4096, 4096, grad=True), meta(4096, 4096, grad=True)
    cost = traced(lambda _: a @ b).total()
    assert cost.flops == 2 * 4096 ** 3
    share = 0.78 * 512 / 528 * 4096 / 4296
    assert math.isclose(cost.seconds, cost.flops / (989e12 * share), rel_tol=1e-6)
    both = traced(lambda _: (a @ b).backward(torch.empty_like(a))).total()
    assert both.flops == 3 * cost.flops                         # a gradient for each factor
    in_fp32 = traced(lambda _: a.float() @ b.float())
    assert math.isclose(in_fp32.costs["forward", "mm"].seconds, 2 * cost.seconds)   # TF32


def test_a_small_operation_takes_its_launch():
    x = meta(8)
    trace = traced(lambda _: x + x + x)
    assert math.isclose(trace.total().seconds, 2 * roofline.SHORTEST)
    assert math.isclose(trace.seconds, 2 * roofline.LAUNCH)     # the host is the slower one


def test_attention_counts_pairs_of_tokens_in_their_documents():
    q, k = meta(48, 4, 32, grad=True), meta(48, 2, 32, grad=True)

    def step(trace):
        segments = Segments(torch.tensor([0, 32, 48], dtype=torch.int32).to("meta"), causal=True)
        attention(q, k, k, segments).sum().backward()
    trace = traced(step)
    pairs = (32 ** 2 + 16 ** 2) / 2
    assert trace.total().flops == (4 + 10) * 4 * 32 * pairs


def test_a_triton_kernel_is_noted_with_its_tensors(monkeypatch):
    """Each tensor once; FLOPs where the table has some."""
    @dispatch.kernel
    def _double_kernel(x, y):
        """Never compiled."""
    x, y = meta(1000), meta(1000)
    monkeypatch.setitem(roofline.KERNEL_FLOPS, "double", lambda _, given, more: more["N"])
    trace = traced(lambda _: _double_kernel[(1,)](x, y, x, N=3))
    cost = trace.costs["forward", "double"]
    assert (cost.launches, cost.bytes, cost.flops) == (1, 4000, 3)
    assert dispatch.noted is None           # as it was before


def test_kernels_with_products_have_flops():
    """By hand, of X X^T in tiles on and below the diagonal, and of attention in pairs of tokens."""
    half = traced(lambda _: gram(meta(2, 1024, 4096))).total()
    assert half.flops == 2 * 1024 * (1024 + 128) * 4096 and half.bytes == 2 * (2 ** 23 + 2 ** 21)
    assert KERNEL_NAMES >= set(roofline.KERNEL_FLOPS) | set(roofline.KERNEL_BYTES)
    logits, weights = meta(64, 1000), meta(64, dtype=torch.float32)
    cost = traced(lambda _: softmax_gradient(logits, meta(64, dtype=torch.int64), weights)).total()
    assert cost.bytes == 64 * (6 * 1000 + 8 + 4 + 4)


def test_the_norm_is_the_fused_one():
    x, weight = meta(64, 512, grad=True), meta(512, grad=True)
    trace = traced(lambda _: F.rms_norm(x, (512,), weight).sum().backward())
    assert trace.costs["forward", "rms_norm"].bytes == 2 * 2 * 64 * 512
    assert trace.costs["forward", "rms_norm_backward"].bytes == 3 * 2 * 64 * 512


# ---- what stands beside them --------------------------------------------------------------------

def test_small_integers_have_values():
    """Shapes may depend on them; what only the device would know is 1."""
    def step(trace):
        tokens = torch.tensor([3, 0, 5, 0]).to("meta")
        assert tokens.nonzero().shape == (2, 1) and tokens.tolist() == [3, 0, 5, 0]
        assert int(tokens.max()) == 5 and (tokens > 0).sum().item() == 2
        assert meta(4, 2)[tokens > 0].shape == (2, 2)
        assert meta(4)[tokens].shape == (4,)
        numbers = torch.arange(3, device="meta") + 1
        repeats = torch.tensor([1, 2, 0], device="meta")
        assert torch.repeat_interleave(numbers, repeats).shape == (3,)
        assert numbers.add_(1).tolist() == [2, 3, 4]
        assert meta().item() == 1 and meta(2).tolist() == [1, 1]
    traced(step)


def test_the_backward_counts_for_the_line_of_its_forward():
    model = torch.nn.Linear(512, 512, device="meta", dtype=torch.bfloat16)

    def step(trace):
        y = model(meta(512, 512))
        y.sum().backward()
    trace = traced(step)
    line = next(name for name, cost in trace.by_line.items() if cost.flops)
    assert line == f"tests/test_roofline.py:{step.__code__.co_firstlineno + 1}"
    assert trace.by_line[line].flops == 2 * 2 * 512 ** 3        # the input has no gradient
    assert trace.dearest(1)[0][1].seconds == max(c.seconds for c in trace.by_line.values())


def test_memory_is_counted_by_kind():
    """Activations are what the forward has left; a temporary tensor counts at the peak only."""
    weight = meta(1000, 1000, grad=True)
    trace = Trace(H100)
    with trace:
        trace.hold("weights", [weight, weight])
        trace.begin("forward")
        y = (meta(1000, 1000) @ weight).relu()          # relu keeps its own result
        del weight
        trace.begin("backward")
        y.sum().backward()
        trace.begin("")
    memory = trace.memory()
    assert (memory["weights"], memory["activations"]) == (2e6, 4e6)     # the input, and y
    assert 6e6 < memory["total"] <= 12e6


def test_eight_gpus_send_what_a_ring_sends():
    """What is sent beside the computation is waited for only if that ends first."""
    x, y = meta(2 ** 22, dtype=torch.float32), meta(4096, 4096)
    link = 7 / 8 * 2 ** 24 / (0.85 * 450e9)

    def step(trace):
        assert dist.is_initialized() and dist.get_world_size() == 8
        dist.all_reduce(x)
        assert math.isclose(trace.exposed, 2 * link)
        sent = dist.reduce(x, group_dst=3, async_op=True)
        y @ y               # takes longer
        sent.wait()
        assert math.isclose(trace.exposed, 2 * link)
        dist.broadcast(x, group_src=3, async_op=True).wait()
    trace = traced(step, "8xH100")
    assert math.isclose(trace.exposed, 3 * link) and trace.sent == 4 * 7 / 8 * 2 ** 24
    assert not dist.is_initialized() and traced(lambda _: None).sent == 0


# ---- machines -----------------------------------------------------------------------------------

def test_machines_by_name():
    eight = find_machine("8xh100")
    assert (eight.count, eight.name, str(eight), str(H100)) == (8, "H100", "8xH100", "H100")
    for text in ("V100", "0xH100", "x", "", "H100x8", "-1xH100"):
        with pytest.raises(UserError, match="^--on takes A100, H100, H200, B200 or several") as e:
            find_machine(text)
        assert "\n" not in str(e.value)


# ---- a whole step -------------------------------------------------------------------------------

def test_a_step_of_tiny(capsys):
    """The products of the model's matrices are counted, forward and backward, and printed."""
    args = lab.Args("tiny", rows=2, row_tokens=512, mtp=True)
    trace, flops, row = lab.trace_step(args)
    # The model's own formula leaves attention out, and rows are padded.
    products = trace.total("forward").flops + trace.total("backward").flops
    assert flops < products < 1.6 * flops
    assert 0 < trace.mfu(flops) < 0.1 and trace.host_seconds == trace.seconds
    kinds = trace.memory()
    assert 1.9e6 < kinds["weights"] < kinds["masters"] / 1.99 and kinds["activations"] > 0
    assert kinds["masters"] == kinds["gradients"] < kinds["momenta"] < 2 * kinds["masters"]
    lab.print_step(args, trace, flops, row)
    out = capsys.readouterr().out
    assert "computed, not measured" in out and "the GPU waits for it" in out
    assert len(re.findall(r"^ +[\d.]+ +[\d,]+   \S+\.py:\d+ ", out, re.M)) == 10
    assert len(re.findall(r"^ +[\d.]+ +[\d,]+   \w+ \((?:for|back|up)\w+\)$", out, re.M)) == 10


@pytest.mark.slow
def test_policies_of_memory_and_many_gpus():
    """To recompute takes more products and less memory; the update is shared by the ranks."""
    found = {}
    for memory, on in (("none", "H100"), ("recompute", "H100"), ("offload", "H100"),
                       ("none", "8xH100")):
        args = lab.Args("small", rows=1, row_tokens=1024, memory=memory, on=on)
        found[memory, on] = lab.trace_step(args)[0]
    plain, again, moved, many = found.values()
    assert again.memory()["activations"] < plain.memory()["activations"] / 4
    assert moved.memory()["activations"] < plain.memory()["activations"] / 4
    assert 1.2 < again.total("backward").flops / plain.total("backward").flops < 1.5
    further = again.total("backward").launches - plain.total("backward").launches
    assert 0 < further <= plain.total("forward").launches       # the forward of blocks, once more
    assert many.total("update").flops < plain.total("update").flops / 6
    assert many.memory()["masters"] < plain.memory()["masters"] / 4 and many.sent > 0


@pytest.mark.slow
def test_a_plan_for_a_machine(capsys, tmp_path):
    """--plan --on of each script; --on alone, or on a machine that is not known, is one line."""
    for script, options in ((pretrain, {}), (train_vit, {}), (rl, {})):
        args = script.Args(plan=True, on="8xH100", out=str(tmp_path / "run"), **options)
        script.run(args)
        out = capsys.readouterr().out
        assert {"on", "memory", "step", "time", "price"} <= {line.split()[0]
                                                            for line in out.splitlines()}
        for word in ("memory", "step", "time", "price"):
            lines = [line for line in out.splitlines() if line.startswith(word)]
            assert lines and all("computed" in line for line in lines)
        for changes, words in ((dict(on="H1000"), "--on takes A100, H100, H200, B200"),
                               (dict(plan=False), "--on=8xH100 .* needs --plan")):
            with pytest.raises(UserError, match=words):
                script.run(replace(args, **changes))
    assert not (tmp_path / "run").exists()
