"""README.md and RESULTS.md against what they speak of: figures, files, commands, counts."""
import ast
import json
import re
from pathlib import Path

import pytest
import torch
from commands import pages, wrong_commands
from test_house import lines_of, shelves

import gym
import train_vit
from lib.checkpoint import load_model, load_tower
from lib.common import ROOT
from lib.evaluation import run_tasks
from lib.probes import ProbeSet, probe
from model import sized
from rl import DEMO
from tasks.base import Task
from tokenizer import Tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
LOG = (ROOT / "LOG.md").read_text(encoding="utf-8")


def shipped_table() -> dict[str, list[float]]:
    """{category: [accuracy of each seed, blank, chance]} in percent."""
    text = RESULTS.split("## The shipped model")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", text, re.M)
    return {name: [float(x) for x in re.findall(r"\d+\.\d", cells)] for name, cells in rows}


def test_the_readme_is_short_and_shows_pictures():
    assert len(README.splitlines()) <= 200
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 3
    for name in pictures:
        assert 0 < (ROOT / name).stat().st_size <= 300_000, name
    assert "no GPU has run them yet" in README.replace("\n", " ")[:1200]


def test_the_readme_counts_files_and_lines():
    """Rounded to a hundred lines, so that not every edit makes it wrong."""
    found = re.findall(r"^\| (?:`(\w+)/`|(top level)) \| (\d+) \| ([\d,]+) \|", README, re.M)
    assert {folder or "top" for folder, _, _, _ in found} == {"top", "lib", "tasks", "lab"}
    for folder, _, files, lines in found:
        counted = shelves()[folder or "top"]
        assert int(files) == counted[0], folder
        assert abs(int(lines.replace(",", "")) - counted[1]) <= 100, (folder, counted)


def test_what_one_step_needs_of_lib_is_short():
    """The files that the README names for following one step of each stage."""
    sentence = re.search(r"To follow one step of each stage(.*?) about 1,000", README, re.S)[1]
    files, parts = re.findall(r"`(lib/\w+\.py)`", sentence), re.findall(r"`(\w+)`", sentence)
    lines = sum(len(lines_of(Path(name))) for name in files)
    sizes = {node.name: node.end_lineno - node.lineno + 1
             for path in (ROOT / "lib").glob("*.py")
             for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    lines += sum(sizes[name] for name in parts)
    print(f"{files}, {parts}: {lines} lines")
    assert files and parts and lines < 1050


def test_the_table_is_the_checkpoints_own_evaluation():
    """The first column is the seed whose weights are in ckpt/."""
    kept = json.loads((DEMO / "report.json").read_text())["table"]
    quoted = shipped_table()
    assert sorted(quoted) == sorted(kept)
    for name, row in kept.items():
        assert quoted[name][0] == round(100 * row["accuracy"], 1), name


def test_the_checkpoint_scores_what_the_table_says():
    """The same 300 tasks a category; 5 points of room, since the table was made in bf16."""
    torch.set_num_threads(1)
    model = load_model(DEMO)
    tokens = Tokenizer(model.config.n_ranks)
    for name, cells in shipped_table().items():
        tasks = [Task(name, 1_000_000 + i, 0, "test") for i in range(300)]
        right = sum(e.score.solved for e in run_tasks(model, tokens, tasks)) / 3
        assert abs(right - cells[0]) <= 5, name
    assert sum((DEMO / f).stat().st_size for f in ("model.safetensors", "config.json")) < 2e6


@pytest.mark.slow
def test_the_towers_in_ckpt_are_as_good_as_the_table_says():
    """A point of room, since the shipped weights are in bf16."""
    rows = re.findall(r"^\| `ckpt/(\w+)` \| ([\d.]+) \| ([\d.]+) \|", RESULTS, re.M)
    assert [name for name, *_ in rows] == list(train_vit.STAGES)
    config = sized("tiny")
    probes = ProbeSet(config, 64)
    for name, linear, dense in rows:
        visual = train_vit.tower(train_vit.Args(), config)
        load_tower(visual, ROOT / "ckpt" / name)
        found = probe(visual, probes)
        assert abs(100 * found["linear"] - float(linear)) <= 1, name
        assert abs(100 * found["dense"] - float(dense)) <= 1, name


def test_the_demos_mean_is_that_of_its_table():
    """README: "mean of six categories 76% (75 to 78 over three seeds)", RESULTS: a row a seed."""
    rows = re.findall(r"^\| seed \d \|.*\| ([\d.]+) \|$", RESULTS, re.M)
    means = [float(mean) for mean in rows]
    mean, least, most = map(float, re.search(
        r"mean of six categories ([\d.]+)% \(([\d.]+) to ([\d.]+) over three seeds\)",
        README).groups())
    assert len(means) == 3 and (least, most) == (min(means), max(means))
    assert abs(mean - sum(means) / 3) < 0.06


def test_every_result_has_a_verdict():
    rows = [line for line in RESULTS.splitlines() if re.match(r"\| \w", line)]
    rows = [row for row in rows if row.count("|") == 5 and not row.startswith("| claim |")]
    verdicts = ("met", "missed", "found", "not seen")
    assert len(rows) > 20
    for row in rows:
        assert row.split("|")[2].strip().startswith(verdicts), row


def test_an_episode_longer_than_the_context_is_an_error_and_not_a_zero():
    model = load_model(DEMO)
    tasks = [Task("ui_polish", 1, 0, "test"), Task("point", 1, 0, "test")]
    long, short = run_tasks(model, Tokenizer(model.config.n_ranks), tasks, context=512, max_new=48)
    assert "context" in long.score.error and short.score.error is None


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_commands_that_are_named_exist(page):
    """Every command is parsed by its own script, which refuses unknown options and values."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"^\| `([\w./]+\.py|[\w]+/)`", text, re.M):
        assert (ROOT / name).exists() or (ROOT / "tasks" / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name
    assert wrong_commands(text) == []


def test_wrong_commands_are_found():
    text = "```sh\n.venv/bin/python rl.py --step=3\nmake tee\n```\nand `python -m lab qk_nor`"
    assert [line.split(":")[0] for line in wrong_commands(text)] == [
        ".venv/bin/python rl.py --step=3", "make tee", "python -m lab qk_nor"]


def test_the_first_minute_of_the_readme_is_right():
    """The script that plays one task in the README solves it."""
    name, split, seed, script = re.search(
        r"gym\.py play (\w+) --split=(\w+) --seed=(\d+) --script=(\S+)", README).groups()
    task = Task(name, int(seed), 0, split)
    evidence = gym.play_out(task, [gym.box(script)])[2]
    assert gym.Rewards().score(task, evidence).reward == 1
