"""The samples that train_vit.py learns from; the text tower, and both towers together.

`Pictures` is the stream of `distill`, `LabelledScenes` that of the texture teacher, `Captions` that
of the semantic teacher and of `align`. As in data.py, sample i of a stream is a pure function of
(seed, i), so a resumed run and any number of ranks see the same samples.

Letters: P patches, F frames a patch, p patch side, N images, T caption tokens, W width of the text
tower, E of the common space; h, w sides of a picture in pixels, or of its grid in patches.
"""
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageEnhance
from torch import nn, Tensor

from kernels import angles, Segments
from lib.images import budgeted, pack
from lib.memory import Runner
from lib.pairs import choose_pair, open_pairs
from lib.prefetch import send
from model import Config, Decoder, TextConfig
from tasks import CATEGORIES
from tasks.base import Task
from tasks.draw import CELL, GRID, SHAPES, UNITS
from tasks.driver import make
from tasks.scenes import caption, Item, moving, ShapeAttr, window
from tokenizer import tokenizer_of
from vit import AttentionPool, CogViT, VitConfig


# ---- drawn scenes -------------------------------------------------------------------------------

def scene(seed: int, split: str = "train", single: bool = False, pixels: int = 64):
    """(picture, items): a drawn scene of one to three shapes, or of a `single` one."""
    env = ShapeAttr(Task("shape_attr", seed, 0, split, pixels))
    env.objects = ((1, 1),) if single else env.objects
    return env.reset().images[0], env.items


def clip(seed: int, split: str = "train", pixels: int = 64):
    """(two frames, the one shape in the first frame, the direction in which it moves)"""
    return ShapeAttr(Task("shape_attr", seed, 0, split, pixels)).clip()


def patch_labels(image: Image.Image, items: list[Item], patch: int) -> Tensor:
    """What each patch shows, (P,) int64 in stored order: 1 + the number of the shape that covers
    at least half of the patch, otherwise 0 for the ground. A small star may own no patch."""
    pixels = np.asarray(image).astype(int)
    ground = np.median(pixels.reshape(-1, 3), axis=0)       # most of a scene is its ground
    is_shape = np.abs(pixels - ground).sum(-1) > 60
    covered = rearrange(is_shape, "(y i) (x j) -> y x (i j)", i=patch, j=patch).mean(-1)
    labels = np.zeros(covered.shape, int)
    for item in items:
        # an area is given in coordinates from 0 to 999: here in patches
        x0, y0, x1, y1 = (round(c * len(covered) / 999) for c in item.area)
        labels[y0:y1, x0:x1] = 1 + SHAPES.index(item.shape)
    labels[covered < 0.5] = 0
    return torch.from_numpy(rearrange(labels, "(y b) (x d) -> (y x b d)", b=2, d=2))


@dataclass
class LabelledScenes:
    """The texture teacher's stream: a drawn scene (h, w, 3) and the labels (P,) of its patches."""
    config: Config
    pixels: int
    seed: int = 0

    def __call__(self, i: int) -> tuple[np.ndarray, Tensor]:
        rng = np.random.default_rng([self.seed, i])
        image, items = scene(int(rng.integers(2 ** 31)), pixels=self.pixels)
        return np.asarray(image), patch_labels(image, items, self.config.vision.patch_size)


class PatchClassifier(nn.Module):
    """A tower and a linear head that names what each patch shows: one of the shapes, or ground.

    It has labels so that it knows what a contrastive tower does not. A small tower trained without
    labels (lab/dino.py) did not know it either: two teachers were then no better than one. [O]
    """

    def __init__(self, visual: CogViT):
        super().__init__()
        self.visual, self.head = visual, nn.Linear(visual.config.hidden_size, 1 + len(SHAPES))


# ---- stage 1: pictures of three sources, with a mask --------------------------------------------

KINDS = {  # stage 1's mixture [C], and the categories that represent each source here [O]
    "natural": (0.8, ("shape_attr", "counting", "point")),
    "instruction": (0.1, ("gui_click", "gui_form", "widget_state")),
    "scientific": (0.1, ("chart_read", "geometry", "table_read")),
}


def quality(image: np.ndarray) -> float:
    """Bits of detail in a picture (h, w, 3): the entropy of the differences in brightness between
    neighbouring pixels. Low for flat or blurred pictures, high for sharp and busy ones. [O]"""
    grey = image.mean(-1)
    steps = np.concatenate([np.diff(grey, axis=axis).ravel() for axis in (0, 1)])
    # the share of each of 64 bins, of 8 steps each from -255 to 255
    shares = np.bincount((steps.astype(int) + 255) // 8, minlength=64) / len(steps)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def random_mask(rng, h: int, w: int, share: float, kind: str) -> np.ndarray:
    """Which patches of an (h, w) grid to hide: (h*w,) bool in stored order, exactly that share.

    kind `random` hides each patch by itself; `block` places rectangles, a quarter to half a side
    long, until they cover enough, so that a hidden patch can't be copied from its neighbours. [O]
    """
    n = round(share * h * w)
    order = rng.random((h, w))
    covered = np.zeros((h, w), bool)
    while kind == "block" and covered.sum() < n:
        high, wide = (int(rng.integers(side // 4, side // 2 + 1)) for side in (h, w))
        y, x = int(rng.integers(h - high + 1)), int(rng.integers(w - wide + 1))
        covered[y:y + high, x:x + wide] = True
    # Hide the n patches of highest order. Those in a rectangle get 1 more, so they come first; if
    # the rectangles cover more than n, some of theirs stay visible.
    order += covered
    hidden = np.zeros((h, w), bool)
    hidden.flat[np.argsort(order, axis=None)[h * w - n:]] = True
    return rearrange(hidden, "(y b) (x d) -> (y x b d)", b=2, d=2)


@dataclass
class MaskedPicture:
    """One sample of stage 1: an image (h, w, 3), its hidden patches (P,) bool, its source."""
    image: np.ndarray
    mask: np.ndarray
    source: str
    skipped: list = field(default_factory=list)     # BadRecords passed over for this one


def stack_masks(pictures: list[MaskedPicture]) -> Tensor:
    """The masks of several pictures, one after the other: (P,) bool."""
    return torch.from_numpy(np.concatenate([picture.mask for picture in pictures]))


@dataclass
class Pictures:
    """Stage 1's stream: three sources at 80/10/10 [C]; draws two candidates, keeps the better one.

    side: pixels of the square; mask, share: see `random_mask`; pairs, languages: take `natural`
    from the pictures of these pairs instead.
    """
    config: Config
    side: int
    seed: int = 0
    mask: str = "block"
    share: float = 0.35
    pairs: str = ""
    languages: str = "en,zh"

    def __call__(self, i: int) -> MaskedPicture:
        rng = np.random.default_rng([self.seed, i])
        borders = np.cumsum([share for share, _ in KINDS.values()])
        number = int(np.searchsorted(borders, rng.random(), "right"))
        source = list(KINDS)[min(number, len(KINDS) - 1)]   # rounding may leave the sum below 1
        candidates, skipped = [], []
        for k in range(2):
            if self.pairs and source == "natural":
                pairs = open_pairs(self.pairs, self.languages)
                image, _, missed = choose_pair(rng, pairs, pairs.order(self.seed, 2 * i + k))
                skipped += missed
            else:
                image = self._render(rng, source)
            candidates.append(self._fit(image))
        image = max(map(np.asarray, candidates), key=quality)
        side = self.side // self.config.vision.patch_size
        mask = random_mask(rng, side, side, self.share, self.mask)
        return MaskedPicture(image, mask, source, skipped)

    def _render(self, rng, source: str) -> Image.Image:
        names = KINDS[source][1]
        name, level = names[int(rng.integers(len(names)))], int(rng.integers(2))
        pixels = max(self.side, CATEGORIES[name].env.min_pixels)
        task = Task(name, int(rng.integers(2 ** 31)), level, pixels=pixels)
        return make(task).reset().images[0]

    def _fit(self, image: Image.Image) -> Image.Image:
        square = (self.side, self.side)
        return image if image.size == square else image.resize(square, Image.Resampling.BICUBIC)


# ---- stage 2: pictures and captions -------------------------------------------------------------

def crop(rng, image: Image.Image) -> Image.Image:
    """A random part, 60-100% of each side, brighter or darker by up to 20%. Never mirrored, since
    captions name letters and sides. Without it the tower memorises a few hundred pictures. [O]"""
    w, h = (side * rng.uniform(0.6, 1) for side in image.size)
    x, y = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
    part = image.crop((int(x), int(y), math.ceil(x + w), math.ceil(y + h)))
    return ImageEnhance.Brightness(part).enhance(rng.uniform(0.8, 1.2))


@dataclass
class Pair:
    """A picture, (h, w, 3) or two frames (2, h, w, 3), and the token ids of its caption."""
    image: np.ndarray
    ids: np.ndarray
    skipped: list = field(default_factory=list)     # BadRecords passed over for this one


LANGUAGES = ("en", "zh")
# What a caption says about each shape. If it always said everything, colours and places would
# nearly always tell the pictures of a batch apart, and shapes would not be learnt. [O]
CAPTION_PARTS = (("color", "shape", "place"), ("color", "shape"), ("shape", "place"), ("shape",))
# The same for a shape that moves; the direction is always said.
CLIP_PARTS = (("color", "shape"), ("shape",), ())


def choose(rng, options):
    """One of the options at random."""
    return options[int(rng.integers(len(options)))]


@dataclass
class Captions:
    """Stage 2's stream: scenes with a caption in English or Chinese, or own pairs.

    budgets: numbers of patches; each `batch` of consecutive samples draws one of them (NaFlex [R]).
    clips: the share of the scenes in which a shape moves, in two frames. pairs, languages: for
    `open_pairs`, in place of scenes.
    """
    config: Config
    budgets: tuple
    batch: int
    seed: int = 0
    split: str = "train"
    pixels: int = 64
    pairs: str = ""
    languages: str = "en,zh"
    clips: float = 0.0

    def __post_init__(self):
        self.tokens = tokenizer_of(self.config)

    def __call__(self, i: int) -> Pair:
        rng = np.random.default_rng([self.seed, i])
        # The same for all samples of a batch; no sample has this seed for its own generator.
        batch_rng = np.random.default_rng([self.seed, 2 ** 32, i // self.batch])
        budget = choose(batch_rng, self.budgets)
        if self.pairs:
            pairs = open_pairs(self.pairs, self.languages)
            image, text, skipped = choose_pair(rng, pairs, pairs.order(self.seed, i))
            image = budgeted(crop(rng, image), self.config.vision, budget)
            return Pair(image, self.encode(text), skipped)
        if self.clips and rng.random() < self.clips:
            return self._clip(rng, budget)
        return self._scene(rng, budget)

    def _scene(self, rng, budget: int) -> Pair:
        image, items = scene(int(rng.integers(2 ** 31)), self.split, pixels=self.pixels)
        columns = rows = (0, GRID)
        # At the budget of its own size the scene stays whole and on the grid of patches. If every
        # scene were cropped off that grid, shapes would be learnt much later. [O]
        if budget != (self.pixels // self.config.vision.patch_size) ** 2:
            columns, rows = window(rng, items)
        cell = CELL * self.pixels / UNITS       # pixels of a cell
        image = image.crop((columns[0] * cell, rows[0] * cell, columns[1] * cell, rows[1] * cell))
        language, parts = choose(rng, LANGUAGES), choose(rng, CAPTION_PARTS)
        text = caption(items, (columns, rows), language, parts)
        return Pair(budgeted(image, self.config.vision, budget), self.encode(text))

    def _clip(self, rng, budget: int) -> Pair:
        frames, item, move = clip(int(rng.integers(2 ** 31)), self.split, self.pixels)
        image = np.stack([budgeted(frame, self.config.vision, budget) for frame in frames])
        language, parts = choose(rng, LANGUAGES), choose(rng, CLIP_PARTS)
        return Pair(image, self.encode(moving(item, move, language, parts)))

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a caption, 64 at most."""
        return np.array(self.tokens.encode(text)[:64], np.int32)


@dataclass
class Pairs:
    """A packed batch of stage 2: images of any sizes and their captions, without padding. Sizes and
    borders are needed on the host, and stay on the CPU."""
    patches: Tensor      # (P, F, 3*p*p) uint8, block-major
    grids: Tensor        # (N, 3) int64: 1, height, width in patches
    ids: Tensor          # (T,) int64, the captions one after the other
    cu_seqlens: Tensor   # (N+1,) int32, where each caption begins, and T

    def to(self, device) -> "Pairs":
        return replace(self, patches=send(self.patches, device), ids=send(self.ids, device))


def collate_pairs(pairs: list[Pair], c: VitConfig) -> Pairs:
    """Samples of stage 2 as one packed batch."""
    patches, grids = pack([pair.image for pair in pairs], c)
    ids, cu_seqlens = pack_texts([pair.ids for pair in pairs])
    return Pairs(patches, grids, ids, cu_seqlens)


def pack_texts(texts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Token ids of N captions -> (T,) int64, one caption after the other, and cu_seqlens (N+1,)
    int32, where each begins, and T."""
    borders = np.cumsum([0] + [len(ids) for ids in texts]).astype(np.int32)
    return torch.from_numpy(np.concatenate(texts).astype(np.int64)), torch.from_numpy(borders)


# ---- the models of stage 2 ----------------------------------------------------------------------

class TextTower(nn.Module):
    """The decoder's own blocks with bidirectional attention: one vector a caption, for `align`."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.config, self.trunk = c, Decoder(c)
        self.pool = AttentionPool(c.hidden_size, c.num_attention_heads)

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """ids (T,) of N captions end to end, cu_seqlens (N+1,), on the CPU -> (N, W)"""
        c, lengths = self.config, cu_seqlens.diff().long()
        # Positions restart at 0 with each caption.
        positions = torch.arange(len(ids)) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
        freqs = angles(send(positions[None], ids.device), (c.head_dim // 2,), c.rope_theta)
        rope = freqs.cos(), freqs.sin()
        segments = Segments(send(cu_seqlens, ids.device), causal=False, host=cu_seqlens)
        x = self.trunk.embed_tokens(ids)
        run = Runner(self.trunk.memory.decoder)
        for layer in self.trunk.layers:
            x = run(layer, x, rope, segments)
        return self.pool(self.trunk.norm(x), lengths)


class TwoTowers(nn.Module):
    """Vision and text tower with attention pooling [O] and projections into a common space, which
    has the vision tower's width E: the model of the semantic teacher and of `align`."""

    def __init__(self, visual: CogViT, config: Config):
        super().__init__()
        v, t = config.vision, config.text
        self.visual, self.text = visual, TextTower(t)
        self.pool = AttentionPool(v.hidden_size, v.num_heads)
        self.image_proj = nn.Linear(v.hidden_size, v.hidden_size, bias=False)
        self.text_proj = nn.Linear(t.hidden_size, v.hidden_size, bias=False)
        # SigLIP's start [R]: of B x B pairs only B match, so a bias of -10 says at first that no
        # pair does. From a bias of 0 the first steps would only correct for that imbalance.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def embed(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """Images (N, E) and texts (N, E), fp32 of length one."""
        return (self.embed_images(batch.patches, batch.grids),
                self.embed_texts(batch.ids, batch.cu_seqlens))

    def embed_images(self, patches: Tensor, grids: Tensor) -> Tensor:
        """patches (P, F, 3*p*p) uint8, grids (N, 3) -> (N, E)"""
        pooled = self.pool(self.visual(patches, grids), grids.prod(1))
        return F.normalize(self.image_proj(pooled).float(), dim=-1)

    def embed_texts(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """ids (T,), cu_seqlens (N+1,) -> (N, E)"""
        return F.normalize(self.text_proj(self.text(ids, cu_seqlens)).float(), dim=-1)


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade random_mask`.
# 1. random_mask: blocks, but exactly the share. pytest tests/test_train_vit.py -k mask; 20 minutes.
# 2. Remove CAPTION_PARTS, so that each caption says everything, and run
#    `python train_vit.py --stage=teachers --teachers=semantic`: what becomes of zero_shot? 15 min.
