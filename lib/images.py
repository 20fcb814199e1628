"""Open pictures, resize them, pack them into patches.

Letters: P patches of all images, N images, F frames a patch, p patch side; h, w sides in pixels.
"""
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from lib.cli import UserError
from lib.common import first_sentence
from vit import fit, naflex, patchify, VitConfig


TURNS = {   # EXIF's orientation: how to turn the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def open_image(path) -> Image.Image:
    """Any picture file as an upright RGB image, transparent parts white. Raises UserError with the
    reason if it can't be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no picture at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # Pillow warns of any odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = upright(Image.open(path))
            if image.mode.startswith("I"):     # 16 bits: Pillow's conversion clips them at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path} unpacks to over {Image.MAX_IMAGE_PIXELS:,} pixels: "
                        "refused") from None
    except Exception as error:  # Pillow reports damage by more than ten types of exception
        reason = "it is empty" if path.stat().st_size == 0 else first_sentence(error)
        raise UserError(f"{path} can't be read as a picture: {reason}") from None


def upright(image: Image.Image) -> Image.Image:
    """The picture, turned as its EXIF block says. ImageOps.exif_transpose would also write a new
    block, which fails where any other entry is damaged."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:           # a damaged block says nothing
        turn = None
    return image if turn is None else image.transpose(turn)


@dataclass(frozen=True)
class Frames:
    """Two successive frames of a video, which the model sees as one visual run. pairs: how many
    such runs the video has; together they get the visual tokens that one picture may have. [O]"""
    pictures: tuple
    pairs: int = 1


def seen_size(image, config) -> tuple[int, int]:
    """The size (h, w) at which the model sees an Image, a Picture or Frames; pixels are not needed
    for it. Raises UserError if one side is more than 200 times the other."""
    v, most = config.vision, config.max_tokens
    if isinstance(image, Frames):
        image, most = image.pictures[0], max(config.min_tokens, most // image.pairs)
    width, height = image.size
    try:
        return fit(height, width, v.patch_size * v.spatial_merge_size, config.min_tokens, most)
    except ValueError as error:
        raise UserError(str(error)) from None


def load(image, h: int, w: int) -> np.ndarray:
    """The pixels of an Image or a Picture at this size, (h, w, 3) uint8; of Frames (2, h, w, 3)."""
    if isinstance(image, Frames):
        return np.stack([load(frame, h, w) for frame in image.pictures])
    image = image if isinstance(image, Image.Image) else image.open()
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def resize(image, config) -> np.ndarray:
    """An Image, a Picture or Frames at the size the model sees it: (h, w, 3) or (2, h, w, 3) uint8.
    Raises UserError as `seen_size` does, or if a Picture can't be read."""
    return load(image, *seen_size(image, config))


class Unread:
    """The pixels of a Picture or of Frames that are not loaded yet, in place of an array of uint8.

    Everything about a batch but the pixels can be computed from `shape`, (h, w, 3) or (2, h, w, 3).
    np.asarray(unread) loads them. If the file turns out to be damaged then, the pixels are grey and
    `damage` says why: it is too late to take another sample, and other ranks wait for this one.
    """

    def __init__(self, image, height: int, width: int):
        self.image, self.damage = image, ""
        self.shape = (height, width, 3)
        if isinstance(image, Frames):
            self.shape = (len(image.pictures), *self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        try:
            return load(self.image, *self.shape[-3:-1])
        except (UserError, OSError) as error:
            self.damage = str(error)
            return np.full(self.shape, 128, np.uint8)


def pack(images: list, c: VitConfig) -> tuple[Tensor, Tensor]:
    """Images (h, w, 3), or two frames (2, h, w, 3) -> patches (P, F, 3*p*p) uint8, grids (N, 3), an
    image after the other without padding. F is 2 if any is a video; stills then repeat theirs."""
    cut = [patchify(image, c.patch_size, c.spatial_merge_size) for image in images]
    frames = max((patches.shape[1] for patches, _ in cut), default=1)
    rows = [np.zeros((0, frames, 3 * c.patch_size ** 2), np.uint8)]     # a batch may be empty
    for patches, _ in cut:
        rows.append(patches if patches.shape[1] == frames else patches.repeat(frames, 1))
    grids = torch.tensor([grid for _, grid in cut], dtype=torch.long).view(-1, 3)
    return torch.from_numpy(np.concatenate(rows)), grids


def budgeted(image: Image.Image, c: VitConfig, budget: int) -> np.ndarray:
    """An image at NaFlex's size for `budget` patches, (h, w, 3) uint8."""
    unit = c.patch_size * c.spatial_merge_size
    h, w = naflex(image.height, image.width, unit, budget // c.spatial_merge_size ** 2)
    return np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
