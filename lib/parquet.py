"""The rows of a parquet file as records. It needs pyarrow, which nothing else here does."""
import functools
import json
import re
from pathlib import Path
from zlib import crc32

import numpy as np

from lib.cli import UserError
from lib.common import first_sentence
from lib.images import BadRecord
from lib.index import index_of, progress, stamp_of
from lib.records import HELD_OUT, Record

# The columns that are not read to find out which rows are held out: their bytes would be all.
PICTURE_COLUMN = re.compile("image|picture|video|bytes", re.IGNORECASE)


class Parquet:
    """A parquet file as hubs keep data sets: a row a record, pictures as {"bytes": ...}. Raises
    UserError if pyarrow is not installed.

    A row can be read only together with its row group, often a hundred megabytes. `first` of the
    index has the number of the first row of each group, for an order that keeps to one at a time.
    """

    def __init__(self, path: Path):
        self.path = path
        self.index = index_of(path, ["parquet", *stamp_of(path)], self._build)

    def _build(self) -> tuple[dict, list[str]]:
        held, first, notes = [], [0], []
        try:
            with load_pyarrow(self.path).parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                texts = [name for name in names if not PICTURE_COLUMN.search(name)]
                with progress(self.path, file.metadata.num_rows, " rows") as bar:
                    for group in range(file.num_row_groups):
                        for row in file.read_row_group(group, texts or names).to_pylist():
                            text = json.dumps(row, sort_keys=True, default=repr)
                            held.append(crc32(text.encode()) % HELD_OUT == 0)
                            bar.update()
                        first.append(len(held))
        except (OSError, ValueError, load_pyarrow(self.path).ArrowException) as error:
            notes = [f"{self.path} can't be read as parquet: {first_sentence(error)}"]
        return {"held": np.array(held, np.uint8), "first": np.array(first, np.int64)}, notes

    def __len__(self):
        return len(self.index["held"])

    def __getitem__(self, k: int) -> Record:
        where = f"{self.path.name}: row {k}"
        group = int(np.searchsorted(self.index["first"], k, "right")) - 1
        try:
            rows = row_group(self.path, tuple(self.index.stamp), group)
            value = rows.slice(k - int(self.index["first"][group]), 1).to_pylist()[0]
        except (OSError, ValueError, load_pyarrow(self.path).ArrowException) as error:
            raise BadRecord("damaged parquet", f"{where}: {first_sentence(error)}") from None
        return Record(where, value, folder=self.path.parent)


def load_pyarrow(path: Path):
    """The module. Raises UserError if it is not installed."""
    try:
        import pyarrow.parquet
        return pyarrow
    except ImportError:
        raise UserError(f"{path}: reading parquet needs a package: pip install pyarrow") from None


@functools.lru_cache(maxsize=2)
def row_group(path: Path, stamp: tuple, group: int):
    """A row group as a pyarrow table. stamp: of the file, so that a new one is not taken for it."""
    with load_pyarrow(path).parquet.ParquetFile(path) as file:
        return file.read_row_group(group)
