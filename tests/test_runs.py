"""What lib/runs.py and lib/common.py guarantee about run folders, signals and launchers."""
import ctypes
import math
import os
import pty
import shutil
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_pretrain import child_dies, dies_before

from lib import common, runs
from lib.cli import UserError
from lib.runs import checkpoints, find_checkpoint, save_checkpoint, step_of, StopSignal


def write(folder: Path):
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)


def in_child(act) -> int:
    """Call act() in a fork of this process; return its process id. An error ends it with 77."""
    child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(77)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- checkpoints ---------------------------------------------------------------------------------

def test_checkpoints_are_sorted_by_number_and_what_the_user_put_there_stays(tmp_path):
    own = ["step_best", "step_notes", "step_000200_best", "step_000200.old", "step_", "step_-1"]
    for name in own:
        (tmp_path / name).mkdir()
    (tmp_path / "step_7").write_text("a file")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, write)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_1000000", "step_1000001"]
    assert find_checkpoint(tmp_path).name == "step_1000001"
    assert {p.name for p in tmp_path.iterdir()} == {
        *own, "step_7", "step_1000000", "step_1000001"}
    assert [step_of(p) for p in ("a/step_000010", "step_best", "step_10.part")] == [10, -1, -1]


def test_options_are_kept_once_there_is_a_checkpoint(tmp_path):
    for name, kept in (("run/step_notes", False), ("run/step_000001", True)):
        (tmp_path / name).mkdir(parents=True)
        with runs.same_options(tmp_path / "config.json", {"seed": 0}):
            pass
        assert (tmp_path / "config.json").exists() == kept


def test_an_old_checkpoint_that_cant_be_removed_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/step_000001").symlink_to(tmp_path / "elsewhere")
    rmtree = shutil.rmtree

    def busy(path, ignore_errors=False):
        if Path(path).name == "step_000002":
            raise OSError(39, "Directory not empty", str(path))
        rmtree(path, ignore_errors)
    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in range(2, 7):
        assert save_checkpoint(tmp_path / "run", step, write)
    assert [step_of(p) for p in checkpoints(tmp_path / "run")] == [1, 2, 5, 6]
    assert (tmp_path / "elsewhere").exists()
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2 and "step_000002: Directory not empty" in said


def test_the_same_step_saved_twice_and_killed_at_any_operation(tmp_path):
    """There is no other checkpoint to fall back to; the next save cleans up."""
    for operation in range(100):
        run, died = tmp_path / str(operation), True
        save_checkpoint(run, 3, write)
        for _ in range(2):      # killed twice
            died = child_dies(lambda: (dies_before(operation), save_checkpoint(run, 3, write)))
            folder, = checkpoints(run)
            assert step_of(folder) == 3 and (folder / "model.safetensors").read_text()
        save_checkpoint(run, 3, write)
        assert [p.name for p in run.iterdir()] == ["step_000003"]
        if not died:
            break
    assert 5 < operation < 100


@pytest.mark.parametrize("saved,words", [(0, "run has no checkpoint"), (2, "step 2, from before")])
def test_what_is_said_after_five_steps_that_were_not_finite(tmp_path, capsys, saved, words):
    before = signal.getsignal(signal.SIGINT)
    watch = runs.Checkpointer(tmp_path / "run", common.setup("cpu"), 99, 1, saved, write)
    with pytest.raises(UserError, match=f"try a lower --lr; .*{words}"):
        for step in range(saved, 99):
            watch.check_loss(math.nan, 1.0)
            watch.after_step(step + 1)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out.startswith(f"step {saved + 1}: loss nan, ")    # as in the log
    assert not checkpoints(tmp_path / "run")


def test_a_rank_that_ends_alone_saves_nothing_and_does_not_wait(tmp_path, monkeypatch, capsys):
    """What it gathers for a checkpoint comes from all ranks; the others never send their part."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    hw = replace(common.setup("cpu"), world=2, store=dist.HashStore())
    watch = runs.Checkpointer(tmp_path / "run", hw, 9, 9, 0, write, gather=pytest.fail)
    watch.done = 3
    assert not watch.all_end(seconds=0.01)
    assert "step 3 is not saved: other ranks do not end; " in capsys.readouterr().err
    hw.store.set(f"end of {tmp_path / 'run'} at 3, rank 1", b"")
    assert watch.all_end(seconds=0.01)
    watch.gather = tuple
    watch.close()
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_000003"]


# ---- one run a folder ----------------------------------------------------------------------------

def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch):
    hw = common.setup("cpu")
    runs.Checkpointer(tmp_path / "run", hw, 9, 9, 0, write).stop_signal.restore()
    save_checkpoint(tmp_path / "run", 1, write)
    runs.move_earlier_run(tmp_path / "run", True, hw)       # this process itself may continue
    with monkeypatch.context() as patch:
        patch.setattr(runs, "LOCKS", {})                    # as another process would
        for resume in (True, False):
            with pytest.raises(UserError, match=f"^process {os.getpid()} on .+ trains in .*run: "):
                runs.move_earlier_run(tmp_path / "run", resume, hw)
        assert checkpoints(tmp_path / "run")
    runs.move_earlier_run(tmp_path / "run", False, hw, lambda line: None)
    assert checkpoints(tmp_path / "run.1") and not (tmp_path / "run").exists()
    monkeypatch.setattr(runs, "LOCKS", {})
    runs.lock_run(tmp_path / "run.1")       # the lock that moved away with it is free


def test_a_killed_run_leaves_no_lock(tmp_path):
    assert child_dies(lambda: (runs.lock_run(tmp_path), os.kill(os.getpid(), signal.SIGKILL)))
    runs.lock_run(tmp_path)


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(runs.fcntl, "flock", flock)
    runs.lock_run(tmp_path)
    assert "can't be locked (Operation not supported)" in capsys.readouterr().err


# ---- signals -------------------------------------------------------------------------------------

def test_a_second_signal_ends_a_process_that_waits_in_cpp():
    """As for another rank. There, Python calls no handler."""
    ready, tell = os.pipe()

    def wait():
        store = dist.HashStore()
        store.set_timeout(timedelta(seconds=20))
        StopSignal()
        os.write(tell, b"1")
        store.get("never")
    child = in_child(wait)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_a_terminal_that_closes_asks_to_stop_and_may_do_so_twice():
    def act():
        master, terminal = pty.openpty()
        os.dup2(terminal, 1)
        os.close(terminal)
        stop = StopSignal()
        os.close(master)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        os.write(1, b"nobody reads this, and it is no error")
        assert stop.received == signal.SIGHUP
        stop.restore()
    assert exit_code(in_child(act)) == 0


def test_nohup_stays(monkeypatch):
    def act():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop = StopSignal()
        signal.raise_signal(signal.SIGHUP)
        assert not stop.received
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        stop.restore()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert exit_code(in_child(act)) == 0


# ---- launchers -----------------------------------------------------------------------------------

def test_a_rank_ends_with_its_launcher():
    """The launcher is killed once its rank is at work; the pipe closes when the rank has ended."""
    ready, tell = os.pipe()

    def rank():
        os.close(ready)
        common.end_with_launcher()
        os.write(tell, b"1")
        ctypes.CDLL(None).pause()

    launcher = in_child(lambda: exit_code(in_child(rank)))
    os.close(tell)
    assert os.read(ready, 1)
    os.kill(launcher, signal.SIGKILL)
    assert exit_code(launcher) == -signal.SIGKILL
    assert os.read(ready, 1) == b""
    os.close(ready)


@pytest.mark.parametrize("environment,words", [
    ({"RANK": "1"}, "RANK=1 in the environment, but WORLD_SIZE=1"),
    ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 in the environment, but WORLD_SIZE=2"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE in the environment is a number from 0 on, not 'abc'"),
    ({"RANK": "-1"}, "RANK in the environment"), ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK in the"),
    ({"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR expected, but not set.*with torchrun"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "x"}, "can't join"),
    ({"WORLD_SIZE": "2"}, "RANK expected, but not set")])
def test_an_odd_environment_is_one_clear_line(monkeypatch, environment, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as error:
        common.setup("cpu")
    assert "\n" not in str(error.value)


def test_threads_of_nested_loops(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    assert "1 thread" in common.setup("cpu").description


@pytest.mark.parametrize("device,backend", [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_a_device_that_is_not_there(monkeypatch, device, backend):
    monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device={device}, but torch sees no"):
        common.setup(device)


# ---- files ---------------------------------------------------------------------------------------

def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_, **more):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device: .*config.json"):
        common.write_json(tmp_path / "config.json", {})


def test_half_of_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    """JSON may hold it; figures of such a group must not be lost."""
    common.write_json(tmp_path / "eval.json", {"\ud83d": "\U0001f600"})
    assert common.read_json(tmp_path / "eval.json") == {"?": "\U0001f600"}


@pytest.mark.parametrize("number,gone", [(5, True), (32, True), (28, False)])
def test_a_line_that_cant_be_printed_ends_no_run(tmp_path, monkeypatch, capfd, number, gone):
    """EIO: the terminal is gone; EPIPE: the reader; ENOSPC: stdout is a file on a full disk."""
    class Broken:
        def write(self, text):
            raise OSError(number, os.strerror(number))
    log = common.Log(tmp_path, "run", 9)
    monkeypatch.setattr(sys, "stdout", Broken())
    held = os.dup(1)
    try:
        log.step(1, True, loss=1.0)
    finally:
        os.dup2(held, 1)
        os.close(held)
    assert log.reader_gone == gone
    log.close()


def test_lines_of_a_log_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n5\n[]\nnull\n"x"\n{}\n{"step": "x"}\n'
                     b'{"step": true}\n{"step": -1}\n\xa7\xff\n' + b"[" * 100_000
                     + b'\n{"step": 2}\n{"ste')
    assert common.read_log(path) == [{"step": 1, "loss": 2}, {"step": 2}]
    common.Log(tmp_path, "run", 9, start=1).close()     # a resumed run reads it
    assert path.read_text() == '{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize("data", [b"", b"{", b"5", b"[]", b"null", b"\xa7", b"[" * 100_000])
def test_a_json_file_that_holds_no_object_is_named(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(UserError, match="config.json is damaged: remove it to go on"):
        common.read_json(tmp_path / "config.json")
