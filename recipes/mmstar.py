"""MMStar as questions for `sample.py eval`: 1,500 multiple choices that need the picture.

    python -m recipes.mmstar mmstar.parquet data/mmstar
    python sample.py eval --ckpt=out/sft --data=data/mmstar/questions.jsonl

Data card: https://huggingface.co/datasets/Lin-Chen/MMStar, file mmstar.parquet, 41.8 MB; it names
no licence. Fields: index, question (with its options in it), image, answer (a letter), category
(the group here), l2_category, meta_info. Needs pyarrow. Not yet run on the published file, only on
one of its form.
"""
import re
import sys
from pathlib import Path

from lib.cli import main
from recipes.published import table_rows, write_questions

COLUMNS = {"question", "image", "answer", "category"}


def letters(question: str) -> list[str]:
    """The letters of a question's options, as in "Options: A: a dog, B: a cat" or "(A) 5 (B) 6"; A
    to D where it shows none."""
    found = set(re.findall(r"\b([A-H])[:.)]", question))
    count = next(k for k, letter in enumerate("ABCDEFGHI") if letter not in found)
    return list("ABCDEFGH"[:count] if count > 1 else "ABCD")


def convert(source: str, out: str):
    """Write questions.jsonl and the pictures into the folder `out`."""
    questions = []
    for number, row in enumerate(table_rows(source, COLUMNS, Path(out, "pictures"), "MMStar")):
        questions.append({
            "images": [f"pictures/{number}.jpg"], "answer": str(row["answer"]).strip(),
            "question": f"{row['question']}\nAnswer with the letter of the right option.",
            "choices": letters(str(row["question"])), "metric": "choice",
            "group": row["category"]})
    write_questions(Path(out, "questions.jsonl"), questions)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(convert, *sys.argv[1:])
