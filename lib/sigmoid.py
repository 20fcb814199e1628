"""SigLIP's loss of many images against many texts, without their table of logits.

Letters: N images, M texts, E width of their vectors.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.dispatch import expect, INTERPRETED, kernel, tl, use_kernels

LIMIT = 2 ** 27     # gradients of logits that the kernel writes at a time: 256 MB in bf16


# ---- plain: one tile of logits at a time --------------------------------------------------------

def _plain(x, y, scale, bias, paired, tile) -> tuple[Tensor, ...]:
    """The loss and its gradients for x, y, scale and bias; those of x and y lack the scale."""
    total, d_scale, d_bias = (torch.zeros((), device=x.device) for _ in range(3))
    d_x, d_y = torch.zeros_like(x), torch.zeros_like(y)
    for i in range(0, len(x), tile):
        for j in range(0, len(y), tile):
            a, b = x[i:i + tile], y[j:j + tile]
            cosine = a @ b.T
            logits = cosine * scale + bias
            total += F.softplus(logits).sum()   # -log sigmoid(-logit), as if none were a pair
            grad = logits.sigmoid()
            if paired and i == j:
                total -= logits.diagonal().sum()  # softplus(l) - l = -log sigmoid(l)
                grad.diagonal().sub_(1)
            d_scale += (grad * cosine).sum()
            d_bias += grad.sum()
            d_x[i:i + tile].addmm_(grad, b)
            d_y[j:j + tile].addmm_(grad.T, a)
    return total, d_x, d_y, d_scale, d_bias


# ---- the kernel: from vectors to the gradients of logits ----------------------------------------
#
# The plain path reads or writes each logit fourteen times. Here it exists in registers only: the
# kernel multiplies a tile of images with a tile of texts, and writes the gradients of the logits,
# which two matrix products of the library then turn into those of x and y.
#
# Gradients are in bf16. Nearly all are sigmoids of about -14, a millionth: bf16 has the exponent of
# fp32, so they keep 8 bits, while fp16 would make them 0. Sums are fp32 everywhere.
#
# Tiling: 128 images x 64 texts a program, E in steps of 64 through shared memory; 8 warps, of which
# each thread holds 32 sums (with 64, as for 128 x 128, the sigmoids no longer fit in registers).
# Each program writes its share of the loss and of the gradients of scale and bias to a place of its
# own, so the sum is the same in each run. As many rows of images are taken at a time, against all
# M texts, as LIMIT allows.
# Roofline: 6 E FLOPs a logit (three products) and 6 bytes (written once, read twice): E FLOPs a
# byte. The H100 is bound by tensor cores from E = 300 on; base has 1,024.

@kernel
def _sigmoid_grad_kernel(x, y, grad, parts, scale, bias, rows, columns, pair, E: tl.constexpr,
                         PAIRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         STEP: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """grad (rows, columns): gradients of the logits of x (rows, E) and y (columns, E), where row i
    and column i + pair belong together. parts (programs, 3): sums of the loss, of gradient x
    cosine, of the gradient."""
    # The tiles of one column of tiles run together and share the tile of y in the L2 cache.
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    first, second = program % tiles * ROWS, program // tiles * COLUMNS
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None]
    # Only the tile's first address needs 64 bits: 64 for each number would fill the registers.
    x += tl.cast(first, tl.int64) * E
    y += tl.cast(second, tl.int64) * E
    grad += tl.cast(first, tl.int64) * columns + second
    cosine = tl.zeros([ROWS, COLUMNS], tl.float32)
    for e in range(0, E, STEP):
        step = e + tl.arange(0, STEP)
        a = tl.load(x + i * E + step[None], (first + i < rows) & (step[None] < E), other=0.0)
        b = tl.load(y + j * E + step[:, None], (second + j < columns) & (step[:, None] < E),
                    other=0.0)
        if FULL:        # Triton's interpreter computes wrongly with bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        cosine = tl.dot(a, b, cosine, input_precision=PRECISION)
    logit = cosine * tl.load(scale) + tl.load(bias)
    sign = tl.full([ROWS, COLUMNS], 1.0, tl.float32)
    if PAIRED:
        sign = tl.where(first + i + pair == second + j, -1.0, 1.0)
    # With z = logit, or -logit for a pair: loss log(1 + exp(z)), gradient sign * sigmoid(z). Both
    # from exp(-|z|), which can't overflow.
    z = sign * logit
    power = tl.exp(-tl.abs(z))
    # log(1 + power) of a small power: 1 + 1e-6 has lost most of its digits, the series has not.
    series = power * (1 - power * (0.5 - power * (1 / 3 - power * 0.25)))
    loss = tl.maximum(z, 0.0) + tl.where(power < 1 / 64, series, tl.log(1 + power))
    change = sign * tl.where(z > 0, 1.0, power) / (1 + power)
    real = (first + i < rows) & (second + j < columns)
    change = tl.where(real, change, 0.0)
    tl.store(grad + i * columns + j, change.to(grad.dtype.element_ty), real)
    tl.store(parts + program * 3, tl.sum(tl.where(real, loss, 0.0)))
    tl.store(parts + program * 3 + 1, tl.sum(change * cosine))
    tl.store(parts + program * 3 + 2, tl.sum(change))


def _add_product(total: Tensor, a: Tensor, b: Tensor):
    """total += a @ b, where total is fp32: so are the sums, whatever the type of a and b."""
    if a.device.type != "cpu" and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _fused(x, y, scale, bias, paired, dtype) -> tuple[Tensor, ...]:
    """As _plain, with the products in dtype."""
    a, b = x.to(dtype), y.to(dtype)
    d_x, d_y, sums = torch.zeros_like(x), torch.zeros_like(y), x.new_zeros(3)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    height = max(128, LIMIT // max(1, len(y)) // 128 * 128)
    grad = a.new_empty(min(height, len(x)), len(y))
    for i in range(0, len(x), height):
        part, tile = a[i:i + height], grad[:len(a) - i]
        programs = -(-len(part) // 128) * -(-len(y) // 64)
        parts = x.new_empty(programs, 3)
        _sigmoid_grad_kernel[programs,](
            part, b, tile, parts, scale, bias, len(part), len(y), i, E=x.shape[1], PAIRED=paired,
            ROWS=128, COLUMNS=64, STEP=64, FULL=INTERPRETED, PRECISION=precision, num_warps=8,
            num_stages=3 if dtype == torch.bfloat16 else 2)
        sums += parts.sum(0)
        _add_product(d_x[i:i + height], tile, b)
        _add_product(d_y, tile.T, part)
    total, d_scale, d_bias = sums
    return total, d_x, d_y, d_scale, d_bias


class _SigmoidLoss(torch.autograd.Function):
    """See sigmoid_loss. The backward only scales gradients that the forward has made."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, paired, tile, dtype):
        x, y, scale, bias = (t.detach().float() for t in (x, y, scale, bias))
        made = (_fused(x.contiguous(), y.contiguous(), scale, bias, paired, dtype) if dtype
                else _plain(x, y, scale, bias, paired, tile))
        total, d_x, d_y, d_scale, d_bias = made
        ctx.grads = [d_x.mul_(scale), d_y.mul_(scale), d_scale, d_bias]
        return total

    @staticmethod
    def backward(ctx, grad):
        # The gradients are as large as the batch: they are scaled in place and then released.
        grads, ctx.grads = ctx.grads, None
        return *(made.mul_(grad) for made in grads), None, None, None


def sigmoid_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, paired: bool = True,
                 tile: int = 1024, dtype: torch.dtype | None = None) -> Tensor:
    """SigLIP's loss of N images against M texts, summed to an fp32 scalar, without keeping the
    N x M logits [C].

    x: (N, E), y: (M, E), with rows of length 1; scale, bias: scalars. The logit of x[i] and y[j] is
    their product times scale, plus bias. It adds -log sigmoid(logit) for a pair, which is i = j
    where `paired`, and -log sigmoid(-logit) otherwise. The gradients are computed in the forward.

    Plain PyTorch takes tile x tile logits at a time and computes in fp32. The kernel has tiles of
    its own; its products are in `dtype`: None for bf16 on a GPU and fp32 elsewhere. Vectors of
    length 1 in bf16 change a cosine by about 1e-4.
    Raises ValueError, with the argument's name, if a shape, type, device or stride is wrong.
    """
    expect("x", x, (None, None))
    expect("y", y, (None, x.shape[1]), x)
    expect("scale", scale, (), x)
    expect("bias", bias, (), x)
    for name, value in ("x", x), ("y", y), ("scale", scale), ("bias", bias):
        if not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, no floating-point type")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}: neither float32 nor bfloat16")
    if not use_kernels(x):
        dtype = None
    elif dtype is None:
        dtype = torch.float32 if x.device.type == "cpu" else torch.bfloat16
    return _SigmoidLoss.apply(x, y, scale, bias, paired, tile, dtype)


# What lab/kernels.py compiles: the kernel at the size of `base`, the types of its arguments and its
# constants.
KERNELS = [(_sigmoid_grad_kernel, dict.fromkeys(("x", "y", "grad"), "*bf16")
            | dict.fromkeys(("parts", "scale", "bias"), "*fp32")
            | dict.fromkeys(("rows", "columns", "pair"), "i32"),
            dict(E=1024, PAIRED=True, ROWS=128, COLUMNS=64, STEP=64, FULL=False, PRECISION="tf32",
                 num_warps=8, num_stages=3))]
