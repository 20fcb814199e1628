"""The data that people have, as numbered records that are read when they are needed.

    shards = open_shards("data/shard-{000..063}.tar")
    record = shards[123]                    # a Record: .value, .text, .pictures, .find(name)
    train = shards.numbers("train")         # the numbers of the records that are not held out
    n = shards.order(seed, i)               # the number of sample i: each epoch in another order

What open_shards takes, as a file, a glob, a range {000..063}, or a .list or .txt file that names
one of these a line:

    .jsonl, .json   one JSON object a line; or one list of objects, as LLaVA is published
    folder          pictures with a .txt or .json of the same name; or, where there is no picture,
                    text and source files

One record in fifty is held out for evaluation. A checksum of its content decides, so that equal
records are on one side, and moving or renaming files changes nothing. [O]

All that is read here comes from somebody else: a record that can't be used raises BadRecord, which
whoever reads counts by its kind; UserError is for what leaves nothing to read.
"""
import base64
import binascii
import glob
import hashlib
import itertools
import json
import math
import mmap
import os
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np

from lib.cli import UserError
from lib.images import BadRecord, Picture
from lib.index import index_of, progress, stamp_of

HELD_OUT = 50                       # one record in so many [O]
MOST_BYTES = 2 ** 28                # of a line or a text: more is a mistake
PICTURES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
            ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".ico", ".tga"}
TEXTS = {".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
         ".java", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".sh", ".html", ".css",
         ".sql", ".toml", ".yaml", ".yml", ".swift", ".kt", ".scala", ".lua", ".jl", ".r", ".pl",
         ".hs", ".ml", ".lean"}


# ---- records ------------------------------------------------------------------------------------

@dataclass
class Record:
    """One record: `value`, a JSON object; `text`, a caption or plain text; or both."""
    where: str                                          # for messages: "shard-000.tar: 000017"
    value: dict | None = None
    text: str | None = None
    pictures: list[Picture] = field(default_factory=list)   # those that lie beside it
    names: list[str] = field(default_factory=list)      # of these pictures
    folder: Path | None = None                          # where relative paths begin

    def find(self, name) -> Picture:
        """The picture that the record names: a path, the name of a picture beside the record, a
        data URI, or bytes, also as {"bytes": ...}. Whether a file is there, is not looked at.
        Raises BadRecord."""
        if isinstance(name, dict):                      # as parquet files hold pictures
            name = name.get("bytes") or name.get("path") or name.get("url")
        if isinstance(name, bytes) and name:
            return Picture(name, f"a picture of {self.where}")
        if not isinstance(name, str) or not name:
            raise BadRecord("missing image", f"{self.where}: {str(name)[:60]!r} names no picture")
        if name.startswith("data:"):
            return Picture(self._data_uri(name), f"a picture of {self.where}")
        if re.match(r"https?://", name):
            raise BadRecord("image on the web", f"{self.where}: {name[:100]} is not downloaded")
        for own, picture in zip(self.names, self.pictures):
            if name in (own, Path(own).name, own.partition(".")[2]) or own == Path(name).name:
                return picture
        if self.folder is None:
            raise BadRecord("missing image", f"{self.where} has no picture {name[:100]!r}")
        return Picture(self.folder / name.removeprefix("file://"))

    def _data_uri(self, text: str) -> bytes:
        """The bytes of data:image/png;base64,iVBOR..."""
        head, _, body = text.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it is not in base64")
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error) as error:
            raise BadRecord("damaged data URI", f"{self.where}: {head[:40]}: {error}") from None


def held_out(checksum: int) -> bool:
    return checksum % HELD_OUT == 0


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text. Raises BadRecord."""
    try:
        text = data.decode("utf-8-sig")     # Windows begins files with a byte-order mark
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"{where}: byte {error.start} is not UTF-8") from None
    if "\0" in text:
        raise BadRecord("NUL bytes", f"{where} has NUL bytes")
    return text


def parse(data: bytes, where: str) -> dict:
    """A JSON object as a dict. Raises BadRecord."""
    text = decode(data, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", f"{where}: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise BadRecord("not an object", f"{where} is no JSON object but {text[:40]!r}")
    return value


# ---- JSONL --------------------------------------------------------------------------------------

class Lines:
    """A file with one JSON object a line, or with one list of objects."""

    def __init__(self, path: Path):
        self.path, self.is_list = path, path.suffix.lower() == ".json" and begins_list(path)
        find = list_entries if self.is_list else lines
        self.index = index_of(path, ["lines", *stamp_of(path)], lambda: index_lines(path, find))

    def __len__(self):
        return len(self.index["offset"])

    def __getitem__(self, k: int) -> Record:
        unit = "entry" if self.is_list else "line"
        where = f"{self.path.name}: {unit} {self.index['number'][k]}"
        length = int(self.index["length"][k])
        if length > MOST_BYTES:
            raise BadRecord("huge line", f"{where} has {length:,} bytes")
        with open(self.path, "rb") as file:
            file.seek(int(self.index["offset"][k]))
            value = parse(file.read(length), where)
        return Record(where, value, folder=self.path.parent)

    def sizes(self, k: int):
        return None                         # the pictures are elsewhere


def begins_list(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def index_lines(path: Path, find) -> tuple[dict, list[str]]:
    """Where the records found by `find` are, their line or number, and whether each is held out."""
    number, offset, length, held = array("q"), array("q"), array("q"), array("B")
    with progress(path, path.stat().st_size, "B") as bar:
        for n, start, size, checksum in find(path):
            number.append(n)
            offset.append(start)
            length.append(size)
            held.append(held_out(checksum))
            bar.update(start + size - bar.n)
    arrays = {"number": number, "offset": offset, "length": length, "held": held}
    return {name: np.asarray(values) for name, values in arrays.items()}, []


def lines(path: Path):
    """(line's number, offset, length, checksum) of each line that is not blank."""
    number = start = 0
    with open(path, "rb") as file:
        while piece := file.readline(2 ** 20):          # a huge line comes in pieces
            number += 1
            size, checksum, blank = 0, 0, True
            while piece:
                size += len(piece)
                ends = piece.endswith(b"\n")
                blank = blank and not piece.strip()
                checksum = crc32(piece.rstrip(b"\r\n"), checksum)
                piece = b"" if ends else file.readline(2 ** 20)
            if not blank:
                yield number, start, size, checksum
            start += size


# What matters to find the entries of a JSON list: strings, which may hold brackets, and brackets.
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)


def list_entries(path: Path):
    """(number, offset, length, checksum) of each entry of a JSON list that begins with a bracket.
    An entry that the file's end cuts off is left out."""
    number = depth = start = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for token in TOKEN.finditer(data):
            mark = data[token.start()]
            if mark in b"[{":
                if depth == 1:
                    start = token.start()
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 1:
                    number += 1
                    yield number, start, token.end() - start, crc32(data[start:token.end()])


# ---- groups of files ----------------------------------------------------------------------------

@dataclass
class Member:
    """A file of a record, in a folder or in a tar."""
    name: str
    offset: int
    length: int

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()


def index_groups(path: Path, groups: list, picture, notes: list[str]) -> tuple[dict, list[str]]:
    """The arrays of an index over groups of Members: which members each record has, their names,
    places and lengths, the sizes of pictures, and whether the record is held out.

    picture: a function of a Member that returns its Picture.
    """
    members = [member for group in groups for member in group]
    names = [member.name.encode("utf-8", "surrogateescape") for member in members]
    sizes, held = np.zeros((len(members), 2), np.int32), np.zeros(len(groups), np.uint8)
    k = 0
    with progress(path, len(groups), " records") as bar:
        for r, group in enumerate(groups):
            checked = next((m for m in group if m.suffix not in PICTURES), group[0])
            with picture(checked).file() as file:
                count = 2 ** 16 if checked.suffix in PICTURES else MOST_BYTES
                held[r] = held_out(crc32(file.read(count)))
            for member in group:
                if member.suffix in PICTURES:
                    try:
                        sizes[k] = picture(member).size
                    except BadRecord:       # whoever reads it will be told
                        pass
                k += 1
            bar.update()
    return {"first": np.cumsum([0, *map(len, groups)]),
            "names": np.frombuffer(b"".join(names), np.uint8),
            "name_end": np.cumsum([0, *map(len, names)]),
            "offset": np.array([member.offset for member in members], np.int64),
            "length": np.array([member.length for member in members], np.int64),
            "size": sizes, "held": held}, notes


class Groups:
    """Records that are groups of files: pictures, and their text as .txt or .json."""
    path: Path

    def __len__(self):
        return len(self.index["held"])

    def member(self, m: int) -> Member:
        start, end = self.index["name_end"][m:m + 2]
        name = bytes(self.index["names"][start:end]).decode("utf-8", "surrogateescape")
        return Member(name, int(self.index["offset"][m]), int(self.index["length"][m]))

    def members(self, k: int) -> range:
        return range(*map(int, self.index["first"][k:k + 2]))

    def picture(self, member: Member, size: tuple | None = None) -> Picture:
        raise NotImplementedError

    def where(self, member: Member) -> str:
        raise NotImplementedError

    def __getitem__(self, k: int) -> Record:
        record = Record("")
        for m in self.members(k):
            member = self.member(m)
            record.where = record.where or self.where(member)
            if member.suffix in PICTURES:
                size = tuple(map(int, self.index["size"][m]))
                record.pictures.append(self.picture(member, size if all(size) else None))
                record.names.append(member.name)
                continue
            if member.length > MOST_BYTES:
                raise BadRecord("huge text", f"{record.where} has {member.length:,} bytes of text")
            with self.picture(member).file() as file:
                data = file.read()
            if member.suffix == ".json":
                record.value = parse(data, record.where)
            else:
                record.text = decode(data, record.where).strip()
        return record

    def sizes(self, k: int):
        members = [m for m in self.members(k) if self.member(m).suffix in PICTURES]
        sizes = [tuple(map(int, self.index["size"][m])) for m in members]
        return sizes if all(map(all, sizes)) else None


class Folder(Groups):
    """A folder of pictures with a .txt or .json of the same name."""

    def __init__(self, path: Path, files: list[Path]):
        self.path = path
        groups: dict[str, list[Path]] = {}
        for file in files:
            if file.suffix.lower() in PICTURES | {".txt", ".json"}:
                groups.setdefault(str(file.with_suffix("")), []).append(file)
        pairs, alone = [], 0
        for group in groups.values():
            pictures = sum(file.suffix.lower() in PICTURES for file in group)
            if 0 < pictures < len(group):
                pairs.append(group)
            else:
                alone += pictures
        notes = [f"{path.name}: {alone} pictures have no .txt or .json of the same name"]
        if not pairs:
            raise UserError(f"{path} has no picture with a .txt or .json of the same name")

        def member(file: Path) -> Member:
            return Member(file.relative_to(path).as_posix(), 0, file.stat().st_size)

        def build():
            listed = [[member(file) for file in group] for group in pairs]
            return index_groups(path, listed, self.picture, notes if alone else [])

        self.index = index_of(path, ["pairs", *stamp_of_files(path, files)], build)

    def picture(self, member: Member, size: tuple | None = None) -> Picture:
        return Picture(self.path / member.name, known_size=size)

    def where(self, member: Member) -> str:
        return f"{self.path.name}: {Path(member.name).with_suffix('')}"


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, sorted, without names that begin with a dot."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
        found += [Path(root, name) for name in names if name[0] != "."]
    return sorted(found)


def stamp_of_files(folder: Path, files: list[Path]) -> list:
    """What changes when any of the files is changed, renamed or removed."""
    checksum = 0
    for file in files:
        stamp = [str(file.relative_to(folder)), *stamp_of(file)]
        checksum = crc32(json.dumps(stamp).encode(), checksum)
    return [len(files), checksum]


# ---- text ---------------------------------------------------------------------------------------

PIECE = 2 ** 15         # bytes: a longer text becomes several records, cut at ends of lines [O]


class TextFolder:
    """A folder of text and source files. A long file is several records, one after the other, so
    that an epoch shows all of it."""

    def __init__(self, path: Path, files: list[Path]):
        self.path = path
        self.files = [file for file in files if file.suffix.lower() in TEXTS]
        self.index = index_of(path, ["texts", *stamp_of_files(path, files)], self._build)

    def _build(self) -> tuple[dict, list[str]]:
        number, offset, length, held = array("q"), array("q"), array("q"), array("B")
        with progress(self.path, len(self.files), " files") as bar:
            for n, path in enumerate(self.files):
                with open(path, "rb") as file:
                    start = 0
                    while piece := b"".join(file.readlines(PIECE)):
                        number.append(n)
                        offset.append(start)
                        length.append(len(piece))
                        held.append(held_out(crc32(piece)))
                        start += len(piece)
                bar.update()
        arrays = {"number": number, "offset": offset, "length": length, "held": held}
        return {name: np.asarray(values) for name, values in arrays.items()}, []

    def __len__(self):
        return len(self.index["offset"])

    def __getitem__(self, k: int) -> Record:
        path, start = self.files[self.index["number"][k]], int(self.index["offset"][k])
        where = str(path.relative_to(self.path)) + (f" from byte {start}" if start else "")
        with open(path, "rb") as file:
            file.seek(start)
            return Record(where, text=decode(file.read(int(self.index["length"][k])), where))

    def sizes(self, k: int):
        return []


# ---- all shards ---------------------------------------------------------------------------------

KINDS = {".jsonl": Lines, ".ndjson": Lines, ".json": Lines}


class Shards:
    """The records of all shards, numbered from 0. It can be sent to another process.

    kind: "jsonl", "tar", "parquet", "pictures" or "text"; notes: lines for the log about what was
    noticed, such as a damaged shard; digest: equal on two machines that have the same shards.
    """

    def __init__(self, spec: str, kind: str, shards: list):
        self.spec, self.kind, self.shards = spec, kind, shards
        self.notes = [note for shard in shards for note in shard.index.notes]
        self.ends = np.cumsum([len(shard) for shard in shards])     # the number after each shard's
        self.digest = digest_of(shards)

    def __len__(self):
        return int(self.ends[-1])

    def _shard(self, n: int) -> tuple:
        """(the shard that holds record n, its number in it)"""
        if not 0 <= n < len(self):
            raise IndexError(f"record {n} of {len(self)}")
        s = int(np.searchsorted(self.ends, n, "right"))
        return self.shards[s], int(n) - int(self.ends[s]) + len(self.shards[s])

    def __getitem__(self, n: int) -> Record:
        """Record n. Raises BadRecord if it can't be used, or OSError if it can't be read."""
        shard, k = self._shard(n)
        return shard[k]

    def sizes(self, n: int) -> list[tuple[int, int]] | None:
        """(width, height) of the pictures that lie beside record n, without reading anything; None
        where the index does not know them."""
        shard, k = self._shard(n)
        return shard.sizes(k)

    def numbers(self, split: str) -> np.ndarray:
        """The numbers of the records of a split, `train` or `test`, in order, int64. The test split
        may be empty; the training split never is."""
        held = np.concatenate([shard.index["held"] for shard in self.shards]).astype(bool)
        if held.all():
            held[:] = False
        return np.flatnonzero(held if split == "test" else ~held)

    def order(self, seed: int, i: int, split: str = "train") -> int:
        """The number of sample i: an endless sequence that shows each record of the split once an
        epoch, in another order each time. A pure function of its arguments."""
        numbers = self._numbers(split)
        return int(numbers[shuffled(seed, i, len(numbers))])

    def _numbers(self, split: str) -> np.ndarray:
        cache = self.__dict__.setdefault("cache", {})
        if split not in cache:
            cache[split] = self.numbers(split)
        return cache[split]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "cache"}


def digest_of(shards: list) -> str:
    """A checksum over names, sizes in bytes and numbers of records, for ranks to compare."""
    parts = [[shard.path.name, *shard.index.stamp[:-1], len(shard)] for shard in shards]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_shards(spec: str) -> Shards:
    """Open the data that `spec` names; see the top of this file. An index is made the first time.
    Raises UserError where nothing can be read."""
    path = Path(spec)
    if path.is_dir():
        return open_folder(path)
    paths = expand(spec)
    kinds = sorted({path.suffix.lower() for path in paths})
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"{spec}: files that end in '{kind}' can't be read here; it takes "
                            f"{', '.join(KINDS)} files and folders")
    if len({KINDS[kind] for kind in kinds}) > 1:
        raise UserError(f"{spec} names files of several kinds: {', '.join(kinds)}")
    return filled(Shards(spec, "jsonl", [KINDS[kinds[0]](path) for path in paths]))


def filled(shards: Shards) -> Shards:
    """Raises UserError if there is no record."""
    if len(shards) == 0:
        raise UserError(f"{shards.spec} has no record" + "".join(f"; {n}" for n in shards.notes))
    return shards


def open_folder(folder: Path) -> Shards:
    files = files_below(folder)
    suffixes = {file.suffix.lower() for file in files}
    if suffixes & PICTURES:
        return filled(Shards(str(folder), "pictures", [Folder(folder, files)]))
    if suffixes & TEXTS:
        return filled(Shards(str(folder), "text", [TextFolder(folder, files)]))
    raise UserError(f"{folder} has neither pictures nor text; it takes pictures with a .txt of the "
                    "same name, or text and source files")


def expand(spec: str) -> list[Path]:
    """The files that a spec names: ranges, then globs, then lists. Raises UserError."""
    path = Path(spec)
    if path.suffix.lower() in (".list", ".txt") and path.is_file():
        listed = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip() and not line.startswith("#"):
                listed += expand_pattern(str(path.parent / line.strip()))
        if not listed:
            raise UserError(f"{spec} names no file: each of its lines is the path of a shard")
        return listed
    return expand_pattern(spec)


RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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
        matches = [match for match in matches if match.is_file()]
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
