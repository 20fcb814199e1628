"""lab.bench does the same work on both sides and reports a ratio, whose size is not tested."""
import contextlib
import importlib.util
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from lab import bench, bench_busy, bench_case, bench_loader, bench_rl, bench_serve, load
from lab.bench import Args, run
from lib.cli import UserError

few = dict(dtype="float32", device="cpu", rounds=1, documents=4)


def ratios(result, folder):
    written = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
    assert written["cases"].keys() == result["cases"].keys()
    return [case["ratio"] for case in written["cases"].values()]


@pytest.mark.slow
def test_training_compares_equal_losses_and_gradients(tmp_path, capsys):
    pytest.importorskip("transformers", exc_type=ImportError)
    result = run(Args("train", out=str(tmp_path), **few))
    for ours, theirs in (result["losses"], result["norms"]):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert all(ratio > 0 for ratio in ratios(result, tmp_path))
    assert "ratio" in capsys.readouterr().out


@pytest.mark.slow
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
    for name, value in dict(WAIT=0.02, STEPS=2, FLIGHT=8, SIZE=4, PROMPTS=1, HELD_OUT=2).items():
        monkeypatch.setattr(bench_rl, name, value)
    result = run(Args("rl", out=str(tmp_path), **few))
    found = ratios(result, tmp_path)
    assert len(found) == 3 and min(found) > 0
    for world, case in result["cases"].items():
        assert case["bound"] > 0 and case["theirs"]["stale_max"] == 0 < case["theirs"]["learnt"]
        assert case["ours"]["stale_max"] <= 2
        assert (case["theirs"]["wait"] > 0) == (world != "waiting for nothing")
    assert "samples learnt/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_beside_busy_processes(tmp_path, capsys, monkeypatch):
    """Every row is measured alone and beside the busy processes, and nothing is left running."""
    started, popen = [], bench_busy.subprocess.Popen
    monkeypatch.setattr(bench_busy.subprocess, "Popen",
                        lambda *words, **more: started.append(popen(*words, **more)) or started[-1])
    monkeypatch.setattr(bench_busy, "BUSY", 1)
    monkeypatch.setattr(bench_busy, "STEPS", 1)
    ours = next(iter(bench_busy.ROWS))
    monkeypatch.setattr(bench_busy, "ROWS", {ours: {"OMP_NUM_THREADS": "1"}})
    result = run(Args("busy", out=str(tmp_path), rounds=1, device="cpu"))
    assert ratios(result, tmp_path)[0] > 0 and result["cases"][ours]["aim"] == bench_busy.MOST
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert "seconds a step" in capsys.readouterr().out


@pytest.mark.slow
def test_own_data_beside_webdataset(tmp_path, capsys, monkeypatch):
    """Both sides read the same pixels; other processes open, read and wait for shards."""
    pytest.importorskip("webdataset")
    for name, value in dict(SHARDS=3, SAMPLES=40, READ=50, CHUNK=5, STEPS=1, BURST=64).items():
        monkeypatch.setattr(bench_loader, name, value)
    monkeypatch.setattr(bench_loader, "PICTURES", {"small": ("png", 40, 30)})
    result = run(Args("loader", out=str(tmp_path), rounds=1, device="cpu"))
    assert ratios(result, tmp_path)[0] > 0 and result["rest"]["resume, records"] == "120"
    assert "samples/s" in capsys.readouterr().out


def test_a_sample_that_differs_from_webdataset_is_seen(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    rng, config = np.random.default_rng(0), bench.config_of("tiny")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bench_loader.write_shard(tmp_path / name / "0.tar",
                                 [bench_loader.encoded(rng, "png", 20, 20)], "png", 0, 5)
    theirs = bench_loader.their_samples
    monkeypatch.setattr(bench_loader, "CHUNK", 2)
    args = Args(rounds=1)
    assert bench_loader.speed(tmp_path / "a", config, args, 5)["ratio"] > 0
    monkeypatch.setattr(bench_loader, "their_samples",
                        lambda folder, config: theirs(tmp_path / "b", config))
    with pytest.raises(UserError, match="not the same"):
        bench_loader.speed(tmp_path / "a", config, args, 5)


def test_busy_processes_end_with_the_block():
    with pytest.raises(ValueError):
        with bench_busy.busy(2) as processes:
            assert all(process.poll() is None for process in processes)
            raise ValueError
    assert all(process.poll() is not None for process in processes)


def test_a_process_of_a_bench_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(bench_rl.subprocess, "run",
                        lambda words, **_: subprocess.CompletedProcess(words, 7))
    with pytest.raises(UserError, match="a run of screens has ended with code 7"):
        bench_rl.one_run("screens", 0, 0, "float32", steps=1, held_out=1)
    for words in ([], ["shards", "0"], ["shards", "0", "some"]):
        monkeypatch.setattr(sys, "argv", ["lab.bench_loader", *words])
        with pytest.raises(UserError, match="with SHARDS START SAMPLES"):
            bench_loader.entry()


def test_the_title_names_the_model_that_is_measured():
    for args, model in ((Args("train", "mini"), "mini"), (Args("busy", "mini"), "tiny"),
                        (Args("serve", "mini"), "gym"), (Args("serve", ckpt="ckpt/demo"), "demo")):
        assert bench.model_of(args) == model


@pytest.mark.slow
def test_a_measuring_process_that_fails_is_one_line():
    process = bench_busy.start({}, "none")
    with pytest.raises(UserError, match="has ended with code 2"):
        bench_busy.ask(process)


@pytest.mark.parametrize("aim,ratio,said", [
    (3.0, 2.9, "  aim 3.0: reached\n"), (3.0, 3.1, "  aim 3.0: missed\n"), (None, 9.0, "9.00\n")])
def test_a_slowdown_has_a_largest_ratio(aim, ratio, said, capsys):
    case = bench_case.case_of_times({"alone": [1.0], "beside": [ratio]}, aim=aim)
    bench_case.print_case("busy", case, bench.AIM)
    assert capsys.readouterr().out.endswith(said)


def test_the_ratio_of_a_case_lies_within_its_range():
    """It is the median of what the rounds gave: here the ratio of the medians would be 1."""
    case = bench_case.case_of_speeds([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], ("", ""))
    assert (case["ratio"], case["ratios"]) == (1.5, [1 / 3, 2.0])
    assert case["ours"]["median"] == case["theirs"]["median"] == 2.0


@pytest.mark.parametrize("wrong,said", [
    (Args("fly"), "train, decode, vit, rl, busy"), (Args("vit", rounds=0), "--rounds takes 1 or"),
    (Args("train", dtype="float16"), "--dtype takes float32 or bfloat16")])
def test_bad_options_are_refused_in_one_line(wrong, said):
    with pytest.raises(UserError, match=said):
        run(wrong)


@pytest.mark.slow
def test_a_server_beside_generate_gives_equal_replies(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers", exc_type=ImportError)
    for name, value in dict(SIDE_BY_SIDE=3, ARRIVALS=2).items():
        monkeypatch.setattr(bench_serve, name, value)
    result = run(Args("serve", out=str(tmp_path), **few))
    assert len(ratios(result, tmp_path)) == 8
    for kind in bench_serve.KINDS:
        assert result["cases"][f"{kind}, one at a time"]["equal"] == 3
    assert capsys.readouterr().out.count("3 of 3 replies") == 2


def test_a_server_that_dies_under_load_is_reported(tmp_path, monkeypatch, capsys):
    """At once, and not as an error of the test of load itself."""
    @contextlib.contextmanager
    def dying(*_):
        process = subprocess.Popen([sys.executable, "-c", "exit(3)"])
        yield SimpleNamespace(port=0, process=process, lines=[])
        process.wait()

    monkeypatch.setattr(load, "server_process", dying)
    monkeypatch.setattr(load, "good_requests", lambda: [])
    monkeypatch.setattr(load, "bad_requests", lambda: [])
    monkeypatch.setattr(load.Load, "client", lambda self, number: None)
    with pytest.raises(UserError, match=r"have gone wrong under load \(1\)"):
        load.run(load.Args(out=str(tmp_path)))
    assert "the server has ended with code 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "load.json").read_text())["minutes"] == 10


@pytest.mark.slow
def test_twenty_seconds_of_mixed_load(tmp_path, capsys):
    found = load.run(load.Args(minutes=1 / 3, clients=4, out=str(tmp_path)))
    assert found["wrong"] == [] and min(found["counts"].values()) > 0
    assert "good requests" in capsys.readouterr().out
