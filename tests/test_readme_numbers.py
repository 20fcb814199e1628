"""Every number of README.md beside its source: a file, a checkpoint, a count.

What stands outside of code and is no name (H100, GLM-4.5V) must be in a sentence that a check below
recognises, so a number without a source fails.
"""
import functools
import json
import re

import torch
from test_readme import README, RESULTS, shipped_table

import gym
import mmtp
from lab import sheet
from lib.checkpoint import load_model
from lib.common import ROOT
from lib.roofline import MACHINES
from lib.scoring import interval
from lib.summary import ahead
from model import GLMV, sized


@functools.cache
def parameters(size: str) -> float:
    """Millions of parameters of a size, with its MTP head."""
    with torch.device("meta"):
        model = GLMV(sized(size))
        mmtp.attach(model, 3)
    return sum(p.numel() for p in model.parameters()) / 1e6


def shipped(name: str) -> float:
    return sum(p.numel() for p in load_model(ROOT / name).parameters()) / 1e6


def learned_by_ckpt_gym() -> int:
    """Categories that stand 20 points above grey pictures and chance at the easiest level."""
    table = json.loads((ROOT / "ckpt/gym/report.json").read_text())["table"]
    return sum(ahead(row["by_level"][0]) for row in table.values())


def in_file(path: str, pattern: str) -> list[str]:
    return re.findall(pattern, (ROOT / path).read_text(encoding="utf-8"))


def demo_minutes() -> float:
    minutes, seconds = re.search(r"(\d+) min (\d+) s with `\.venv`", RESULTS).groups()
    return int(minutes) + int(seconds) / 60


def price() -> float:
    return MACHINES["H100"].price


def half_an_hour() -> float:
    return float(in_file("runs/one_gpu.sh", r"HOURS=\$\{HOURS:-([\d.]+)\}")[0])


def on_two_nodes() -> tuple[float, float]:
    """Hours and price of all stages in the head of runs/nodes.sh."""
    rows = in_file("runs/nodes.sh", r"([\d.]+) h\s+\$(\d+)")
    return sum(float(h) for h, _ in rows), sum(float(p) for _, p in rows)


def form(cell: int) -> float:
    return shipped_table()["gui_form"][cell]


def near(quoted: str, value: float) -> bool:
    """Whether a number is a value, rounded to the digits that are quoted."""
    digits = len(quoted.partition(".")[2])
    return abs(float(quoted.replace(",", "")) - value) <= 0.5000001 * 10 ** -digits


# (sentence with one group a number, function giving their values)
CHECKED = [
    (r"joint reinforcement learning over (\d+) task categories", lambda: [len(gym.names())]),
    (r"the ([\d.]+)M-parameter checkpoint in\s+`ckpt/demo`", lambda: [shipped("ckpt/demo")]),
    (r"It solves ([\d.]+)% of (\d+) such forms \((\d+)% interval ([\d.]+) to ([\d.]+); ([\d.]+)% "
     r"with grey pictures", lambda: [
         form(0), 300, 95, *(100 * end for end in interval(form(0) / 100, 300)), form(3)]),
    (r"mean of six categories ([\d.]+)% \(([\d.]+) to ([\d.]+) over three seeds\)",
     lambda: [float(x) for x in re.search(
         r"is at least 75% \| met \| ([\d.]+)% \[([\d.]+) to ([\d.]+)\]", RESULTS).groups()]),
    (r"`make demo` \| (\d+) minutes", lambda: [demo_minutes()]),
    (r"`bash runs/night.sh` \| (\d+) idle hours.*?(\d+) of (\d+) categories learned.*?after (\d+) "
     r"hours", lambda: [
         float(in_file("runs/night.sh", r"HOURS=\$\{HOURS:-(\d+)\}")[0]), learned_by_ckpt_gym(),
         len(gym.names()), int(in_file("ckpt/gym/README.md", r"(\d+) hours of one CPU core")[0])]),
    (r"half an hour, \$([\d.]+) on an H100 at \$([\d.]+) \| a model of (\d+)M", lambda: [
        half_an_hour() * price(), price(), parameters("small")]),
    (r"\| ([\d.]+) hours, \$(\d+), computed \| a model of GLM-OCR's size, ([\d.]+)B", lambda: [
        *on_two_nodes(), parameters("base") / 1000]),
    (r"through everything in (\d+) minutes", lambda: [
        int(in_file("course/README.md", r"One lecture of (\d+) minutes")[0])]),
    (r"three seeds or more,\s+(\d+)% intervals", lambda: [95]),
    (r"how to add a category in (\d+)\s+lines", lambda: [
        int(in_file("tasks/README.md", r"Your own category in (\d+) lines")[0])]),
    (r"about 1,(000) lines", lambda: [0]),      # counted in tests/test_readme.py
    (r"`tiny` \(([\d.]+)M parameters, the demo\),\s+`mini` \(([\d.]+)M.*?`small` \((\d+)M.*?`base` "
     r"\(GLM-OCR's own, ([\d.]+)B\)", lambda: [
         *map(parameters, ("tiny", "mini", "small")), parameters("base") / 1000]),
    (r"six categories of the\s+gym, (\d+)-pixel drawings", lambda: [64]),
    (r"async loss: GLM-5 \| (\d+) categories, rule verifiers", lambda: [len(gym.names())]),
]
# What the paper and its relatives say; PAPER facts are not measured here.
FACTS = (r"two teachers, 35% masked, SigLIP loss at 64K", r"loss weight 0\.3, then 0\.1",
         r"joint over 30 categories", r"needed from about 5B parameters", r"a 2-core laptop",
         r"on 2 quiet cores")
NAMES = (r"GLM-[\d.]+V?(?:-Turbo)?", r"arXiv [\d.]+", r"[ABH]\d{3}", r"SigLIP2|DINOv3",
         r"fp32|bf16")


def numbers_of(text: str) -> str:
    """The README without code, pictures, links and tables that have a test of their own."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"^\| (?:`\w+/`|top level) \| \d+ \| [\d,]+ \|$", "", text, flags=re.M)
    return re.sub(r"^\| `\w+` \| .*\.? \| .*\|$", "", text, flags=re.M)     # sheets


def test_every_number_has_a_source():
    text = numbers_of(README)
    for pattern, values in CHECKED:
        found = re.search(pattern, text, re.S)
        assert found, pattern
        expected = values()
        assert len(expected) == len(found.groups()), pattern
        for quoted, value in zip(found.groups(), expected):
            assert near(quoted, value), (pattern, quoted, value)
        start, end = found.span()
        text = text[:start] + re.sub(r"\d", "#", text[start:end]) + text[end:]
    for pattern in (*FACTS, *NAMES):
        text = re.sub(pattern, "", text)
    text = re.sub(r"`[^`]*`", "", text)
    left = [line for line in text.splitlines() if re.search(r"\d", line)]
    assert left == []


def test_the_claims_are_those_of_the_sheets():
    """Claim and verdict of each sheet, the measured ones first."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", README, re.M)
    rows = {name: (claim, verdict) for name, claim, verdict in rows if name in sheet.names()}
    assert sorted(rows) == sheet.names()
    for name, (claim, verdict) in rows.items():
        assert claim == sheet.claim(name), name
        answer, night = sheet.kept(name), sheet.load(name).SHEET.kind == "night"
        todo = "not yet run" + " (a night)" * night
        assert verdict == (f"**{answer['verdict']}**" if answer else todo), name


def test_results_has_every_effect():
    """A row of RESULTS.md for each test of each answer, with its figures."""
    number = sheet.drawing.number
    for name in sheet.names():
        for title, test in (sheet.kept(name) or {"tests": {}})["tests"].items():
            kind = "a gain of" if test["kind"] == "Gain" else "a loss below"
            row = (f"| `{name}` | {title} | {number(test['mean'])} [{number(test['low'])} to "
                   f"{number(test['high'])}], {number(test['detectable'])} | {kind} "
                   f"{number(test['claimed'])} | {test['verdict']} |")
            assert row in RESULTS, row
