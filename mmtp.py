"""MMTP, multimodal multi-token prediction: one more decoder layer that guesses further ahead.

The trunk's hidden state h_i predicts token i+1. The head looks k tokens further: at depth k it
joins the state of depth k-1 with the embedding of token i+k, runs one decoder layer and predicts
token i+k+1:

    h_i^k = layer(eh_proj([enorm(embed(t_{i+k})), hnorm(h_i^{k-1})])),  h_i^0 = h_i

One physical layer serves every depth, and embedding and output head are the trunk's [C]. It earns
its keep twice: as a training signal, and as the drafter of speculative decoding (engine.py).

What should stand for embed(t) where t is a visual slot? The paper's three options [C]:
- `embed`: the visual embedding itself, as in the trunk. The last pipeline stage must then receive
  all visual embeddings from the first and send their gradients back; under a sequence cut it needs
  those of its neighbours for the shift by k.
- `mask`: slots whose next token is visual leave the head's row: neither embedded nor attended
  to; the others keep their rotary positions. Nothing is sent, but rows have to be cut anew.
- `token` (adopted): the one learnable embedding of <|image|>, which is simply embed(ids), for the
  ids hold that token at every visual slot. Positions and attention are the trunk's; nothing is
  sent.

Letters: T tokens of a packed row, W width, V vocabulary, S cache slots, K drafts.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn, Tensor

from kernels import angles, linear_cross_entropy, Segments
from lib.cli import UserError
from model import DecoderLayer, GLMV
from vit import RMSNorm

OPTIONS = ("embed", "mask", "token")


class SharedHead(nn.Module):
    """Only a name: the released tensors are `shared_head.norm` and `shared_head.head`."""

    def __init__(self, c):
        super().__init__()
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.head = None        # an output matrix of its own, where a checkpoint brings one


class MTPLayer(DecoderLayer):
    """A decoder layer with the four parts that make it a predictor, GLM-OCR's names [R]."""

    def __init__(self, c):
        super().__init__(c)
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.embed_tokens = None  # likewise; ours uses the trunk's [C: shared in training]
        self.shared_head = SharedHead(c)


# ---- attaching, loading -------------------------------------------------------------------------

def head_of(model: GLMV) -> MTPLayer | None:
    """The head of a model, if it has one."""
    layers = model.model.language_model.layers
    n = model.config.text.num_hidden_layers
    return layers[n] if len(layers) > n else None


def prefix(model: GLMV) -> str:
    """What the names of the head's tensors begin with."""
    return f"model.language_model.layers.{model.config.text.num_hidden_layers}."


def attach(model: GLMV, depths: int = 3, seed: int = 0) -> MTPLayer:
    """Give `model` a new head, meant for `depths` predictions; returns it. Matrices are drawn as
    the trunk's are [O]."""
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
    """One application of the head. hidden, embedded (T, W): h_i^{k-1} and embed(t_{i+k}), at the
    rotary positions (3, T) of slot i. Returns h_i^k (T, W), before the head's last norm.

    A document's slot 0 embeds to zero [R]. cache: what Cache.fill or Cache.extend returned.
    """
    head, c = head_of(model), model.config
    embedded = embedded.masked_fill((positions == 0).all(0)[:, None], 0)
    x = head.eh_proj(torch.cat([head.enorm(embedded), head.hnorm(hidden)], dim=-1))
    freqs = angles(positions, c.sections, c.text.rope_theta)
    return head(x, (freqs.cos(), freqs.sin()), segments, c.text.num_hidden_layers, cache)


def logits(model: GLMV, hidden: Tensor) -> Tensor:
    """h^k (..., W) -> (..., V): the head's own norm, then the trunk's output matrix."""
    return head_of(model).shared_head.norm(hidden) @ tables(model)[1].T


def inputs(tokens: Tensor, visual: Tensor, table: Tensor, merged: Tensor | None, option: str):
    """What stands for each token at the head's entrance. tokens, visual (T,), table (V, W), merged
    (visual slots, W) for `embed` alone -> (T, W)."""
    embedded = F.embedding(tokens, table)
    if option == "embed" and merged is not None:
        return embedded.index_copy(0, visual.nonzero()[:, 0], merged.to(embedded.dtype))
    return embedded.masked_fill(visual[:, None], 0) if option == "mask" else embedded


@dataclass
class Ahead:
    """The head's work at one depth: states of the slots `kept`, what they predict, and whether
    that counts."""
    hidden: Tensor              # (n, W) h_i^k of the kept slots
    kept: Tensor                # (n,) their places i in the row
    target: Tensor              # (n,) i + k + 1, clamped to the row
    counts: Tensor              # (n,) bool: a text token of the same document


def states(model: GLMV, hidden: Tensor, batch, merged: Tensor | None = None, depths: int = 3,
           option: str = "token", table: Tensor | None = None):
    """Yield an Ahead for each depth 1..depths. hidden (T, W): the trunk's, after its norm; merged:
    for `embed` alone; table: the embedding matrix, the head's own unless given."""
    tokens, visual = batch.tokens, batch.tokens == model.config.image_token_id
    embedded = inputs(tokens, visual, tables(model)[0] if table is None else table, merged, option)
    lengths = batch.cu_seqlens.diff().long()
    place = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)
    kept, cu_seqlens = torch.arange(len(tokens), device=tokens.device), batch.cu_seqlens
    if option == "mask":
        kept = (~visual.roll(-1)).nonzero()[:, 0]
        left = torch.bincount(place[kept], minlength=len(lengths))
        cu_seqlens = F.pad(left.cumsum(0), (1, 0)).int()
    segments, positions = Segments(cu_seqlens, causal=True), batch.positions[:, kept]

    h = hidden[kept]
    for k in range(1, depths + 1):
        h = predict(model, h, embedded.roll(-k, 0)[kept], positions, segments)
        target = (kept + k + 1).clamp(max=len(tokens) - 1)
        counts = (place[target] == place[kept]) & (kept + k + 1 < len(tokens)) & ~visual[target]
        yield Ahead(h, kept, target, counts)


def losses(model: GLMV, hidden: Tensor, batch, merged: Tensor | None = None, depths: int = 3,
           option: str = "token", detach: bool = False) -> list[Tensor]:
    """The weighted sum of cross-entropies at each depth 1..depths; fp32 scalars.

    Arguments as for `states`. Targets that are visual slots or lie in the next document don't
    count [O]. detach: only the head's own weights learn, so that the loss can't move the policy
    (RL, or a head trained on a finished trunk).
    """
    if option not in OPTIONS:
        raise UserError(f"image_option takes {', '.join(OPTIONS)}, not '{option}'")
    table, out = tables(model)
    if detach:
        hidden, table, out = hidden.detach(), table.detach(), out.detach()
    norm = head_of(model).shared_head.norm
    return [linear_cross_entropy(norm(x.hidden), out, batch.tokens[x.target],
                                 batch.weights[x.target] * x.counts)
            for x in states(model, hidden, batch, merged, depths, option, table)]


# ---- speculation --------------------------------------------------------------------------------

def draft(model: GLMV, hidden: Tensor, tokens: Tensor, positions: Tensor,
          segments: Segments | None = None, cache=None) -> Tensor:
    """`predict` from token ids, option `token`. (T, W), (T,), (3, T) -> (T, W)"""
    return predict(model, hidden, F.embedding(tokens, tables(model)[0]), positions, segments, cache)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One index a row, by inverting the cumulative distribution at `uniforms`: the randomness
    comes in as an argument, so that each request can own its generator. (..., V), (...) -> (...)"""
    cumulative = probs.cumsum(-1)
    point = uniforms[..., None] * cumulative[..., -1:]
    return (cumulative <= point).sum(-1).clamp_max(probs.shape[-1] - 1)


def accept(p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Which drafts stand, and the token that follows them: distributed as if drawn from p alone.

    p (S, K+1, V): the trunk's probabilities where the drafts stand and after the last; q (S, K, V):
    those that the drafts (S, K) were drawn from; uniforms (S, K+1) in [0, 1). Draft j stands if
    its uniform is below p/q; the first that falls is replaced by a draw from what p has more
    than q, with the last uniform [Leviathan et al. 2023]. Returns counts (S,) and tokens (S,).
    """
    k = drafts.shape[1]
    at = drafts[..., None]
    # u < p/q without the division: a draft that q could not draw never stands by accident
    stands = uniforms[:, :k] * q.gather(-1, at)[..., 0] < p[:, :k].gather(-1, at)[..., 0]
    count = stands.long().cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    rest = p[row, count]
    rest = (rest - F.pad(q, (0, 0, 0, 1))[row, count]).clamp_min(0)  # after the last: p itself
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[row, count])
    return count, draw(rest, uniforms[:, k])


def worth(rates: list[float], cost: list[float]) -> int:
    """How many drafts to make: the K that gives most tokens for its time.

    rates[j]: the share of drafts at depth j+1 that stand where those before them did; cost[K]: the
    time of a step with K drafts. Tokens a step: 1 + r1 + r1 r2 + ... No drafts are given a tenth's
    lead, since times are noisy and a wrong yes costs more than a wrong no. [O]
    """
    expected, alive, best = 1.0, 1.0, (1.1 / cost[0], 0)
    for k, rate in enumerate(rates, 1):
        alive *= rate
        expected += alive
        best = max(best, (expected / cost[k], k))
    return best[1]


# Exercises. Delete the body, write it again, run the test.
# 1. accept. pytest tests/test_mmtp.py -k distribution: integrated exactly over a vocabulary of
#    five; 30 minutes.
# 2. losses, option `token` alone: which slot predicts what at depth k, and what must not count?
#    pytest tests/test_mmtp.py -k from_the_definition; 30 minutes.
