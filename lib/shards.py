"""The data that people have, as numbered records that are read when they are needed.

    shards = open_shards("data/shard-{000..063}.tar")
    record = shards[123]                    # a Record: .value, .text, .pictures, .find(name)
    train = shards.numbers("train")         # the numbers of the records that are not held out
    n = shards.order(seed, i)               # the number of sample i: each epoch in another order

What open_shards takes, as a file, a glob, a range {000..063}, or a .list or .txt file that names
one of these a line:

    .jsonl, .json   one JSON object a line; or one list of objects, as LLaVA is published
    .tar            webdataset shards: 000017.jpg with 000017.txt or 000017.json
    .parquet        as hubs keep data sets; needs pyarrow
    folder          of such files; of pictures with a .txt or .json of the same name; or, where
                    there is no picture, of text and source files

One record in fifty is held out for evaluation. A checksum of its content decides (of the picture
that lies beside it, otherwise of the text), so that equal records are on one side, and moving or
renaming files changes nothing. [O]

Records are read in a shuffled order, from anywhere in the files: a disk has to allow that.

A record that can't be used raises BadRecord, which whoever reads counts by its kind; UserError is
for what leaves nothing to read. What was noticed while an index was made, such as a tar that is cut
off, is in `shards.notes`.
"""
import glob
import hashlib
import itertools
import json
import math
import re
from bisect import bisect_right
from pathlib import Path

import numpy as np

from lib.cli import UserError
from lib.images import BadRecord
from lib.index import SUFFIX
from lib.parquet import Parquet
from lib.records import files_below, Folder, Lines, PICTURES, Record, Tar, TextFolder, TEXTS

# ---- all shards ---------------------------------------------------------------------------------

READERS = {".jsonl": Lines, ".ndjson": Lines, ".json": Lines, ".tar": Tar, ".parquet": Parquet}
KINDS = {Lines: "jsonl", Tar: "tar", Parquet: "parquet", Folder: "pictures", TextFolder: "text"}
UNPACK = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd",
          ".zip": "unzip"}


class Shards:
    """The records of all shards, numbered from 0. It can be sent to another process.

    kind: "jsonl", "tar", "parquet", "pictures" or "text"; notes: lines for the log about what was
    noticed, such as a damaged shard; digest: equal on two machines that have the same shards.
    """

    def __init__(self, spec: str, shards: list):
        self.spec, self.shards, self.kind = spec, shards, KINDS[type(shards[0])]
        self.notes = [note for shard in shards for note in shard.index.notes]
        self.ends = list(itertools.accumulate(map(len, shards)))    # the number after each shard's
        self.digest = digest_of(shards)
        self.orders: dict[tuple, Order] = {}
        if len(self) == 0:
            raise UserError("; ".join([f"{spec} has no record", *self.notes]))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, n: int) -> Record:
        """Record n. Raises BadRecord if it can't be read or used."""
        if not 0 <= n < len(self):
            raise IndexError(f"record {n} of {len(self)}")
        s = bisect_right(self.ends, n)
        try:
            return self.shards[s][int(n) - self.ends[s] + len(self.shards[s])]
        except OSError as error:        # a file that has been removed, a disk that is damaged
            raise BadRecord("unreadable file", str(error)) from None

    def numbers(self, split: str) -> np.ndarray:
        """The numbers of the records of a split, `train` or `test`, in order, int64. The test split
        may be empty; the training split never is. The split `all` is both."""
        if split == "all":
            return np.arange(len(self))
        held = np.concatenate([shard.index["held"] for shard in self.shards]).astype(bool)
        if held.all():
            held[:] = False
        return np.flatnonzero(held if split == "test" else ~held)

    def order(self, seed: int, i: int, split: str = "train") -> int:
        """The number of sample i: an endless sequence that shows each record of the split once an
        epoch, in another order each time. A pure function of its arguments.

        Rows of parquet are shuffled within a row group, and the row groups among each other: to
        read a row is to read its group.
        """
        if (seed, split) not in self.orders:
            self.orders[seed, split] = Order(self, seed, split)
        return self.orders[seed, split](i)

    def __getstate__(self):
        return self.__dict__ | {"orders": {}}       # they can be made again


def digest_of(shards: list) -> str:
    """A checksum over names, sizes in bytes and numbers of records, for ranks to compare."""
    # Of a stamp neither the version of our format nor the time of the last change, which differs
    # between copies.
    parts = [[shard.path.name, *shard.index.stamp[1:-1], len(shard)] for shard in shards]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Order:
    """The order of the records of a split: see Shards.order. The records are in blocks: those of
    parquet are its row groups, of anything else there is only one."""

    def __init__(self, shards: Shards, seed: int, split: str):
        numbers, self.seed = shards.numbers(split), seed
        self.count, self.blocks = len(numbers), [numbers]
        if shards.kind == "parquet":
            firsts = [shard.index["first"][:-1] + end - len(shard)
                      for shard, end in zip(shards.shards, shards.ends)]
            borders = np.searchsorted(numbers, np.concatenate(firsts))
            self.blocks = [block for block in np.split(numbers, borders) if len(block)]
        self.shown = self._epoch(0)

    def _epoch(self, epoch: int) -> tuple[int, list, list]:
        """(epoch, its blocks in their order, the place after each block)"""
        count = len(self.blocks)
        blocks = [self.blocks[shuffled(self.seed, epoch * count + j, count)] for j in range(count)]
        return epoch, blocks, list(itertools.accumulate(map(len, blocks)))

    def __call__(self, i: int) -> int:
        epoch, place = divmod(i, self.count)
        shown = self.shown              # another thread may be in another epoch
        if shown[0] != epoch:
            shown = self.shown = self._epoch(epoch)
        _, blocks, ends = shown
        j = bisect_right(ends, place)
        length = len(blocks[j])
        inside = place - ends[j] + length
        return int(blocks[j][shuffled(self.seed, epoch * length + inside, length)])


# ---- what a spec names --------------------------------------------------------------------------

def open_shards(spec: str) -> Shards:
    """Open the data that `spec` names; see the top of this file. An index is made the first time.
    Raises UserError where nothing can be read."""
    if not spec.strip():
        raise UserError("the path of the data is empty")
    if Path(spec).is_dir():
        return open_folder(Path(spec))
    return open_files(spec, expand(spec))


def open_files(spec: str, paths: list[Path]) -> Shards:
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in UNPACK:
            raise UserError(f"{path} is compressed, and records are read from anywhere in a file: "
                            f"unpack it first, {UNPACK[suffix]} {path.name}")
        if suffix not in READERS:
            raise UserError(f"{path}: files that end in '{suffix}' can't be read here; it takes "
                            f"{', '.join(READERS)} files and folders")
    readers = {READERS[path.suffix.lower()] for path in paths}
    if len(readers) > 1:
        raise UserError(f"{spec} names files of several kinds: "
                        f"{', '.join(sorted(KINDS[reader] for reader in readers))}")
    reader, = readers
    return Shards(spec, [reader(path) for path in paths])


def open_folder(folder: Path) -> Shards:
    """A folder of shards, else of pictures, else of text."""
    files = files_below(folder)
    shards = [file for file in files
              if file.parent == folder and file.suffix.lower() in (".tar", ".parquet", ".jsonl")]
    if shards:
        return open_files(str(folder), shards)
    suffixes = {file.suffix.lower() for file in files}
    for kinds, reader in ((PICTURES, Folder), (TEXTS, TextFolder)):
        if suffixes & kinds:
            return Shards(str(folder), [reader(folder, files)])
    raise UserError(f"{folder} has neither shards nor pictures nor text")


def expand(spec: str) -> list[Path]:
    """The files that a spec names, itself or as a list. Raises UserError where one is missing."""
    path = Path(spec)
    if path.suffix.lower() in (".list", ".txt") and path.is_file():
        listed = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip() and not line.startswith("#"):
                try:
                    listed += expand_pattern(str(path.parent / line.strip()))
                except (UserError, ValueError) as error:    # a path with a NUL is a ValueError
                    raise UserError(f"each line of {spec} is the path of a shard, but {error}; to "
                                    "learn plain text, give its folder") from None
        if not listed:
            raise UserError(f"{spec} names no file; each line is the path of a shard")
        return listed
    return expand_pattern(spec)


RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


def expand_pattern(pattern: str) -> list[Path]:
    """shard-{000..002}.tar, shard-*.tar or shard-000.tar as paths, sorted. Raises UserError where
    one names no file."""
    parts = RANGE.split(pattern)            # text, first, last, text, first, last, text ...
    choices = [[part] for part in parts[::3]]
    for k in range(len(parts) // 3):
        first, last = parts[3 * k + 1:3 * k + 3]
        numbers = range(int(first), int(last) + 1)
        if not 0 < len(numbers) <= 100_000:
            raise UserError(f"{pattern}: a range has from 1 to 100,000 numbers")
        choices.insert(2 * k + 1, [str(n).zfill(len(first)) for n in numbers])
    found = []
    for name in map("".join, itertools.product(*choices)):
        if Path(name).is_file():            # also where its name has a * or a [
            found.append(Path(name))
            continue
        matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
        matches = [match for match in matches if match.is_file() and match.suffix != SUFFIX]
        if not matches:
            what = "matches no file" if glob.has_magic(name) else "is not there"
            raise UserError(f"{name} {what}")
        found += matches
    return found


# ---- order --------------------------------------------------------------------------------------

def shuffled(seed: int, i: int, n: int) -> int:
    """Element i of an endless shuffled sequence over the numbers 0 .. n - 1, in which each epoch of
    n elements is another permutation of them. A pure function that needs no memory.

    It is a Feistel network: the number is written as two digits, high * b + low, with a * b a
    little over n. Each round adds to one digit a hash of the other one, which can be undone, so
    that no two numbers get to the same place. A result of n or more is put in again. [O]
    """
    epoch, x = divmod(i, n)
    b = math.isqrt(n - 1) + 1
    a = -(-n // b)
    key = scramble(scramble(seed) + epoch)
    while True:
        high, low = divmod(x, b)
        for k in range(3):
            high = (high + scramble(key + 2 * k * n + low)) % a
            low = (low + scramble(key + (2 * k + 1) * n + high)) % b
        x = high * b + low
        if x < n:
            return x


def scramble(x: int) -> int:
    """A hash of 64 bits: the finalizer of the generator SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % 2 ** 64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2 ** 64
    return x ^ x >> 31
