"""OCRBench as questions for `sample.py eval`: 1,000 questions about text in pictures, of ten types.

    python -m recipes.ocrbench "OCRBench/data/test-*.parquet" data/ocrbench
    python sample.py eval --ckpt=out/sft --data=data/ocrbench/questions.jsonl

Data card: https://huggingface.co/datasets/echo840/OCRBench, files data/test-*, 67.6 MB; it names no
licence. Fields: dataset (where the picture is from), question, question_type (the group here),
answer (a list), image. Needs pyarrow. A reply is right if it contains an answer, without regard to
case; formulas, those of HME100k, are compared without white space. Not yet run on the published
files, only on one of their form.
"""
import json
import sys
from pathlib import Path

from lib.cli import main, UserError
from lib.common import write_text
from lib.shards import open_shards


def convert(source: str, out: str):
    """Write questions.jsonl and the pictures into the folder `out`."""
    shards, lines, pictures = open_shards(source), [], Path(out, "pictures")
    columns = {"dataset", "question", "question_type", "answer", "image"}
    if missing := columns - (shards[0].value or {}).keys():
        raise UserError(f"{source} is not OCRBench's file: it has no column {min(missing)}")
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(len(shards)):
        record, name = shards[number], f"{number}.jpg"
        row = record.value
        with record.find(row["image"]).file() as file:
            (pictures / name).write_bytes(file.read())
        formula = row["dataset"] == "HME100k"
        lines.append({"images": [f"pictures/{name}"], "question": row["question"],
                      "answers": row["answer"], "group": row["question_type"],
                      "metric": "contains-formula" if formula else "contains"})
    write_text(Path(out, "questions.jsonl"),
               "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{len(lines):,} questions in {out}/questions.jsonl")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(convert, *sys.argv[1:])
