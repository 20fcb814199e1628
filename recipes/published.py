"""What the converters of published sets share: rows in, questions for `sample.py eval` out."""
import json
from pathlib import Path

from lib.cli import UserError
from lib.common import write_text
from lib.shards import open_shards


def table_rows(source: str, columns: set[str], pictures: Path, name: str):
    """Yield the rows of parquet files as dicts, after writing the picture of row n, its column
    `image`, to `pictures`/n.jpg, byte for byte. Raises UserError if a column is missing, or a row
    can't be read."""
    shards = open_shards(source)
    if missing := columns - (shards[0].value or {}).keys():
        raise UserError(f"{source} is not of {name}: it has no column {min(missing)}")
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(len(shards)):
        record = shards[number]
        with record.find(record.value["image"]).file() as file:
            (pictures / f"{number}.jpg").write_bytes(file.read())
        yield record.value


def write_questions(path: Path, questions: list[dict]):
    """Write questions as JSONL: see lib/own_eval.py."""
    write_text(path, "".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions))
    print(f"{len(questions):,} questions in {path}")
