"""The lab sheets about RL: the sign of each effect, what their arms differ in, two in miniature."""
import json
import math
from dataclasses import replace
from unittest import mock

import pytest

import gym
from data import parse_mix
from lab import bench_rl, joint, sheet
from lab.sheets import (async_rl, forgetting, hierarchy, rl_beats_sft, transfer, vague_tasks,
                        weak_verifier)
from lib.cli import UserError
from lib.common import write_json
from tasks.base import Task

SHEETS = (forgetting, hierarchy, rl_beats_sft, transfer, vague_tasks, weak_verifier)


@pytest.mark.parametrize("module,runs,effects", [
    (transfer, {"start": {"agent": 30}, "perception": {"agent": 41, "perception": 0}}, [11]),
    (vague_tasks, {"exact": {"forms": 80}, "unreliable": {"forms": 50}}, [30]),
    (weak_verifier, {"right": {"others": 80, "counting": 1}, "weak": {"others": 60}}, [20]),
    (hierarchy, {"alone": {"forms": 70}, "turn": {"forms": 60}, "all": {"forms": 0}}, [-10]),
    (forgetting, {"rl": {"others": 40, "forms": 0}, "sft": {"others": 5}}, [35]),
    (rl_beats_sft, {"rl": {"mean": 90, "forms": 0}, "sft": {"mean": 60}}, [30]),
    (async_rl, {"asynchronous": {"rate": 16, "right": 70}, "synchronous": {"rate": 4, "right": 72}},
     [2, -2])])
def test_an_effect_is_positive_where_the_claim_is_right(module, runs, effects):
    assert [test.of(runs) for test in module.SHEET.tests] == pytest.approx(effects)
    assert set(runs) == set(module.SHEET.arms)


@pytest.mark.parametrize("module", SHEETS, ids=lambda module: module.__name__.split(".")[-1])
def test_arms_take_as_many_steps_or_minutes(module):
    """Of each arm, and all categories that are played are examined."""
    study = module.STUDY
    spent = {(sum(phase.steps for phase in phases),
              0 if phases[0].steps else sum(phase.share for phase in phases))
             for phases in study.arms.values()}
    assert len(spent) == 1
    played = {name for phases in study.arms.values() for phase in phases
              for name, _ in parse_mix(phase.mix)}
    assert played <= set(study.names.split(",")) <= set(gym.names())


def test_a_start_of_other_code_is_not_taken_for_that_of_another_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "make_start", lambda study, args, out: out)
    monkeypatch.setattr(sheet, "sources", lambda: ["pretrain.py"])
    for start_of in (rl_beats_sft.fallible_start, hierarchy.tiers_start):
        start = start_of(tmp_path / "one" / "arm-0")
        assert start == start_of(tmp_path / "other" / "arm-0") and start.parent == tmp_path
        write_json(start / "code.json", {"pretrain.py": "as it was before"})
        with pytest.raises(UserError, match="pretrain.py has changed"):
            start_of(tmp_path / "other" / "arm-0")


def test_transfer_does_not_play_what_it_claims():
    played = {name for name, _ in parse_mix(transfer.STUDY.arms["perception"][0].mix)}
    assert played == set(transfer.PERCEPTION) and not played & set(transfer.AGENT)
    assert all(gym.CATEGORIES[name].env.family == "agent" for name in transfer.AGENT)
    assert all(gym.CATEGORIES[name].env.family == "perception" for name in transfer.PERCEPTION)


def test_an_unreliable_verdict_is_the_opposite_and_stays_the_same():
    """A share of the verdicts, whatever they are; nothing else about a score changes."""
    task = Task("counting", 1)
    evidence = gym.play_out(task)[2]
    pairs = [(replace(task, seed=i), {**evidence, "reply": reply})
             for i in range(300) for reply in (evidence["reply"], "nothing")]
    rewards = gym.Rewards()
    true = [rewards.score(*pair) for pair in pairs]
    with joint.unreliable(0.3):
        first, again = ([rewards.score(*pair) for pair in pairs] for _ in range(2))
    assert first == again
    flipped = [a.reward != b.reward for a, b in zip(true, first)]
    for right in (0, 1):
        mine = [flip for flip, score in zip(flipped, true) if score.reward == right]
        assert 0.2 < sum(mine) / len(mine) < 0.4
    assert all(b.reward == (1 - a.reward if flip else a.reward)
               for a, b, flip in zip(true, first, flipped))
    with joint.unreliable(1.0):
        broken = rewards.score(task, {})
    assert broken.error and math.isnan(broken.reward)
    assert rewards.score(*pairs[0]) == true[0]


def test_async_rl_compares_staleness_alone(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(bench_rl, "one_run", lambda *how: called.append(how) or {
        "rate": 3.0, "right": 0.5, "stale_max": 2, "waited": 0.1})
    for arm in async_rl.SHEET.arms:
        found = async_rl.measure(arm, 7, tmp_path)
    assert found == {"rate": 3.0, "right": 50, "lag": 2, "waited": 0.1}
    (w1, s1, *rest1), (w2, s2, *rest2) = called
    assert (w1, s1, s2) == (w2, 0, 2) and rest1 == rest2 and rest1[0] == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vague_tasks", "transfer"])
def test_a_sheet_in_miniature(name, tmp_path, monkeypatch, capsys):
    """Both arms of a seed from one start, an answer, a page; a second time nothing is trained."""
    module = sheet.load(name)
    for part in SHEETS:                 # its start may be another sheet's
        monkeypatch.setattr(part, "ARGS", replace(part.ARGS, before=1, count=2, prompts=1))
    monkeypatch.setattr(module, "STUDY", replace(module.STUDY, arms={
        arm: [replace(phase, steps=1) for phase in phases]
        for arm, phases in module.STUDY.arms.items()}))
    monkeypatch.setattr(joint, "budget", lambda *rest: (400, 8))
    # Every episode has a chance of a reward, so that a group of two gives a signal soon.
    monkeypatch.setattr(gym.Rewards, "score", lambda self, task, evidence: gym.Score(
        float(len(repr(evidence)) % 2)))
    found = sheet.run(name, first=5, seeds=1, out=tmp_path)
    assert found["verdict"] == "underpowered" and len(found["runs"]) == 2
    assert (tmp_path / name / "report.html").exists()
    start = next(tmp_path.rglob("*_start"))
    assert json.loads((start / "seconds.json").read_text())["step 1"] > 0
    assert len(list(tmp_path.glob("**/phase0/log.jsonl"))) == len(module.STUDY.arms)
    with mock.patch.object(joint, "run_arm", None):     # would fail if it were called
        assert sheet.run(name, first=5, seeds=1, out=tmp_path)["runs"] == found["runs"]
