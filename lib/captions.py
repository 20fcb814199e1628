"""Picture-caption pairs and the text tower."""
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import nn, Tensor

from kernels import angles, Segments
from lib.cli import UserError
from lib.images import budgeted, open_image, pack
from model import Config, Decoder, TextConfig
from tasks.base import held, Task
from tasks.draw import CELL, GRID, UNITS
from tasks.scenes import caption, moving, ShapeAttr, window
from tokenizer import Tokenizer
from vit import AttentionPool, VitConfig


def scene(seed: int, split: str = "train", lone: bool = False, pixels: int = 64):
    """(picture, items) of a scene of one to three things, or of a lone one."""
    env = ShapeAttr(Task("shape_attr", seed, 0, split, pixels))
    env.objects = ((1, 1),) if lone else env.objects
    return env.reset().images[0], env.items


def clip(seed: int, split: str = "train", pixels: int = 64):
    """(two frames, the lone thing in the first, where it goes)"""
    return ShapeAttr(Task("shape_attr", seed, 0, split, pixels)).clip()


@functools.lru_cache(maxsize=8)
def find_pairs(folder: str, split: str) -> tuple[list[Path], int]:
    """(pictures beside a .txt of the same name, how many stand alone), sorted; of all names one
    in five is held out. Raises UserError where there are none."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--pairs={folder}: there is no such folder")
    kinds = {".png", ".jpg", ".jpeg", ".webp"}
    pictures = sorted(p for p in root.rglob("*") if p.suffix.lower() in kinds)
    texts = {p.with_suffix("") for p in root.rglob("*.txt")}
    paired = [p for p in pictures if p.with_suffix("") in texts]
    alone = len(pictures) - len(paired) + len(texts - {p.with_suffix("") for p in paired})
    chosen = [p for p in paired if held(p.stem) == (split != "train")]
    if not chosen:
        raise UserError(f"--pairs={folder} holds no picture with a .txt beside it" + (
            f" for {split}: of {len(paired)} none falls to it" if paired else ""))
    return chosen, alone


def read_captions(path: Path, folder: str) -> list[str]:
    """What may be said of a picture: the lines of its caption file in English and Chinese. A line
    may begin with a language, `zh_cn.utf8=`. Raises UserError where there is nothing to say, or
    another encoding than UTF-8.

    Collections are often sorted by kind, and who asks for a kind says nothing else. So where there
    are folders, each line comes alone, behind their names, and once the names come without it. [O]
    """
    above = " ".join(path.parent.relative_to(folder).parts)
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8") from None
    for line in lines:
        language, mark, text = line.partition(".utf8=")
        text = text if mark else line
        if text.strip() and (not mark or language.startswith(("en", "zh"))):
            found.append(text.strip())
    if not found and not above:
        raise UserError(f"{path} holds no caption in English or Chinese")
    kinds = [above] * max(1, len(found)) if above else []
    return [*found, *(f"{above}: {line}" for line in found if above), *kinds]


def read_pair(path: Path, folder: str) -> tuple[Image.Image, list[str]]:
    """(picture, what may be said of it). Raises UserError or OSError where it can't be used."""
    image = open_image(path)
    if max(image.size) > 100 * min(image.size):     # no budget has room for such a strip
        raise UserError(f"{path} is {image.width} x {image.height} pixels")
    return image, read_captions(path.with_suffix(".txt"), folder)


def draw_pair(rng, folder: str, split: str) -> tuple[Image.Image, str, int]:
    """(picture, caption, how many were passed over: corrupt, strips, without a caption). Raises
    UserError after 20."""
    paths, _ = find_pairs(folder, split)
    for skipped in range(20):
        path = paths[int(rng.integers(len(paths)))]
        try:
            image, lines = read_pair(path, folder)
        except (UserError, OSError) as error:
            reason = error
            continue
        return image, lines[int(rng.integers(len(lines)))], skipped
    raise UserError(f"--pairs={folder}: 20 pictures in a row can't be read; the last: {reason}")


def crop(rng, image: Image.Image) -> Image.Image:
    """A random part, 60-100% of each side, brighter or darker by up to 20%. Never reflected, as
    captions name letters and sides. Without it a few hundred pictures are soon known by heart. [O]
    """
    w, h = (side * rng.uniform(0.6, 1) for side in image.size)
    x, y = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
    part = image.crop((int(x), int(y), math.ceil(x + w), math.ceil(y + h)))
    return ImageEnhance.Brightness(part).enhance(rng.uniform(0.8, 1.2))


@dataclass
class Pair:
    """A picture, (h, w, 3) or two frames (2, h, w, 3), and the ids of its caption."""
    image: np.ndarray
    ids: np.ndarray
    skipped: int = 0


# What a caption tells of each thing. Were it always everything, colours and places would nearly
# always tell the pictures of a batch apart, and shapes would not be learnt. [O]
TOLD = (("color", "shape", "place"), ("color", "shape"), ("shape", "place"), ("shape",))


MOVED = (("color", "shape"), ("shape",), ())    # of what moves, likewise: where it goes in any case


@dataclass
class Captions:
    """Stage 2's stream: scenes with a caption in English or Chinese, or the pairs of a folder.

    budgets: patches an image may have, drawn anew for each `batch` consecutive samples (NaFlex).
    clips: the share of the scenes in which a thing moves, in two frames.
    """
    config: Config
    budgets: tuple
    batch: int
    seed: int = 0
    split: str = "train"
    pixels: int = 64
    folder: str = ""
    clips: float = 0.0

    def __post_init__(self):
        self.tokens = Tokenizer(self.config.n_ranks)

    def __call__(self, i: int) -> Pair:
        rng = np.random.default_rng([self.seed, i])
        of_batch = np.random.default_rng([self.seed, 2 ** 32, i // self.batch])
        budget, skipped = self.budgets[int(of_batch.integers(len(self.budgets)))], 0
        if self.folder:
            image, text, skipped = draw_pair(rng, self.folder, self.split)
            image = crop(rng, image)
        elif self.clips and rng.random() < self.clips:
            frames, *what = clip(int(rng.integers(2 ** 31)), self.split, self.pixels)
            image = np.stack([budgeted(frame, self.config.vision, budget) for frame in frames])
            language, told = (of[int(rng.integers(len(of)))] for of in (("en", "zh"), MOVED))
            return Pair(image, self.encode(moving(*what, language, told)))
        else:
            image, items = scene(int(rng.integers(2 ** 31)), self.split, pixels=self.pixels)
            # At its own size the scene stays whole: off the grid of patches shapes come late.
            natural = (self.pixels // self.config.vision.patch_size) ** 2
            spans = ((0, GRID), (0, GRID)) if budget == natural else window(rng, items)
            unit = CELL * self.pixels / UNITS
            (x0, x1), (y0, y1) = [[edge * unit for edge in span] for span in spans]
            image = image.crop((x0, y0, x1, y1))
            language, told = ("en", "zh")[int(rng.integers(2))], TOLD[int(rng.integers(len(TOLD)))]
            text = caption(items, spans, language, told)
        return Pair(budgeted(image, self.config.vision, budget), self.encode(text), skipped)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a caption, 64 at most."""
        return np.array(self.tokens.encode(text)[:64], np.int32)


@dataclass
class Pairs:
    """A packed batch of stage 2: images of any sizes and their captions, nothing padded."""
    patches: Tensor      # (P, F, 3*p*p) uint8, block-major
    grids: Tensor        # (N, 3) int64: 1, height, width in patches
    ids: Tensor          # (T,) int64, the captions one behind the other
    cu_seqlens: Tensor   # (N+1,) int32, their borders

    def to(self, device) -> "Pairs":
        return Pairs(**{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


def collate_pairs(pairs: list[Pair], c: VitConfig) -> Pairs:
    return Pairs(*pack([pair.image for pair in pairs], c), *pack_texts([p.ids for p in pairs]))


def pack_texts(texts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Ids of N captions -> (T,) one behind the other, their borders (N+1,)"""
    borders = np.cumsum([0] + [len(ids) for ids in texts]).astype(np.int32)
    return torch.from_numpy(np.concatenate(texts).astype(np.int64)), torch.from_numpy(borders)


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
