"""GLMV: the vision encoder, the decoder, the splice between them, and the KV cache's layout.

The decoder is GLM-OCR's [R]: grouped-query attention, RMSNorm before *and* after attention and
MLP (sandwich), SwiGLU, rotary positions in interleaved pairs over three axes (M-RoPE). Parameter
names and the checkpoint folder are GLM-OCR's too, so weights travel both ways.

Three calls make the model: `encode(patches, grids)` turns pixels into one embedding a visual
token; `forward(batch, merged)` splices them into the text and returns hidden states; `lm_head`
is applied only where logits are needed.

Letters: T tokens of a packed row, D documents, P patches, N images, W width, H query heads,
G key-value heads, C width of a head, S cache slots, V vocabulary.
"""
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import nn, Tensor

from kernels import angles, attention, rotary_pairs, Segments, swiglu
from lib.cli import UserError
from tokenizer import Tokenizer
from vit import CogViT, RMSNorm, VitConfig


@dataclass
class TextConfig:
    """Field names are those of GLM-OCR's text_config; the defaults are the released values, not
    the class defaults of transformers, which differ."""
    vocab_size: int = 59392
    hidden_size: int = 1536
    intermediate_size: int = 4608
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 131072

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Frequencies of t, h, w: 1/4, 3/8, 3/8 of half a head, [16, 24, 24] at 128 [R]."""
        half = self.head_dim // 2
        return half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8


@dataclass
class Config:
    """A whole model. min/max_tokens bound the visual tokens of one image; n_ranks is how much of
    the rank file its tokenizer uses (0: another tokenizer's checkpoint)."""
    text: TextConfig = field(default_factory=TextConfig)
    vision: VitConfig = field(default_factory=VitConfig)
    image_token_id: int = 59280
    min_tokens: int = 8
    max_tokens: int = 6144
    n_ranks: int = 0
    mtp_depths: int = 0         # how far ahead its MTP head was trained to look; 0: unknown
    mrope: tuple | None = None  # sections read from a config.json, where they are not the rule's

    @property
    def sections(self) -> tuple[int, int, int]:
        return tuple(self.mrope or self.text.mrope_section)


def sized(size: str) -> Config:
    """tiny: the demo, 2 cores. small: one GPU. base: GLM-OCR, CogViT-L and its decoder [R]; of
    its 59,392 places for tokens ours take the first."""
    if size not in ("tiny", "small", "base"):
        raise UserError(f"--size takes tiny, small or base, not '{size}'")
    n_ranks = 512 if size == "tiny" else 4096
    tokens = Tokenizer(n_ranks)
    if size == "base":
        return Config(image_token_id=tokens.image, n_ranks=n_ranks)
    if size == "tiny":
        # A head of 32 has 16 frequencies. With GLM's base and sections the six of the columns turn
        # by 0.003 radians a token at most, and four columns look alike; these turn by 0.1-0.3. [O]
        text = TextConfig(tokens.vocab_size, 96, 256, 3, 3, 3, 32, rope_theta=10.0,
                          max_position_embeddings=4096)
        vision = VitConfig(2, 96, 3, 256, patch_size=8, out_hidden_size=96)
        return Config(text, vision, tokens.image, 4, 16, n_ranks, mrope=(2, 6, 8))
    text = TextConfig(tokens.vocab_size, 512, 1536, 8, 8, 4, 64, max_position_embeddings=32768)
    vision = VitConfig(8, 512, 8, 1536, out_hidden_size=512)
    return Config(text, vision, tokens.image, 4, 1024, n_ranks)


# ---- positions and cache ------------------------------------------------------------------------

def rope_positions(tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, image_token: int) -> Tensor:
    """M-RoPE positions of a packed row. (T,), (N, 3), (D+1,) -> (3, T) int64 on the CPU.

    Text counts on, with t = h = w. A visual run of h x w patches sits at one t and spreads its
    rows and columns over h and w from there; after it counting goes on at max(h, w) / 2 further.
    Positions restart with every document. [R]
    """
    tokens, grids = tokens.cpu(), [tuple(g) for g in grids.tolist()]
    positions = torch.empty(3, len(tokens), dtype=torch.long)
    visual = (tokens == image_token).tolist()
    borders, image = cu_seqlens.tolist(), 0
    for start, stop in zip(borders, borders[1:]):
        at, now = start, 0
        while at < stop:
            if visual[at]:
                _, h, w = (grids[image][0], grids[image][1] // 2, grids[image][2] // 2)
                if at + h * w > stop:
                    raise ValueError("an image's tokens run over the end of its document")
                run = positions[:, at:at + h * w]
                run[0] = now
                run[1] = now + torch.arange(h).repeat_interleave(w)
                run[2] = now + torch.arange(w).repeat(h)
                at, now, image = at + h * w, now + max(h, w), image + 1
            else:
                end = at
                while end < stop and not visual[end]:
                    end += 1
                positions[:, at:end] = torch.arange(now, now + end - at)
                now, at = now + end - at, end
    return positions


# ---- the decoder --------------------------------------------------------------------------------

class SelfAttention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.width = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, segments, layer, cache):
        q, k, v = (rearrange(proj(x), "t (h c) -> t h c", c=self.width)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary_pairs(q, *rope), rotary_pairs(k, *rope)
        out = (cache.attend(layer, q, k, v, segments) if cache is not None
               else attention(q, k, v, segments))
        return self.o_proj(rearrange(out, "t h c -> t (h c)"))


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(*self.gate_up_proj(x).chunk(2, dim=-1)))


class DecoderLayer(nn.Module):
    """Sandwich norms. `post_attention_layernorm` is, by GLM's naming, the one *before* the MLP."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_self_attn_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, segments, layer=0, cache=None):
        out = self.self_attn(self.input_layernorm(x), rope, segments, layer, cache)
        x = x + self.post_self_attn_layernorm(out)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(c) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


def init(module: nn.Module, seed: int):
    """Normal matrices of deviation 1/sqrt(fan-in), so that widths need no tuning [O]; norms are
    born at 1, biases go to 0, lone vectors (a query, a mask token) are normal, scalars stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim == 1 and name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim == 1 and name.endswith("weight"):
            nn.init.ones_(p)
        elif p.ndim:
            std = 1.0 if "embed_tokens" in name else p[0].numel() ** -0.5
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)


class Backbone(nn.Module):
    """Only a name: GLM-OCR's tensors begin with `model.`"""

    def __init__(self, config: Config):
        super().__init__()
        self.visual = CogViT(config.vision)
        self.language_model = Decoder(config.text)


class GLMV(nn.Module):
    def __init__(self, config: Config, seed: int = 0):
        super().__init__()
        if config.text.hidden_size != config.vision.out_hidden_size:
            raise ValueError("the adapter's output must be as wide as the decoder")
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if self.lm_head.weight.device.type != "meta":
            init(self, seed)

    def encode(self, patches: Tensor, grids: Tensor) -> Tensor:
        """(P, F, 3*p*p) uint8, (N, 3) -> (P/4, W): one embedding a visual token."""
        return self.model.visual.merge(self.model.visual(patches, grids))

    def encode_images(self, batch) -> Tensor | None:
        """One embedding a visual slot of a Batch, in order; None where it has no pictures."""
        if not len(batch.patches):
            return None
        return self.encode(batch.patches, batch.grids)[batch.visual]

    def forward(self, batch, merged: Tensor | None = None, cache=None) -> Tensor:
        """Hidden states (T, W) after the last norm.

        batch: anything with tokens (T,), positions (3, T) and cu_seqlens (D+1,); merged: from
        `see`, one row a token that is <|image|>, in order; cache: what Cache.fill or
        Cache.extend returned.
        """
        decoder, c = self.model.language_model, self.config
        x = decoder.embed_tokens(batch.tokens)
        if merged is not None:
            slots = (batch.tokens == c.image_token_id).nonzero()[:, 0]
            x = x.index_copy(0, slots, merged.to(x.dtype))
        freqs = angles(batch.positions, c.sections, c.text.rope_theta)
        rope = freqs.cos(), freqs.sin()
        segments = None     # for new tokens of a request: the cache knows what they may see
        if batch.cu_seqlens is not None:
            segments = Segments(batch.cu_seqlens, causal=True)
        for i in range(c.text.num_hidden_layers):  # an MTP layer may follow; it is not the trunk's
            x = decoder.layers[i](x, rope, segments, i, cache)
        return decoder.norm(x)

    def counts(self) -> dict[str, int]:
        """Parameters of each part."""
        def size(module):
            return sum(p.numel() for p in module.parameters())
        visual, decoder = self.model.visual, self.model.language_model
        adapter = size(visual.downsample) + size(visual.merger)
        mtp = size(decoder.layers[self.config.text.num_hidden_layers:])
        return {"tower": size(visual) - adapter, "adapter": adapter,
                "decoder": size(decoder) - mtp, "mtp": mtp, "head": size(self.lm_head),
                "total": size(self)}


# Exercises. Delete the body, write it again, run the test.
# 1. rope_positions. pytest tests/test_model.py -k positions_by_hand; 30 minutes.
# 2. Extend.__init__ and .attend: n new tokens a slot over the slot's past.
#    pytest tests/test_model.py -k cached; 45 minutes.
# 3. Drop the two norms after attention and MLP and train again: `make demo ARGS=--out=out/plain`.
#    Does anything change at this size? (In a run of 150 steps we saw no difference.)
