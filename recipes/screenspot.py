"""ScreenSpot-v2 as questions for `sample.py eval`: click what an instruction means on a screen.

    unzip screenspotv2_image.zip            in the folder ScreenSpot-v2
    python -m recipes.screenspot ScreenSpot-v2
    python sample.py eval --ckpt=out/sft --data=ScreenSpot-v2/questions.jsonl

Data: https://huggingface.co/datasets/OS-Copilot/ScreenSpot-v2, screenspot_{mobile,desktop,web}_v2
.json and screenspotv2_image.zip (1.33 GB), 1,272 instructions, Apache-2.0. Its card says no more;
the fields are those of the files: img_filename, bbox (x, y, width, height in pixels), instruction,
data_type (text or icon), data_source. The platform is the group here. A click anywhere in the box
is right. Not yet run on the published files, only on some of their form.
"""
import sys
from pathlib import Path

from lib.cli import main, UserError
from lib.common import read_json
from lib.images import Picture
from recipes.published import write_questions

IMAGES = "screenspotv2_image"


def convert(source: str):
    """Write questions.jsonl into the folder `source`; its pictures stay where they are."""
    lines = []
    for path in sorted(Path(source).glob("screenspot_*_v2.json")):
        platform = path.stem.split("_")[1]
        for entry in read_json(path, list):
            try:
                name, instruction, (x, y, w, h) = (
                    entry[key] for key in ("img_filename", "instruction", "bbox"))
                width, height = Picture(Path(source, IMAGES, name)).size
                box = [999 * x / width, 999 * y / height,
                       999 * (x + w) / width, 999 * (y + h) / height]
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path} is not of ScreenSpot-v2: {str(entry)[:100]}") from None
            lines.append({
                "images": [f"{IMAGES}/{name}"], "group": platform,
                "question": f"{instruction}\nReply with click(x, y), both from 0 to 999.",
                "answer": [round(min(max(c, 0), 999), 1) for c in box], "metric": "point-in-box"})
    if not lines:
        raise UserError(f"{source} has no screenspot_mobile_v2.json, ..._desktop_v2, ..._web_v2")
    write_questions(Path(source, "questions.jsonl"), lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(convert, *sys.argv[1:])
