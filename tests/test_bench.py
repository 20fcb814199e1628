"""lab.bench does the same work on both sides and reports a ratio; how large is not tested."""
import importlib.util
import json
import sys
from types import ModuleType

import pytest

from lab import bench, bench_rl
from lab.bench import Args, run
from lib.cli import UserError

few = dict(dtype="float32", device="cpu", rounds=1, documents=4)


def ratios(result, folder):
    written = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
    assert written["cases"].keys() == result["cases"].keys()
    return [case["ratio"] for case in written["cases"].values()]


def test_training_compares_equal_losses_and_gradients(tmp_path, capsys):
    pytest.importorskip("transformers", exc_type=ImportError)
    result = run(Args("train", out=str(tmp_path), **few))
    for ours, theirs in (result["losses"], result["norms"]):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert all(ratio > 0 for ratio in ratios(result, tmp_path))
    assert "ratio" in capsys.readouterr().out


def test_generation_compares_equal_replies(tmp_path):
    pytest.importorskip("transformers", exc_type=ImportError)
    result = run(Args("decode", out=str(tmp_path), **few))
    found = result["agreement"]
    assert found["different"] == 0 and sum(found.values()) == 3 * few["documents"]
    assert len(ratios(result, tmp_path)) == 3


def test_the_encoder_compares_equal_losses_and_gradients(tmp_path, capsys, monkeypatch):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    monkeypatch.setattr(bench, "BUDGETS", (16, 24, 48))
    result = run(Args("vit", out=str(tmp_path), **few))
    for ours, theirs in (result["losses"], result["norms"]):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert len(ratios(result, tmp_path)) == 8
    assert "padding" in capsys.readouterr().out
    assert isinstance(sys.modules.get("torchvision"), (ModuleType, type(None)))


@pytest.mark.slow
def test_asynchronous_rl_beside_synchronous(tmp_path, capsys, monkeypatch):
    for name, value in dict(WAIT=0.02, STEPS=2, FLIGHT=8, SIZE=4, PROMPTS=1, EXAM=2).items():
        monkeypatch.setattr(bench_rl, name, value)
    result = run(Args("rl", out=str(tmp_path), **few))
    found = ratios(result, tmp_path)
    assert len(found) == 3 and min(found) > 0
    for world, case in result["cases"].items():
        assert case["bound"] > 0 and case["theirs"]["stale_max"] == 0 < case["theirs"]["learnt"]
        assert case["ours"]["stale_max"] <= 2
        assert (case["theirs"]["wait"] > 0) == (world != "waiting for nothing")
    assert "samples learnt/s" in capsys.readouterr().out


def test_anything_else_is_refused_in_one_line():
    with pytest.raises(UserError, match="train, decode, vit, rl"):
        run(Args("fly"))
