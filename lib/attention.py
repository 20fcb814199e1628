"""Attention inside the documents of a packed row, and rotary positions.

Letters: T tokens of a packed row, D documents in it, L length of a document, H query heads, G
key-value heads, C channels of a head.
"""
import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

try:    # a fused kernel for packed rows: CUDA only, and only in half precision
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


def angles(positions: Tensor, sections: tuple[int, ...], theta: float = 10000.0) -> Tensor:
    """Rotary angles, with the frequencies of a head divided among several position axes.

    positions: integers, one row for each axis: (3, T) for t, h, w or (2, T) for h, w. sections: how
    many of the C/2 frequencies each axis gets, in contiguous blocks. Returns (T, C/2) in fp32.
    """
    half = sum(sections)
    frequency = theta ** -(torch.arange(half, device=positions.device) / half)
    axis = torch.repeat_interleave(torch.arange(len(sections), device=positions.device),
                                   torch.tensor(sections, device=positions.device))
    return positions[axis].T.float() * frequency


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
        order = room.argsort(stable=True)
        begins = torch.empty_like(room)
        begins[order] = room[order].cumsum(0) - room[order]
        place = torch.arange(int(borders[-1])) + torch.repeat_interleave(begins - starts, lengths)
        shapes = [(n, size) for n, size in zip(counts.tolist(), sizes.tolist()) if size]
        return shapes, place.to(self.cu_seqlens.device)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention inside each document of a packed row, scaled by C ** -0.5.

    q: (T, H, C); k, v: (T, G, C), where G divides H. Returns (T, H, C).
    """
    if q.is_cuda and varlen_attn is not None and q.dtype in (torch.bfloat16, torch.float16):
        cu, longest = segments.cu_seqlens, segments.longest
        window = (-1, 0) if segments.causal else (-1, -1)
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k, v))
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window)
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
