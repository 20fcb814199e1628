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


def test_the_mixtures_have_every_category():
    parts = re.search(r"^CHEAP=.*?^TEXT=.*?^LATER=.*?\n\n", NIGHT.read_text(), re.M | re.S)[0]
    shown = subprocess.run(["bash", "-euc", parts + 'echo "$MIX"; echo "$LATER"'],
                           capture_output=True, text=True, check=True).stdout
    for mix in shown.split():
        weights = dict(parse_mix(mix, sight(sized("mini"))))
        assert weights.keys() == {*gym.names(), *TEXTS} and min(weights.values()) > 0


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
    for name, before in (("first", ""), ("second", "first"), ("third", "second")):
        config = json.loads((out / name / "config.json").read_text())
        assert config["size"] == "mini" and config["init"] == (before and str(out / before))
    weights = load_tensors(out / "kept")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert load_model(out / "kept").config.text == sized("mini").text
    assert json.loads((out / "kept/report.json").read_text())["table"].keys() <= set(gym.names())
    third = subprocess.run(**night)         # nothing is left to do
    assert third.returncode == 0 and "tokens a step" not in third.stdout
