"""The lab sheets about the model, its drafts, its memory and its use: signs of the effects, and
three of them run in small."""
import pytest

from lab import sheet
from lab.sheets import (draft_speed, draft_tokens, element_read, harness, mmtp_bytes, mmtp_loss,
                        out_of_gym, partition, text_kept, vit_memory)
from lib.cli import UserError
from lib.common import read_json
from tasks.base import Task


def effects(module, runs) -> list[float]:
    """The effect of each of a sheet's tests on the figures of one seed."""
    assert set(runs) == set(module.SHEET.arms)
    return [pytest.approx(test.of(runs)) for test in module.SHEET.tests]


def test_effects_of_what_is_sent_loaded_and_kept():
    assert effects(mmtp_bytes, {"one step": {"bytes, embed": 400, "bytes, token": 300}}) == [25]
    runs = {arm: {"max/mean, planned": 1.01, "MB, planned": 9, "MB, gathered": 10}
            for arm in partition.SHEET.arms}
    runs["8 ranks"] = {"max/mean, planned": 1.0, "MB, planned": 2, "MB, gathered": 10}
    assert effects(partition, runs) == [80, -1]         # of 8 ranks; of the worst
    runs = {"all kept": {"MB, 16 images": 10, "MB, 64 images": 40}, "offload": {},
            "chunks": {"MB, 16 images": 8, "MB, 64 images": 10}}
    assert effects(vit_memory, runs) == [-25, 75]


def test_effects_on_losses():
    runs = {"embed": {"MTP loss": 1.5}, "token": {"MTP loss": 1.25}}
    assert effects(mmtp_loss, runs) == [0.25, 0.25]
    runs = {"text alone": {"text loss": 3.0}, "and pictures": {"text loss": 3.5}}
    assert effects(text_kept, runs) == [-0.5]


def test_effects_of_drafts():
    runs = {"ckpt/demo": {"tokens a step": 2.7, "formula": 3.0}}
    assert effects(draft_tokens, runs) == [1.7, -10]
    assert draft_tokens.GLM_OCR == pytest.approx((1 - 0.84 ** 4) / 0.16)
    runs = {"plain": {"tokens": 200}, "three drafts": {"tokens": 150}}
    assert effects(draft_speed, runs) == [-25]


def test_effects_of_harness_reading_and_browser():
    assert effects(harness, {"plain": {"solved": 70}, "history": {"solved": 80}}) == [10]
    runs = {"ckpt/gym": {"right points where read rightly": 60, "right points where misread": 40}}
    assert effects(element_read, runs) == [20]
    runs = {"gym": {"right": 90}, "browser": {"right": 88}, "white page": {"right": 50}}
    assert effects(out_of_gym, runs) == [-2]


def test_every_sheet_says_what_is_claimed_and_where_it_is_from():
    for name in sheet.names():
        module = sheet.load(name)
        assert len(sheet.claim(name)) <= 100 and sheet.claim(name).endswith(".")
        assert module.SHEET.tests and module.SHEET.minutes > 0 and module.SHEET.seeds >= 3
        for test in module.SHEET.tests:
            assert test.claimed > 0 and test.source.startswith(("[C", "[R", "[O"))


def test_what_is_read_of_a_drawing_is_not_what_the_goal_could_give_away():
    """The question fits one thing of three, and the answer is a property of the target."""
    found = [element_read.drawing(Task("point", 5_000_000 + i, 0, "test", 64)) for i in range(60)]
    found = [entry for entry in found if entry]
    assert 5 < len(found) < 40
    for goal, picture, target, question, answer in found:
        known, asked = target.shape, target.color
        if "color" not in question:
            known, asked = asked, known
        assert known in question and answer == asked and asked not in question
        assert (target.shape in goal) or (target.color in goal)


@pytest.mark.slow
def test_partition_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(partition, "STEPS", 2)
    found = sheet.run("partition", first=3, seeds=2, out=tmp_path)
    bytes_saved, balance = found["tests"].values()
    assert bytes_saved["mean"] > 80 and -3 < balance["mean"] < 0
    again = sheet.run("partition", first=3, seeds=2, out=tmp_path)      # nothing is run again
    assert again["tests"] == found["tests"]
    capsys.readouterr()


def test_memory_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(vit_memory, "COUNTS", (12, 24))
    runs = {arm: vit_memory.measure(arm, 5, tmp_path) for arm in vit_memory.ARMS}
    assert runs["all kept"]["MB, 24 images"] > 1.7 * runs["all kept"]["MB, 12 images"]
    assert runs["chunks"]["MB, 24 images"] < 1.2 * runs["chunks"]["MB, 12 images"]
    assert runs["offload"]["MB on the host, 24 images"] > 0 == runs["chunks"][
        "MB on the host, 24 images"]


@pytest.mark.slow
def test_text_in_small(tmp_path, monkeypatch):
    """Both arms see the same rows of text; the held-out ones are of other texts."""
    monkeypatch.setattr(text_kept, "STEPS", 2)
    monkeypatch.setattr(text_kept, "HELD_OUT", 1)
    found = sheet.run("text_kept", seeds=1, out=tmp_path)
    figures = [read_json(tmp_path / "text_kept" / f"{arm}-0/figures.json")["figures"]
               for arm in ("text_alone", "and_pictures")]
    first = [each["loss in training, text"][0] for each in figures]
    assert first[0] == pytest.approx(first[1]) and "picture loss" in figures[1]
    (test,) = found["tests"].values()
    assert test["verdict"] == "underpowered"            # a single seed


@pytest.mark.slow
def test_drafts_and_harness_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(draft_tokens, "COUNT", 12)
    found = draft_tokens.measure("ckpt/demo", 2, tmp_path)
    assert 1 < found["tokens a step"] < 4 and 0 < found["p"] < 1
    assert draft_tokens.expected(found["p"], 3) == found["formula"]
    monkeypatch.setattr(draft_speed, "COUNT", 6)
    monkeypatch.setattr(draft_speed, "ROUNDS", 1)
    assert all(draft_speed.measure(arm, 0, tmp_path)["tokens"] > 0 for arm in draft_speed.ARMS)
    monkeypatch.setattr(harness, "COUNT", 4)
    found = sheet.run("harness", seeds=1, out=tmp_path)
    assert all(0 <= run["solved"] <= 100 and run["replies"] >= 1 for run in found["runs"].values())


def test_without_a_browser_the_sheet_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no browser: none of chromium"):
        sheet.run("out_of_gym", out=tmp_path)
