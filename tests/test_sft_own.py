"""docs/data.md, "Your own data", as it is printed, and the recipes that it speaks of."""
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from recipes import stamps

import pretrain
import sample
import train_vit
from lib.cli import cli, UserError
from lib.common import ROOT
from lib.runs import checkpoints

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [line.split(" # ")[0] for line in
            re.search(r"```sh\n(.*?)```", PAGE, re.S)[1].strip().splitlines()]
FEW = {  # what is added to the printed commands, so that they take seconds
    "pretrain.py": "--steps=1 --rows=1 --mtp=0 --workers=0 --eval_every=0 --device=cpu",
    "train_vit.py": "--steps=1 --batch=8 --probes=16 --workers=0 --stage=align --device=cpu",
    "sample.py": ""}


def draw_things(folder):
    """60 pictures of red plums and green ones, and questions about them but for the first picture;
    half of them with captions, in a folder of their own."""
    (folder / "plums").mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for i in range(1, 61):
        ripe, shade = (("yes", (150, 0, 0)), ("no", (0, 120, 0)))[i % 2 == 0]
        image = Image.new("RGB", (80, 60), tuple(rng.integers(190, 256, 3).tolist()))
        x, y = rng.integers(0, 40, 2).tolist()
        colour = tuple((rng.integers(0, 70, 3) + shade).tolist())
        ImageDraw.Draw(image).ellipse((x, y // 2, x + 30, y // 2 + 30), fill=colour)
        image.save(folder / f"{i}.png")
        if ripe == "yes":
            image.save(folder / f"plums/{i}.png")
            (folder / f"plums/{i}.txt").write_text("A ripe plum.")
        lines.append({"images": [f"{i}.png"], "question": "Is it ripe?", "answers": [ripe],
                      "metric": "exact"})
    text = "".join(json.dumps(line) + "\n" for line in lines[1:])
    (folder / "questions.jsonl").write_text(text + "[1, 2]\n")


@pytest.mark.slow
def test_your_own_data_as_printed(tmp_path, monkeypatch, capsys):
    """A model that does not know the question answers it after 20 steps, and not to grey pictures;
    the other commands run."""
    draw_things(tmp_path / "own")
    for path in ROOT.iterdir():         # a working folder like the repository's, but for out/
        if path.name not in ("out", "own", ".git"):
            (tmp_path / path.name).symlink_to(path)
    done = subprocess.run(["bash", "-ec", "\n".join(COMMANDS[:2])], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
                          env={**os.environ, "STEPS": "20", "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout
    assert '"yes"' in (tmp_path / "own/questions.jsonl").read_text().splitlines()[-1]
    assert "not an object" in done.stdout       # the line [1, 2]
    before, after = (json.loads((tmp_path / f"out/sft_own/{name}/eval.json").read_text())["all"]
                     for name in ("before", "after"))
    assert before["accuracy"] < 0.1 and after["accuracy"] >= 0.9, done.stdout
    assert after["blank"] < 0.8 and after["n"] > 5
    assert (tmp_path / "out/sft_own/after/report.html").exists()

    monkeypatch.chdir(tmp_path)
    scripts = []
    for line in COMMANDS[2:]:
        script, *words = shlex.split(line.removeprefix(".venv/bin/python "))
        scripts.append(script)
        words += FEW[script].split()
        if script == "sample.py":
            sample.ask(cli(sample.Ask, words[1:], positional="question"))
            assert capsys.readouterr().out.strip() == "yes"
        else:
            module = {"pretrain.py": pretrain, "train_vit.py": train_vit}[script]
            module.run(cli(module.Args, words))
    assert scripts == ["sample.py", "pretrain.py", "train_vit.py"]
    assert checkpoints(tmp_path / "out/pretrain") and checkpoints(tmp_path / "out/vit/align")


def test_stamps_are_asked_about_in_two_languages(tmp_path, monkeypatch):
    """Of a folder in the package's form: names of one kind on one side, pictures on white."""
    for name in ("goat", "goat2", "owl", "ox", "cat", "dog", "hen", "fox"):
        for kind in ("animals", "symbols"):
            path = tmp_path / "stamps" / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (90, 45), (0, 0, 0, 0)).save(path)
            path.with_suffix(".txt").write_text(f"A {name}.\nde.utf8=Ding\nzh_CN.utf8=东西\n",
                                                encoding="utf-8")
    monkeypatch.setattr(stamps, "STAMPS", tmp_path / "stamps")
    stamps.convert(tmp_path / "out")
    lines = {split: [json.loads(line) for line in (tmp_path / f"out/{split}.jsonl").open()]
             for split in ("train", "test")}
    names = {split: {line["images"][0].partition("-")[2] for line in found}
             for split, found in lines.items()}
    assert names["train"] and names["test"] and not names["train"] & names["test"]
    found = {line["group"]: line["answers"] for line in lines["train"]
             if line["images"] == [f"train/animals-{min(names['train'])}"]}
    stem = min(names["train"]).removesuffix(".png")
    assert found == {"name_en": [f"A {stem}."], "kind_en": ["animals"], "kind_zh": ["动物"],
                     "name_zh": ["东西"]}
    image = Image.open(tmp_path / "out" / lines["test"][0]["images"][0])
    assert image.size == (64, 32) and image.getpixel((5, 5)) == (255, 255, 255)
    monkeypatch.setattr(stamps, "STAMPS", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no stamps in .*nowhere"):
        stamps.convert(tmp_path / "out")
