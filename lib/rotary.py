"""Rotary positions, with the norm of queries and keys in the same pass.

`rotary_half` and `rotary_pairs` are the two rotations in plain PyTorch. `norm_rotary`, for the ViT,
and `rotary_qk`, for the decoder, are what a layer calls: plain PyTorch or, where `use_kernels` says
so, one Triton kernel.

Letters: T tokens of a packed row, H query heads, G key-value heads, C channels of a head.
"""
import torch
from torch import Tensor

from lib.dispatch import expect, inline, kernel, tl, use_kernels


def angles(positions: Tensor, sections: tuple[int, ...], theta: float = 10000.0) -> Tensor:
    """Rotary angles, with the frequencies of a head divided among several position axes.

    positions: integers, one row for each axis: (3, T) for t, h, w or (2, T) for h, w. sections: how
    many of the C/2 frequencies each axis gets, in contiguous blocks. Returns (T, C/2) in fp32.
    """
    half = sum(sections)
    frequency = theta ** -(torch.arange(half, device=positions.device) / half)
    parts = frequency.split(list(sections))
    return torch.cat([axis[:, None].float() * part for axis, part in zip(positions, parts)], -1)


def rotary_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channels i and i + C/2 as a pair, as the ViT does. x (T, H, C); cos, sin (T, C/2);
    returns (T, H, C)."""
    # (a, b) -> (a cos - b sin, b cos + a sin): x times cos, plus x with halves exchanged times sin.
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotary_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channels 2i and 2i + 1 as a pair, as the decoder does. x (T, H, C); cos, sin
    (T, C/2); returns (T, H, C)."""
    # Two neighbours in memory are one complex number, and its rotation is one product. This takes a
    # seventh of the time of slices [..., 0::2] and [..., 1::2].
    numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    rotated = numbers * torch.complex(cos.float(), sin.float())[:, None]
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def power_of_2(n: int) -> int:
    """The smallest power of 2 from n on: Triton's tiles have such sides, and a mask cuts them."""
    return 1 << (n - 1).bit_length()


def expect_floats(name: str, x: Tensor):
    """Raise ValueError, with the argument's name, if it holds integers. (The kernels compute in
    fp32 at most: fp64 is left to plain PyTorch.)"""
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, no floating-point type")


# ---- rotary halves with QK-norm: the ViT -------------------------------------------------------
#
# Plain, the forward moves 22 bytes for each channel of q and k in bf16: a norm, a roll, a product,
# a product with a sum. All of it needs only one head at a time, so one pass is enough.
#
# Tiling: one program for each token, which holds all heads of its queries, then of its keys, as two
# tiles of [HEADS, C/2], the two channels of a pair at the same place in both. The token's C/2
# cosines and sines are read once and serve every head. Addresses come from strides, so that q, k
# and v stay where the fused matrix product has left them.
#
# Roofline: forward 2 bytes read and 2 written for each channel of q and k in bf16, about 12 FLOPs;
# backward 10 read and 6 written for a channel of q, k and v together, about 50 FLOPs. An H100 does
# 20 FLOPs outside of its tensor cores in the time of one byte: bound by memory. The 2,048 numbers
# of a token of base are 16 for each thread of 4 warps; the forward takes 32 registers a thread, so
# that 16 programs share a multiprocessor and hide each other's waits for memory.

@inline
def _load_halves(x, mask, C):
    return (tl.load(x, mask, other=0.0).to(tl.float32),
            tl.load(x + C // 2, mask, other=0.0).to(tl.float32))


@inline
def _store_halves(x, a, b, mask, C):
    tl.store(x, a.to(x.dtype.element_ty), mask)
    tl.store(x + C // 2, b.to(x.dtype.element_ty), mask)


@inline
def _norm_and_turn(x, out, weight, c, s, eps, mask, C, HALF):
    """One token's heads: x, out are pointers [HEADS, HALF] to their first halves; c, s [1, HALF]"""
    channel = tl.arange(0, HALF)[None]
    a, b = _load_halves(x, mask, C)
    wa, wb = _load_halves(weight + channel, channel < C // 2, C)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / C + eps)
    a, b = a * scale * wa, b * scale * wb
    _store_halves(out, a * c - b * s, b * c + a * s, mask, C)


@kernel
def _norm_rotary_kernel(qkv, q_weight, k_weight, cos, sin, q_out, k_out, t_stride, n_stride,
                        h_stride, cos_stride, sin_stride, heads, eps,
                        C: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None]
    mask = (head < heads) & (channel < C // 2)
    c = tl.load(cos + t * cos_stride + channel, channel < C // 2, other=0.0)
    s = tl.load(sin + t * sin_stride + channel, channel < C // 2, other=0.0)
    x, place = qkv + t * t_stride + head * h_stride + channel, (t * heads + head) * C + channel
    _norm_and_turn(x, q_out + place, q_weight, c, s, eps, mask, C, HALF)
    _norm_and_turn(x + n_stride, k_out + place, k_weight, c, s, eps, mask, C, HALF)


@inline
def _norm_and_turn_backward(x, grad, out, weight, c, s, eps, mask, C, HALF):
    """Write the gradient of one token's heads; return what they add to the weight's, in halves."""
    channel = tl.arange(0, HALF)[None]
    a, b = _load_halves(x, mask, C)
    wa, wb = _load_halves(weight + channel, channel < C // 2, C)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / C + eps)
    a, b = a * scale, b * scale             # x / rms(x), the norm's output without its weight
    ga, gb = _load_halves(grad, mask, C)
    ga, gb = ga * c + gb * s, gb * c - ga * s       # a rotation's gradient: rotated back
    wa, wb, ga_n, gb_n = ga * wa, gb * wb, ga * a, gb * b
    # The part of the gradient along x would change its length only, which the norm divides out.
    along = (tl.sum(wa * a, 1) + tl.sum(wb * b, 1))[:, None] / C
    _store_halves(out, (wa - a * along) * scale, (wb - b * along) * scale, mask, C)
    return ga_n, gb_n


@kernel
def _norm_rotary_backward_kernel(qkv, q_weight, k_weight, cos, sin, dq, dk, dv, out, sums, t_stride,
                                 n_stride, h_stride, v_t_stride, v_h_stride, cos_stride, sin_stride,
                                 total, heads, eps, C: tl.constexpr, HEADS: tl.constexpr,
                                 HALF: tl.constexpr, TOKENS: tl.constexpr):
    """The gradient of qkv, v's part included: so autograd has nothing left to put together. Each
    program takes TOKENS tokens and writes one sum over them for each weight. Adding those up later
    gives the same result each time; atomic additions, in the order of their arrival, would not."""
    program = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None]
    mask = (head < heads) & (channel < C // 2)
    qa = tl.zeros([HEADS, HALF], tl.float32)
    qb, ka, kb = qa, qa, qa
    for t in range(program * TOKENS, tl.minimum(program * TOKENS + TOKENS, total)):
        c = tl.load(cos + t * cos_stride + channel, channel < C // 2, other=0.0)
        s = tl.load(sin + t * sin_stride + channel, channel < C // 2, other=0.0)
        x = qkv + t * t_stride + head * h_stride + channel
        place = (t * heads + head) * C + channel            # in dq and dk
        to = out + (t * 3 * heads + head) * C + channel     # in the gradient of qkv (T, 3, H, C)
        a, b = _norm_and_turn_backward(x, dq + place, to, q_weight, c, s, eps, mask, C, HALF)
        qa, qb = qa + a, qb + b
        a, b = _norm_and_turn_backward(x + n_stride, dk + place, to + heads * C, k_weight, c, s,
                                       eps, mask, C, HALF)
        ka, kb = ka + a, kb + b
        a, b = _load_halves(dv + t * v_t_stride + head * v_h_stride + channel, mask, C)
        _store_halves(to + 2 * heads * C, a, b, mask, C)
    to = sums + program * 2 * C + tl.arange(0, HALF)
    _store_halves(to, tl.sum(qa, 0), tl.sum(qb, 0), tl.arange(0, HALF) < C // 2, C)
    _store_halves(to + C, tl.sum(ka, 0), tl.sum(kb, 0), tl.arange(0, HALF) < C // 2, C)


class _NormRotary(torch.autograd.Function):
    """See norm_rotary. The backward norms again: qkv is in memory anyway, as v is a part of it."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, eps):
        total, _, heads, c = qkv.shape
        q, k = (qkv.new_empty(total, heads, c) for _ in range(2))
        _norm_rotary_kernel[total,](
            qkv, q_weight, k_weight, cos, sin, q, k, *qkv.stride()[:3], cos.stride(0),
            sin.stride(0), heads, eps, C=c, HEADS=power_of_2(heads), HALF=power_of_2(c // 2),
            num_warps=4)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return q, k, qkv[:, 2]

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        total, _, heads, c = qkv.shape
        dv = dv if dv.stride(-1) == 1 else dv.contiguous()
        programs = -(-total // 8)
        out, sums = qkv.new_empty(qkv.shape), cos.new_empty(programs, 2, c, dtype=torch.float32)
        _norm_rotary_backward_kernel[programs,](
            qkv, q_weight, k_weight, cos, sin, dq.contiguous(), dk.contiguous(), dv, out, sums,
            *qkv.stride()[:3], *dv.stride()[:2], cos.stride(0), sin.stride(0), total, heads,
            ctx.eps, C=c, HEADS=power_of_2(heads), HALF=power_of_2(c // 2), TOKENS=8, num_warps=4)
        d_q_weight, d_k_weight = sums.sum(0)
        return (out, d_q_weight.to(q_weight.dtype), d_k_weight.to(k_weight.dtype),
                None, None, None)


def norm_rotary(qkv: Tensor, q_norm: torch.nn.Module, k_norm: torch.nn.Module, cos: Tensor,
                sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of each head of the queries and keys, then `rotary_half`; the values as they are.

    qkv: (T, 3, H, C), C even; q_norm, k_norm: RMSNorms with a `weight` (C,) and `eps`, or anything
    else, for instance nn.Identity, and no kernel runs; cos, sin: (T, C/2) fp32. The channels of a
    head are neighbours in memory; other strides are free. Returns q, k, v, each (T, H, C); v is a
    view. Raises ValueError, with the argument's name, if a shape, type, device or stride is wrong.
    """
    expect("qkv", qkv, (None, 3, None, None))
    expect_floats("qkv", qkv)
    total, _, _, c = qkv.shape
    _expect_rotations(cos, sin, total, c, qkv)
    norms = ("q_norm", q_norm), ("k_norm", k_norm)
    if not all(hasattr(norm, "eps") for _, norm in norms) or qkv.dtype == torch.float64 or (
            not use_kernels(qkv)):
        q, k, v = qkv.unbind(1)
        return rotary_half(q_norm(q), cos, sin), rotary_half(k_norm(k), cos, sin), v
    for name, norm in norms:
        expect(f"{name}.weight", norm.weight, (c,), qkv, qkv.dtype)
    if q_norm.eps != k_norm.eps:
        raise ValueError(f"q_norm.eps is {q_norm.eps} and k_norm.eps {k_norm.eps}: not the same")
    return _NormRotary.apply(qkv, q_norm.weight, k_norm.weight, cos, sin, q_norm.eps)


def _expect_rotations(cos: Tensor, sin: Tensor, total: int, c: int, like: Tensor):
    if c % 2:
        raise ValueError(f"heads of {c} channels, an odd number, have no pairs to rotate")
    expect("cos", cos, (total, c // 2), like, torch.float32)
    expect("sin", sin, (total, c // 2), like, torch.float32)


# ---- rotary pairs: the decoder -----------------------------------------------------------------
#
# Queries and keys in one launch, each channel read and written once. The backward is the rotation
# by the opposite angle, so it is the same kernel and needs nothing but the cosines and sines.
#
# Tiling: one program for each token, a tile of [HEADS, C] for its queries, another for its keys.
# The channels of a pair are neighbours. To read 0, 2, 4 ... and 1, 3, 5 ... would fetch every
# 32-byte sector twice, so a tile is read as it lies in memory and split in registers.
#
# Roofline: 2 bytes read and 2 written for each channel in bf16, 3 FLOPs: bound by memory. Plain, as
# complex numbers in fp32, 20 bytes are moved. Base has 3,072 channels in the heads of a token: 24
# for each thread of 4 warps.

@inline
def _turn_pairs(x, out, h_stride, heads, c, s, C, CHANNELS, HEADS):
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, CHANNELS)[None]
    mask = (head < heads) & (channel < C)
    pairs = tl.load(x + head * h_stride + channel, mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(pairs, [HEADS, CHANNELS // 2, 2]))
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), [HEADS, CHANNELS])
    tl.store(out + head * C + channel, turned.to(out.dtype.element_ty), mask)


@kernel
def _rotary_qk_kernel(q, k, q_out, k_out, cos, sin, q_t_stride, q_h_stride, k_t_stride, k_h_stride,
                      cos_stride, sin_stride, heads, groups, C: tl.constexpr,
                      CHANNELS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
                      BACKWARD: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, CHANNELS // 2)[None]
    c = tl.load(cos + t * cos_stride + pair, pair < C // 2, other=0.0)
    s = tl.load(sin + t * sin_stride + pair, pair < C // 2, other=0.0)
    if BACKWARD:
        s = -s
    _turn_pairs(q + t * q_t_stride, q_out + t * heads * C, q_h_stride, heads, c, s,
                C, CHANNELS, HEADS)
    _turn_pairs(k + t * k_t_stride, k_out + t * groups * C, k_h_stride, groups, c, s,
                C, CHANNELS, GROUPS)


class _RotaryQK(torch.autograd.Function):
    """See rotary_qk."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, backward=False)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
        return *_turn(dq, dk, *ctx.saved_tensors, backward=True), None, None


def _turn(q, k, cos, sin, backward: bool) -> tuple[Tensor, Tensor]:
    (total, heads, c), groups = q.shape, k.shape[1]
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    _rotary_qk_kernel[total,](
        q, k, *outs, cos, sin, *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0),
        heads, groups, C=c, CHANNELS=power_of_2(c), HEADS=power_of_2(heads),
        GROUPS=power_of_2(groups), BACKWARD=backward, num_warps=4)
    return outs


def rotary_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary_pairs` of the queries and of the keys.

    q: (T, H, C); k: (T, G, C); cos, sin: (T, C/2) fp32; C even. The channels of a head are
    neighbours in memory; other strides are free. Returns two tensors of the shapes of q and k.
    Raises ValueError, with the argument's name, if a shape, type, device or stride is wrong.
    """
    expect("q", q, (None, None, None))
    expect_floats("q", q)
    total, _, c = q.shape
    expect("k", k, (total, None, c), q, q.dtype)
    _expect_rotations(cos, sin, total, c, q)
    if q.dtype == torch.float64 or not use_kernels(q):
        return rotary_pairs(q, cos, sin), rotary_pairs(k, cos, sin)
    return _RotaryQK.apply(q, k, cos, sin)


# What lab/kernels.py compiles: each kernel at the sizes of `base`, the types of its arguments and
# its constants.
_ROTARY = dict.fromkeys(("qkv", "q_weight", "k_weight", "q_out", "k_out", "dq", "dk", "dv", "out",
                         "q", "k"), "*bf16") | dict.fromkeys(("cos", "sin", "sums"), "*fp32")
_ROTARY |= dict.fromkeys(("t_stride", "n_stride", "h_stride", "v_t_stride", "v_h_stride",
                          "cos_stride", "sin_stride", "q_t_stride", "q_h_stride", "k_t_stride",
                          "k_h_stride", "total", "heads", "groups"), "i32") | {"eps": "fp32"}
KERNELS = [
    (_norm_rotary_kernel, _ROTARY, dict(C=64, HEADS=16, HALF=32, num_warps=4)),
    (_norm_rotary_backward_kernel, _ROTARY, dict(C=64, HEADS=16, HALF=32, TOKENS=8, num_warps=4)),
    (_rotary_qk_kernel, _ROTARY,
     dict(C=128, CHANNELS=128, HEADS=16, GROUPS=8, BACKWARD=False, num_warps=4))]
