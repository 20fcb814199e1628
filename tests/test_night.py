"""runs/night.sh: its mixture, and a miniature of the whole run that is killed and started again."""
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import gym
from data import parse_mix, sight, TEXTS
from lib.checkpoint import load_model
from lib.common import ROOT
from lib.tensors import load_tensors
from model import sized

NIGHT = ROOT / "runs/night.sh"


def shell(tail: str) -> str:
    """What `tail` prints in a shell that has the script's mixture and its function `improving`."""
    text = NIGHT.read_text()
    parts = (re.search(r"^CHEAP=.*?^MIX=.*?$", text, re.M | re.S)[0],
             re.search(r"^improving\(\) \{.*?^\}$", text, re.M | re.S)[0])
    return subprocess.run(["bash", "-euc", "\n".join([f"PYTHON={sys.executable}", *parts, tail])],
                          capture_output=True, text=True, check=True).stdout.strip()


def test_the_mixture_has_every_category_and_prefers_what_still_improves(tmp_path):
    (tmp_path / "exam.json").write_text(json.dumps({"table": {
        "point": {"reward": 1.0}, "counting": {"reward": 0.0}, "doc_qa": {"reward": 0.5}}}))
    plain, improving = (dict(parse_mix(shell(command), sight(sized("mini")))) for command in (
        'echo "$MIX"', f'improving "{tmp_path}/exam.json"'))
    assert plain.keys() == improving.keys() == {*gym.names(), *TEXTS}
    factors = {name: improving[name] / plain[name] for name in plain}
    assert {name: factors.pop(name) for name in ("point", "counting")} == {
        "point": 0.25, "counting": 0.25}
    assert all(factor == pytest.approx(1, abs=0.01) for factor in factors.values())


@pytest.mark.slow
def test_a_miniature_survives_a_kill(tmp_path):
    """Killed once the first stage of pretraining has begun, and started again until its end."""
    out = tmp_path / "night"
    night = dict(args=["bash", NIGHT, out], text=True, start_new_session=True,
                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                 env={**os.environ, "HOURS": "0.001", "EXAM": "point,doc_qa",
                      "PYTHON": sys.executable})
    with subprocess.Popen(**night) as run:
        for line in run.stdout:
            if "run folder" in line:        # all the tower's stages are done
                os.killpg(run.pid, signal.SIGKILL)
    again = subprocess.run(**night)
    assert again.returncode == 0, again.stdout
    assert "align begins" not in again.stdout and (out / "vit/align/step_000001").is_dir()
    for name, levels in (("first", 1), ("second", 3), ("sft", 3)):
        config = json.loads((out / name / "config.json").read_text())
        assert (config["levels"], config["size"]) == (levels, "mini")
    weights = load_tensors(out / "kept")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert load_model(out / "kept").config.text == sized("mini").text
    assert json.loads((out / "kept/report.json").read_text())["table"].keys() <= set(gym.names())
    third = subprocess.run(**night)         # nothing is left to do
    assert third.returncode == 0 and "tokens a step" not in third.stdout
