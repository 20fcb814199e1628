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
import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from common import UserError, check_shapes, load_tensors, save_tensors, write_json
from kernels import Segments, angles, attention, rotary_pairs, swiglu
from tokenizer import SPECIAL, Tokenizer
from vit import AttentionPool, CogViT, MEAN, RMSNorm, STD, VitConfig


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


class Cache:
    """Keys and values of S conversations side by side, each in its own slot.

    keys, values: (layers, S, G, context, C). `length` (S,): tokens held; `position` (S,): the
    M-RoPE position of the next text token, which falls behind `length` by what images save.
    Going back in a conversation is setting these two integers back.
    """

    def __init__(self, config: Config, slots: int, context: int, device, dtype, layers: int = 0):
        c = config.text
        shape = (layers or c.num_hidden_layers, slots, c.num_key_value_heads, context, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)
        self.position = torch.zeros(slots, dtype=torch.long, device=device)

    def fill(self, first: int, cu_seqlens: Tensor, which: Tensor | None = None) -> "Prefill":
        """For a forward over whole prompts, kept in the slots from `first` on: each in its own, or
        document which[i] in slot first + i, so that several slots go on from one."""
        if which is None:
            which = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
        lengths, end = cu_seqlens.diff().long()[which], first + len(which)
        self.length[first:end] = lengths
        slot = torch.repeat_interleave(torch.arange(first, end, device=lengths.device), lengths)
        place = torch.arange(len(slot), device=lengths.device)
        place = place - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        begin = torch.repeat_interleave(cu_seqlens[:-1].long()[which], lengths)
        return Prefill(self, slot, place, begin + place)

    def extend(self, slots: int, n: int) -> "Extend":
        """For a forward over n new tokens in each of the first `slots` slots."""
        return Extend(self, slots, n)

    def move(self, source: int, target: int):
        """Put slot `source` in the place of slot `target`."""
        held = int(self.length[source])
        for store in (self.keys, self.values):
            store[:, target, :, :held] = store[:, source, :, :held]
        self.length[target] = self.length[source]
        self.position[target] = self.position[source]


class Prefill:
    """Attention inside the prompts themselves; keys and values are kept on the way: those of row
    token[i] of the batch in slot[i] at place[i]."""

    def __init__(self, cache, slot, place, token):
        self.cache, self.slot, self.place, self.token = cache, slot, place, token

    def attend(self, layer, q, k, v, segments):
        self.cache.keys[layer, self.slot, :, self.place] = k[self.token]
        self.cache.values[layer, self.slot, :, self.place] = v[self.token]
        return attention(q, k, v, segments)


class Extend:
    """Attention of n new tokens a slot over the slot's whole past; (S*n, H, C) rows in and out."""

    def __init__(self, cache, slots, n):
        self.cache, self.slots, self.n = cache, slots, n
        held = cache.length[:slots]
        device = held.device
        self.reach = int(held.max()) + n
        self.row = torch.arange(slots, device=device)[:, None]
        self.place = held[:, None] + torch.arange(n, device=device)  # (S, n)
        later = torch.arange(self.reach, device=device) > self.place[:, :, None]
        self.mask = torch.zeros(later.shape, device=device, dtype=cache.keys.dtype)
        self.mask = self.mask.masked_fill(later, float("-inf"))[:, None]  # (S, 1, n, reach)
        held += n

    def attend(self, layer, q, k, v, segments):
        cache = self.cache
        q, k, v = (rearrange(x, "(s n) h c -> s n h c", n=self.n) for x in (q, k, v))
        cache.keys[layer, self.row, :, self.place] = k
        cache.values[layer, self.row, :, self.place] = v
        keys = cache.keys[layer, :self.slots, :, :self.reach]
        values = cache.values[layer, :self.slots, :, :self.reach]
        repeat = q.shape[2] // keys.shape[1]
        q = rearrange(q, "s n (g r) c -> s g (r n) c", r=repeat) * q.shape[-1] ** -0.5
        scores = q @ keys.mT  # no copy: slots and heads lie evenly in memory
        scores = (scores.unflatten(2, (repeat, self.n)) + self.mask[:, :, None]).flatten(2, 3)
        out = scores.softmax(-1) @ values
        return rearrange(out, "s g (r n) c -> (s n) (g r) c", n=self.n)


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


class TextTower(nn.Module):
    """The decoder's own blocks, here looking both ways: one vector a caption, for `align`."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.config, self.trunk = c, Decoder(c)
        self.pool = AttentionPool(c.hidden_size, c.num_attention_heads)

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """ids (T,) of N captions end to end, cu_seqlens (N+1,) -> (N, W)"""
        c, lengths = self.config, cu_seqlens.diff().long()
        place = torch.arange(len(ids), device=ids.device)
        place = place - torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
        freqs = angles(place[None], (c.head_dim // 2,), c.rope_theta)
        rope, segments = (freqs.cos(), freqs.sin()), Segments(cu_seqlens, causal=False)
        x = self.trunk.embed_tokens(ids)
        for layer in self.trunk.layers:
            x = layer(x, rope, segments)
        return self.pool(self.trunk.norm(x), lengths)


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

    def see(self, batch) -> Tensor | None:
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
        segments = None if isinstance(cache, Extend) else Segments(batch.cu_seqlens, causal=True)
        for i in range(c.text.num_hidden_layers):  # an MTP layer may follow; it is not the trunk's
            x = decoder.layers[i](x, rope, segments, i, cache)
        return decoder.norm(x)

    # ---- loading and saving, GLM-OCR's folder ---------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32) -> "GLMV":
        """Open a folder of config.json and model.safetensors. Raises UserError if they disagree."""
        config, tensors = load_config(folder), load_tensors(folder)
        extra = f"model.language_model.layers.{config.text.num_hidden_layers}."
        tensors = {k: v for k, v in tensors.items() if not k.startswith(extra)}  # an MTP layer
        with torch.device("meta"):
            model = cls(config)
        check_shapes(f"{folder}: the weights are not of the model that config.json describes",
                     model.state_dict(), tensors)
        model = model.to_empty(device=device).to(dtype)
        model.load_state_dict(tensors, strict=True)
        model.model.visual.patch_embed.set_normalisation()
        return model

    def save_pretrained(self, folder, dtype=torch.float32, weights=None):
        """Write config.json, preprocessor_config.json and model.safetensors; `weights` replaces
        the model's own values (an optimizer's fp32 masters)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {**self.state_dict(), **(weights or {})}
        save_tensors(folder / "model.safetensors", {k: v.to(dtype) for k, v in state.items()})
        ahead = len(self.model.language_model.layers) > self.config.text.num_hidden_layers
        config = self.config if ahead else dataclasses.replace(self.config, mtp_depths=0)
        save_config(config, folder, str(dtype)[6:])

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


def tower_of(folder) -> dict[str, Tensor]:
    """The weights of a tower, without its adapter, from a folder of train_vit.py or of a whole
    model. Raises UserError where the folder holds none."""
    tensors = load_tensors(folder)
    prefix = next((p for p in ("ema.visual.", "visual.", "model.visual.")
                   if p + "post_layernorm.weight" in tensors), None)
    if prefix is None:
        raise UserError(f"{folder} holds no vision tower")
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v for k, v in found.items() if not k.startswith(("downsample.", "merger."))}


def load_tower(visual: CogViT, folder):
    """Fill a tower, not its adapter. Raises UserError where the folder's is of other sizes."""
    have = tower_of(folder)
    want = {k: v for k, v in visual.state_dict().items()
            if not k.startswith(("downsample.", "merger."))}
    check_shapes(f"the tower in {folder} is not of this model's sizes", want, have)
    visual.load_state_dict(have, strict=False)


def keep_tower(folder: Path, to: Path):
    """Write the tower of a checkpoint of train_vit.py, alone and in bf16, as its own folder."""
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "config.json", to)
    save_tensors(to / "model.safetensors", {
        f"visual.{name}": value.bfloat16() for name, value in tower_of(folder).items()})


def save_config(config: Config, folder, dtype: str = "float32"):
    """config.json and preprocessor_config.json as GLM-OCR's, ours marked `nanoglmv`."""
    c, v = config.text, config.vision
    marks = {name: i for i, name in enumerate(SPECIAL, config.n_ranks)}
    text = dataclasses.asdict(c) | {
        "model_type": "glm_ocr_text", "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": False, "dtype": dtype, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta,
                            "partial_rotary_factor": 1.0, "mrope_section": list(config.sections)}}
    text.pop("rope_theta")
    if config.mtp_depths:
        text["num_nextn_predict_layers"] = 1        # one physical layer, whatever the depth
    if config.n_ranks:
        text["eos_token_id"] = [marks[s] for s in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    ids = {"image_token_id": config.image_token_id}
    if config.n_ranks:
        ids |= {"video_token_id": marks["<|video|>"],
                "image_start_token_id": marks["<|begin_of_image|>"],
                "image_end_token_id": marks["<|end_of_image|>"],
                "video_start_token_id": marks["<|begin_of_video|>"],
                "video_end_token_id": marks["<|end_of_video|>"]}
    vision = dataclasses.asdict(v) | {"model_type": "glm_ocr_vision", "hidden_act": "silu"}
    write_json(Path(folder) / "config.json", {
        "architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr", **ids,
        "tie_word_embeddings": False, "dtype": dtype, "text_config": text,
        "vision_config": vision,
        "nanoglmv": {"n_ranks": config.n_ranks, "mtp_depths": config.mtp_depths}})
    pixels = v.temporal_patch_size * (v.patch_size * v.spatial_merge_size) ** 2
    write_json(Path(folder) / "preprocessor_config.json", {
        "size": {"shortest_edge": config.min_tokens * pixels,
                 "longest_edge": config.max_tokens * pixels},
        "patch_size": v.patch_size, "temporal_patch_size": v.temporal_patch_size,
        "merge_size": v.spatial_merge_size, "do_rescale": True,
        "image_mean": list(MEAN), "image_std": list(STD)})


def load_config(folder) -> Config:
    """Read config.json (and preprocessor_config.json, if it is there)."""
    def known(kind, values):
        names = {f.name for f in dataclasses.fields(kind)} & values.keys()
        return kind(**{name: values[name] for name in names})
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rope = raw["text_config"].get("rope_parameters") or {}
        text, ours = known(TextConfig, raw["text_config"]), raw.get("nanoglmv", {})
        text.rope_theta = float(rope.get("rope_theta", text.rope_theta))
        config = Config(text, known(VitConfig, raw["vision_config"]), raw["image_token_id"],
                        n_ranks=ours.get("n_ranks", 0), mtp_depths=ours.get("mtp_depths", 0))
        config.mrope = tuple(rope["mrope_section"]) if "mrope_section" in rope else None
        extra = path.with_name("preprocessor_config.json")
        if extra.exists():
            size = json.loads(extra.read_text(encoding="utf-8"))["size"]
            v = config.vision
            pixels = v.temporal_patch_size * (v.patch_size * v.spatial_merge_size) ** 2
            config.min_tokens = max(1, size["shortest_edge"] // pixels)
            config.max_tokens = size["longest_edge"] // pixels
        return config
    except FileNotFoundError:
        raise UserError(f"no config.json in {folder}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a GLM-OCR config.json ({error!r})") from None


# Exercises. Delete the body, write it again, run the test.
# 1. rope_positions. pytest tests/test_model.py -k positions_by_hand; 30 minutes.
# 2. Extend.__init__ and .attend: n new tokens a slot over the slot's past.
#    pytest tests/test_model.py -k cached; 45 minutes.
# 3. Drop the two norms after attention and MLP and train again: `make demo ARGS=--out=out/plain`.
#    Does anything change at this size? (In a run of 150 steps we saw no difference.)
