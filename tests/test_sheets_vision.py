"""The lab sheets about the vision tower and the optimizer: their effects, and each in miniature."""
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import optim
import pretrain
import train_vit
from lab import sheet, vit_pays
from lab.sheets import big_batch, muon, naflex, qk_norm, tower_pays, two_teachers
from lib.images import pack
from model import init, sized


def effects(module, runs):
    """{first word of a test's name: its effect} of made-up figures {arm: {figure: number}}"""
    return {test.name.split()[0]: test.of(runs) for test in module.SHEET.tests}


def in_small(name, tmp_path, arms):
    """Run one seed of a sheet whose constants are small by now; returns its figures by arm."""
    found = sheet.run(name, first=5, seeds=1, out=tmp_path)
    assert found["verdict"] == "underpowered" and (tmp_path / name / "report.html").exists()
    runs = {run.rpartition(",")[0]: figures for run, figures in found["runs"].items()}
    assert list(runs) == list(arms)
    assert all(math.isfinite(x) for row in runs.values() for x in row.values())
    return runs


def test_qk_norm_has_a_positive_effect_if_it_bounds_logits():
    runs = {"with": {"largest logit": 8.0}, "without": {"largest logit": 32.0}}
    assert effects(qk_norm, runs) == {"doublings": 2.0}


def test_the_largest_logit_is_that_of_the_attention_by_hand():
    config = sized("tiny")
    tower = train_vit.tower(replace(qk_norm.PLAIN, qk_norm=False), config)
    init(tower, 0)
    del tower.blocks[1:]
    rng = np.random.default_rng(0)
    patches, grids = pack([rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(2)],
                          config.vision)
    one = [qk_norm.largest_logit(tower, patches[64 * i:64 * i + 64], grids[i:i + 1])
           for i in range(2)]
    assert qk_norm.largest_logit(tower, patches, grids) == pytest.approx(max(one), rel=1e-5)
    with torch.no_grad():       # queries twice as long: logits twice as large
        tower.blocks[0].attn.qkv.weight[:96] *= 2
        tower.blocks[0].attn.qkv.bias[:96] *= 2
    assert qk_norm.largest_logit(tower, patches, grids) == pytest.approx(2 * max(one), rel=1e-5)


@pytest.mark.slow
def test_qk_norm_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(qk_norm, "STEPS", 20)
    monkeypatch.setattr(qk_norm, "PLAIN", replace(qk_norm.PLAIN, batch=8, warmup=2))
    runs = in_small("qk_norm", tmp_path, ("with", "without"))
    assert runs["without"]["largest logit"] > runs["with"]["largest logit"] > 0


@pytest.mark.parametrize("module,figure,better,worse", [
    (naflex, "letters", "naflex", "square"), (tower_pays, "mean", "aligned", "random")])
def test_the_better_arm_has_the_positive_effect(module, figure, better, worse):
    runs = {better: {figure: 3.0}, worse: {figure: 2.0}}
    assert list(effects(module, runs).values()) == [1.0]
    runs = {better: {figure: 3.0}, worse: {figure: 4.0}}
    assert list(effects(module, runs).values()) == [-1.0]


def test_a_larger_batch_may_cost_a_tenth_and_both_teachers_must_beat_the_better_one():
    runs = {"512 pairs": {"peak GiB": 0.5}, "4,096 pairs": {"peak GiB": 0.6}}
    assert list(effects(big_batch, runs).values()) == [pytest.approx(-20)]
    test, = big_batch.SHEET.tests
    assert test.verdict(sheet.effect([-1.0, -1.1, -0.9])) == "reproduced"
    assert test.verdict(sheet.effect([-20.0, -20.1, -19.9])) == "contradicted"
    runs = {arm: {"linear + dense": x} for arm, x in
            (("both", 150.0), ("semantic", 140.0), ("texture", 147.0))}
    assert list(effects(two_teachers, runs).values()) == [3.0]


def test_lines_have_a_letter_in_each_column_and_are_the_same_for_the_same_seed():
    for i in range(20):
        image, letters = naflex.line(5, 0, i)
        again, same = naflex.line(5, 0, i)
        assert image.size == (128, 32) and len(letters) == 16
        assert letters == same and image.tobytes() == again.tobytes()
        pixels = np.asarray(image).astype(int)
        inked = np.abs(pixels - pixels[0, 0]).max(-1) > 60
        assert inked.reshape(32, 16, 8).any((0, 2)).all()
        assert not inked[[0, -1]].any()         # none is cut off
    assert naflex.line(5, 0, 0)[1] != naflex.line(5, 1, 0)[1]


@pytest.mark.parametrize("h,w", [(4, 16), (8, 8)])
def test_a_reader_names_the_letters_of_a_column_from_its_patches_alone(h, w):
    """The tower is replaced by one whose features are the patches' own brightness."""
    model = naflex.Reader(naflex.PLAIN, sized("tiny"), w)
    config = model.visual.config

    class Brightness(torch.nn.Module):
        def forward(self, patches, grids):
            return patches.float().mean((1, 2))[:, None].expand(-1, config.hidden_size)

    model.visual = Brightness()
    model.visual.config = config
    picture = np.zeros((8 * h, 8 * w, 3), np.uint8)
    before = model([picture])
    assert before.shape == (1, 16, 26)
    picture[:, 8 * 3:8 * 4] = 200               # the fourth column of patches
    changed = (model([picture]) != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(3 * 16 // w, 4 * 16 // w))


def test_muons_effect_counts_doublings_of_steps_to_the_same_loss():
    slow, fast = [(5, 3.0), (10, 2.0), (20, 1.0)], [(5, 2.5), (10, 0.9), (20, 0.5)]

    def of(muons, adamws):
        return list(effects(muon, {arm: {"loss over steps": curve} for arm, curve in
                                   (("Muon", muons), ("AdamW", adamws))}).values())

    assert of(fast, slow) == [1.0]              # 10 steps instead of 20
    assert of(slow, fast) == [-1.0] and of(slow, slow) == [0.0]


@pytest.mark.slow
def test_muon_in_small(tmp_path, monkeypatch):
    """Each arm has its optimizer in all its runs, and the best rate is the one reported."""
    seen, matrices, train = [], optim.is_matrix, muon.train

    def watched(args):
        seen.append((args.lr, optim.is_matrix is matrices))
        train(replace(args, batch=4))

    monkeypatch.setattr(muon, "train", watched)
    monkeypatch.setattr(muon, "STEPS", 20)
    runs = in_small("muon", tmp_path, ("Muon", "AdamW"))
    assert seen == [(rate, arm == "Muon") for arm, rates in muon.RATES.items() for rate in rates]
    assert optim.is_matrix is matrices
    for arm, row in runs.items():
        losses = {rate: row[f"loss at {rate}"] for rate in muon.RATES[arm]}
        assert row["loss"] == min(losses.values()) == losses[row["best rate"]]
        assert len(set(losses.values())) == len(losses) == 4
    assert runs["Muon"]["loss at 0.008"] != runs["AdamW"]["loss at 0.008"]


@pytest.mark.slow
def test_naflex_in_small(tmp_path, monkeypatch):
    shapes, forward = [], naflex.Reader.forward

    def watched(model, pictures):
        shapes.append({picture.shape for picture in pictures})
        return forward(model, pictures)

    monkeypatch.setattr(naflex.Reader, "forward", watched)
    for name, value in (("STEPS", 3), ("EVERY", 3), ("ASKED", 16)):
        monkeypatch.setattr(naflex, name, value)
    monkeypatch.setattr(naflex, "PLAIN", replace(naflex.PLAIN, batch=8))
    runs = in_small("naflex", tmp_path, ("naflex", "square"))
    assert shapes == 4 * [{(32, 128, 3)}] + 4 * [{(64, 64, 3)}]     # as many patches
    assert all(0 <= row["letters"] <= 100 for row in runs.values())


@pytest.mark.slow
def test_big_batch_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(big_batch, "BATCHES", {"512 pairs": 8, "4,096 pairs": 16})
    monkeypatch.setattr(big_batch, "PLAIN", replace(big_batch.PLAIN, micro=4))
    runs = in_small("big_batch", tmp_path, ("512 pairs", "4,096 pairs"))
    assert all(0.1 < row["peak GiB"] < 8 for row in runs.values())


@pytest.mark.slow
def test_two_teachers_in_small(tmp_path, monkeypatch):
    """The three students have the same teachers, which are trained once."""
    monkeypatch.setattr(two_teachers, "PLAIN", replace(
        two_teachers.PLAIN, steps=1, teacher_steps=1, batch=4, probes=16))
    runs = in_small("two_teachers", tmp_path, ("both", "semantic", "texture"))
    assert all(row["linear + dense"] == pytest.approx(row["linear"] + row["dense"])
               for row in runs.values())
    start = tmp_path / "two_teachers/start/seed5"       # os.walk does not follow the links
    folders = sorted(Path(folder).relative_to(start).as_posix()
                     for folder, _, files in os.walk(start) if "log.jsonl" in files)
    assert folders == ["distill", "of_semantic/distill", "of_texture/distill", "semantic",
                       "texture"]


@pytest.mark.slow
def test_tower_pays_in_small(tmp_path, monkeypatch):
    """Towers are trained once; the arm from random weights has the steps that they cost."""
    full, tower = pretrain.Args, train_vit.Args
    monkeypatch.setattr(pretrain, "Args", lambda **kw: full(**kw | {"rows": 1, "row_tokens": 512}))
    monkeypatch.setattr(train_vit, "Args", lambda **kw: tower(
        **kw | {"batch": 4, "micro": 4, "probes": 64}))
    monkeypatch.setattr(vit_pays, "MIX", "shape_attr")
    monkeypatch.setattr(vit_pays, "pace", lambda *args: 2.0)
    monkeypatch.setattr(vit_pays, "timed", lambda work, settings, name: (
        work(settings), {"semantic": 4.0, "texture": 5.0, "distill": 6.0, "align": 8.0}[
            name.split()[0]])[1])
    monkeypatch.setattr(tower_pays, "PLAIN", vit_pays.Args(
        steps=4, alone=1, tower="1,1,1,1", count=1))
    runs = in_small("tower_pays", tmp_path, ("aligned", "random"))
    assert [row["steps"] for row in runs.values()] == [2, 6]     # of (4 + 4 * 2 - 8 or 0) / 2
    assert [row["minutes of the tower"] for row in runs.values()] == [8 / 60, 0]
