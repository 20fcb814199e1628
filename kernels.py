"""The operations that take most of the time, each behind one public function.

On a GPU most of them are a Triton kernel. Beside each kernel is a function in plain PyTorch that
says what it computes, and that runs on a CPU (lib/dispatch.py chooses). Where torch has a fused
kernel that is as fast, it is used: rms_norm. The plain versions are written so that a CPU is not
slow and memory stays small: attention without padding, losses without all their logits.

Attention is in lib/attention.py, rotary positions in lib/rotary.py, losses over a vocabulary in
lib/losses.py, the contrastive loss in lib/sigmoid.py; they can be imported from here too.

Letters: W width of the model, I inner width of an MLP, N matrices of R rows and C columns.

In the kernels `at` are the elements that a program takes, `inside` says which of them exist, and
`place` is where they are in memory.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.attention import attention, Segments
from lib.dispatch import expect, inline, INTERPRETED, kernel, tl, use_kernels
from lib.losses import linear_cross_entropy, linear_logp
from lib.rotary import angles, norm_rotary, rotary_half, rotary_pairs, rotary_qk
from lib.sigmoid import sigmoid_loss


class _RmsNorm(torch.autograd.Function):
    """RMSNorm with a backward of its own: F.rms_norm has no fused one on a CPU, and takes twice as
    long."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        full = x.float()
        scale = (full.square().mean(-1, keepdim=True) + eps).rsqrt_()
        normal = full * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal.to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        normal, scale, weight = ctx.saved_tensors
        each = grad.float() * normal
        # the part of the gradient along x would change its length only, which the norm divides out
        along = each @ weight.float()[:, None] / len(weight)
        d_x = (grad * weight).float().addcmul(normal, along, value=-1).mul_(scale)
        d_weight = each.flatten(0, -2).sum(0)
        return d_x.to(grad.dtype), d_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last dimension, rms in fp32. (..., W), (W,) -> (..., W)"""
    if x.requires_grad and x.device.type == "cpu":
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


# ---- residual add and RMSNorm -------------------------------------------------------------------
#
# A program takes a whole row at a time, so that sums over it need no second pass, with 8 elements
# for each thread. The backward's programs each take every n-th row: the gradients of the norms'
# weights are sums over all rows, so a program adds up its rows in registers and writes one row of
# fp32, and n such rows are added at the end. Four programs fit on a multiprocessor.
#
# Roofline, in bf16, of x' = residual + norm(x), h = norm(x'): 8 bytes an element forward (x and
# residual read, x' and h written), 12 backward (x, x' and two gradients read, two written), about
# 15 and 30 FLOPs: bound by memory. As three operations they take 14 and 26.


@inline
def _norm_backward(grad, normal, weight, scale, width):
    """The gradient of x, where normal = x * scale has the RMS 1, and `grad` is the gradient of
    normal * weight. The part along x would only change its length, which the norm divides out."""
    each = grad * weight
    return (each - normal * (tl.sum(each * normal, 0) / width)) * scale


@kernel
def _add_norm_kernel(x, residual, inner, weight, total, normed, x_scales, total_scales, width, eps,
                     INNER: tl.constexpr, OUTER: tl.constexpr, BLOCK: tl.constexpr):
    """One row: total = residual + x, where INNER takes norm(x); with OUTER normed = norm(total).
    The scales, 1 / rms of x and of total, are kept for the backward."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside, place = at < width, row.to(tl.int64) * width + at
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if INNER:
        scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        tl.store(x_scales + row, scale)
        value *= scale * tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + place, value.to(total.dtype.element_ty), mask=inside)
    if OUTER:
        scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        tl.store(total_scales + row, scale)
        value *= scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


@kernel
def _add_norm_backward_kernel(x, total, inner, weight, x_scales, total_scales, d_total, d_normed,
                              d_x, d_residual, d_inner, d_weight, rows, width,
                              INNER: tl.constexpr, OUTER: tl.constexpr, BLOCK: tl.constexpr):
    """Every n-th row: its d_residual, and with INNER d_x; d_inner and d_weight summed over them."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    inside, place = at < width, program.to(tl.int64) * width + at
    inner_sum, weight_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        grad = tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
        if OUTER:
            scale = tl.load(total_scales + row)
            normal = tl.load(total + place, mask=inside, other=0.0).to(tl.float32) * scale
            outer = tl.load(d_normed + place, mask=inside, other=0.0).to(tl.float32)
            weight_sum += outer * normal
            factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            grad += _norm_backward(outer, normal, factor, scale, width)
        tl.store(d_residual + place, grad.to(d_residual.dtype.element_ty), mask=inside)
        if INNER:
            scale = tl.load(x_scales + row)
            normal = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
            inner_sum += grad * normal
            factor = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
            grad = _norm_backward(grad, normal, factor, scale, width)
            tl.store(d_x + place, grad.to(d_x.dtype.element_ty), mask=inside)
        place += programs * width
    if INNER:
        tl.store(d_inner + program * width + at, inner_sum, mask=inside)
    if OUTER:
        tl.store(d_weight + program * width + at, weight_sum, mask=inside)


def _add_norm_launch(width: int) -> dict:
    """The kernels' block, the next power of two, and warps of 32 threads for it."""
    block = 1 << (width - 1).bit_length()
    return dict(BLOCK=block, num_warps=min(16, max(1, block // 256)))


def _programs(x: Tensor) -> int:
    """Four for each multiprocessor, of which an H100 has 132; at most one for each row."""
    count = 132
    if x.device.type == "cuda":
        count = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(len(x), 4 * count)


class _AddNorm(torch.autograd.Function):
    """See add_norm. One of the weights may be None; then that norm is left out."""

    @staticmethod
    def forward(ctx, x, residual, inner, weight, eps):
        shape, width = x.shape, x.shape[-1]
        x, residual = (y.reshape(-1, width).contiguous() for y in (x, residual))
        total, normed = torch.empty_like(x), None if weight is None else torch.empty_like(x)
        x_scales, total_scales = x.new_empty(2, len(x), dtype=torch.float32)
        # For a tensor that the kernel does not use, any other one is passed.
        _add_norm_kernel[(len(x),)](
            x, residual, _or(inner, x), _or(weight, x), total, _or(normed, x), x_scales,
            total_scales, width, eps, INNER=inner is not None, OUTER=weight is not None,
            **_add_norm_launch(width))
        ctx.save_for_backward(None if inner is None else x, None if weight is None else total,
                              inner, weight, x_scales, total_scales)
        return total.view(shape), None if weight is None else normed.view(shape)

    @staticmethod
    def backward(ctx, d_total, d_normed):
        x, total, inner, weight, x_scales, total_scales = ctx.saved_tensors
        shape, width = d_total.shape, d_total.shape[-1]
        d_total = d_total.reshape(-1, width).contiguous()
        d_residual, n = torch.empty_like(d_total), _programs(d_total)
        d_x = d_residual if inner is None else torch.empty_like(d_total)
        if weight is not None:
            d_normed = d_normed.reshape(-1, width).contiguous()
        d_inner, d_weight = (None if w is None else w.new_empty(n, width, dtype=torch.float32)
                             for w in (inner, weight))
        _add_norm_backward_kernel[(n,)](
            _or(x, d_x), _or(total, d_x), _or(inner, d_x), _or(weight, d_x), x_scales,
            total_scales, d_total, _or(d_normed, d_x), d_x, d_residual, _or(d_inner, d_x),
            _or(d_weight, d_x), len(d_total), width, INNER=inner is not None,
            OUTER=weight is not None, **_add_norm_launch(width))
        d_inner, d_weight = (None if w is None else d.sum(0).to(w.dtype)
                             for d, w in ((d_inner, inner), (d_weight, weight)))
        return d_x.view(shape), d_residual.view(shape), d_inner, d_weight, None


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def plain_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5,
                   inner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What add_norm computes."""
    total = residual + (x if inner is None else rms_norm(x, inner, eps))
    return total, rms_norm(total, weight, eps)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5,
             inner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of x and residual, and its RMSNorm: what lies between two parts of a layer. With
    `inner`, the weight of another norm, it adds norm(x) instead of x (sandwich).

    x, residual: (..., W); weight, inner: (W,); all of one dtype, bf16 or fp32. Returns sum and
    normed, (..., W) each. Raises ValueError if an argument has another shape, dtype or device.
    """
    _check_norm(x, residual, weight=weight, inner=inner)
    if not use_kernels(x):
        return plain_add_norm(x, residual, weight, eps, inner)
    return _AddNorm.apply(x, residual, inner, weight, eps)


def plain_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """What norm_add computes."""
    return residual + rms_norm(x, weight, eps)


def norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """residual + norm(x), the end of a layer of the sandwich form. Arguments as for add_norm."""
    _check_norm(x, residual, weight=weight)
    if not use_kernels(x):
        return plain_norm_add(x, residual, weight, eps)
    return _AddNorm.apply(x, residual, weight, None, eps)[0]


def _check_norm(x: Tensor, residual: Tensor, **weights: Tensor | None):
    _check_floats("x", x)
    expect("residual", residual, x.shape, x, x.dtype)
    for name, weight in weights.items():
        if weight is not None:
            expect(name, weight, x.shape[-1:], x, x.dtype)


def _check_floats(name: str, x: Tensor):
    expect(name, x, (None,) * x.dim())
    if x.dtype not in (torch.bfloat16, torch.float32) or not x.dim():
        raise ValueError(f"{name} is {x.dtype} of {x.dim()} dimensions, not bf16 or fp32 of one "
                         "or more")



# ---- SwiGLU -------------------------------------------------------------------------------------
#
# Elementwise: a program takes 1,024 neighbours of one row, 8 for each of 128 threads, which is one
# load of 16 bytes in bf16. Roofline: 6 bytes an element forward, 10 backward, about 10 FLOPs: bound
# by memory. PyTorch's own operations take 10 and 22, as silu(gate) goes to memory and is kept for
# the backward pass; here only gate and up are kept.
SWIGLU = dict(BLOCK=1024, num_warps=4)


@kernel
def _swiglu_kernel(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


@kernel
def _swiglu_backward_kernel(gate, up, grad, d_both, gate_stride, up_stride, width,
                            BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    d_gate, d_up = d * u * s * (1 + g * (1 - s)), d * g * s
    d_both += row * 2 * width + at      # a row of both: d_gate, then d_up
    tl.store(d_both, d_gate.to(d_both.dtype.element_ty), mask=inside)
    tl.store(d_both + width, d_up.to(d_both.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    """See swiglu."""

    @staticmethod
    def halves(gate, up):
        """Gate and up with all rows in one dimension; views, if they lie in one tensor too."""
        gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
        return gate.reshape(-1, gate.shape[-1]), up.reshape(-1, gate.shape[-1])

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        g, u = _SwiGLU.halves(gate, up)
        out = gate.new_empty(g.shape)
        grid = len(g), -(-g.shape[1] // SWIGLU["BLOCK"])
        _swiglu_kernel[grid](g, u, out, g.stride(0), u.stride(0), g.shape[1], **SWIGLU)
        return out.view(*gate.shape[:-1], g.shape[1])

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        g, u = _SwiGLU.halves(gate, up)
        grad, d_both = grad.contiguous(), gate.new_empty(len(g), 2 * g.shape[1])
        grid = len(g), -(-g.shape[1] // SWIGLU["BLOCK"])
        _swiglu_backward_kernel[grid](g, u, grad, d_both, g.stride(0), u.stride(0), g.shape[1],
                                      **SWIGLU)
        d_both = d_both.view(*gate.shape[:-1], 2 * g.shape[1])
        return (d_both, None) if up is None else d_both.chunk(2, dim=-1)


def plain_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """What swiglu computes."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, elementwise. gate, up: (..., I), bf16 or fp32; or one tensor (..., 2 I) that
    holds both side by side, which is not copied. Returns (..., I). Raises ValueError if an argument
    has another shape, dtype or device."""
    _check_floats("gate", gate)
    if up is not None:
        expect("up", up, gate.shape, gate, gate.dtype)
    elif gate.shape[-1] % 2:
        raise ValueError(f"gate holds gate and up, but is {gate.shape[-1]} wide, an odd number")
    return _SwiGLU.apply(gate, up) if use_kernels(gate) else plain_swiglu(gate, up)


# ---- products for Newton-Schulz -----------------------------------------------------------------
#
# X X^T and A A are symmetric, so only tiles on and below the diagonal are computed, and each is
# stored a second time, mirrored. Tiles of 128 x 128 in steps of 64 columns: 64 fp32 sums for each
# of 256 threads, and 98 kB of shared memory for three steps of both operands on the way; an A100
# gives 163 kB to a program. Half of the programs lie above the diagonal and end at once.
#
# Roofline of an R x C matrix in bf16: R (R + 128) C FLOPs instead of 2 R^2 C, 2 R C + 2 R^2 bytes:
# at R = 1,536 and C = 4,608 about 620 FLOPs a byte, bound by the tensor cores.
PRODUCT = dict(BLOCK=128, DEPTH=64, num_warps=8, num_stages=3)


@kernel
def _symmetric_kernel(x, out, rows, columns, matrix_stride, row_stride, column_stride, b, c,
                      POLYNOMIAL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
                      DEPTH: tl.constexpr):
    """Tile (i, j) of x x^T, and tile (j, i), its transpose. POLYNOMIAL: b x + c x x^T instead, for
    a symmetric x."""
    i, j = tl.program_id(0), tl.program_id(1)
    if j > i:
        return
    matrix = tl.program_id(2).to(tl.int64)
    x += matrix * matrix_stride
    out += matrix * rows * rows
    at_i, at_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    inside_i, inside_j = at_i[:, None] < rows, at_j[:, None] < rows
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, columns, DEPTH):
        k = (start + tl.arange(0, DEPTH))[None, :]
        tile_i = tl.load(x + at_i[:, None] * row_stride + k * column_stride,
                         mask=inside_i & (k < columns), other=0.0)
        tile_j = tl.load(x + at_j[:, None] * row_stride + k * column_stride,
                         mask=inside_j & (k < columns), other=0.0)
        if EXACT:
            tile_i, tile_j = tile_i.to(tl.float32), tile_j.to(tl.float32)
        total = tl.dot(tile_i, tl.trans(tile_j), total, input_precision="ieee")
    place = at_i[:, None] * rows + at_j[None, :]
    mask = inside_i & (at_j[None, :] < rows)
    if POLYNOMIAL:      # here x is square
        own = x + at_i[:, None] * row_stride + at_j[None, :] * column_stride
        total = b * tl.load(own, mask=mask, other=0.0).to(tl.float32) + c * total
    total = total.to(out.dtype.element_ty)
    tl.store(out + place, total, mask=mask)
    if j < i:       # the tile above the diagonal; on the diagonal the two are one
        tl.store(out + at_j[:, None] * rows + at_i[None, :], tl.trans(total),
                 mask=inside_j & (at_i[None, :] < rows))


def _symmetric(x: Tensor, b: float, c: float, polynomial: bool) -> Tensor:
    matrices, rows, columns = x.shape
    out, tiles = x.new_empty(matrices, rows, rows), -(-rows // PRODUCT["BLOCK"])
    # Triton's interpreter multiplies bf16 wrongly, so it must not see any.
    _symmetric_kernel[(tiles, tiles, matrices)](
        x, out, rows, columns, *x.stride(), b, c, POLYNOMIAL=polynomial,
        EXACT=INTERPRETED or x.dtype == torch.float32, **PRODUCT)
    return out


def plain_gram(x: Tensor) -> Tensor:
    """What gram computes."""
    return x @ x.mT


def gram(x: Tensor) -> Tensor:
    """x @ x.mT, summed in fp32, without gradient. (N, R, C), bf16 or fp32, also the transpose of
    such a tensor -> (N, R, R). Raises ValueError if x has another shape, dtype or layout."""
    _check_matrices("x", x)
    return _symmetric(x, 0.0, 0.0, False) if use_kernels(x) else plain_gram(x)


def plain_poly(a: Tensor, b: float = -4.7750, c: float = 2.0315) -> Tensor:
    """What poly computes. baddbmm adds b a to the product as it writes it: one pass through memory
    instead of three."""
    return torch.baddbmm(a, a, a, beta=b, alpha=c)


def poly(a: Tensor, b: float = -4.7750, c: float = 2.0315) -> Tensor:
    """b a + c a @ a for symmetric matrices (N, R, R), bf16 or fp32, summed in fp32, without
    gradient; b and c are Newton-Schulz's if not given. Raises ValueError if a is not square, or
    like gram."""
    _check_matrices("a", a)
    expect("a", a, (None, None, a.shape[1]))
    return _symmetric(a, b, c, True) if use_kernels(a) else plain_poly(a, b, c)


def _check_matrices(name: str, x: Tensor):
    x = x.mT if x.dim() == 3 and x.stride(1) == 1 else x
    expect(name, x, (None, None, None))
    _check_floats(name, x)


# lab/kernels.py compiles each kernel with these types of its arguments and these constants.
_NORM = {name: "*bf16" for name in ("x", "total", "inner", "weight")}
_NORM |= {"x_scales": "*fp32", "total_scales": "*fp32", "width": "i32"}
_STRIDES = {"gate_stride": "i32", "up_stride": "i32", "width": "i32"}
KERNELS = [
    (_add_norm_kernel, _NORM | dict(residual="*bf16", normed="*bf16", eps="fp32"),
     dict(INNER=True, OUTER=True, **_add_norm_launch(1536))),
    (_add_norm_backward_kernel, _NORM | dict(
        d_total="*bf16", d_normed="*bf16", d_x="*bf16", d_residual="*bf16", d_inner="*fp32",
        d_weight="*fp32", rows="i32"), dict(INNER=True, OUTER=True, **_add_norm_launch(1536))),
    (_swiglu_kernel, _STRIDES | dict(gate="*bf16", up="*bf16", out="*bf16"), SWIGLU),
    (_swiglu_backward_kernel, _STRIDES | dict(
        gate="*bf16", up="*bf16", grad="*bf16", d_both="*bf16"), SWIGLU),
    *((_symmetric_kernel, dict(
        x="*bf16", out="*bf16", rows="i32", columns="i32", matrix_stride="i32", row_stride="i32",
        column_stride="constexpr", b="fp32", c="fp32"),
       dict(column_stride=1, POLYNOMIAL=polynomial, EXACT=False, **PRODUCT))
      for polynomial in (False, True))]


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade NAME`.
# 1. _swiglu_backward_kernel: from the derivative of g * sigmoid(g) * u.
#    TRITON_INTERPRET=1 pytest tests/test_kernels.py -k kernel_swiglu; 30 minutes.
# 2. rotary_pairs in lib/rotary.py: from its docstring alone.
#    pytest tests/test_model.py -k rotations; 15 minutes.
# 3. _plain in lib/sigmoid.py: tile by tile, with all four gradients.
#    pytest tests/test_train_vit.py -k tiles; 30 minutes.
