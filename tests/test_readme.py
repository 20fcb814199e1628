"""The README against what it speaks of: figures, files, commands."""
import json
import re

import pytest
import torch

import gym
import train_vit
from lib.checkpoint import load_model, load_tower
from lib.common import ROOT
from lib.probes import Exam, probe
from model import sized
from sample import DEMO, play
from tasks.base import Task
from tokenizer import Tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_table() -> dict[str, list[float]]:
    """{category: [accuracy of each seed, blank, chance]} in percent."""
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", README, re.M)
    numbers = {name: [float(x) for x in re.findall(r"\d+\.\d", cells)] for name, cells in rows}
    return {name: cells for name, cells in numbers.items() if name in gym.names()}


def test_the_table_is_the_checkpoints_own_examination():
    """The first column is the seed whose weights stand in ckpt/."""
    kept = json.loads((DEMO / "report.json").read_text())["table"]
    told = readme_table()
    assert sorted(told) == sorted(kept)
    for name, row in kept.items():
        assert told[name][0] == round(100 * row["accuracy"], 1), name


def test_the_checkpoint_scores_what_the_readme_says():
    """The same 300 tasks a category; 5 points of room, for the table was made in bf16."""
    torch.set_num_threads(1)
    model = load_model(DEMO)
    tokens = Tokenizer(model.config.n_ranks)
    for name, cells in readme_table().items():
        tasks = [Task(name, 1_000_000 + i, 0, "test") for i in range(300)]
        right = sum(p.score.reward > 0.999 for p in play(model, tokens, tasks)) / 3
        assert abs(right - cells[0]) <= 5, name
    assert sum((DEMO / f).stat().st_size for f in ("model.safetensors", "config.json")) < 2e6


@pytest.mark.slow
def test_the_towers_in_ckpt_are_as_good_as_the_readme_says():
    """A point of room, for what stands there is in bf16."""
    rows = re.findall(r"^\| `ckpt/(\w+)` \| ([\d.]+) \| ([\d.]+) \|", README, re.M)
    assert [name for name, *_ in rows] == list(train_vit.STAGES)
    config = sized("tiny")
    exam = Exam(config, 64)
    for name, linear, dense in rows:
        visual = train_vit.tower(train_vit.Args(), config)
        load_tower(visual, ROOT / "ckpt" / name)
        found = probe(visual, exam)
        assert abs(100 * found["linear"] - float(linear)) <= 1, name
        assert abs(100 * found["dense"] - float(dense)) <= 1, name


def test_an_episode_longer_than_the_context_is_an_error_and_not_a_zero():
    model = load_model(DEMO)
    tasks = [Task("ui_polish", 1, 0, "test"), Task("point", 1, 0, "test")]
    long, short = play(model, Tokenizer(model.config.n_ranks), tasks)
    assert "context" in long.score.error and short.score.error is None


def test_files_and_commands_that_it_names_exist():
    for name in re.findall(r"^\| `([\w./]+)`", README, re.M):
        assert name in gym.names() or (ROOT / name).exists() or name in (
            "tokens", "weights", "positions", "cu_seqlens", "patches", "grids", "visual"), name
    for script, words in re.findall(r"python (\w+\.py|-m lab\.\w+)((?: \S+)*)", README):
        path = script.replace("-m lab.", "lab/") + (".py" if script.startswith("-m") else "")
        assert (ROOT / path).exists(), script
        for option in re.findall(r"--([\w-]+)", words.split("#")[0]):
            text = (ROOT / path).read_text() + (ROOT / "gym.py").read_text()
            assert option in ("help",) or option.replace("-", "_") in text, (script, option)
