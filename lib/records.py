"""The records of one file or folder that somebody has: JSONL, a tar, pictures, text.

Each kind is a class with `len(shard)`, `shard[k]` -> Record, and an index (see lib/index.py) whose
array `held` says which records are held out. So is Parquet, in lib/parquet.py.
lib/shards.py puts several of them together; that is what the rest of the repository uses.

All that is read here comes from somebody else: a record that can't be used raises BadRecord, which
whoever reads counts by its kind.
"""
import base64
import binascii
import contextlib
import functools
import json
import mmap
import os
import re
import tarfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np

from lib.cli import UserError
from lib.images import BadRecord, HEADER, Picture, printable, read_part
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
            base = Path(own).name           # 000017.0.jpg, which people also call 0.jpg
            if name in (own, base.partition(".")[2]) or Path(name).name == base:
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
        if path.suffix.lower() == ".json" and len(self):
            try:
                self[0]
            except BadRecord as error:
                raise UserError(f"{path} is neither a list of objects nor one object a line: "
                                f"{error}") from None

    def __len__(self):
        return len(self.index["held"])

    def __getitem__(self, k: int) -> Record:
        number, offset, length = self.index["places"][k].tolist()
        where = f"{self.path.name}: {'entry' if self.is_list else 'line'} {number}"
        if length > MOST_BYTES:
            raise BadRecord("huge line", f"{where} has {length:,} bytes")
        value = parse(read_part(self.path, offset, length), where)
        return Record(where, value, folder=self.path.parent)


def begins_list(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def table(rows: array) -> dict[str, np.ndarray]:
    """The arrays of an index over parts of files, from four integers for each part: the number of
    the line, the list's entry or the file; its offset and length in bytes; its checksum."""
    rows = np.asarray(rows).reshape(-1, 4)
    return {"places": rows[:, :3], "held": (rows[:, 3] % HELD_OUT == 0).astype(np.uint8)}


def index_lines(path: Path, find) -> tuple[dict, list[str]]:
    """The arrays of an index over what `find` finds in a file, and notes for the log."""
    rows, notes = array("q"), []
    with progress(path, path.stat().st_size, "B") as bar:
        for number, offset, length, checksum in find(path, notes):
            rows.extend((number, offset, length, checksum))
            bar.update(offset + length - bar.n)
    return table(rows), notes


def lines(path: Path, notes: list[str]):
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


def list_entries(path: Path, notes: list[str]):
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
    if depth:
        notes.append(f"{path} is cut off after entry {number}")


# ---- groups of files ----------------------------------------------------------------------------

@dataclass
class Member:
    """A file of a record, in a folder or in a tar."""
    name: str
    offset: int
    length: int
    size: tuple[int, int] | None = None     # (width, height) of a picture, where it is known


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES    # pathlib would be slower


def is_text(name: str) -> bool:
    """Whether a file that lies beside pictures is their text."""
    return name.lower().endswith((".txt", ".json"))


def natural(name: str) -> str:
    """A name to sort by, so that 2.jpg comes before 10.jpg."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(9), name)


def index_groups(path: Path, groups: list, picture) -> dict[str, np.ndarray]:
    """The arrays of an index over groups of Members: which members each record has, their names,
    places and lengths, the sizes of pictures, and whether the record is held out.

    picture: a function of a Member that returns its Picture.
    """
    names, rows, held, last = [], [], [], 0
    with progress(path, len(groups), " records") as bar:
        for group in groups:
            group.sort(key=lambda member: natural(member.name))
            # The first picture decides, or its first part: what is asked about one picture is on
            # one side then. If the text decided, all pictures of a label would be.
            checked = next((member for member in group if is_picture(member.name)), group[0])
            with picture(checked).file(HEADER) as file:
                held.append(crc32(file.read(HEADER)) % HELD_OUT == 0)
            for member in group:
                size = (0, 0)
                if is_picture(member.name):
                    with contextlib.suppress(BadRecord):    # whoever reads it will count it
                        size = picture(member).size
                names.append(member.name.encode("utf-8", "surrogateescape"))
                rows.append((last, last + len(names[-1]), member.offset, member.length, *size))
                last += len(names[-1])
            bar.update()
    return {"first": np.cumsum([0, *map(len, groups)]),
            "members": np.array(rows, np.int64).reshape(-1, 6),
            "names": np.frombuffer(b"".join(names), np.uint8), "held": np.array(held, np.uint8)}


class Groups:
    """Records that are groups of files: pictures, and their text as .txt or .json."""
    path: Path

    def picture(self, member: Member) -> Picture:
        """Any file of a record as a Picture, which knows where its bytes are."""
        raise NotImplementedError

    def where(self, member: Member) -> str:
        """The name of a member's record, for messages."""
        raise NotImplementedError

    def folder(self, member: Member) -> Path | None:
        """Where the paths that a member's record names begin."""
        raise NotImplementedError

    def __len__(self):
        return len(self.index["held"])

    def members(self, k: int) -> range:
        """The numbers of a record's members."""
        return range(*self.index["first"][k:k + 2].tolist())

    def member(self, m: int) -> Member:
        start, end, offset, length, *size = self.index["members"][m].tolist()
        name = bytes(self.index["names"][start:end]).decode("utf-8", "surrogateescape")
        return Member(name, offset, length, tuple(size) if all(size) else None)

    def __getitem__(self, k: int) -> Record:
        members = [self.member(m) for m in self.members(k)]
        record = Record(self.where(members[0]), folder=self.folder(members[0]))
        for member in members:
            if is_picture(member.name):
                record.pictures.append(self.picture(member))
                record.names.append(member.name)
                continue
            if member.length > MOST_BYTES:
                raise BadRecord("huge text", f"{record.where} has {member.length:,} bytes of text")
            with self.picture(member).file() as file:
                data = file.read()
            # Of 000017.json and 000017.meta.json the first one counts.
            if not member.name.lower().endswith(".json"):
                record.text = record.text or decode(data, record.where).strip()
            elif record.value is None:
                record.value = parse(data, record.where)
        return record


class Folder(Groups):
    """A folder of pictures with a .txt or .json of the same name."""

    def __init__(self, path: Path, files: list[Path]):
        self.path = path
        files = [file for file in files if is_text(file.name) or is_picture(file.name)]
        build = functools.partial(self._build, files)
        self.index = index_of(path, ["pairs", *stamp_of_files(path, files)], build)

    def _build(self, files: list[Path]) -> tuple[dict, list[str]]:
        groups: dict[str, list[Member]] = {}
        for file in files:
            name = file.relative_to(self.path).as_posix()
            member = Member(name, 0, file.stat().st_size)
            groups.setdefault(name.removesuffix(file.suffix), []).append(member)
        pairs, alone = [], 0
        for group in groups.values():
            pictures = sum(is_picture(member.name) for member in group)
            if 0 < pictures < len(group):
                pairs.append(group)
            else:
                alone += pictures
        notes = [f"{self.path}: {alone} pictures have no .txt or .json of the same name"]
        return index_groups(self.path, pairs, self.picture), notes if alone else []

    def picture(self, member: Member) -> Picture:
        return Picture(self.path / member.name, known_size=member.size)

    def where(self, member: Member) -> str:
        return printable(f"{self.path.name}: {Path(member.name).with_suffix('')}")

    def folder(self, member: Member) -> Path:
        return (self.path / member.name).parent


class Tar(Groups):
    """A webdataset shard. As there, the files of a record have one name up to its first dot:
    000017.jpg, 000017.json, or 000017.0.jpg, 000017.1.jpg, 000017.txt."""

    def __init__(self, path: Path):
        self.path = path
        self.index = index_of(path, ["tar", *stamp_of(path)], self._build)

    def _build(self) -> tuple[dict, list[str]]:
        members, damage = tar_members(self.path)
        notes = [f"{self.path}: {damage}; the {len(members):,} files before that are used"]
        groups: list[dict] = []
        last: dict[str, dict] = {}          # the last group of each key
        for member in members:
            found = KEY.fullmatch(member.name)
            if not found or not (is_picture(member.name) or is_text(member.name)):
                continue
            key, ending = found.groups()
            # A name that comes again, as in tars that were joined, begins another record.
            if key not in last or ending in last[key]:
                last[key] = {}
                groups.append(last[key])
            last[key][ending] = member
        groups = [list(group.values()) for group in groups]
        return index_groups(self.path, groups, self.picture), notes if damage else []

    def picture(self, member: Member) -> Picture:
        return Picture(self.path, f"{self.path.name}: {member.name}", member.offset, member.length,
                       known_size=member.size)

    def where(self, member: Member) -> str:
        return printable(f"{self.path.name}: {KEY.fullmatch(member.name)[1]}")

    def folder(self, member: Member) -> None:
        return None                         # what is in a tar names no files outside it


# The key, and the ending after its first dot; a name that begins with a dot has no key.
KEY = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)


def tar_members(path: Path) -> tuple[list[Member], str]:
    """The files in a tar, and what is wrong with it: "" if it is whole."""
    found, size, damage = [], path.stat().st_size, ""
    try:
        with tarfile.open(path, "r:") as tar, progress(path, size, "B") as bar:
            while info := tar.next():
                tar.members.clear()         # or they would all stay in memory
                if info.size < 0 or tar.offset <= info.offset:
                    # tarfile would go back by a negative size, and read the same again for ever.
                    raise tarfile.ReadError(f"the size of {info.name} is negative")
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"it is cut off in {info.name}")
                if info.isreg() and not info.issparse():
                    found.append(Member(info.name, info.offset_data, info.size))
                bar.update(info.offset_data + info.size - bar.n)
            end = tar.offset
        # tarfile takes a damaged header for the end, which really is a block of zeros.
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                damage = f"it has no end mark at byte {end:,}, so something is missing"
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError,
            RecursionError) as error:       # of thousands of headers before a file
        damage = printable(str(error))
    return found, damage


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, sorted, without names that begin with a dot."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
        paths = (Path(root, name) for name in names if name[0] != ".")
        found += [path for path in paths if path.is_file()]     # a link may point to nothing
    return sorted(found)


def stamp_of_files(folder: Path, files: list[Path]) -> list:
    """What changes when any of the files is changed, renamed or removed."""
    size = checksum = 0
    for file in files:
        stamp = [str(file.relative_to(folder)), *stamp_of(file)]
        checksum = crc32(json.dumps(stamp).encode(), checksum)
        size += stamp[1]
    return [len(files), size, checksum]


# ---- text ---------------------------------------------------------------------------------------

PIECE = 2 ** 13         # bytes: a longer text becomes several records, cut at ends of lines [O]


class TextFolder:
    """A folder of text and source files. A long file is several records, so that it counts by its
    length, and that an epoch shows all of it where a row has room for a record."""

    def __init__(self, path: Path, files: list[Path]):
        self.path = path
        self.files = [file for file in files if file.suffix.lower() in TEXTS]
        self.index = index_of(path, ["texts", *stamp_of_files(path, self.files)], self._build)

    def _build(self) -> tuple[dict, list[str]]:
        rows = array("q")
        with progress(self.path, len(self.files), " files") as bar:
            for number, path in enumerate(self.files):
                offset = 0
                with open(path, "rb") as file:
                    while piece := next_piece(file):
                        rows.extend((number, offset, len(piece), crc32(piece)))
                        offset += len(piece)
                bar.update()
        return table(rows), []

    def __len__(self):
        return len(self.index["held"])

    def __getitem__(self, k: int) -> Record:
        number, offset, length = self.index["places"][k].tolist()
        path = self.files[number]
        where = printable(str(path.relative_to(self.path)))
        where += f" from byte {offset:,}" if offset else ""
        return Record(where, text=decode(read_part(path, offset, length), where))


def next_piece(file) -> bytes:
    """The next part of a text file. It ends with a line, or in a very long line at least with a
    letter, which has up to four bytes in UTF-8."""
    piece = file.read(PIECE)
    piece += file.readline(PIECE)
    for _ in range(3):
        following = file.peek(1)[:1]
        if following and following[0] & 0xC0 == 0x80:       # inside of a letter
            piece += file.read(1)
    return piece
