"""Tux Paint's stamps as questions: what a small model learns from a few hundred real pictures.

    apt-get install tuxpaint-stamps-default
    python -m recipes.stamps                        into out/stamps: train.jsonl, test.jsonl
    python pretrain.py --init=ckpt/demo --data=out/stamps/train.jsonl --val=out/stamps/test.jsonl \\
        --steps=450 --rows=1 --lr=2e-3 --mtp=0 --out=out/stamps/run
    python sample.py eval --ckpt=out/stamps/run --data=out/stamps/test.jsonl --max_new=48

Each stamp, a photo or a drawing, is asked about twice in English and twice in Chinese: what it is,
answered by its caption, and what kind of thing it is, answered by the name of its folder. One in
five file names is for the test, so no stamp of such a name is trained on. The stamps have licences
of their own and stay outside the repository.
"""
import sys
from pathlib import Path

from PIL import Image

from lib.cli import main, UserError
from lib.images import open_image
from recipes.published import write_questions
from tasks.base import held

STAMPS = Path("/usr/share/tuxpaint/stamps")
SIDE = 64       # pixels; the smallest model sees no more
KINDS = {"animals": "动物", "clothes": "衣服", "food": "食物", "hobbies": "爱好", "household": "家居",
         "medical": "医疗", "military": "军事", "naturalforces": "自然力", "people": "人",
         "plants": "植物", "seasonal": "节日", "space": "太空", "sports": "运动", "symbols": "符号",
         "town": "城镇", "vehicles": "交通工具"}


def questions(path: Path) -> list[tuple[str, str, str]]:
    """(group, question, answer) of a stamp; without a Chinese caption there are three."""
    lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    chinese = [line.partition("=")[2] for line in lines if line.startswith("zh_CN.utf8=")]
    kind = path.relative_to(STAMPS).parts[0]
    found = [("name_en", "What is it?", lines[0].strip()), ("kind_en", "What kind is it?", kind),
             ("kind_zh", "这是哪一类？", KINDS[kind])]
    return found + [("name_zh", "这是什么？", line.strip()) for line in chinese if line.strip()]


def convert(out: Path):
    """Write both files and the pictures, on white and at most SIDE pixels wide and high."""
    pictures = [p for p in sorted(STAMPS.rglob("*.png")) if p.with_suffix(".txt").is_file()]
    if not pictures:
        raise UserError(f"no stamps in {STAMPS}: apt-get install tuxpaint-stamps-default")
    lines = {"train": [], "test": []}
    for path in pictures:
        split = "test" if held(path.stem.lower()) else "train"
        name = "-".join(path.relative_to(STAMPS).parts)
        image = open_image(path)
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        (out / split).mkdir(parents=True, exist_ok=True)
        image.save(out / split / name)
        for group, question, answer in questions(path):
            lines[split].append({"images": [f"{split}/{name}"], "question": question,
                                 "answers": [answer], "metric": "exact", "group": group})
    for split, asked in lines.items():
        write_questions(out / f"{split}.jsonl", asked)


if __name__ == "__main__":
    if sys.argv[1:2] in (["--help"], ["-h"]) or len(sys.argv) > 2:
        sys.exit(__doc__)
    main(convert, Path(*sys.argv[1:]) if sys.argv[1:] else Path("out/stamps"))
