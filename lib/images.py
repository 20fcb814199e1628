"""Open pictures, resize them, pack them into patches.

Letters: P patches of all images, N images, F frames a patch, p patch side; h, w sides in pixels.
"""
import contextlib
import functools
import io
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from lib.cli import UserError
from lib.common import first_sentence
from vit import fit, naflex, patchify, VitConfig

TURNS = {   # EXIF's orientation: how to turn the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
SIDEWAYS = {TURNS[5], TURNS[6], TURNS[7], TURNS[8]}     # these exchange width and height
HEADER = 2 ** 16        # bytes of a file that are read to learn a picture's size
# Pillow knows more formats. For EPS it runs Ghostscript: a file from the internet must not start a
# program. A format is recognised by the file's content, whatever its name is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "AVIF")
warnings.filterwarnings("ignore", module="PIL")     # it warns of any odd metadata


# ---- pictures -----------------------------------------------------------------------------------

class BadRecord(UserError):
    """A record of somebody's data, or a picture in it, that can't be used.

    kind: a short name to count it by, such as "damaged picture"; detail: one line about this one.
    """

    def __init__(self, kind: str, detail: str):
        # Both, so that it can be sent to another process.
        super().__init__(kind, printable(detail))
        self.kind = kind

    def __str__(self):
        return self.args[1]


def printable(text: str) -> str:
    """A text as one line of valid Unicode without control characters: a file's name may be in
    another encoding, and a text from the internet may hold commands for the terminal."""
    line = " ".join(text.encode("utf-8", "replace").decode().splitlines())
    return re.sub(r"[\0-\x1f\x7f-\x9f]", "?", line)


def read_part(path, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset` on, or fewer where it ends. For small parts, Python's
    own file objects would take several times as long."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Picture:
    """A picture that is not decoded yet: a file, a stretch of a file (of a tar), or its bytes.

    It can be sent to another process. `size` and `open` raise BadRecord if there is no picture, it
    is damaged, or it would unpack to more pixels than Pillow allows.
    """
    source: Path | str | bytes          # where the file is, or the file's bytes
    name: str = ""                      # for messages; "": the path
    offset: int = 0                     # of the stretch in the file, in bytes
    length: int | None = None           # of the stretch; None: the whole file
    frame: int = 0                      # of an animated picture
    known_size: tuple | None = None     # what `size` is, where an index knows it

    def __str__(self):
        if self.name or isinstance(self.source, bytes):
            return self.name or f"a picture of {len(self.source):,} bytes"
        return str(self.source)

    def file(self, most: int | None = None):
        """The picture's bytes as an open file. most: read no more bytes than this of a stretch."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        if self.length is None:
            return open(self.source, "rb")
        length = self.length if most is None else min(self.length, most)
        return io.BytesIO(read_part(self.source, self.offset, length))

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture, from the file's header alone."""
        if self.known_size:
            return self.known_size
        # The start of the file is enough, unless its header is longer or at its end.
        with contextlib.suppress(BadRecord):
            return self._size(HEADER)
        return self._size()

    def _size(self, most: int | None = None) -> tuple[int, int]:
        with self._opened(most) as image:
            return image.size[::-1] if turn_of(image) in SIDEWAYS else image.size

    def open(self) -> Image.Image:
        """The picture, upright, as RGB, with transparent parts in white."""
        with self._opened() as image:
            turn = turn_of(image)
            if self.frame:
                image.seek(self.frame)
            image.load()
            return opaque(image if turn is None else image.transpose(turn))

    def frames(self) -> list["Picture"]:
        """The frames of an animated GIF, WebP or PNG; a still picture is its own only frame."""
        with self._opened() as image:
            count = count_frames(image)
        return [replace(self, frame=k) for k in range(count)] if count > 1 else [self]

    def times(self) -> list[float]:
        """The seconds at which the frames of an animated picture begin, from 0.0 on; [0.0] of a
        still one. A frame that says nothing is shown for a tenth of a second, as browsers do."""
        times = [0.0]
        with self._opened() as image:
            for k in range(count_frames(image) - 1):
                image.seek(k)
                times.append(times[-1] + (image.info.get("duration") or 100) / 1000)
        return times

    @contextlib.contextmanager
    def _opened(self, most: int | None = None):
        """The picture as a Pillow image of which only the header is read. Any error in the `with`
        block becomes a BadRecord."""
        try:
            with self.file(most) as file:
                image = Image.open(file, formats=FORMATS)
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError
                yield image
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadRecord("missing image", f"no picture at {self}") from None
        except Image.DecompressionBombError:
            raise BadRecord("huge picture", f"{self} unpacks to over {Image.MAX_IMAGE_PIXELS:,} "
                            "pixels: refused") from None
        except Exception as error:  # Pillow reports damage by more than ten types of exception
            raise BadRecord("damaged picture",
                            f"{self} can't be read as a picture: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        # ValueError: a name that no file can have
        with contextlib.suppress(OSError, ValueError), self.file() as file:
            if not file.read(1):
                return "it is empty"
        if isinstance(error, UnidentifiedImageError):
            return f"it is in none of the formats {', '.join(FORMATS)}"
        return first_sentence(error)


def count_frames(image: Image.Image) -> int:
    """The number of frames of an animated picture; 1 of any other. What Pillow calls the frames of
    other formats are pages."""
    return getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP", "PNG") else 1


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How to turn a picture upright, by its EXIF block; its pixels need not be read for that.
    ImageOps.exif_transpose would write a new block, which fails where any entry is damaged."""
    if image.format == "TIFF":      # Pillow turns those itself
        return None
    try:
        # The method of the PNG class would read all pixels, to look for a block after them.
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation))
    except Exception:               # a damaged block is taken for none
        return None


def opaque(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as RGB, with transparent parts in white."""
    if image.mode.startswith("I"):      # 16 bits: Pillow's conversion would clip them at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(path) -> Image.Image:
    """Any picture file as an upright RGB image, transparent parts white. Raises UserError with the
    reason if it can't be read."""
    return Picture(path).open()


def any_image(image) -> Image.Image:
    """A picture as a program has it, as an RGB image: a Pillow image, the path of a file, or an
    array (h, w), (h, w, 3) or (h, w, 4) of uint8. A file's picture is turned upright, as
    `open_image` does. Raises UserError for anything else."""
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else 1
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
            raise UserError("a picture as an array is (h, w), (h, w, 3) or (h, w, 4) of uint8, not "
                            f"{image.shape} of {image.dtype}")
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if not isinstance(image, Image.Image):
        raise UserError("a picture is a Pillow image, a path or an array of uint8, not "
                        f"{type(image).__name__}")
    if not all(image.size):
        raise UserError("the picture has no pixels")
    try:
        return opaque(image)
    except (OSError, ValueError) as error:      # a file that ends early, an image that is closed
        raise UserError(f"the picture can't be read: {first_sentence(error)}") from None


# ---- what the model sees ------------------------------------------------------------------------

@dataclass(frozen=True)
class Frames:
    """Two successive frames of a video, which the model sees as one visual run. pairs: how many
    such runs the video has; together they get the visual tokens that one picture may have. [O]"""
    pictures: tuple
    pairs: int = 1


def seen_size(image, config) -> tuple[int, int]:
    """The size (h, w) at which the model sees an Image, a Picture or Frames; pixels are not needed
    for it. Raises BadRecord if one side is more than 200 times the other."""
    v, most = config.vision, config.max_tokens
    if isinstance(image, Frames):
        image, most = image.pictures[0], max(config.min_tokens, most // image.pairs)
    width, height = image.size
    try:
        return fit(height, width, v.patch_size * v.spatial_merge_size, config.min_tokens, most)
    except ValueError as error:
        raise BadRecord("long strip", str(error)) from None


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
    Raises BadRecord as `seen_size` does, or if a Picture can't be read."""
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
    """Images (h, w, 3), or two frames (2, h, w, 3) -> patches (P, F, 3*p*p) uint8, grids (N, 3),
    image after image without padding. F is 2 if any is a video; then stills are doubled."""
    cut = [patchify(image, c.patch_size, c.spatial_merge_size) for image in images]
    frames = max((patches.shape[1] for patches, _ in cut), default=1)
    parts = [np.zeros((0, frames, 3 * c.patch_size ** 2), np.uint8)]    # there may be no image
    for patches, _ in cut:
        parts.append(patches if patches.shape[1] == frames else patches.repeat(frames, 1))
    grids = torch.tensor([grid for _, grid in cut], dtype=torch.long).view(-1, 3)
    return torch.from_numpy(np.concatenate(parts)), grids


def budgeted(image: Image.Image, c: VitConfig, budget: int) -> np.ndarray:
    """An image at NaFlex's size for `budget` patches, (h, w, 3) uint8."""
    unit = c.patch_size * c.spatial_merge_size
    h, w = naflex(image.height, image.width, unit, budget // c.spatial_merge_size ** 2)
    return np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
