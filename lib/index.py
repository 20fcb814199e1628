"""Where the records of a data file begin: found once, kept in a file beside it, memory-mapped.

An index file is a line of JSON and then the raw bytes of some arrays, each from a multiple of 64
bytes on:

    {"stamp": [2, "tar", 52428800, 1700000000000000000], "notes": [],
     "arrays": {"offset": ["<i8", [10000], 256], "held": ["|u1", [10000], 80256]}}

The stamp holds the format's version, the size of the data and when they were changed last. An index
with another stamp is made anew, so that it never points into a file that has been replaced.
"""
import hashlib
import json
import os
import sys
import tempfile
import uuid
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.cli import UserError

VERSION = 2                     # of what the indices hold; another one makes them anew
SUFFIX = ".nanoglmv-index"
ALIGN = 64                      # bytes


class Index:
    """The arrays of an index file by name, memory-mapped: `index["offset"][17]`.

    Only what is looked at is in memory, and processes on one machine share it. notes: what was
    noticed while the index was made, lines for the log. Sent to another process, it is the path of
    the file, which is mapped there again.
    """

    def __init__(self, path):
        self.path = str(path)
        raw = np.memmap(self.path, np.uint8, "r")
        with open(self.path, "rb") as file:
            header = json.loads(file.readline())
        self.stamp, self.notes, self.arrays = header["stamp"], header["notes"], {}
        for name, (dtype, shape, start) in header["arrays"].items():
            size = np.dtype(dtype).itemsize * int(np.prod(shape))
            self.arrays[name] = np.asarray(raw[start:start + size]).view(dtype).reshape(shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self):
        return Index, (self.path,)


def write_index(path: Path, stamp: list, notes: list[str], arrays: dict[str, np.ndarray]):
    """Write an index file under a name of its own, then rename it: two processes may do so at the
    same time."""
    # Where the arrays begin is counted from the end of the header first, and moved by its length,
    # which has room for more digits.
    places, start = {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, array.shape, start]
        start += -(-array.nbytes // ALIGN) * ALIGN
    header = {"stamp": stamp, "notes": notes, "arrays": places}
    room = -(-(len(json.dumps(header)) + 20 * len(arrays) + 1) // ALIGN) * ALIGN
    for place in places.values():
        place[2] += room
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file:
            file.write(json.dumps(header).encode().ljust(room - 1) + b"\n")
            for name, array in arrays.items():
                file.seek(places[name][2])
                file.write(np.ascontiguousarray(array).tobytes())
            file.truncate(room + start)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def index_of(data: Path, stamp: list, build) -> Index:
    """The index of a file or folder, made by `build() -> (arrays, notes)` unless there is one with
    this stamp. Raises UserError if it can't be written anywhere."""
    stamp = [VERSION, *stamp]
    for path in places_for(data):
        try:
            index = Index(path)
            if index.stamp == stamp:
                return index
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass                            # there is none, or it is damaged
    arrays, notes = build()
    for path in places_for(data):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_index(path, stamp, notes, arrays)
            return Index(path)
        except OSError as error:
            reason = error
    raise UserError(f"no place to write the index of {data}: {reason}")


def places_for(data: Path) -> list[Path]:
    """Where an index may lie: beside the data, or in a cache folder if that is not writable."""
    data = data.resolve()
    name = f"{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}-{data.name}{SUFFIX}"
    caches = Path(tempfile.gettempdir()) / "nanoglmv-cache",
    try:
        caches = Path.home() / ".cache" / "nanoglmv", *caches
    except RuntimeError:                    # the user has no home
        pass
    return [data.with_name(data.name + SUFFIX), *(cache / name for cache in caches)]


def stamp_of(path: Path) -> list:
    """What changes when a file is changed."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def progress(path: Path, total: int, unit: str = "") -> tqdm:
    """A progress bar for making an index, which appears only if it takes longer than a second."""
    return tqdm(total=total, unit=unit, unit_scale=True, desc=f"index of {path.name}", delay=1,
                leave=False, disable=not sys.stderr.isatty())
