"""Attention inside the documents of a packed row.

There are three ways to compute it:
- Plain PyTorch takes the documents of one length at a time. It runs on a CPU, and says what the
  others compute.
- torch's varlen kernel runs on a GPU in half precision. It is faster than what fits into a page of
  Triton.
- The Triton kernels of this file are here to be read. They run where torch's kernel is missing (in
  fp32, or in an older torch), and everywhere with NANOGLMV_ATTENTION=triton. That is an environment
  variable, as NANOGLMV_KERNELS is: an argument would have to pass through every layer of both
  towers.

Letters: T tokens of a packed row, D documents in it, L length of a document, H query heads, G
key-value heads, C channels of a head.
"""
import functools
import inspect
import os

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lib.dispatch import expect, inline, INTERPRETED, kernel, tl, use_kernels
from lib.rotary import expect_floats, power_of_2

try:    # a fused kernel for packed rows: CUDA only, and only in half precision
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
# Since torch 2.13 it shares a key head among its query heads; before, keys must be copied.
SHARES_KEYS = varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters

CHOICE = os.environ.get("NANOGLMV_ATTENTION", "")
if CHOICE not in ("", "library", "triton"):
    raise SystemExit(f"error: NANOGLMV_ATTENTION takes library or triton, not '{CHOICE}'")

LOG2_E = 1.4426950408889634


class Segments:
    """Where the documents of a packed row begin and end; made once a batch, used by every layer.

    On a GPU the kernels read `cu_seqlens` (D+1,) as it is. Elsewhere documents of the same length
    become small dense batches (see `layout`).

    `longest` is the number of tokens of the longest document, `host` is a copy of cu_seqlens on the
    CPU. Pass them where they are known: each that is missing is computed from cu_seqlens when it is
    needed, and for that the CPU waits until the GPU has done everything that was launched before.
    """

    def __init__(self, cu_seqlens: Tensor, causal: bool, longest: int | None = None,
                 host: Tensor | None = None):
        self.causal, self.cu_seqlens = causal, cu_seqlens
        self.made = None    # what `spans` returns: the same for all layers
        # An attribute that is set here hides the property of the same name below.
        if longest is not None:
            self.longest = longest
        if host is not None:
            self.host = host

    @functools.cached_property
    def host(self) -> Tensor:
        return self.cu_seqlens.cpu()

    @functools.cached_property
    def longest(self) -> int:
        return int(self.host.diff().max())

    def spans(self, total: int) -> tuple[Tensor, Tensor]:
        """For each of the row's `total` tokens, where its document begins and where it ends: two
        (T,) int32, made on the device. Tokens after the last border count as one more document."""
        if self.made is None:
            borders = F.pad(self.cu_seqlens, (0, 1), value=total)
            tokens = torch.arange(total, device=borders.device, dtype=borders.dtype)
            after = torch.searchsorted(borders, tokens, right=True)     # which border comes next
            self.made = borders[after - 1], borders[after]
        return self.made

    @functools.cached_property
    def layout(self) -> tuple[list[tuple[int, int]], Tensor | None]:
        """The dense batches as pairs (documents, length), and the place (T,) of each token when all
        batches are laid end to end; no places if all lengths are equal, since then the row itself
        is the only batch.

        Without a mask on padding, a batch can only hold documents of one length. Where attention is
        causal, lengths are first rounded up to multiples of 16, to make fewer batches: the padding
        comes after every real token, and causal attention does not look there. For bidirectional
        documents of 3, 2 and 3 tokens,

            row     a0 a1 a2 b0 b1 c0 c1 c2
            shapes  (1, 2), (2, 3)              one document of 2 tokens, then two of 3
            dense   b0 b1 | a0 a1 a2 | c0 c1 c2
            place   2 3 4 0 1 5 6 7             where a0, a1, ... c2 are in the line above

        and (shapes, place) is returned.
        """
        borders = self.host.long()
        starts, lengths = borders[:-1], borders.diff()
        if bool((lengths == lengths[0]).all()):
            return [(len(lengths), int(lengths[0]))], None
        room = (lengths + 15) // 16 * 16 if self.causal else lengths
        sizes, counts = room.unique(return_counts=True)
        # Where each document begins when they are laid end to end, the shortest first.
        order = room.argsort(stable=True)
        begins = torch.empty_like(room)
        begins[order] = room[order].cumsum(0) - room[order]
        place = torch.arange(int(borders[-1])) + torch.repeat_interleave(begins - starts, lengths)
        shapes = [(n, size) for n, size in zip(counts.tolist(), sizes.tolist()) if size]
        return shapes, place.to(self.cu_seqlens.device)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention inside each document of a packed row, scaled by C ** -0.5.

    q: (T, H, C); k, v: (T, G, C), where G divides H; in each of them the C channels of a head are
    neighbours in memory; other strides are free. Returns (T, H, C). Raises ValueError, with the
    argument's name, if a shape, type, device or stride is wrong.
    """
    expect("q", q, (None, None, None))
    expect_floats("q", q)
    for name, x in ("k", k), ("v", v):
        expect(name, x, (len(q), k.shape[1], q.shape[2]), q, q.dtype)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide q's {q.shape[1]}")
    # Wider heads than 256 in half precision and 128 in fp32 are left to plain PyTorch.
    kernels = use_kernels(q) and q.dtype != torch.float64 and (
        power_of_2(q.shape[2]) * q.element_size() <= 512)
    # On meta tensors lib/roofline.py looks at what a GPU would run.
    on_gpu = q.is_cuda or (q.is_meta and kernels)
    half = q.dtype in (torch.bfloat16, torch.float16)
    library = varlen_attn is not None and on_gpu and half and CHOICE != "triton"
    if kernels or library:
        expect("segments.cu_seqlens", segments.cu_seqlens, (None,), q, torch.int32)
    if library:
        cu, longest, options = segments.cu_seqlens, segments.longest, {}
        if SHARES_KEYS:
            options["enable_gqa"] = True
        elif (repeat := q.shape[1] // k.shape[1]) > 1:
            k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        window = (-1, 0) if segments.causal else (-1, -1)
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window, **options)
    if kernels:
        return _Attention.apply(q, k, v, *segments.spans(len(q)), segments.causal)
    shapes, place = segments.layout
    if place is not None:
        # Each token is copied to its place; the backward of index_copy is a plain gather.
        total = sum(n * size for n, size in shapes)
        q, k, v = (x.new_zeros(total, *x.shape[1:]).index_copy(0, place, x) for x in (q, k, v))
    parts = [x.split([n * size for n, size in shapes]) for x in (q, k, v)]
    outs = [_dense(*(x.unflatten(0, shape) for x in part), segments.causal).flatten(0, 1)
            for shape, part in zip(shapes, zip(*parts))]
    return outs[0] if place is None else torch.cat(outs).index_select(0, place)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of B documents of one length. q (B, L, H, C); k, v (B, L, G, C) -> (B, L, H, C)"""
    length, heads, groups = *q.shape[1:3], k.shape[2]
    if length > 512 or q.dtype == torch.float32:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=heads != groups).transpose(1, 2)
    # In bf16 torch's flash kernel for CPUs is slow: for short documents two matrix products and a
    # softmax are two to five times as fast. The r query heads that share a key head become rows of
    # one matrix, so that the keys need no copies.
    repeat = heads // groups
    q = rearrange(q * q.shape[-1] ** -0.5, "b l (g r) c -> (b g) (r l) c", r=repeat)
    k, v = (rearrange(x, "b l g c -> (b g) l c") for x in (k, v))
    scores = rearrange(q @ k.transpose(1, 2), "b (r l) m -> b r l m", r=repeat)
    if causal:
        scores.add_(torch.full((length, length), float("-inf"), device=q.device).triu(1))
    out = rearrange(scores.softmax(-1), "b r l m -> b (r l) m") @ v
    return rearrange(out, "(b g) (r l) c -> b l (g r) c", g=groups, r=repeat)


# ---- attention in Triton: FlashAttention for packed rows ----------------------------------------
#
# Attention needs all T x L scores but must not store them: at 16K tokens and 16 heads they would be
# 8 GB a layer. The method of FlashAttention-2: a program keeps one tile of queries, walks over the
# keys tile by tile, and never holds more scores than one tile against another.
#
# 1. The online softmax. A softmax needs the largest score, which is known only at the end. So each
#    row carries the largest score so far (`top`), the sum of exp(score - top) (`mass`) and the sum
#    of exp(score - top) times the values (`sums`). When a tile brings a larger score, mass and sums
#    are multiplied by exp(old top - new top): as if the new one had been known from the beginning.
# 2. What is saved. The backward needs the probabilities again, which are exp(score - lse) with the
#    row's log-sum-exp, lse = top + log(mass): one number a row and head instead of L.
# 3. The backward. With out = P v and P = softmax(S), dP = dout v^T and dS = P * (dP - delta), where
#    delta = sum(P * dP) over the row. That sum is also sum(dout * out), because out = P v: it needs
#    no second walk. One kernel walks over the keys for each tile of queries and sums up dq; another
#    walks over the queries for each tile of keys and sums up dk and dv. A single kernel would save
#    two of the seven products, but several programs would have to add to the same rows of dq:
#    atomic additions, and another result in each run.
# 4. Packed rows. A tile may lie across several short documents: a query sees the keys between
#    `start` and `stop` of its own document. The walk begins where the tile's first document begins
#    and ends where its last one ends (or at the tile's last query, if causal), so that captions of
#    20 tokens share a tile and no program waits for the longest document. The grid depends on T
#    alone: the host need not know any length.
# 5. Grouped queries. The keys of one head are read by each of its H/G query heads; the kernel for
#    dk and dv walks over all of them, so that each row of dk has a single writer.
#
# exp(x) is 2 ** (x log2 e), and a GPU has an instruction for powers of 2 only. So log2 e is a part
# of the scale, and all logarithms here have base 2.
#
# Tiling: a program's own tile has 128 rows forward and 64 backward, and it walks over tiles of 64
# and 32; less for heads of more bytes (see _settings). With 8 warps the accumulators (fp32,
# [128, C] forward, two of [64, C] in dk and dv) stay in registers.
# Roofline: forward 4 C FLOPs for each query, visible key and head, backward 14 C (7 products);
# bytes 2 (2 H + 2 G) C a token forward. A document of L tokens has about L FLOPs a byte: bound by
# tensor cores from L = 500 on, by memory for captions. At base attention is 4% of a step.

@inline
def _load_tile(x, first, stride, total, C, CHANNELS, ROWS, FULL):
    """Rows first..first + ROWS of one head: a tile [ROWS, CHANNELS], 0 where there is no row or
    channel. Triton's interpreter computes wrongly with bf16: FULL asks for fp32."""
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None]
    at = x + tl.cast(first, tl.int64) * stride + row * stride + channel
    tile = tl.load(at, (first + row < total) & (channel < C), other=0.0)
    return tile.to(tl.float32) if FULL else tile


@inline
def _store_tile(x, tile, first, stride, total, C, CHANNELS, ROWS):
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None]
    at = x + tl.cast(first, tl.int64) * stride + row * stride + channel
    tl.store(at, tile.to(x.dtype.element_ty), (first + row < total) & (channel < C))


@inline
def _visible(query, key, start, stop, CAUSAL):
    """Whether a query may see a key, by the limits of the query's document: [queries, keys]"""
    seen = (key >= start) & (key < stop)
    return seen & (key <= query) if CAUSAL else seen


@kernel
def _attention_kernel(q, k, v, out, lse, start, stop, qt_stride, qh_stride, kt_stride, kh_stride,
                      vt_stride, vh_stride, total, heads, repeat, scale, C: tl.constexpr,
                      CHANNELS: tl.constexpr, CAUSAL: tl.constexpr, OWN: tl.constexpr,
                      WALK: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of queries of one head: out (T, H, C) and lse (H, T)."""
    first, h = tl.program_id(0) * OWN, tl.program_id(1)
    query = first + tl.arange(0, OWN)
    real = query < total
    begin = tl.load(start + query, real, other=total)
    end = tl.load(stop + query, real, other=0)
    tile_q = _load_tile(q + h * qh_stride, first, qt_stride, total, C, CHANNELS, OWN, FULL)
    k, v = k + h // repeat * kh_stride, v + h // repeat * vh_stride
    # Not -inf: a row whose document comes later in the walk has seen nothing, and would compute
    # inf - inf.
    top = tl.full([OWN], -1e30, tl.float32)
    mass = tl.zeros([OWN], tl.float32)
    sums = tl.zeros([OWN, CHANNELS], tl.float32)
    last = tl.minimum(first + OWN, total) if CAUSAL else tl.max(end, 0)
    for n in range(tl.min(begin, 0), last, WALK):
        key = n + tl.arange(0, WALK)
        tile_k = _load_tile(k, n, kt_stride, total, C, CHANNELS, WALK, FULL)
        tile_v = _load_tile(v, n, vt_stride, total, C, CHANNELS, WALK, FULL)
        scores = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
        seen = _visible(query[:, None], key[None], begin[:, None], end[:, None], CAUSAL)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p, fade = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        mass = mass * fade + tl.sum(p, 1)
        sums = sums * fade[:, None] + tl.dot(p.to(tile_v.dtype), tile_v, input_precision=PRECISION)
        top = higher
    mass = tl.where(real, mass, 1.0)
    _store_tile(out + h * C, sums / mass[:, None], first, heads * C, total, C, CHANNELS, OWN)
    tl.store(lse + h.to(tl.int64) * total + query, top + tl.log2(mass), real)


@kernel
def _attention_dq_kernel(q, k, v, out, grad, lse, delta, dq, start, stop, qt_stride, qh_stride,
                         kt_stride, kh_stride, vt_stride, vh_stride, gt_stride, gh_stride, total,
                         heads, repeat, scale, C: tl.constexpr, CHANNELS: tl.constexpr,
                         CAUSAL: tl.constexpr, OWN: tl.constexpr, WALK: tl.constexpr,
                         FULL: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of queries of one head: dq (T, H, C), and delta (H, T) for the other kernel."""
    first, h = tl.program_id(0) * OWN, tl.program_id(1)
    query = first + tl.arange(0, OWN)
    real = query < total
    begin = tl.load(start + query, real, other=total)
    end = tl.load(stop + query, real, other=0)
    tile_q = _load_tile(q + h * qh_stride, first, qt_stride, total, C, CHANNELS, OWN, FULL)
    tile_g = _load_tile(grad + h * gh_stride, first, gt_stride, total, C, CHANNELS, OWN, FULL)
    tile_o = _load_tile(out + h * C, first, heads * C, total, C, CHANNELS, OWN, FULL)
    row = h.to(tl.int64) * total + query
    row_lse = tl.load(lse + row, real, other=0.0)
    row_delta = tl.sum(tile_g.to(tl.float32) * tile_o.to(tl.float32), 1)
    tl.store(delta + row, row_delta, real)
    k, v = k + h // repeat * kh_stride, v + h // repeat * vh_stride
    sums = tl.zeros([OWN, CHANNELS], tl.float32)
    last = tl.minimum(first + OWN, total) if CAUSAL else tl.max(end, 0)
    for n in range(tl.min(begin, 0), last, WALK):
        key = n + tl.arange(0, WALK)
        tile_k = _load_tile(k, n, kt_stride, total, C, CHANNELS, WALK, FULL)
        tile_v = _load_tile(v, n, vt_stride, total, C, CHANNELS, WALK, FULL)
        scores = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
        seen = _visible(query[:, None], key[None], begin[:, None], end[:, None], CAUSAL)
        p = tl.where(seen, tl.exp2(scores - row_lse[:, None]), 0.0)
        dp = tl.dot(tile_g, tl.trans(tile_v), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        sums += tl.dot(ds.to(tile_k.dtype), tile_k, input_precision=PRECISION)
    # scale contains log2 e, for the powers of 2; the gradient does not. Times ln 2 undoes it.
    sums = sums * (scale * 0.6931471805599453)
    _store_tile(dq + h * C, sums, first, heads * C, total, C, CHANNELS, OWN)


@kernel
def _attention_dkv_kernel(q, k, v, grad, lse, delta, dk, dv, start, stop, qt_stride, qh_stride,
                          kt_stride, kh_stride, vt_stride, vh_stride, gt_stride, gh_stride, total,
                          groups, repeat, scale, C: tl.constexpr, CHANNELS: tl.constexpr,
                          CAUSAL: tl.constexpr, OWN: tl.constexpr, WALK: tl.constexpr,
                          FULL: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of keys of one key-value head: dk and dv (T, G, C), the sums over all queries of the
    head's group that see them. Scores are transposed here, [OWN, WALK], so that the products
    with them need no transposition of a tile in fp32."""
    first, g = tl.program_id(0) * OWN, tl.program_id(1)
    key = first + tl.arange(0, OWN)
    real = key < total
    begin = tl.load(start + key, real, other=total)
    end = tl.load(stop + key, real, other=0)
    tile_k = _load_tile(k + g * kh_stride, first, kt_stride, total, C, CHANNELS, OWN, FULL)
    tile_v = _load_tile(v + g * vh_stride, first, vt_stride, total, C, CHANNELS, OWN, FULL)
    sums_k = tl.zeros([OWN, CHANNELS], tl.float32)
    sums_v = tl.zeros([OWN, CHANNELS], tl.float32)
    begins = first if CAUSAL else tl.min(begin, 0)
    last = tl.max(end, 0)
    for r in range(repeat):
        h = g * repeat + r
        for n in range(begins, last, WALK):
            query = n + tl.arange(0, WALK)
            tile_q = _load_tile(q + h * qh_stride, n, qt_stride, total, C, CHANNELS, WALK, FULL)
            tile_g = _load_tile(grad + h * gh_stride, n, gt_stride, total, C, CHANNELS, WALK, FULL)
            row = h.to(tl.int64) * total + query
            row_lse = tl.load(lse + row, query < total, other=0.0)
            row_delta = tl.load(delta + row, query < total, other=0.0)
            scores = tl.dot(tile_k, tl.trans(tile_q), input_precision=PRECISION) * scale
            # Both are in one document if the query lies between the limits of the key's.
            seen = (query[None] >= begin[:, None]) & (query[None] < end[:, None])
            if CAUSAL:
                seen = seen & (query[None] >= key[:, None])
            p = tl.where(seen, tl.exp2(scores - row_lse[None]), 0.0)
            sums_v += tl.dot(p.to(tile_g.dtype), tile_g, input_precision=PRECISION)
            dp = tl.dot(tile_v, tl.trans(tile_g), input_precision=PRECISION)
            ds = p * (dp - row_delta[None])
            sums_k += tl.dot(ds.to(tile_q.dtype), tile_q, input_precision=PRECISION)
    sums_k = sums_k * (scale * 0.6931471805599453)      # ln 2, as in the kernel for dq
    _store_tile(dk + g * C, sums_k, first, groups * C, total, C, CHANNELS, OWN)
    _store_tile(dv + g * C, sums_v, first, groups * C, total, C, CHANNELS, OWN)


def _settings(q: Tensor, causal: bool, backward: bool) -> dict:
    """The constants of the kernels: a program keeps a tile of OWN rows and walks over tiles of WALK
    rows. See the tiling above."""
    c = q.shape[2]
    wide = power_of_2(c) * q.element_size() // 128      # 1: up to 64 channels in half precision
    own, walk = (64, 32) if backward else (128, 64)
    if wide > 2:
        own, walk = (32, 32) if backward else (64, 32)
    # For fp32: tensor cores as TF32 where the user lets matrix products be so, else none.
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return dict(C=c, CHANNELS=max(16, power_of_2(c)), CAUSAL=causal, OWN=own, WALK=walk,
                FULL=INTERPRETED, PRECISION=precision, num_warps=8, num_stages=2)


class _Attention(torch.autograd.Function):
    """See attention, and the comment above."""

    @staticmethod
    def forward(ctx, q, k, v, start, stop, causal):
        (total, heads, c), out = q.shape, q.new_empty(q.shape)
        lse = start.new_empty(heads, total, dtype=torch.float32)
        settings = _settings(q, causal, backward=False)
        _attention_kernel[-(-total // settings["OWN"]), heads](
            q, k, v, out, lse, start, stop, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            total, heads, heads // k.shape[1], c ** -0.5 * LOG2_E, **settings)
        ctx.save_for_backward(q, k, v, out, lse, start, stop)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, start, stop = ctx.saved_tensors
        (total, heads, c), groups = q.shape, k.shape[1]
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        delta, settings = torch.empty_like(lse), _settings(q, ctx.causal, backward=True)
        strides = [n for x in (q, k, v, grad) for n in x.stride()[:2]]
        _attention_dq_kernel[-(-total // settings["OWN"]), heads](
            q, k, v, out, grad, lse, delta, dq, start, stop, *strides, total, heads,
            heads // groups, c ** -0.5 * LOG2_E, **settings)
        _attention_dkv_kernel[-(-total // settings["OWN"]), groups](
            q, k, v, grad, lse, delta, dk, dv, start, stop, *strides, total, groups,
            heads // groups, c ** -0.5 * LOG2_E, **settings)
        return dq, dk, dv, None, None, None


# What lab/kernels.py compiles: each kernel for heads of 64 channels, as in the tower of `base`, and
# of 128, as in its decoder, with the types of its arguments and its constants.
_TYPES = dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), "*bf16")
_TYPES |= dict.fromkeys(("lse", "delta"), "*fp32") | dict.fromkeys(("start", "stop"), "*i32")
_TYPES |= {f"{x}_stride": "i32" for x in ("qt", "qh", "kt", "kh", "vt", "vh", "gt", "gh")}
_TYPES |= dict.fromkeys(("total", "heads", "groups", "repeat"), "i32") | {"scale": "fp32"}
KERNELS = [(each, _TYPES, _settings(torch.empty(0, 1, c, dtype=torch.bfloat16), causal, backward)
            | {"FULL": False})
           for each, backward in ((_attention_kernel, False), (_attention_dq_kernel, True),
                                  (_attention_dkv_kernel, True))
           for c, causal in ((64, False), (128, True))]
