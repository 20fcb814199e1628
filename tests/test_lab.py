"""The demo, its page and the lab sheets, end to end at a few steps."""
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gym
import pretrain
import rl
import train_vit
from data import parse_mix
from lab import campaign, demo, dino, drafts, mmtp_options, vit_claims, vit_pays, worlds
from lib.checkpoint import save_model
from lib.cli import UserError
from lib.common import ROOT
from lib.runs import find_checkpoint
from lib.tensors import load_tensors
from model import GLMV, sized
from tasks.base import box, Task


@pytest.fixture
def small_pretraining(monkeypatch):
    full, small = pretrain.Args, {"workers": 0, "row_tokens": 512}
    monkeypatch.setattr(pretrain, "Args", lambda **kw: full(**kw | small))


@pytest.mark.slow
def test_the_demo_trains_evaluates_answers_and_reports(tmp_path, small_towers, small_pretraining,
                                                       monkeypatch, capsys):
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
    args = demo.Args(tower_steps=1, steps=3, rl_steps=0, count=2, out=str(tmp_path / "run"),
                     keep=str(tmp_path / "kept"))
    demo.demo(args)
    facts = json.loads((tmp_path / "run/report.json").read_text())
    assert list(facts["table"]) == [name for name, _ in parse_mix(demo.MIX)]
    assert len(facts["samples"]) == 2 * len(facts["table"])
    assert list(facts["stages"]) == [*demo.IMPROVES, "pretraining"]
    for row in facts["stages"].values():
        assert all(0 <= row[key] <= 100 for key in ("random", "before", "after"))
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("data:image/png;base64,") >= 12 and "polyline" in page
    assert "names a shape, among 48 names" in page
    assert page.count("s features</small>") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "kept/model.safetensors").exists()
    said = capsys.readouterr().out
    assert all(f"{i}/5 " in said for i in (1, 2, 3, 4)) and "5/5" not in said
    assert "this machine is busy (load 99.0" in said
    logs = sorted((tmp_path / "run").glob("**/log.jsonl"))
    assert [path.parent.name for path in logs] == ["pretrain", "align", "distill", "semantic",
                                                   "texture"]
    before = [path.read_text() for path in logs]
    demo.demo(args)  # once more: nothing is trained again
    assert [path.read_text() for path in logs] == before
    with pytest.raises(UserError, match="begun with other options"):
        demo.demo(replace(args, seed=1))


def test_each_tower_stage_is_compared_with_random_weights_or_a_blind_guess():
    rows = demo.improvements({
        "random weights": {"dense": 0.3, "linear": 0.7},
        "texture": {"dense": 0.6, "linear": 0.5}, "distill": {"dense": 0.5, "linear": 0.8},
        "align": {"zero_shot_en": 0.9, "i2t_en": 0.2, "chance_en": 0.01}})
    assert list(rows) == ["texture", "distill", "align"]    # a stage that did not run has no row
    assert rows["texture"] == {"figure": f"{demo.IMPROVES['texture'][1]}, %", "random": 30.0,
                               "before": 30.0, "after": 60.0}
    assert rows["distill"]["after"] == 80.0 and rows["align"]["before"] == pytest.approx(100 / 48)


@pytest.mark.parametrize("tower_steps", [0, 1])
def test_the_demo_pretrains_from_its_own_tower_or_from_the_shipped_one(
        tower_steps, tmp_path, small_towers, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, "run", seen.append)
    with pytest.raises(UserError, match="no checkpoint"):       # as nothing is pretrained here
        demo.demo(demo.Args(tower_steps=tower_steps, row_tokens=1024, rl_steps=0,
                            out=str(tmp_path)))
    tower = tmp_path / "vit/align/step_000001" if tower_steps else ROOT / "ckpt/semantic"
    assert find_checkpoint(seen[0].vit) == tower and seen[0].row_tokens == 1024


@pytest.mark.parametrize("wrong,said", [
    ({"tower_steps": -1}, "--tower_steps takes 0 or more"),
    ({"rl_steps": -1}, "--rl_steps takes 0 or more"), ({"rows": 0}, "--rows takes 1 or more"),
    ({"levels": 9}, "--levels takes 1 to 5")])
def test_the_demo_refuses_at_once_and_leaves_nothing(tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        demo.demo(demo.Args(**wrong, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_demos_worlds_run_side_by_side_and_are_shown(tmp_path, monkeypatch, capfd):
    fake = tmp_path / "lab/worlds.py"
    fake.parent.mkdir()
    fake.write_text("""
import json, pathlib, sys
words = dict(word[2:].split("=") for word in sys.argv[1:])
print("steps", words["steps"])
if words["seeds"] != "1" or words["steps"] == "13":
    sys.exit(3)
folder = pathlib.Path(words["out"]) / words["world"]
folder.mkdir(parents=True)
names = "start", "rl, seed 0", "sft, seed 0"
rows = {f"{name}, greedy": {"mean": i, "gui_form": i} for i, name in enumerate(names)}
(folder / "report.json").write_text(json.dumps({"figures": rows}))
""")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    args = demo.Args(rl_steps=7, out=str(tmp_path / "out"))
    figures = demo.two_worlds(args, tmp_path)
    assert figures == {f"{title}: {arm}": {"mean": i, "gui_form": i}
                       for title, *_ in demo.WORLDS.values()
                       for i, arm in enumerate(("start", "RL", "SFT, as long"))}
    assert [(row["before"], row["after"]) for row in demo.rl_rows(figures).values()] == [(0, 1)] * 2
    said = capfd.readouterr().out
    assert "fallible: steps 7" in said and "untold: steps 7" in said
    with pytest.raises(UserError, match="`fallible` ended with code 3"):
        demo.two_worlds(replace(args, rl_steps=13), tmp_path)


def test_damaged_files_of_the_demo_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="json is damaged: remove it to go on"):
        demo.demo(demo.Args(out=str(tmp_path), tower_steps=0))


@pytest.mark.slow
def test_two_stages_compute_what_one_process_does_and_send_what_the_formula_says(tmp_path):
    """The model cut in two over gloo: losses of all three options, and bytes, counted."""
    args = mmtp_options.Args(out=str(tmp_path), depths=2)
    rows = mmtp_options.count_bytes(args)
    model, batch = mmtp_options.example(args)
    assert rows.pop("row")["tokens"] == len(batch.tokens)
    for option, row in rows.items():
        assert row["bytes"] == row["formula"]
        main, further = pretrain.loss_sum(model, batch, 2, option)
        assert row["loss"] == pytest.approx((main + 0.1 * sum(further)).item(), rel=1e-5)
    assert rows["embed"]["bytes"] > rows["token"]["bytes"] == rows["mask"]["bytes"]


def test_processes_that_fail_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(mmtp_options.sys, "executable", "false")
    with pytest.raises(UserError, match="two processes ended with code 1: see above"):
        mmtp_options.count_bytes(mmtp_options.Args(out=str(tmp_path)))


@pytest.mark.slow
def test_a_run_of_the_ablation(tmp_path):
    """A few steps, read again without training; a damaged log is refused."""
    log = mmtp_options.train("token", 0, 4, 2, tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3, 4] and log[-1]["mtp2"] > 0
    assert mmtp_options.train("token", 0, 4, 2, tmp_path) == log
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text()[:-9])        # the last line is cut short
    with pytest.raises(UserError, match="has 3 whole lines for 4 steps"):
        mmtp_options.train("token", 0, 4, 2, tmp_path)


@pytest.mark.parametrize("question,reply,wrong", [
    ("How many stars?", box(4), box(3)), ("Count the red ones.", box(2), box(2)),
    ("Point at the star.", box([125, 374]), box([125, 624])),
    ("Where is the star?", box([874, 874]), box([874, 624])),
    ("Press OK.", "click(250, 125)", "click(250, 375)"), ("Read the text.", box("37"), box("37"))])
def test_annotators_err_as_stated(question, reply, wrong):
    assert worlds.slip("<|image|>" + question, reply) == wrong


@pytest.mark.parametrize("name,low,high", [
    ("point", 0.3, 0.5), ("gui_click", 0.3, 0.5), ("counting", 0.58, 0.82),
    ("shape_attr", 1, 1)])
def test_fallible_demonstrations_are_right_as_often_as_stated(name, low, high):
    def replies(task):
        return [talk[1].text for talk in gym.demonstrate(task)]

    tasks, honest = [Task(name, seed) for seed in range(200)], gym.demonstrate
    with worlds.fallible():
        said = [replies(task) for task in tasks]
        assert said == [replies(task) for task in tasks]
    assert gym.demonstrate is honest
    right = [gym.Rewards().score(task, gym.play_out(task, script)[2]).reward
             for task, script in zip(tasks, said)]
    assert low <= sum(right) / len(right) <= high


def test_forms_are_shown_without_a_mistake():
    right = gym.demonstrate(Task("gui_form", 5))
    with worlds.fallible():
        assert [[m.text for m in talk] for talk in gym.demonstrate(Task("gui_form", 5))] == [
            [m.text for m in talk] for talk in right]


@pytest.mark.slow
def test_worlds_run_compare_and_resume(tmp_path, monkeypatch):
    save_model(GLMV(sized("tiny"), seed=0), tmp_path / "model")
    for script, small in ((pretrain, {"rows": 1, "row_tokens": 512}),
                          (rl, {"prompts": 1, "group": 2, "max_new": 2})):
        full = script.Args
        monkeypatch.setattr(script, "Args", lambda full=full, small=small, **kw: full(**kw | small))
    monkeypatch.setattr(worlds, "FEW", 1)
    monkeypatch.setattr(worlds, "pace", lambda work, settings, folder, *_, pace=worlds.pace: max(
        pace(work, settings, folder, 1), 0.4))
    args = worlds.Args(seeds=1, minutes=0.02, before=1, count=1, out=str(tmp_path),
                       init=str(tmp_path / "model"))
    with pytest.raises(UserError, match="no checkpoint"):
        worlds.worlds(replace(args, init="nowhere"))    # which is no reason to refuse the next
    worlds.worlds(args)
    made = tmp_path / "fallible"
    facts = json.loads((made / "report.json").read_text())
    assert set(facts["runs"]) == {"rl", "sft", "clean_sft"}
    for arm, points in ((arm, runs["0"]) for arm, runs in facts["runs"].items()):
        minutes = [at for at, _ in points]
        assert len(points) == 1 + worlds.PARTS and minutes == sorted(minutes)
        assert all(set(marks) == {"greedy", "sampled"} for _, marks in points)
    assert facts["figures"]["RL over sft"]["mean"] == pytest.approx(
        facts["figures"]["rl, seed 0, greedy"]["mean"]
        - facts["figures"]["sft, seed 0, greedy"]["mean"])
    assert "mean, sampled" in (made / "report.html").read_text()
    before = (made / "rl0/log.jsonl").read_text()
    worlds.worlds(args)  # once more: nothing is trained again
    assert (made / "rl0/log.jsonl").read_text() == before
    with pytest.raises(UserError, match="begun with other options"):
        worlds.worlds(replace(args, steps=9))
    small = worlds.Args(seeds=1, steps=3, before=1, count=1, out=str(tmp_path / "small"),
                        init=str(tmp_path / "model"))
    worlds.worlds(small)
    facts = json.loads((tmp_path / "small/fallible/report.json").read_text())
    assert set(facts["runs"]) == {"rl", "sft"}
    assert len((tmp_path / "small/fallible/rl0/log.jsonl").read_text().splitlines()) == 3
    worlds.worlds(replace(small, keep=str(tmp_path / "kept")))
    a, b = (load_tensors(tmp_path / name) for name in ("small/fallible/start/step_000001", "kept"))
    assert a.keys() == b.keys() and all(torch.equal(a[k].bfloat16(), b[k].bfloat16()) for k in a)
    with pytest.raises(UserError, match="--world takes"):
        worlds.worlds(worlds.Args(world="best"))


@pytest.fixture
def small_towers(monkeypatch):
    full = train_vit.Args
    monkeypatch.setattr(train_vit, "Args", lambda **kw: full(
        **kw | {"batch": 4, "micro": 4, "workers": 0, "probes": 64}))


@pytest.mark.slow
def test_claims_about_the_tower(tmp_path, small_towers):
    small = vit_claims.Args(steps=1, teacher_steps=5, batch=4, probes=64, out=str(tmp_path / "run"))
    vit_claims.run(small)
    figures = json.loads((tmp_path / "run/report.json").read_text())["figures"]
    rows = [row.removeprefix("seed 0: ") for row in figures]
    aims = list(figures["seed 0: aims"])
    assert rows[:len(aims)] == aims and figures[aims[0]].keys() == {"mean", "least", "most"}
    assert rows[len(aims):] == ["random", "teacher semantic", "teacher texture", "student of both",
                                "student of semantic", "student of texture", "aims"]
    with pytest.raises(UserError, match="begun with other options"):
        vit_claims.run(replace(small, steps=2))
    with pytest.raises(UserError, match="begun with other options"):
        vit_claims.run(replace(small, probes=32))       # the figures would be of two kinds
    with pytest.raises(UserError, match="--seeds takes 1 or more"):
        vit_claims.run(replace(small, seeds=0))
    # Relative links, so that the folder can be moved.
    assert (tmp_path / "run/seed0/of_semantic/texture").readlink() == Path("../texture")


def test_the_aims_of_two_teachers_are_in_points():
    rows = {"random": (0.5, 0.0), "student of both": (0.75, 0.5), "student of semantic": (0.7, 0.1),
            "student of texture": (0.5, 0.6)}
    found = {name: {"linear": linear, "dense": dense} for name, (linear, dense) in rows.items()}
    assert list(vit_claims.aims(found).values()) == pytest.approx([25, 15])


@pytest.mark.slow
def test_does_a_tower_pay_at_equal_minutes(tmp_path, small_towers, monkeypatch):
    full = pretrain.Args
    small = {"rows": 1, "row_tokens": 512}
    monkeypatch.setattr(pretrain, "Args", lambda **kw: full(**kw | small))
    clock, whole = [0.0], train_vit.train

    def train(*args):
        whole(*args)
        clock[0] += 2       # seconds a stage

    monkeypatch.setattr(train_vit, "train", train)
    monkeypatch.setattr(worlds.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(vit_pays, "pace", lambda *args: 1.0)
    args = vit_pays.Args(steps=8, alone=1, tower="1,1,1,1", count=1, out=str(tmp_path / "run"))
    vit_pays.pays(args)
    steps = {arm: len((tmp_path / f"run/{arm}0/log.jsonl").read_text().splitlines())
             for arm in ("random", "contrastive", "aligned")}
    assert steps == {"random": 10, "contrastive": 8, "aligned": 2}  # towers cost 2 and 8 seconds
    assert "aligned over random" in (tmp_path / "run/report.html").read_text()
    with pytest.raises(UserError, match="leaves no minute"):
        vit_pays.pays(vit_pays.Args(steps=1, alone=1, tower="1,1,1,1", count=1,
                                    out=str(tmp_path / "short")))
    with pytest.raises(UserError, match="--tower takes the steps"):
        vit_pays.pays(vit_pays.Args(tower="5,x"))


@pytest.mark.parametrize("sheet,words", [(drafts.Args(drafts="1,x"), "1,x"),
                                         (drafts.Args(drafts="0"), "from 1 to 16"),
                                         (drafts.Args(drafts="17"), "from 1 to 16"),
                                         (drafts.Args(drafts="²"), "from 1 to 16"),
                                         (drafts.Args(max_new=1), "--max_new takes 2"),
                                         (drafts.Args(size="huge"), "--size takes nothing, tiny"),
                                         (mmtp_options.Args(depths=0), "--depths takes 1 to")])
def test_lab_sheets_refuse_bad_numbers(sheet, words):
    run = drafts.run if isinstance(sheet, drafts.Args) else mmtp_options.run
    with pytest.raises(UserError, match=words):
        run(sheet)


def test_self_distillation_runs_and_centring_and_scaling_keep_it_from_collapse(tmp_path):
    """Prototype 3 leads on every picture: what the targets are with and without either remedy."""
    found = dino.run(dino.Args(steps=2, batch=2, init="random", probes=64, out=str(tmp_path)))
    assert found.keys() == {"loss", "used", "sure", "spread", "linear", "knn", "dense"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {"used", "sure", "spread"} <= lines[0].keys()

    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) / 100
    logits[:, 3] += 1
    centre, std = logits.mean(0), logits.std(0)
    used, sure = {}, {}
    for without in ("none", "centre", "std", "both"):
        targets = dino.sharpen(logits, centre, std, without)
        used[without] = dino.entropy(targets.mean(0)).item()
        sure[without] = dino.entropy(targets).mean().item()
    assert used["none"] > 0.9 > 0.6 > sure["none"]      # all prototypes, and decided targets
    assert used["centre"] < 0.01 and used["both"] < 0.01    # one prototype for all
    assert sure["std"] > 0.9                                # targets that say nothing


# ---- the campaign of faults ---------------------------------------------------------------------

def test_a_campaign_tells_its_outcomes_apart(monkeypatch, capsys):
    """A trial for each outcome, in a round of six; the table and the number of faults."""
    def clear(rng, ground):
        raise UserError("this file is damaged")

    def two_lines(rng, ground):
        raise UserError("two\nlines")

    def wrong(rng, ground):
        raise campaign.Silent("other weights")

    def leaves_a_process(rng, ground):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"]))
        ground.started += started
        return 1 // 0

    def trial(rng, ground):
        drawn.append(int(rng.integers(10 ** 9)))
        (ground.folder / "file").write_text("left behind")
        folders.append(ground.folder)

    drawn, folders, started = [], [], []
    monkeypatch.setattr(campaign, "reference", lambda ref: None)
    monkeypatch.setattr(campaign, "KINDS", {
        "reply": (trial, 2), "page": (clear, 1), "bytes": (wrong, 1), "kill": (two_lines, 1),
        "disk": (leaves_a_process, 1)})
    assert campaign.campaign(campaign.Args(minutes=0, seed=7)) == 3
    said = capsys.readouterr().out
    assert said.splitlines()[-2].split() == ["all", "6", "2", "1", "2", "1"]
    assert "seed 7" in said and not any(folder.exists() for folder in folders)
    assert len(started) == 1 and started[0].returncode == -signal.SIGKILL
    again = campaign.Args(kind="reply", trial=1, seed=7)
    assert campaign.campaign(again) == 0 and drawn[0] != drawn[1] == drawn[2]
    with pytest.raises(UserError, match="--trial needs a --kind"):
        campaign.campaign(campaign.Args(trial=3))


@pytest.mark.slow
def test_a_minute_of_faults_finds_none(capsys):
    faults = campaign.campaign(campaign.Args(minutes=1))
    assert faults == 0, capsys.readouterr()
