"""MMStar as questions for `sample.py eval`: 1,500 multiple choices that need the picture.

    python -m recipes.mmstar mmstar.parquet data/mmstar
    python sample.py eval --ckpt=out/sft --data=data/mmstar/questions.jsonl

Data card: https://huggingface.co/datasets/Lin-Chen/MMStar, file mmstar.parquet, 41.8 MB; it names
no licence. Fields: index, question (with its options in it), image, answer (a letter), category
(the group here), l2_category, meta_info. Needs pyarrow. Not yet run on the published file, only on
one of its form.
"""
import json
import re
import sys
from pathlib import Path

from lib.cli import main, UserError
from lib.common import write_text
from lib.shards import open_shards


def letters(question: str) -> list[str]:
    """The letters of a question's options, as in "Options: A: a dog, B: a cat" or "(A) 5 (B) 6"; A
    to D where it shows none."""
    found = set(re.findall(r"\b([A-H])[:.)]", question))
    count = next(k for k, letter in enumerate("ABCDEFGHI") if letter not in found)
    return list("ABCDEFGH"[:count] if count > 1 else "ABCD")


def convert(source: str, out: str):
    """Write questions.jsonl and the pictures into the folder `out`."""
    shards, lines, pictures = open_shards(source), [], Path(out, "pictures")
    columns = {"index", "question", "image", "answer", "category"}
    if missing := columns - (shards[0].value or {}).keys():
        raise UserError(f"{source} is not MMStar's file: it has no column {min(missing)}")
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(len(shards)):
        record = shards[number]
        row, name = record.value, f"{record.value['index']}.jpg"
        with record.find(row["image"]).file() as file:
            (pictures / name).write_bytes(file.read())
        lines.append({"images": [f"pictures/{name}"], "answer": row["answer"].strip(),
                      "question": row["question"] + "\nAnswer with the letter of the right option.",
                      "choices": letters(row["question"]), "metric": "choice",
                      "group": row["category"]})
    write_text(Path(out, "questions.jsonl"),
               "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{len(lines):,} questions in {out}/questions.jsonl")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(convert, *sys.argv[1:])
