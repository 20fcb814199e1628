"""OCRBench as questions for `sample.py eval`: 1,000 questions about text in pictures, of ten types.

    python -m recipes.ocrbench "OCRBench/data/test-*.parquet" data/ocrbench
    python sample.py eval --ckpt=out/sft --data=data/ocrbench/questions.jsonl

Data card: https://huggingface.co/datasets/echo840/OCRBench, files data/test-*, 67.6 MB; it names no
licence. Fields: dataset (where the picture is from), question, question_type (the group here),
answer (a list), image. Needs pyarrow. A reply is right if it contains an answer, without regard to
case; formulas, those of HME100k, are compared without white space. Not yet run on the published
files, only on one of their form.
"""
import sys
from pathlib import Path

from lib.cli import main
from recipes.published import table_rows, write_questions

COLUMNS = {"dataset", "question", "question_type", "answer", "image"}


def convert(source: str, out: str):
    """Write questions.jsonl and the pictures into the folder `out`."""
    questions = []
    for number, row in enumerate(table_rows(source, COLUMNS, Path(out, "pictures"), "OCRBench")):
        formula = row["dataset"] == "HME100k"
        questions.append({
            "images": [f"pictures/{number}.jpg"], "question": row["question"],
            "answers": row["answer"], "group": row["question_type"],
            "metric": "contains-formula" if formula else "contains"})
    write_questions(Path(out, "questions.jsonl"), questions)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(convert, *sys.argv[1:])
