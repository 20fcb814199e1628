"""Pictures with captions, for the vision tower: a folder, tars, JSONL or parquet.

    pairs = open_pairs("data/cc12m-train-{0000..0099}.tar")
    image, captions = pairs.read(pairs.numbers("train")[0])

In a folder or a tar, a picture has a .txt of the same name beside it, with a caption a line. A line
may begin with its language, as in Tux Paint's stamps:

    A sleeping cat.
    zh_cn.utf8=一只睡着的猫
    de.utf8=Eine schlafende Katze

A JSON object, which is a .json beside the picture, a line of JSONL or a row of parquet, has its
captions as `caption`, `captions` or `text`: a string, a list of them, or either of these by
language, {"en": "A sleeping cat.", "zh": ["一只猫", "一只睡着的猫"]}. Its `image` names the picture.
"""
import functools
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from lib.cli import UserError
from lib.images import BadRecord, Picture
from lib.shards import open_shards, Record, Shards, shuffled
from tasks.base import held

CAPTIONS = "caption", "captions", "text"    # fields of an object that may hold captions
MOST_SKIPPED = 20                           # unusable pairs in a row, until the run ends


class PairSource:
    """Numbered pictures with captions in the wanted languages.

    languages: "en,zh", or "all". A caption that does not say its language is always taken.
    """

    def __init__(self, shards: Shards, languages: str):
        self.shards, self.languages = shards, languages
        self.training = self.numbers("train")

    def numbers(self, split: str) -> np.ndarray:
        """The numbers of the pairs of a split. Of a folder, one file name in five is held out:
        pictures of one name in several folders often show the same thing. Of anything else it is
        one record in fifty, by content. [O]"""
        if self.shards.kind != "pictures":
            return self.shards.numbers(split)
        stems = (Path(name).stem for name in first_names(self.shards))
        test = np.array([held(stem) for stem in stems], bool)
        return np.flatnonzero(test if split != "train" else ~test)

    def order(self, seed: int, i: int) -> int:
        """The number of training sample i: each epoch shows each pair once, in another order."""
        if self.shards.kind != "pictures":
            return self.shards.order(seed, i)
        return int(self.training[shuffled(seed, i, len(self.training))])

    def read(self, n: int) -> tuple[Image.Image, list[str]]:
        """(picture, its captions). Raises BadRecord if either can't be used."""
        record = self.shards[n]
        picture = picture_of(record)
        captions = [text for language, text in captions_of(record) if self.wants(language)]
        if self.shards.kind == "pictures":
            captions = with_folders(captions, Path(record.names[0]).parent)
        if not captions:
            raise BadRecord("no caption", f"{record.where} has none in {self.languages}")
        image = picture.open()
        if max(image.size) > 100 * min(image.size):     # it fits into no budget of patches
            raise BadRecord("long strip", f"{picture} is {image.width} x {image.height} pixels")
        return image, captions

    def wants(self, language: str) -> bool:
        """zh_CN is wanted where zh is."""
        base = language.lower().replace("-", "_").replace("@", "_").partition("_")[0]
        return not base or self.languages == "all" or base in self.languages.split(",")


@functools.lru_cache(maxsize=8)
def open_pairs(spec: str, languages: str = "en,zh") -> PairSource:
    """The pairs of whatever `open_shards` opens. Raises UserError if there is nothing, or nothing
    to train on."""
    pairs = PairSource(open_shards(spec), languages)
    if len(pairs.training) == 0:
        raise UserError(f"--pairs={spec}: all of its {len(pairs.shards)} pairs are held out")
    return pairs


def first_names(shards: Shards) -> list[str]:
    """The name of each record's first file in a folder."""
    folder, = shards.shards
    return [folder.member(folder.members(k)[0]).name for k in range(len(folder))]


# ---- one record ---------------------------------------------------------------------------------

def picture_of(record: Record) -> Picture:
    """The picture beside a record, or the first that it names. Raises BadRecord."""
    if record.pictures:
        return record.pictures[0]
    value = record.value or {}
    name = value.get("image") or value.get("images")
    return record.find(name[0] if isinstance(name, list) and name else name)


def captions_of(record: Record) -> list[tuple[str, str]]:
    """(language or "", caption) for each caption of a record: of its text, or of its fields."""
    found, fields = [], record.value or {}
    for line in (record.text or "").splitlines():
        language, mark, text = line.partition(".utf8=")
        found.append((language, text) if mark else ("", line))
    if not record.text:
        value = next((fields[name] for name in CAPTIONS if fields.get(name) is not None),
                     None)
        by_language = value if isinstance(value, dict) else {"": value}
        for language, texts in by_language.items():
            texts = texts if isinstance(texts, list) else [texts]
            found += [(language, text) for text in texts if isinstance(text, str)]
    return [(language, text.strip()) for language, text in found if text.strip()]


def with_folders(captions: list[str], folder: Path) -> list[str]:
    """The captions of animals/cats/1.txt, and with them the names of its folders:

        ["A sleeping cat."] -> ["A sleeping cat.", "animals cats: A sleeping cat.", "animals cats"]

    Collections are often sorted by kind into folders, and a user asks for a kind by its name alone.
    So a picture also learns its folders' names, before each caption and as often alone, which makes
    a third of the draws the kind alone. [O]
    """
    names = " ".join(folder.parts)
    if not names:
        return captions
    return [*captions, *(f"{names}: {text}" for text in captions),
            *[names] * max(1, len(captions))]


# ---- drawing ------------------------------------------------------------------------------------

def choose_pair(rng, pairs: PairSource, n: int) -> tuple[Image.Image, str, list[BadRecord]]:
    """(picture, one of its captions, what was skipped): of pair n, or of another training pair,
    drawn at random, where that one can't be used. The next one in order is in the same batch
    already, where a contrastive loss would take its caption to be wrong for its own picture.
    Raises UserError after 20 failures in a row.
    """
    skipped = []
    while len(skipped) < MOST_SKIPPED:
        try:
            image, captions = pairs.read(n)
            return image, captions[int(rng.integers(len(captions)))], skipped
        except BadRecord as error:
            skipped.append(error)
        n = int(rng.choice(pairs.training))
    raise UserError(f"--pairs={pairs.shards.spec}: {MOST_SKIPPED} pairs in a row can't be used; "
                    f"the last: {skipped[-1]}")


class Skipped:
    """Counts what was skipped, by kind, and names the first one of each kind."""

    def __init__(self, say=print):
        self.kinds, self.say, self.told = Counter(), say, 0

    def note(self, samples: list):
        """Count what was skipped for these samples: their field `skipped`, if they have one."""
        for sample in samples:
            for error in getattr(sample, "skipped", ()):
                if error.kind not in self.kinds:
                    self.say(f"skipped: {error.kind}: {error}")
                self.kinds[error.kind] += 1

    def latest(self) -> int:
        """How many there were since this was called last."""
        before, self.told = self.told, self.kinds.total()
        return self.told - before

    def summary(self):
        """Say how many of each kind there were."""
        if self.kinds:
            counts = ", ".join(f"{n} times {kind}" for kind, n in self.kinds.most_common())
            self.say(f"skipped {self.kinds.total()} in all: {counts}")
