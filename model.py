"""GLMV: the vision encoder, the decoder, and the splice of visual embeddings between them.

The decoder is GLM-OCR's [R]: grouped-query attention, RMSNorm before *and* after attention and
MLP (sandwich), SwiGLU, rotary positions in interleaved pairs over three axes (M-RoPE). Parameter
names and the checkpoint folder are GLM-OCR's too, so that weights can be used in both directions.

Three calls make up the model: `encode(patches, grids)` turns pixels into one embedding for each
visual token; `forward(batch, merged)` splices them into the text and returns hidden states;
`lm_head` turns hidden states into logits, only where logits are needed.

Letters: T tokens of a packed row, D documents in it, P patches, F frames, p patch side, N images,
W width of the decoder, H query heads, G key-value heads, C channels of a head, V vocabulary.
"""
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import nn, Tensor

from kernels import add_norm, angles, attention, norm_add, rotary_qk, Segments, swiglu
from lib.cli import UserError
from lib.memory import in_chunks, Memory, Runner
from tokenizer import Tokenizer
from vit import CogViT, RMSNorm, VitConfig

attention = torch.compiler.disable(attention)       # see vit.py


@dataclass
class TextConfig:
    """Field names are those of GLM-OCR's text_config. The defaults are the released values [R],
    which differ from the class defaults of transformers."""
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
        """How many frequencies t, h and w get: 1/4, 3/8 and 3/8 of the C/2 of a head. With
        C = 128: 16, 24, 24 [R]."""
        half = self.head_dim // 2
        return half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8


@dataclass
class Config:
    """A whole model. min_tokens, max_tokens: limits of the visual tokens of one image. n_ranks: how
    many ranks of the rank file its tokenizer uses; 0: it has another one, whose tokenizer.json is
    at the path `vocabulary`."""
    text: TextConfig = field(default_factory=TextConfig)
    vision: VitConfig = field(default_factory=VitConfig)
    image_token_id: int = 59280
    min_tokens: int = 8
    max_tokens: int = 6144
    n_ranks: int = 0
    mtp_depths: int = 0         # how far ahead its MTP head was trained to look; 0: unknown
    mrope: tuple | None = None  # sections that differ from TextConfig.mrope_section
    vocabulary: str = ""        # path of a released tokenizer.json

    @property
    def sections(self) -> tuple[int, int, int]:
        return tuple(self.mrope or self.text.mrope_section)


def sized(size: str) -> Config:
    """The configuration of a size. tiny: the demo, for 2 cores. mini: all categories of the gym, in
    a day of one core. small: for one GPU. base: GLM-OCR, which is CogViT-L and a decoder [R]; our
    tokens are the first of its vocabulary of 59,392. Raises UserError on another name."""
    if size not in ("tiny", "mini", "small", "base"):
        raise UserError(f"--size takes tiny, mini, small or base, not '{size}'")
    n_ranks = {"tiny": 512, "mini": 1024}.get(size, 4096)
    tokens = Tokenizer(n_ranks)
    # The numbers below are, for TextConfig: vocabulary, width, width of the MLP, layers, query
    # heads, key-value heads, channels of a head; for VitConfig: layers, width, heads, MLP's width.
    if size == "base":
        return Config(image_token_id=tokens.image, n_ranks=n_ranks)
    if size == "tiny":
        # A head of 32 channels has 16 frequencies, base ** -(i / 16). With GLM's base of 10,000 and
        # its sections the six of the columns (w) rotate by 0.003 radians a token or less: four
        # neighbouring columns look alike. With base 10 and eight frequencies theirs rotate by 0.1
        # to 0.3 radians. [O]
        text = TextConfig(tokens.vocab_size, 96, 256, 3, 3, 3, 32, rope_theta=10.0,
                          max_position_embeddings=4096)
        vision = VitConfig(2, 96, 3, 256, patch_size=8, out_hidden_size=96)
        return Config(text, vision, tokens.image, 4, 16, n_ranks, mrope=(2, 6, 8))
    if size == "mini":
        # Patches of 8 pixels, as the letters of a page of 256 pixels are about 8 high. One thread
        # of a busy machine draws and learns 19 pictures of 128 and 3.7 of 256 pixels a second; with
        # patches of 16 it is 12 and 2.1 at the sizes of data.task_pixels, 35 and 7.9 at half of
        # them, where a token covers four letters by three lines. Two minutes of CPU did not tell
        # which learns better. 1,024 ranks: 144 tokens a conversation, with 512 it is 164, with
        # 2,048 it is 133, but the vocabulary's two matrices are twice as large. Base 20: the
        # frequencies of the columns rotate by 0.06 to 0.22 radians a token, for 16 columns. [O]
        text = TextConfig(tokens.vocab_size, 192, 512, 4, 6, 3, 32, rope_theta=20.0,
                          max_position_embeddings=8192)
        vision = VitConfig(4, 128, 4, 320, patch_size=8, out_hidden_size=192)
        return Config(text, vision, tokens.image, 4, 400, n_ranks, mrope=(2, 6, 8))
    text = TextConfig(tokens.vocab_size, 512, 1536, 8, 8, 4, 64, max_position_embeddings=32768)
    vision = VitConfig(8, 512, 8, 1536, out_hidden_size=512)
    return Config(text, vision, tokens.image, 4, 1024, n_ranks)


# ---- positions ----------------------------------------------------------------------------------

def rope_positions(tokens: Tensor, grids: Tensor, cu_seqlens: Tensor, image_token: int) -> Tensor:
    """M-RoPE positions of a packed row. (T,), (N, 3) in patches, (D+1,) -> (3, T) int64; all on the
    CPU.

    A text token has t = h = w, one more than the token before it. The tokens of an image, h x w of
    them after merging, share one t; their h and w count rows and columns from there, and the text
    after the image continues max(h, w) later. Positions begin at 0 in every document. [R] An image
    of 2x2 tokens (#) between four words:

        tokens   a  b  #  #  #  #  c  d
        t        0  1  2  2  2  2  4  5
        h        0  1  2  2  3  3  4  5
        w        0  1  2  3  2  3  4  5

    Raises ValueError if the tokens of an image are not as many as its grid says, or do not lie side
    by side in one document.
    """
    visual = (tokens == image_token).numpy()
    slots = np.flatnonzero(visual)
    borders, grids = cu_seqlens.numpy().astype(np.int64), grids.numpy() // (1, 2, 2)   # in tokens
    # Of each image: its size, and where its first and its last token are in the row.
    height, width = grids[:, 1], grids[:, 2]
    count = height * width
    ends = np.cumsum(count)
    if count.sum() != len(slots):
        raise ValueError(f"{len(slots)} image tokens for images of {count.tolist()}")
    first, last = slots[ends - count], slots[ends - 1]
    # Two tokens are in one document if as many borders come before them.
    same = np.searchsorted(borders, first, "right") == np.searchsorted(borders, last, "right")
    if not (same & (last - first == count - 1)).all():
        raise ValueError("an image's tokens run over the end of its document")
    # How far the position moves on after each token: 1 after text; in an image 0, but max(h, w)
    # after its last token.
    step = np.where(visual, 0, 1)
    step[last] = np.maximum(height, width)
    begins = np.cumsum(step) - step         # of each token, counted from the start of the row
    # Subtract what each document begins with. An empty one has no first token to look at.
    starts, lengths = borders[:-1], np.diff(borders)
    used = lengths > 0
    begins -= np.repeat(begins[starts[used]], lengths[used])
    positions = np.stack([begins] * 3)
    place = np.arange(len(slots)) - np.repeat(ends - count, count)      # inside its image
    columns = np.repeat(width, count)                                   # of its image
    positions[1, slots] += place // columns
    positions[2, slots] += place % columns
    return torch.from_numpy(positions)


# ---- the decoder --------------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions: each key-value head serves H/G query heads."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, segments, layer, cache):
        q, k, v = (rearrange(proj(x), "t (h c) -> t h c", c=self.head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary_qk(q, k, *rope)
        # A cache (engine.py) keeps k and v for the tokens to come, and attends to all it holds.
        out = (cache.attend(layer, q, k, v, segments) if cache is not None
               else attention(q, k, v, segments))
        return self.o_proj(rearrange(out, "t h c -> t (h c)"))


class MLP(nn.Module):
    """SwiGLU; gate and up are one matrix, as in GLM-OCR [R]."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each between two norms (sandwich). In GLM's naming
    `post_attention_layernorm` is the norm *before* the MLP [R]."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.self_attn, self.mlp, self.eps = SelfAttention(c), MLP(c), c.rms_norm_eps
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_self_attn_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, segments, layer=0, cache=None):
        out = self.self_attn(self.input_layernorm(x), rope, segments, layer, cache)
        # In one pass over memory: the new x is x + post_self_attn_layernorm(out), and `normed` is
        # post_attention_layernorm of the new x.
        x, normed = add_norm(out, x, self.post_attention_layernorm.weight, self.eps,
                             inner=self.post_self_attn_layernorm.weight)
        return norm_add(self.mlp(normed), x, self.post_mlp_layernorm.weight, self.eps)


class Decoder(nn.Module):
    """The embedding, the trunk's layers and the last norm. An MTP head (mmtp.py) is one more entry
    of `layers`, since its tensors are named so in GLM-OCR's checkpoints; the trunk does not run
    it."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.depth = c.num_hidden_layers
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(c) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.memory = Memory()      # what the backward keeps, set by the training scripts

    def forward(self, x: Tensor, rope, segments: Segments | None, cache=None) -> Tensor:
        """Embeddings (T, W) -> hidden states (T, W) after the last norm. rope: cosines and sines
        (T, C/2); segments: where documents begin; None while decoding, when the cache knows what
        a token may attend to."""
        run = Runner(self.memory.decoder)
        for i in range(self.depth):
            # Without a cache it does not matter which layer it is: all share the compiled code.
            which = () if cache is None else (i, cache)
            x = run(self.layers[i], x, rope, segments, *which)
        return self.norm(x)


def init(module: nn.Module, seed: int):
    """Set all parameters to random values that depend on the seed alone [O].

    A matrix is normal with std 1/sqrt(fan-in): a sum of n products of values of variance 1 with
    weights of variance 1/n has variance 1, so that a layer's output is about as large as its input
    at every width. An embedding picks one row; as a matrix product its fan-in is 1, so its std is
    1.0. A standalone vector (a mask token) is such a row and has std 1.0 too. Weights of norms are
    1 and biases 0. Scalars keep the values that they were made with.
    """
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
    """The part whose tensors are named `model.*` in GLM-OCR's checkpoints [R]."""

    def __init__(self, config: Config):
        super().__init__()
        self.visual = CogViT(config.vision)
        self.language_model = Decoder(config.text)


class GLMV(nn.Module):
    """The whole model. Raises ValueError if the adapter is not as wide as the decoder."""

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
        """Pixels (P, F, 3*p*p) uint8 and grids (N, 3) -> (P/4, W), one embedding for each visual
        token: the adapter merges 2x2 patches into one. Tower and adapter encode a chunk of images
        together, so that not even the tower's output is kept for all of them."""
        visual = self.model.visual
        return in_chunks(lambda patches, grids: visual.merge(visual(patches, grids)),
                         visual.parameters(), visual.memory.chunk_patches, patches, grids)

    def encode_images(self, batch) -> Tensor | None:
        """The embeddings (slots, W) for all visual slots of a Batch, in order; None if it has no
        images. An image in several documents of the row is encoded once."""
        if not len(batch.patches):
            return None
        return self.encode(batch.patches, batch.grids)[batch.visual]

    def forward(self, batch, merged: Tensor | None = None, cache=None) -> Tensor:
        """Hidden states (T, W) after the last norm.

        batch: a Batch; merged: from `encode_images`, one row for each visual slot, in order; cache:
        from Cache.prefill or Cache.extend of engine.py. With the latter `batch` only needs tokens
        (T,), positions (3, T), and None for cu_seqlens.
        """
        decoder, c = self.model.language_model, self.config
        x = decoder.embed_tokens(batch.tokens)
        if merged is not None:      # the splice: visual slots get the encoder's embeddings instead
            x = x.index_copy(0, batch.slots, merged.to(x.dtype))
        freqs = angles(batch.positions, c.sections, c.text.rope_theta)
        segments = None
        if batch.cu_seqlens is not None:
            segments = Segments(batch.cu_seqlens, causal=True, host=batch.host.cu_seqlens)
        return decoder(x, (freqs.cos(), freqs.sin()), segments, cache)

    def flops(self, tokens: float, patches: float, learnt: float, depths: int = 0) -> float:
        """FLOPs of a forward and a backward over a row with so many tokens and patches.

        A matrix of n parameters takes n multiplications and n additions for each row that it is
        applied to, and twice as many backward, for the gradients of its input and of itself: 6 n in
        all. The decoder runs once for each token, the tower for each patch, the adapter for every
        four patches; the output matrix only for the `learnt` tokens, those whose weight in the loss
        is not 0. Each of the MTP head's `depths` is one more layer and one more output matrix. The
        embedding is a lookup and takes none. Left out are the products of attention itself, queries
        with keys and weights with values; in `base` these alone are as many as all the rest once
        documents have about 18,000 tokens.

        A frozen matrix takes 4 n, without the gradient of itself; in tower and adapter 2 n, since
        nothing before them learns, so that they have no backward.
        """
        def cost(module, frozen=4):
            return sum(p.numel() * (6 if p.requires_grad else frozen) for p in module.parameters())
        visual, decoder = self.model.visual, self.model.language_model
        adapter = cost(visual.downsample, 2) + cost(visual.merger, 2)
        tower = cost(visual, 2) - adapter
        mtp = cost(decoder.layers[self.config.text.num_hidden_layers:])
        trunk = cost(decoder) - cost(decoder.embed_tokens) - mtp
        return (tokens * (trunk + depths * mtp) + learnt * (1 + depths) * cost(self.lm_head)
                + patches * (tower + adapter / 4))

    def counts(self) -> dict[str, int]:
        """Parameters of each part: tower, adapter, decoder (with embedding), mtp, head, total."""
        def size(module):
            return sum(p.numel() for p in module.parameters())
        visual, decoder = self.model.visual, self.model.language_model
        adapter = size(visual.downsample) + size(visual.merger)
        mtp = size(decoder.layers[self.config.text.num_hidden_layers:])
        return {"tower": size(visual) - adapter, "adapter": adapter,
                "decoder": size(decoder) - mtp, "mtp": mtp, "head": size(self.lm_head),
                "total": size(self)}


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade rope_positions`.
# 1. rope_positions: the figure in its docstring, for rows of many documents and images.
#    pytest tests/test_model.py -k positions; 30 minutes.
# 2. DecoderLayer.forward: what is normed before and after attention and MLP, and what is added?
#    It needs requirements-peers.txt. pytest tests/test_parity.py -k logits; 15 minutes.
# 3. Drop the two norms after attention and MLP and train again: `make demo ARGS=--out=out/plain`.
#    Does anything change at this size? (In a run of 150 steps we saw no difference.)
