"""MMTP, multimodal multi-token prediction: one more decoder layer that predicts further ahead.

The trunk's hidden state h_i predicts token i+1. The head looks k tokens further: at depth k it
joins its state of depth k-1 with the embedding of token i+k, runs one decoder layer and predicts
token i+k+1:

    h_i^k = layer(eh_proj([enorm(embed(t_{i+k})), hnorm(h_i^{k-1})])),  h_i^0 = h_i

For a document of five tokens, of which # is a visual slot:

    position i           0    1    2    3    4
    token t_i            a    b    #    d    e
    trunk    predicts    b   (#)   d    e    .
    k = 1    reads       b    #    d    e    .
             predicts   (#)   d    e    .    .
    k = 2    reads       #    d    e    .    .
             predicts    d    e    .    .    .
    k = 3    reads       d    e    .    .    .
             predicts    e    .    .    .    .

A dot is a place after the document's end. Dots and targets in brackets do not count in the loss
[O]. A position that reads a dot reads a token of the next document. That does no harm: such
positions are the document's last ones, and no position that counts attends to them. What position 0
reads is replaced by zero [R].

One physical layer serves every depth, and embedding and output matrix are the trunk's [C]. The
head is useful twice: as a training signal, and as the drafter of speculative decoding (engine.py).

What should embed(t) be where t is a visual slot, the # above? The paper's three options [C]:
- `embed`: the visual embedding itself, as in the trunk. The last pipeline stage must then receive
  all visual embeddings from the first and send their gradients back; if the sequence is cut over
  ranks, each needs those of its neighbours for the shift by k.
- `mask`: positions whose next token is visual (b above) leave the head's row: they are neither
  embedded nor attended to. The others keep their rotary positions. Nothing is sent, but the row's
  borders have to be computed again.
- `token` (adopted): the one learnable embedding of <|image|>. This is simply embed(ids), since the
  ids hold that token at every visual slot. Positions and attention are the trunk's; nothing is
  sent.

Letters: T tokens of a packed row, D documents in it, W width of the model, V vocabulary, S cache
slots, K drafts, k depth.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn, Tensor

from kernels import angles, linear_cross_entropy, Segments
from lib.cli import UserError
from lib.memory import Runner
from lib.prefetch import send
from model import DecoderLayer, GLMV
from vit import RMSNorm

OPTIONS = ("embed", "mask", "token")


class SharedHead(nn.Module):
    """Gives two tensors their released names, `shared_head.norm` and `shared_head.head` [R]."""

    def __init__(self, c):
        super().__init__()
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.head = None        # an output matrix of its own, if a checkpoint has one


class MTPLayer(DecoderLayer):
    """A decoder layer and the parts that make it a predictor; GLM-OCR's names [R]."""

    def __init__(self, c):
        super().__init__(c)
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.embed_tokens = None  # its own, if a checkpoint has one; ours uses the trunk's [C]
        self.shared_head = SharedHead(c)


# ---- attaching, loading -------------------------------------------------------------------------

def head_of(model: GLMV) -> MTPLayer | None:
    """The MTP head of a model, or None."""
    layers = model.model.language_model.layers
    n = model.config.text.num_hidden_layers
    return layers[n] if len(layers) > n else None


def prefix(model: GLMV) -> str:
    """The beginning of the names of the head's tensors."""
    return f"model.language_model.layers.{model.config.text.num_hidden_layers}."


def attach(model: GLMV, depths: int = 3, seed: int = 0) -> MTPLayer:
    """Add a new head to `model` and return it. depths: how far ahead it will be trained to look.
    Matrices are initialised as the trunk's are [O]. Raises ValueError if there is a head already.
    """
    if head_of(model) is not None:
        raise ValueError("the model has an MTP head already")
    like = model.lm_head.weight
    head = MTPLayer(model.config.text).to(like.device, like.dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in head.parameters():
        if p.ndim == 2 and p.device.type != "meta":
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    model.model.language_model.layers.append(head)
    model.config.mtp_depths = depths
    return head


def tables(model: GLMV) -> tuple[Tensor, Tensor]:
    """The embedding and output matrices that the head uses, (V, W) each."""
    head = head_of(model)
    return ((head.embed_tokens or model.model.language_model.embed_tokens).weight,
            (head.shared_head.head or model.lm_head).weight)


# ---- the forward --------------------------------------------------------------------------------

def predict(model: GLMV, hidden: Tensor, embedded: Tensor, positions: Tensor,
            segments: Segments | None = None, cache=None) -> Tensor:
    """Apply the head once. hidden, embedded (T, W): h_i^{k-1} and embed(t_{i+k}), at the rotary
    positions (3, T) of token i. Returns h_i^k (T, W), before the head's last norm.

    At position 0 of a document the embedding is replaced by zero [R]. cache: from Cache.prefill or
    Cache.extend.
    """
    head, c = head_of(model), model.config
    embedded = embedded.masked_fill((positions == 0).all(0)[:, None], 0)
    x = head.eh_proj(torch.cat([head.enorm(embedded), head.hnorm(hidden)], dim=-1))
    freqs = angles(positions, c.sections, c.text.rope_theta)
    run = Runner(model.model.language_model.memory.decoder)
    return run(head, x, (freqs.cos(), freqs.sin()), segments, c.text.num_hidden_layers, cache)


def logits(model: GLMV, hidden: Tensor) -> Tensor:
    """h^k (..., W) -> (..., V): the head's own norm, then the trunk's output matrix."""
    return head_of(model).shared_head.norm(hidden) @ tables(model)[1].T


def inputs(tokens: Tensor, slots: Tensor, table: Tensor, merged: Tensor | None, option: str):
    """The embedding of each token as the head reads it, (T, W). tokens (T,); slots: the places of
    the visual slots among them; table (V, W); merged (slots, W), used by `embed` only."""
    embedded = F.embedding(tokens, table)
    if option == "embed" and merged is not None:
        return embedded.index_copy(0, slots, merged.to(embedded.dtype))
    return embedded.index_fill(0, slots, 0) if option == "mask" else embedded


@dataclass
class Ahead:
    """What the head computes at one depth k, for the n positions that are in its row."""
    hidden: Tensor              # (n, W) h_i^k
    kept: Tensor                # (n,) the positions i; all T of them, unless the option is `mask`
    target: Tensor              # (n,) i + k + 1, clamped to the row
    counts: Tensor              # (n,) bool: whether the target is text of the same document
    learnt: Tensor              # (m,) int64: which of the n positions count and have a weight


def states(model: GLMV, hidden: Tensor, batch, merged: Tensor | None = None, depths: int = 3,
           option: str = "token", table: Tensor | None = None):
    """Yield an Ahead for each depth 1..depths.

    hidden (T, W): the trunk's states after its last norm; batch: a packed row; merged: the visual
    embeddings, used by `embed` only; table (V, W): the embedding matrix, the head's if not given.
    """
    embedded = inputs(batch.tokens, batch.slots, tables(model)[0] if table is None else table,
                      merged, option)
    # What counts depends on tokens and borders alone: computed on the CPU, see lib/prefetch.py.
    host, device = batch.host, hidden.device
    total, borders = len(host.tokens), host.cu_seqlens.long()
    visual = torch.zeros(total, dtype=torch.bool).index_fill(0, host.slots, True)
    document = torch.repeat_interleave(borders.diff())      # (T,): the document of each token
    kept = torch.arange(total)
    if option == "mask":        # keep the positions whose next token is text
        kept = (~visual.roll(-1)).nonzero()[:, 0]
        borders = torch.searchsorted(kept, borders)         # how many are kept before each border
    at, borders = send(kept, device), borders.int()
    segments = Segments(send(borders, device), causal=True, host=borders)

    h, positions = hidden[at], batch.positions[:, at]
    for k in range(1, depths + 1):
        # rolled by -k, row i is embed(t_{i+k})
        h = predict(model, h, embedded.roll(-k, 0)[at], positions, segments)
        target = (kept + k + 1).clamp(max=total - 1)
        same = (document[target] == document[kept]) & (kept + k + 1 < total)
        counts = same & ~visual[target]
        learnt = (counts & (host.weights[target] != 0)).nonzero()[:, 0]
        yield Ahead(h, at, *(send(x, device) for x in (target, counts, learnt)))


def losses(model: GLMV, hidden: Tensor, batch, merged: Tensor | None = None, depths: int = 3,
           option: str = "token", detach: bool = False) -> Tensor:
    """The weighted sum of cross-entropies at each depth 1..depths, (depths,) in fp32. Only their
    sum, times any factor, can be differentiated: they share one gradient of the output matrix.

    Arguments as for `states`. Targets that are visual slots or lie in the next document do not
    count [O]. detach: the loss trains only the head's own weights, so that it can't change the
    policy (in RL, or where a head is trained on a finished trunk). Raises UserError on an unknown
    option.
    """
    if option not in OPTIONS:
        raise UserError(f"image_option takes {', '.join(OPTIONS)}, not '{option}'")
    table, out = tables(model)
    if detach:
        hidden, table, out = hidden.detach(), table.detach(), out.detach()
    norm = head_of(model).shared_head.norm
    hiddens, targets, weights, used = [], [], [], []
    for i, x in enumerate(states(model, hidden, batch, merged, depths, option, table)):
        hiddens.append(norm(x.hidden))
        targets.append(batch.tokens[x.target])
        weights.append(batch.weights[x.target] * x.counts)
        used.append(i * len(x.kept) + x.learnt)     # counted through the rows of all depths
    return linear_cross_entropy(torch.stack(hiddens), out, torch.stack(targets),
                                torch.stack(weights), used=torch.cat(used))


# ---- speculation --------------------------------------------------------------------------------

def draft(model: GLMV, hidden: Tensor, tokens: Tensor, positions: Tensor,
          segments: Segments | None = None, cache=None) -> Tensor:
    """`predict` from token ids, with option `token`. (T, W), (T,), (3, T) -> (T, W)"""
    return predict(model, hidden, F.embedding(tokens, tables(model)[0]), positions, segments, cache)


def categorical(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one index a row by inverting the cumulative distribution. (..., V), (...) -> (...)

    uniforms: random numbers in [0, 1), given as an argument so that each request can have a
    generator of its own. The rows of probs need not sum to one.
    """
    cumulative = probs.cumsum(-1)
    point = uniforms[..., None] * cumulative[..., -1:]
    return (cumulative <= point).sum(-1).clamp_max(probs.shape[-1] - 1)


def accept(p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts are accepted, and the token that follows them. Together they have exactly the
    distribution of tokens sampled from p alone [Leviathan et al. 2023].

    p (S, K+1, V): the trunk's distributions at each draft and after the last one; q (S, K, V):
    those that the drafts (S, K) were sampled from; uniforms (S, K+1) in [0, 1). Draft j is accepted
    if its uniform is below p/q. The first rejected one is replaced by a sample from max(0, p - q),
    the part of p that q does not cover, with the last uniform. If all are accepted, a sample from p
    follows them. Returns counts (S,) and tokens (S,).
    """
    k = drafts.shape[1]
    at = drafts[..., None]
    # u < p/q without the division; strictly, so that a draft with p = 0 is rejected even at u = 0
    passes = uniforms[:, :k] * q.gather(-1, at)[..., 0] < p[:, :k].gather(-1, at)[..., 0]
    count = passes.long().cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    rest = p[row, count]
    # q is padded with zeros after the last draft: there the token is sampled from p itself.
    rest = (rest - F.pad(q, (0, 0, 0, 1))[row, count]).clamp_min(0)
    # Rounding can leave nothing of p - q where the two are nearly equal.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[row, count])
    return count, categorical(rest, uniforms[:, k])


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade accept`.
# 1. accept: the test integrates exactly over a vocabulary of five.
#    pytest tests/test_mmtp.py -k accept; 30 minutes.
# 2. states: with option `token` only. Which position reads and predicts what at depth k, and what
#    must not count? pytest tests/test_mmtp.py -k "definition or figure"; 30 minutes.
