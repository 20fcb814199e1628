"""Run folders, the checkpoints in them, and how a run saves and stops.

    out/NAME/step_000100            a complete checkpoint
    out/NAME/step_000200.part       one that is being written; it gets its name when it is complete
    out/NAME/step_000200.replaced   the earlier one of the same step, until the new one has its name
    out/NAME/.lock                  held by the process that trains in this folder

All other files in a run folder that are not a script's own belong to the user: nothing here touches
them.
"""
import contextlib
import fcntl
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist

from lib.cli import UserError
from lib.common import Hardware, read_json, write_json
from lib.tensors import write_digests

LOCKS: dict[Path, int] = {}         # {run folder: descriptor of its lock}, until this process ends
NOT_REMOVED: set[Path] = set()      # old checkpoints of which this was said


# ---- run folders: out/NAME/step_000100, written under another name and then renamed --------------

def step_of(path) -> int:
    """The step of a checkpoint's folder by its name, which is `step_` and a number; -1 of any other
    name, such as step_best: the user's own."""
    name = re.fullmatch(r"step_([0-9]+)(\.replaced)?", Path(path).name)
    return int(name[1]) if name else -1


def checkpoints(run) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first. A step_N.replaced counts only where
    step_N is missing: the process was killed between two renames of `save_checkpoint`."""
    found = [p for p in Path(run).glob("step_*") if step_of(p) >= 0 and p.is_dir()]
    found = [p for p in found if p.suffix == "" or not p.with_suffix("").exists()]
    return sorted(found, key=step_of)


def save_checkpoint(run: Path, step: int, write) -> Path | None:
    """Save run/step_NNNNNN by calling write(folder), so that a kill at any moment loses nothing.

    The folder gets its name only once it is complete; then all but the newest two are removed. A
    write that fails (a full disk) leaves the earlier checkpoints as they are and returns None.
    """
    final = Path(run) / f"step_{step:06d}"
    part, replaced = final.with_suffix(".part"), final.with_suffix(".replaced")
    try:
        shutil.rmtree(part, ignore_errors=True)     # left there by a run that was killed
        part.mkdir(parents=True)
        write(part)
        write_digests(part)
        if final.exists():          # the same step once more, after a resume
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(part, final)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        print(f"could not save {final}: {error.strerror or error}; the earlier checkpoint is kept",
              file=sys.stderr)
        return None
    for old in checkpoints(run)[:-2]:
        try:
            shutil.rmtree(old)
        except OSError as error:    # a link, no permission, or a file that another machine has open
            if old not in NOT_REMOVED:
                print(f"could not remove the old checkpoint {old}: {error.strerror or error}",
                      file=sys.stderr)
            NOT_REMOVED.add(old)
    return final


def save_state(path, state: dict):
    """torch.save; a full disk raises OSError, and the file is on the disk when this returns."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides a full disk's OSError behind one
            raise error.__context__ or error from None
        file.flush()
        os.fsync(file.fileno())


def lock_run(out: Path):
    """Raise UserError if another process trains in the folder `out`: two runs would delete each
    other's checkpoints. The kernel frees the lock when this process ends, however it ends."""
    if out.resolve() in LOCKS:
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace") or "another process"
        os.close(lock)
        raise UserError(f"{holder} trains in {out}: wait until it has ended, or take another --out"
                        ) from None
    except OSError as error:        # not every network disk has locks
        print(f"{out} can't be locked ({error.strerror}): start no second run in it",
              file=sys.stderr)
    LOCKS[out.resolve()] = lock


def move_earlier_run(out: Path, resume: bool, hw: Hardware, say=print):
    """Rename an earlier run to out.1, out.2, ... unless it is to be resumed: nothing is
    overwritten. All ranks call this once they have loaded the weights that they start from, which
    may be in that folder. Raises UserError if another process still trains there."""
    if hw.world > 1:
        dist.barrier()
    if hw.rank or not out.exists():
        return
    lock_run(out)
    if not resume and checkpoints(out):
        os.close(LOCKS.pop(out.resolve()))      # its file moves away with the folder
        kept = next(p for i in range(1, 10_000) if not (p := Path(f"{out}.{i}")).exists())
        out.rename(kept)
        say(f"{out} held a run: kept as {kept}")


def find_checkpoint(path) -> Path:
    """A folder with a model: `path` itself, or the newest step of the run folder `path`. Raises
    UserError where there is neither."""
    path = Path(path)
    if (path / "config.json").exists() and list(path.glob("model.safetensors*")):
        return path
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    if not (steps := checkpoints(path)):
        raise UserError(f"no checkpoint at {path}: neither config.json with model.safetensors "
                        "nor a step_NNNNNN folder")
    return steps[-1]


@contextlib.contextmanager
def same_options(path: Path, asked: dict):
    """Continue the work in a folder only with the options that it was begun with.

    `path` is the file that holds them. Raises UserError where it holds others than `asked`: results
    of other options would be taken for results of these. The file is written when the block ends,
    by an error too, and has left a checkpoint in the folder.
    """
    if path.exists() and read_json(path) != asked:
        raise UserError(f"{path.parent} was begun with other options, see {path}: take another")
    try:
        yield
    finally:
        if any(step_of(p) >= 0 for p in path.parent.glob("**/step_*")):
            write_json(path, asked)


# ---- to save and to stop ------------------------------------------------------------------------

class StopSignal:
    """The first Ctrl-C, SIGTERM or SIGHUP (the terminal is gone) only sets `received`, so that the
    loop finishes its step and saves. A second Ctrl-C or SIGTERM ends the process at once. A signal
    that was ignored before, as nohup does, stays ignored."""

    def __init__(self):
        self.received = 0           # the signal's number
        self.before = {}            # {signal: handler}, for `restore`
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        if threading.current_thread() is not threading.main_thread():
            return
        for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(which) != signal.SIG_IGN:
                self.before[which] = signal.signal(which, self._note)
        # Python calls `_note` between two of its instructions, so not while the main thread waits
        # in C++ for another rank. But it writes the number of a signal to this pipe at once.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self.pipe_before = signal.set_wakeup_fd(writer)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def restore(self):
        """Put the earlier handlers back: no loop will look at `received` any more."""
        for which, handler in self.before.items():
            signal.signal(which, handler)
        if self.before:
            os.close(signal.set_wakeup_fd(self.pipe_before))    # ends the thread
            self.before = {}

    def _note(self, which, frame):
        if which == signal.SIGHUP:      # to write to a terminal that is gone is an error
            for stream in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if self.received:
            return
        self.received = which
        # The handler may run in the middle of a print, and print is not reentrant: it would raise
        # here. os.write fails only if stderr was a pipe (`2>&1 | tee`) and its reader has ended.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step (saving; once more to stop at once)\n")

    def _watch(self, reader: int):
        """End the process at the second signal. A terminal that closes may send SIGHUP twice."""
        received = 0
        while byte := os.read(reader, 1):
            number = byte[0]
            if received and number in (signal.SIGTERM, signal.SIGINT):
                os._exit(128 + number)
            received = received or number in self.before
        os.close(reader)


class Checkpointer:
    """Saves every `every` steps, after the last step and when a signal asks to stop, but nothing
    while the loss is not finite: the weights may be broken. Ends a run whose loss stays so. A
    training loop uses it in this order:

        checkpointer = Checkpointer(...)            # from here on, signals are only noted
        for step in range(start, steps):
            ...                                     # one step
            checkpointer.check_loss(loss, norm)
            if checkpointer.after_step(step + 1):   # saves when due
                break
        checkpointer.close()                        # saves what is not saved yet

    write(folder, ...) fills a checkpoint's folder, on rank 0 only. Before it gather() is called, on
    all ranks, as each may hold a part of what is saved (Optimizer.gather); what it returns on rank
    0 are the further arguments of `write`. group: the ranks that save and stop together, as a
    torch.distributed group; None: all. Past hw.deadline (--max_hours) the run ends after its step
    as a signal would end it, but as a success: --resume continues it.
    """

    def __init__(self, out: Path, hw: Hardware, steps: int, every: int, start: int, write,
                 gather=tuple, group=None):
        self.out, self.hw, self.steps, self.every = out, hw, steps, every
        self.write, self.gather = write, gather
        self.group, self.stop_signal = group, StopSignal()
        self.done = start               # steps done
        self.saved = start              # of these, steps saved
        self.skipped = 0                # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0
        self.postponed = False          # a save was due after such a step
        self.stopping = False           # some rank has been asked to stop
        self.out_of_time = False        # the deadline has passed on some rank
        if hw.rank == 0:
            lock_run(Path(out))

    def check_loss(self, loss: float, norm: float) -> bool:
        """Return whether loss and gradient norm are finite. Raises UserError where they were not in
        five steps in a row."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.hw.rank == 0:
            print(f"step {self.done + 1}: loss {loss}, gradient norm {norm}: step skipped "
                  f"({self.skipped_in_a_row} in a row)")
        if self.skipped_in_a_row == 5:
            self.stop_signal.restore()
            raise UserError(f"five steps in a row were not finite: try a lower --lr; "
                            f"{self._newest()}")
        return False

    def after_step(self, done: int, reader_gone: bool = False) -> bool:
        """Call after each step, on all ranks: saves when due; returns True to stop.

        done: the number of steps done. All ranks stop if one has received a signal, if nobody
        reads the printed lines any more, or if the deadline has passed.
        """
        self.done = done
        # On the CPU, where gloo adds it up: the host must not wait for a GPU here.
        stop = torch.tensor([self.stop_signal.received > 0 or reader_gone,
                             monotonic() >= self.hw.deadline], dtype=torch.float32)
        if self.hw.world > 1:
            dist.all_reduce(stop, group=self.group)
        self.stopping, self.out_of_time = (value > 0 for value in stop.tolist())
        leave = self.stopping or self.out_of_time
        if done % self.every == 0 or done == self.steps or leave or self.postponed:
            self.save()
        return leave

    def save(self):
        """Save now; all ranks call it together. If that fails, or the last step was not finite,
        `saved` stays smaller than `done`."""
        self.postponed = self.skipped_in_a_row > 0
        if self.postponed:
            return
        gathered = self.gather()        # by all ranks, before rank 0 may find the disk full
        if self.hw.rank or save_checkpoint(self.out, self.done,
                                           lambda folder: self.write(folder, *gathered)):
            self.saved = self.done

    def all_end(self, seconds: float = 60.0) -> bool:
        """Whether all ranks are about to end. After an error on one rank only, the others never
        come here, and without what they hold there is nothing to save."""
        world = dist.get_world_size(self.group) if self.hw.world > 1 else 1
        names = [f"end of {self.out} at {self.done}, rank {rank}" for rank in range(world)]
        if world > 1:
            self.hw.store.set(names[self.hw.rank], b"")
            try:
                self.hw.store.wait(names, timedelta(seconds=seconds))
            except dist.DistStoreError:
                print(f"step {self.done} is not saved: other ranks do not end; {self._newest()}",
                      file=sys.stderr)
                return False
        return True

    def close(self):
        """Save what is not saved yet. Raises UserError if that fails, KeyboardInterrupt after a
        signal: the script then ends with exit code 130."""
        if self.saved != self.done:     # the run has ended between two steps, or the disk was full
            if not self.all_end():
                return self.stop_signal.restore()
            self.save()
        self.stop_signal.restore()
        if self.saved != self.done:
            why = "was not finite" if self.postponed else "could not be saved"
            raise UserError(f"step {self.done} {why}; {self._newest()}")
        if self.saved and self.hw.rank == 0:
            print(f"saved {self.out}/step_{self.saved:06d}")
            if self.out_of_time and self.done < self.steps:
                print(f"--max_hours are over after step {self.done} of {self.steps}: --resume "
                      "continues the run")
        if self.stop_signal.received or self.stopping:
            raise KeyboardInterrupt

    def _newest(self) -> str:
        if not self.saved:
            return f"{self.out} has no checkpoint"
        return f"the last checkpoint of {self.out} is step {self.saved}, from before"
