"""Losses over a vocabulary, without keeping the logits of all tokens.

The output matrix has tens of thousands of rows: the logits of 16,384 tokens would take 2 GB, their
softmax and its gradient as much each. So both losses go through the tokens in chunks. The matrix
products are the library's; a kernel does what lies between them, in place of a chunk's logits.

Letters: T tokens, G groups of them, W width of the model, V vocabulary.
"""
import torch
from torch import Tensor

from lib.dispatch import expect, kernel, tl, use_kernels


# ---- softmax: losses, gradient, entropy ---------------------------------------------------------
#
# One program takes one row of logits, in blocks. The first pass keeps the largest logit so far,
# `top`, and the sum of exp(logit - top); when a block brings a larger one, the sum is scaled to it.
# The second pass reads the row again and writes the gradient over it. A row of 59,392 logits in
# bf16 takes 119 kB, so the rows in work at a time stay in the L2 cache (50 MB on an H100), and the
# second reading costs little.
#
# Roofline: 6 bytes a logit (2 with GRADIENT=False), about 10 FLOPs: bound by memory. 4,096 logits
# a block are 16 for each of 256 threads, which is two loads of 16 bytes in bf16. Eight programs fit
# on a multiprocessor, and while one waits for its sums over a block the others load.
SOFTMAX = dict(BLOCK=4096, num_warps=8)


@kernel
def _softmax_kernel(logits, targets, weights, losses, entropies, stride, vocabulary,
                    GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)     # row * stride passes 2 ** 31 in large chunks
    logits += row * stride
    target = tl.load(targets + row)
    # A target outside the vocabulary gives a loss of NaN; reading there would give any number.
    known = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    top = float("-inf")
    mass = 0.0          # the sum of exp(logit - top)
    moment = 0.0        # the sum of exp(logit - top) * logit
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        power, scale = tl.exp(x - higher), tl.exp(top - higher)
        mass = mass * scale + tl.sum(power, 0)
        if not GRADIENT:    # after the row's end x is -inf and power 0, and their product NaN
            moment = moment * scale + tl.sum(power * tl.where(at < vocabulary, x, 0.0), 0)
        top = higher
    log_mass = top + tl.log(mass)
    tl.store(losses + row, log_mass - target_logit)
    if GRADIENT:
        weight = tl.load(weights + row)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < vocabulary, other=0.0).to(tl.float32)
            grad = tl.exp(x - log_mass) - tl.where(at == target, 1.0, 0.0)
            tl.store(logits + at, (grad * weight).to(logits.dtype.element_ty), mask=at < vocabulary)
    else:               # -sum p log p, where log p = logit - log_mass
        tl.store(entropies + row, log_mass - moment / mass)


def plain_softmax_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """What softmax_gradient computes."""
    full = logits.float()       # the tensor itself, if it is fp32 already
    target_logits, top = full.gather(1, targets[:, None]), full.amax(-1, keepdim=True)
    powers = full.sub_(top).exp_()
    mass = powers.sum(-1, keepdim=True)
    grad = powers.mul_(weights[:, None] / mass)
    grad.scatter_add_(1, targets[:, None], -weights[:, None])
    if full is not logits:
        logits.copy_(grad)
    return mass.log_().add_(top).sub_(target_logits)[:, 0]


def softmax_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The losses -log softmax(logits[t])[targets[t]], (T,) fp32. In place of the logits it leaves
    the gradient of their sum weighted by `weights`: (softmax - onehot) * weight.

    logits: (T, V) bf16 or fp32; targets: (T,) int64; weights: (T,) fp32. Raises ValueError if an
    argument has another shape, dtype or device.
    """
    _check(logits, targets)
    expect("weights", weights, targets.shape, logits, torch.float32)
    if not use_kernels(logits):
        return plain_softmax_gradient(logits, targets, weights)
    losses = torch.empty_like(weights)
    _softmax_kernel[(len(logits),)](logits, targets, weights, losses, losses, logits.stride(0),
                                    logits.shape[1], GRADIENT=True, **SOFTMAX)
    return losses


def plain_logp(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What logp computes."""
    all_logp = logits.float().log_softmax(-1)
    return all_logp.gather(1, targets[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(-1)


def logp(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits[t])[targets[t]], and the entropy of each softmax, in nats; (T,) fp32.

    logits: (T, V) bf16 or fp32; targets: (T,) int64. Raises like softmax_gradient.
    """
    _check(logits, targets)
    if not use_kernels(logits):
        return plain_logp(logits, targets)
    losses = torch.empty(len(logits), device=logits.device)
    entropies = torch.empty_like(losses)
    _softmax_kernel[(len(logits),)](logits, targets, losses, losses, entropies, logits.stride(0),
                                    logits.shape[1], GRADIENT=False, **SOFTMAX)
    return losses.neg_(), entropies


def _check(logits: Tensor, targets: Tensor):
    _expect_floats("logits", logits, 2)
    expect("targets", targets, logits.shape[:1], logits, torch.int64)


def _expect_floats(name: str, x: Tensor, dimensions: int):
    expect(name, x, (None,) * dimensions)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name} is {x.dtype}, not torch.bfloat16 or torch.float32")


# ---- with the output matrix ---------------------------------------------------------------------

def _chunk(hidden: Tensor) -> int:
    """How many tokens to take at a time, in chunks of nearly equal size.

    The gradient of the output matrix, 365 MB in fp32 at the vocabulary of `base`, is read and
    written once a chunk. The product that makes it takes as long as that at 200 tokens on an H100,
    so there a chunk has up to 4,096, whose logits take 490 MB. On a CPU 512 tokens take less memory
    and up to a fifth less time than 4,096, as more of their logits stay in the cache.
    """
    most = 4096 if use_kernels(hidden) else 512
    chunks = -(-len(hidden) // most)
    return -(-len(hidden) // max(1, chunks)) or 1


def _add_product(total: Tensor, a: Tensor, b: Tensor):
    """total += a @ b, where total is fp32 and a and b may be bf16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda or total.is_meta:    # the library adds in fp32 while it multiplies
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


class _LinearCrossEntropy(torch.autograd.Function):
    """See linear_cross_entropy. Of the rows of `shape` it gets those of `used`. The backward only
    scales gradients that the forward has made; that of a frozen weight is None."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, used, shape, chunk):
        losses = torch.empty_like(weights)
        d_hidden = torch.empty_like(hidden)
        d_weight = None         # of a frozen matrix
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            logits = hidden[rows] @ weight.T
            losses[rows] = softmax_gradient(logits, targets[rows], weights[rows])
            torch.mm(logits, weight, out=d_hidden[rows])    # `logits` holds their gradient now
            if d_weight is not None:
                _add_product(d_weight, logits.T, hidden[rows])
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        # Rows that are not used count 0; the last dimension of `shape` is that of the tokens.
        terms = losses.new_zeros(shape.numel()).index_copy(0, used, losses * weights)
        return terms.view(shape).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        first = grad.flatten()[0]
        if grad.numel() > 1:    # d_weight is already the sum over all groups
            torch._assert_async((grad == first).all(), "linear_cross_entropy: the losses of all "
                                "groups need one factor; what differs belongs into `weights`")
        if d_weight is not None:
            d_weight = d_weight * first.to(d_weight.dtype)
        return d_hidden * first.to(d_hidden.dtype), d_weight, *[None] * 5


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor,
                         chunk: int = 0, used: Tensor | None = None) -> Tensor:
    """sum_t weights[t] * -log softmax(hidden[t] @ weight.T)[targets[t]], an fp32 scalar, without
    keeping all T x V logits.

    hidden: (T, W); weight: (V, W); targets: (T,) int64; weights: (T,) fp32. Since the weights are
    known in the forward, the gradients are computed there, for `chunk` rows at a time (0: see
    _chunk): three matrix products, and never more than chunk x V logits.

    With hidden (G, T, W), targets and weights (G, T), it returns a loss for each group, (G,): the
    depths of MTP share one output matrix and one gradient of it. What is differentiated must then
    be their sum times any factor; other gradients raise RuntimeError.

    used: (T',) int64, rows of hidden, or of hidden.flatten(0, 1), that hold all those whose weight
    is not 0. Without it they are looked for, and on a GPU the host waits for their number. Raises
    ValueError if an argument has another shape, dtype or device.
    """
    _expect_floats("hidden", hidden, 3 if hidden.dim() == 3 else 2)
    expect("weight", weight, (None, hidden.shape[-1]), hidden, hidden.dtype)
    expect("targets", targets, hidden.shape[:-1], hidden, torch.int64)
    expect("weights", weights, hidden.shape[:-1], hidden, torch.float32)
    shape, hidden = hidden.shape[:-1], hidden.flatten(0, -2)
    targets, weights = targets.flatten(), weights.flatten()
    if used is None:
        used = weights.nonzero()[:, 0]
    expect("used", used, (None,), hidden, torch.int64)
    hidden, targets, weights = (x.index_select(0, used) for x in (hidden, targets, weights))
    chunk = chunk or _chunk(hidden)
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, used, shape, chunk)


class _LinearLogp(torch.autograd.Function):
    """See linear_logp. The backward computes the logits a second time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        values = torch.empty(len(hidden), device=hidden.device)
        entropies = torch.empty_like(values)
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            values[rows], entropies[rows] = logp(hidden[rows] @ weight.T, targets[rows])
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = None         # of a frozen matrix
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            logits = hidden[rows] @ weight.T
            softmax_gradient(logits, targets[rows], -grad[rows])    # logp is the loss times -1
            torch.mm(logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, logits.T, hidden[rows])
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def linear_logp(hidden: Tensor, weight: Tensor, targets: Tensor,
                chunk: int = 0) -> tuple[Tensor, Tensor]:
    """log softmax(hidden[t] @ weight.T)[targets[t]] for each t, and the entropy of each softmax;
    both (T,) fp32.

    hidden: (T, W); weight: (V, W); targets: (T,) int64. For losses whose coefficients are known
    only after this forward (RL): the backward computes the logits again, so that there are four
    matrix products and never more than chunk x V logits (chunk 0: see _chunk). The entropy has no
    gradient. Raises ValueError if an argument has another shape, dtype or device.
    """
    _expect_floats("hidden", hidden, 2)
    expect("weight", weight, (None, hidden.shape[1]), hidden, hidden.dtype)
    expect("targets", targets, hidden.shape[:1], hidden, torch.int64)
    return _LinearLogp.apply(hidden, weight, targets, chunk or _chunk(hidden))


# lab/kernels.py compiles each kernel with these types of its arguments and these constants.
KERNELS = [
    (_softmax_kernel, dict(logits="*bf16", targets="*i64", weights="*fp32", losses="*fp32",
                           entropies="*fp32", stride="i32", vocabulary="i32"),
     dict(GRADIENT=gradient, **SOFTMAX)) for gradient in (True, False)]


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade NAME`.
# 1. _LinearCrossEntropy.forward: all gradients in one pass over chunks of rows, never with more
#    than `chunk` rows of logits. pytest tests/test_model.py -k linear_cross; 45 minutes.
