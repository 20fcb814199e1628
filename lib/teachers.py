"""The frozen teachers of stage 1: SigLIP2 for meaning, DINOv3 (or DINOv2) for texture.

    python train_vit.py --stage=distill --semantic_teacher=FOLDER --texture_teacher=FOLDER

    teacher = load_teacher("siglip2-base-patch16-224", "cuda", torch.bfloat16)
    features = teacher(images, grids)           # (P, teacher.width), the student's patch order

A folder is what Hugging Face publishes: config.json and model.safetensors, in one file or several.
The three families are the same transformer with LayerNorms. They differ in three places, and only
these are written once a family: how a patch gets its position (from a table that is stretched to
the picture, or by rotary angles), which tokens come before the patches (none, a class token,
registers), and how a picture is prepared.

A teacher sees a picture at its own scale and patch size; its grid of features is then resampled to
the student's grid.

Letters: P patches of all images, N images, T tokens (patches and those before them), h, w rows and
columns of patches, p patch side, W width, H heads, C width of a head, R tokens before the patches.

The two families are the paper's [C], which does not say their sizes. Sizes and names are those of
the released checkpoints [R].
"""
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn, Tensor

from kernels import angles, attention, rotary_half, Segments
from lib.cli import UserError
from lib.common import first_sentence
from lib.prefetch import send
from lib.tensors import check_digest, check_shapes, checked, load_tensors
from vit import naflex, patchify

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu,
               "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass
class TeacherConfig:
    """Field names are Hugging Face's. A config.json leaves out its family's defaults; KINDS holds
    those that differ from the ones here."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    num_patches: int = 0           # NaFlex: places in the table of positions; 0: by image_size
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    num_register_tokens: int = 0
    rope_theta: float = 100.0
    mlp_ratio: float = 4           # DINOv2 has this in place of intermediate_size
    use_swiglu_ffn: bool = False   # DINOv2 has this in place of use_gated_mlp
    use_gated_mlp: bool = False
    qkv_bias: bool = True          # DINOv2: one switch for all three
    query_bias: bool = True        # DINOv3: one switch each
    key_bias: bool = True
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True


# ---- the transformer that the families share ----------------------------------------------------

class Attention(nn.Module):
    def __init__(self, c: TeacherConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.q = nn.Linear(c.hidden_size, c.hidden_size, bias=c.query_bias)
        self.k = nn.Linear(c.hidden_size, c.hidden_size, bias=c.key_bias)
        self.v = nn.Linear(c.hidden_size, c.hidden_size, bias=c.value_bias)
        self.o = nn.Linear(c.hidden_size, c.hidden_size, bias=c.proj_bias)

    def forward(self, x, rope, segments):
        q, k, v = (rearrange(proj(x), "t (h c) -> t h c", h=self.heads)
                   for proj in (self.q, self.k, self.v))
        if rope is not None:
            q, k = rotary_half(q, *rope), rotary_half(k, *rope)
        return self.o(rearrange(attention(q, k, v, segments), "t h c -> t (h c)"))


class MLP(nn.Module):
    def __init__(self, c: TeacherConfig):
        super().__init__()
        self.act = ACTIVATIONS[c.hidden_act]
        self.gate = (nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
                     if c.use_gated_mlp else None)
        self.up = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm. The DINOs scale each branch per channel (LayerScale); SigLIP does not."""

    def __init__(self, c: TeacherConfig, scaled: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attn, self.mlp = Attention(c), MLP(c)
        self.scale1, self.scale2 = ((nn.Parameter(torch.ones(c.hidden_size)) for _ in range(2))
                                    if scaled else (1, 1))

    def forward(self, x, rope, segments):
        x = x + self.scale1 * self.attn(self.norm1(x), rope, segments)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Teacher(nn.Module):
    """The transformer and the preparation of pictures. `width` is that of its features; `budget` is
    the number of patches that a picture is resized to."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the DINOs use
    resampling = Image.Resampling.BILINEAR
    kind = "texture"        # what it teaches: semantic or texture
    scaled = True           # LayerScale in its blocks

    def __init__(self, c: TeacherConfig):
        super().__init__()
        self.config, self.width, self.patch_size = c, c.hidden_size, c.patch_size
        self.budget = c.num_patches or (c.image_size // c.patch_size) ** 2
        self.patch = nn.Linear(3 * c.patch_size ** 2, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c, self.scaled) for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def prefix(self) -> Tensor:
        """(R, W): the tokens before the patches; their features are dropped."""
        return self.patch.weight.new_zeros(0, self.width)

    def place(self, grids: list[tuple[int, int]]):
        """The positions of patches: (P, W) to add to the embeddings, or 0; and rotary angles (P,
        C/2), or None."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: list[np.ndarray], grids: Tensor) -> Tensor:
        """Features of the patch tokens after the last norm, on the student's grids.

        images: N arrays (h, w, 3) uint8; grids: (N, 3): 1, rows, columns in the student's patches,
        on the CPU.
        Returns (P, W) fp32 in the student's block-major order, on the teacher's device, without a
        graph. Raises ValueError unless every image has one grid of even sides.
        """
        grids = [tuple(grid) for grid in grids.tolist()]
        if len(grids) != len(images) or any(t != 1 or h % 2 or w % 2 for t, h, w in grids):
            raise ValueError(f"{len(images)} images with the grids {grids}: a teacher takes one "
                             "grid (1, rows, columns) an image, of even sides")
        cut = [patchify(self.resize(image), self.patch_size, merge=1) for image in images]
        own = [(h, w) for _, (_, h, w) in cut]
        features = self.features(torch.from_numpy(np.concatenate([p[:, 0] for p, _ in cut])), own)
        parts = features.float().split([h * w for h, w in own])
        return torch.cat([resample(*each) for each in zip(parts, own, grids)])

    def resize(self, image: np.ndarray) -> np.ndarray:
        """The picture at the teacher's scale: as many whole patches as its budget allows.

        A square picture gets the size of the released preprocessor, without an incomplete patch at
        the border. Other pictures keep their aspect [O]: the preprocessors of fixed-size towers
        squash or crop them, and for a cropped border there would be no features.
        """
        size = naflex(*image.shape[:2], self.patch_size, self.budget)
        if size == image.shape[:2]:
            return image
        return np.asarray(Image.fromarray(image).resize(size[::-1], self.resampling))

    def features(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """(P, 3*p*p) uint8, row by row, and N grids (h, w) -> (P, W) after the last norm."""
        weight = self.patch.weight
        mean, std = (send(torch.tensor(x)[:, None], weight.device) for x in (self.mean, self.std))
        pixels = rearrange(send(patches, weight.device) / 255, "p (c i) -> p c i", c=3)
        pixels = ((pixels - mean) / std).to(weight.dtype)
        added, freqs = self.place(grids)
        x = self.patch(pixels.flatten(1)) + added

        # Each image is its own copy of the tokens before the patches, then its patches.
        prefix, areas = self.prefix(), [h * w for h, w in grids]
        before = len(prefix)
        x = torch.cat([y for part in x.split(areas) for y in (prefix, part)])
        rope = None
        if freqs is not None:  # tokens before the patches have no position: angles of zero
            freqs = torch.cat([F.pad(part, (0, 0, before, 0)) for part in freqs.split(areas)])
            rope = freqs.cos(), freqs.sin()
        lengths = [before + area for area in areas]
        borders = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
        segments = Segments(send(borders, weight.device), causal=False, host=borders)
        for block in self.blocks:
            x = block(x, rope, segments)
        x = self.norm(x)
        return torch.cat([part[before:] for part in x.split(lengths)])


def resample(features: Tensor, own: tuple[int, int], grid: tuple[int, int, int]) -> Tensor:
    """(h*w, W) row by row -> the student's grid, block-major.

    Bilinear; where the student's grid is coarser, a weighted mean over all patches of the teacher
    that lie under one of the student's (`antialias`), so that none is skipped. [O]
    """
    square = rearrange(features, "(h w) c -> 1 c h w", h=own[0])
    square = F.interpolate(square, grid[1:], mode="bilinear", antialias=True)
    return rearrange(square, "1 c (y b) (x d) -> (y x b d) c", b=2, d=2)


# ---- the families -------------------------------------------------------------------------------

def stretch(table: Tensor, grids: list, **interpolation) -> Tensor:
    """A square table of positions (n*n, W), resized to each grid (h, w) -> (P, W)."""
    square = rearrange(table.float(), "(h w) c -> 1 c h w", h=math.isqrt(len(table)))
    made = {grid: F.interpolate(square, grid, align_corners=False, **interpolation)
            for grid in set(grids)}
    return torch.cat([rearrange(made[g], "1 c h w -> (h w) c") for g in grids]).to(table.dtype)


class Siglip(Teacher):
    """SigLIP and SigLIP2 of one size (`siglip_vision_model`): a table of positions, no class token.
    The pooling head is left out: it only serves to compare pictures with texts."""
    mean = std = (0.5, 0.5, 0.5)
    kind = "semantic"
    scaled = False
    interpolation = {"mode": "bicubic"}

    def __init__(self, c: TeacherConfig):
        super().__init__(c)
        self.position = nn.Parameter(torch.zeros(self.budget, c.hidden_size))

    def place(self, grids):
        return stretch(self.position, grids, **self.interpolation), None


class SiglipNaFlex(Siglip):
    """SigLIP2 of any size and shape (`siglip2_vision_model`)."""
    interpolation = {"mode": "bilinear", "antialias": True}


class DinoV2(Teacher):
    """DINOv2 (`dinov2`): a class token, which has a row in the table of positions too.

    The released table is for 518 pixels, but pictures are resized to 224, as in most of its
    training and in its preprocessor.
    """
    resampling = Image.Resampling.BICUBIC
    interpolation = {"mode": "bicubic"}

    def __init__(self, c: TeacherConfig):
        bias = c.qkv_bias
        c = dataclasses.replace(c, query_bias=bias, key_bias=bias, value_bias=bias,
                                use_gated_mlp=c.use_swiglu_ffn,
                                intermediate_size=int(c.hidden_size * c.mlp_ratio))
        if c.use_swiglu_ffn:  # three matrices of two thirds the width have the size of two
            inner = int(c.intermediate_size * 2 / 3)
            c = dataclasses.replace(c, intermediate_size=(inner + 7) // 8 * 8, hidden_act="silu")
        super().__init__(c)
        self.cls = nn.Parameter(torch.zeros(1, c.hidden_size))
        self.position = nn.Parameter(torch.zeros(1 + self.budget, c.hidden_size))
        self.budget = min(self.budget, (224 // c.patch_size) ** 2)

    def prefix(self):
        return self.cls + self.position[:1]

    def place(self, grids):
        return stretch(self.position[1:], grids, **self.interpolation), None


class DinoV2Registers(DinoV2):
    """DINOv2 with registers (`dinov2_with_registers`), which have no row in the table."""
    interpolation = {"mode": "bicubic", "antialias": True}

    def __init__(self, c: TeacherConfig):
        super().__init__(c)
        self.register = nn.Parameter(torch.zeros(c.num_register_tokens, c.hidden_size))

    def prefix(self):
        return torch.cat([super().prefix(), self.register])


class DinoV3(Teacher):
    """DINOv3 (`dinov3_vit`): a class token, registers, and rotary angles in place of a table.

    Positions run from -1 to 1 across the picture, so they mean the same at every size.
    """

    def __init__(self, c: TeacherConfig):
        super().__init__(c)
        self.cls = nn.Parameter(torch.zeros(1, c.hidden_size))
        self.register = nn.Parameter(torch.zeros(c.num_register_tokens, c.hidden_size))

    def prefix(self):
        return torch.cat([self.cls, self.register])

    def place(self, grids):
        c, device = self.config, self.patch.weight.device
        quarter = c.hidden_size // c.num_attention_heads // 4
        made = {}
        for grid in set(grids):
            rows, columns = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in grid)
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            made[grid] = torch.cat([angles(2 * torch.pi * axis.reshape(1, -1), (quarter,),
                                           c.rope_theta) for axis in (y, x)], dim=-1)
        return 0, torch.cat([made[grid] for grid in grids])


# ---- from a Hugging Face folder -----------------------------------------------------------------

KINDS = {
    "siglip_vision_model": (Siglip, {"hidden_act": "gelu_pytorch_tanh"}),
    "siglip2_vision_model": (SiglipNaFlex, {"hidden_act": "gelu_pytorch_tanh",
                                            "num_patches": 256}),
    "dinov2": (DinoV2, {"patch_size": 14}),
    "dinov2_with_registers": (DinoV2Registers, {"num_register_tokens": 4}),
    "dinov3_vit": (DinoV3, {"hidden_size": 384, "intermediate_size": 1536, "key_bias": False,
                            "num_attention_heads": 6, "layer_norm_eps": 1e-5}),
}

# Names of tensors: Hugging Face's, which differ between families and versions of the library, and
# ours. One pattern after the other is replaced, for example in SigLIP2 (after its prefix is cut)
#     vision_model.encoder.layers.3.self_attn.q_proj.weight -> blocks.3.attn.q.weight
#     vision_model.encoder.layers.3.mlp.fc1.bias            -> blocks.3.mlp.up.bias
# and in DINOv2
#     embeddings.patch_embeddings.projection.weight         -> patch.weight
#     encoder.layer.3.attention.output.dense.weight         -> blocks.3.attn.o.weight
# LEFT_OUT is not part of the tower's trunk.
LEFT_OUT = re.compile(r"text_model|logit_|classifier|head\.|embeddings\.(mask_token|position_ids)")
NAMES = tuple((re.compile(pattern), ours) for pattern, ours in (
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch."),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "position"),
    (r"^embeddings\.(cls|register)_tokens?$", r"\1"),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.layer_scale(\d)\.lambda1$", r".scale\1"),
    (r"\.(self_attn|attention)\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\3."),
    (r"\.(self_attn|attention)\.(o_proj|out_proj|output\.dense)\.", ".attn.o."),
    (r"\.mlp\.gate_proj\.", ".mlp.gate."),
    (r"\.mlp\.(fc1|up_proj)\.", ".mlp.up."),
    (r"\.mlp\.(fc2|down_proj|weights_out)\.", ".mlp.down."),
    (r"^(post_layernorm|layernorm)\.", "norm.")))


def renamed(tensors: dict[str, Tensor], flex: bool) -> dict[str, Tensor]:
    """A checkpoint's tensors with our names and shapes. flex: they are of a NaFlex tower."""
    ours = {}
    for name, value in tensors.items():
        name = re.sub(r"^((siglip2?|vision_model|dinov2\w*|dinov3_vit|model)\.)+", "", name)
        if LEFT_OUT.match(name):
            continue
        for pattern, replacement in NAMES:
            name = pattern.sub(replacement, name)
        if ".mlp.weights_in." in name:  # gate and up are stacked in one matrix
            for part, half in zip(("gate", "up"), value.chunk(2)):
                ours[name.replace("weights_in", part)] = half
            continue
        if name == "patch.weight" and value.ndim == 4:  # a convolution without overlap is a matrix
            value = value.flatten(1)
        elif name == "patch.weight" and flex:  # NaFlex orders a patch's pixels with colours last
            value = rearrange(value, "w (i c) -> w (c i)", c=3)
        if name in ("position", "cls", "register"):  # some have a batch dimension of one
            value = value.flatten(0, -2)
        ours[name] = value
    return ours


def load_config(folder) -> tuple[type[Teacher], TeacherConfig]:
    """The class and sizes of the teacher in a folder. Raises UserError if it holds none."""
    path = Path(folder) / "config.json"
    try:
        check_digest(path)
        raw = json.loads(path.read_text(encoding="utf-8"))
        # A whole SigLIP describes its tower in vision_config.
        if raw.get("model_type") in ("siglip", "siglip2"):
            raw = {"model_type": raw["model_type"] + "_vision_model", **raw["vision_config"]}
        kind = raw.get("model_type")
        if kind not in KINDS:
            raise UserError(f"{folder} holds a model of the kind '{str(kind)[:60]}', not a "
                            f"teacher; the kinds known are {', '.join(KINDS)}")
        cls, defaults = KINDS[kind]
        config = checked(TeacherConfig, {**defaults, **raw})
        if config.patch_size > config.image_size:
            raise ValueError(f"no patch of {config.patch_size} fits in {config.image_size} pixels")
        if config.num_patches != math.isqrt(config.num_patches) ** 2:
            raise ValueError(f"num_patches = {config.num_patches} is no square")
        unit = config.num_attention_heads * (4 if cls is DinoV3 else 1)  # 2 axes, pairs of channels
        if config.hidden_size % unit:
            raise ValueError(f"hidden_size {config.hidden_size} is no multiple of {unit}")
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {config.hidden_act}, not {', '.join(ACTIVATIONS)}")
        return cls, config
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no teacher in {folder}: there is no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not describe a teacher ({error})") from None


def load_teacher(folder, device="cpu", dtype=torch.float32) -> Teacher:
    """Open a Hugging Face folder of one of KINDS, or of a whole SigLIP without its text tower.

    Raises UserError on another kind of folder, a damaged file, or weights that do not fit the tower
    that config.json describes.
    """
    cls, config = load_config(folder)
    tensors = load_tensors(folder)
    try:
        tensors = renamed(tensors, cls is SiglipNaFlex)
    except (RuntimeError, IndexError) as error:     # a tensor has too few dimensions, or odd sides
        raise UserError(f"{folder} has no teacher's weights: {first_sentence(error)}") from None
    with torch.device("meta"):
        teacher = cls(config)
    check_shapes(f"{folder}: the weights are not of the tower that config.json describes",
                 teacher.state_dict(), tensors)
    teacher = teacher.to_empty(device=device).to(dtype)
    teacher.load_state_dict(tensors)
    return teacher.eval().requires_grad_(False)


class TowerTeacher:
    """A small tower that train_vit.py has trained itself, called like a Teacher: the stand-in where
    no folder is given. Its patches are the student's, so nothing is resampled."""

    def __init__(self, visual):
        self.visual, self.width = visual.requires_grad_(False), visual.config.hidden_size

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray], grids: Tensor) -> Tensor:
        c = self.visual.config
        patches = [patchify(image, c.patch_size, c.spatial_merge_size)[0] for image in images]
        device = self.visual.post_layernorm.weight.device
        return self.visual(send(torch.from_numpy(np.concatenate(patches)), device), grids)


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade NAME`.
# 1. DinoV3.place: angles from places between -1 and 1. It needs requirements-peers.txt.
#    pytest tests/test_teachers.py -k dinov3; 30 minutes.
# 2. resample: without einops and F.interpolate, for a grid half as fine as the teacher's.
#    pytest tests/test_teachers.py -k student; 20 minutes.
# 3. A fourth family: CLIP's tower (`clip_vision_model`), with a class token, a table with a row for
#    it, and one more norm before the blocks. 60 minutes.
