"""Hardware, torchrun, run folders, checkpoints on disk and logs: what every script needs.

Nothing here knows about models. Errors that the user can correct are `UserError`s: `lib.cli.main`
prints them as one line and exits with code 2.
"""
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
# gloo gives up after this time; rank 0 may evaluate or save for long while the others wait for it.
GROUP_TIMEOUT = timedelta(hours=2)


# ---- hardware -----------------------------------------------------------------------------------

PEAKS = {  # dense bf16 FLOP/s by the data sheet, and a rental price in $/h (our guess; edit it)
    "H200": (989e12, 3.5), "H100": (989e12, 2.5), "A100": (312e12, 1.5), "L40S": (362e12, 1.0),
    "4090": (165e12, 0.5), "3090": (71e12, 0.25),
}


@dataclass
class Hardware:
    """The device of this process, and its place among the ranks that torchrun has started."""
    device: torch.device
    dtype: torch.dtype
    description: str        # one line for the log: device, dtype, why, number of processes
    peak: float             # FLOP/s of one device
    price: float            # $/h of one device
    rank: int = 0
    world: int = 1          # number of ranks
    local_rank: int = 0     # rank among the processes of this machine
    store: object = None    # torch.distributed's key-value store, shared by all ranks


def cores(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of CPU cores that this process may use, at least 1.

    os.cpu_count() counts the machine's cores. A process may be pinned to a few of them (taskset, a
    batch system: its affinity), and a container may have a quota of CPU time (`docker --cpus=2`).
    More threads than that only take turns. groups, mount: where Linux shows the control groups.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for quota in cpu_quotas(groups, mount):
        count = min(count, int(quota))
    return max(1, count)


def cpu_quotas(groups: Path, mount: Path) -> list[float]:
    """The CPU quotas, in cores, of this process's control group and of all groups around it.

    A line of `groups` reads number:controllers:path. Version 2 has one tree and no controllers,
    version 1 a tree a controller, here `cpu`. Inside a container the path may be the host's, which
    does not exist there; the container's own quota is then in the files at the root of the mount.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:             # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tree = mount
        elif "cpu" in controllers.split(","):
            tree = mount / "cpu"
        else:
            continue
        folder = tree / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(tree):
                found += read_quota(group)
    return found


def read_quota(group: Path) -> list[float]:
    """[quota in cores] of one control group, or [] where there is no limit."""
    try:
        if (group / "cpu.max").exists():                                # version 2: "150000 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:                                                           # version 1: two files
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return [int(quota) / int(period)] if int(quota) > 0 else []     # -1: no limit
    except (OSError, ValueError):       # no such file, or "max 100000"
        return []


def setup(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Choose device and dtype, and join torchrun's process group if there is one.

    device: auto | cpu | cuda | mps; dtype: auto | float32 | bfloat16. A CPU process uses all its
    cores, or OMP_NUM_THREADS; one where torchrun has started several. fp16 is never used: it needs
    loss scaling on a GPU and is a hundred times slower on a CPU. Raises UserError where there is no
    such device, or a rank does not join.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available()
                  else "mps" if torch.backends.mps.is_available() else "cpu")
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device takes auto, cpu, cuda or mps, not '{device}'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no GPU here")
    if device == "cuda":
        torch.cuda.set_device(local)
        name = torch.cuda.get_device_name(local)
        capability = torch.cuda.get_device_capability(local)
        bf16, because = capability >= (8, 0), f"{name}, compute capability {capability}"
        peak, price = next((v for k, v in PEAKS.items() if k in name), (100e12, 1.0))
        torch.set_float32_matmul_precision("high")
    elif device == "mps":
        bf16, because, peak, price = False, "Apple GPU (untested)", 5e12, 0.0
    else:
        flags = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        because = f"CPU with {flags}, {'fast' if bf16 else 'no fast'} bf16"
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or (1 if world > 1 else cores())
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # tiny optimizer moments otherwise stall the CPU
        peak, price = threads * (160e9 if bf16 else 80e9), 0.0
        because += f", {threads} thread{'s' * (threads > 1)}"
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype takes auto, float32 or bfloat16, not '{dtype}'")
    chosen = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if bf16 else torch.float32
    where = torch.device(device, local) if device == "cuda" else torch.device(device)
    store = None
    if world > 1:
        try:
            store = store_of_this_attempt(next(dist.rendezvous("env://"))[0], rank, world)
        except dist.DistStoreError:
            raise UserError(f"rank {rank} waited too long for {world} ranks to join") from None
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world, timeout=GROUP_TIMEOUT)
    description = f"{where} in {str(chosen)[6:]}: {because}"
    if world > 1:
        description += f", {world} processes"
    return Hardware(where, chosen, description, peak, price, rank, world, local, store)


def store_of_this_attempt(store, rank: int, world: int):
    """Return the part of `store` that belongs to this attempt at the run.

    torchrun restarts all ranks when one has died, and keeps the same store: gloo would find there
    the addresses of dead processes. So each attempt needs a prefix of its own. torchrun's count of
    restarts differs from machine to machine, therefore rank 0 chooses a random name:

        each rank r > 0   writes a random word of its own at here/r, waits at answer/WORD
        rank 0            reads here/r, writes the attempt's name at answer/WORD
        each rank r > 0   reads the name, writes NAME/heard/r

    At here/r rank 0 may read the word of a dead process and answer that one. So it repeats its
    answers until every living rank has confirmed.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", own)
        attempt = store.get(f"answer/{own}").decode()       # waits until it is there
        store.set(f"{attempt}/heard/{rank}", "")
        return dist.PrefixStore(attempt, store)
    missing = list(range(1, world))
    while missing:
        for other in missing:
            word = store.get(f"here/{other}").decode()
            store.set(f"answer/{word}", own)
        time.sleep(0.01)
        missing = [other for other in missing if not store.check([f"{own}/heard/{other}"])]
    return dist.PrefixStore(own, store)


def check_same_start(start: int, out):
    """Raise UserError where ranks have found different checkpoints to continue from: they would add
    up gradients of different weights."""
    if dist.is_initialized():
        found = [0] * dist.get_world_size()
        dist.all_gather_object(found, start)
        if len(set(found)) > 1:
            raise UserError(f"--resume: ranks find steps {found} in {out}: not all see that folder")


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def print_plan(hw: Hardware, parts: dict[str, int], tokens: float, flops: float, memory: float):
    """Print what a run would need and cost (`--plan`).

    parts: {name: number of parameters}; tokens, flops: of the whole run, over all ranks; memory:
    bytes a rank.
    """
    mfu = 0.4 if hw.device.type == "cuda" else 0.2  # what such runs may reach: a guess
    hours = flops / (hw.peak * hw.world * mfu) / 3600
    print(f"on          {hw.description}")
    for name, count in parts.items():
        print(f"{name:<11} {count / 1e6:,.2f}M parameters")
    print(f"memory      {memory / 2**30:,.2f} GiB a rank: weights, gradients, optimizer, "
          "activations")
    print(f"tokens      {tokens / 1e6:,.1f}M")
    print(f"compute     {flops:.3g} FLOPs")
    print(f"time        {hours:,.2f} h at {mfu:.0%} of {hw.peak * hw.world / 1e12:,.2f} TFLOP/s")
    print(f"price       ${hours * hw.price * hw.world:,.2f} at ${hw.price} a device-hour")


# ---- run folders: out/NAME/step_000100, written under another name and then renamed --------------

def save_checkpoint(run: Path, step: int, write, keep: int = 2) -> Path | None:
    """Save run/step_NNNNNN by calling write(folder), so that a kill at any moment loses nothing.

    The folder gets its name only once it is complete; then all but the newest `keep` are removed. A
    write that fails (a full disk) leaves the earlier checkpoints as they are and returns None.
    """
    final = Path(run) / f"step_{step:06d}"
    part, old = final.with_suffix(".part"), final.with_suffix(".old")
    try:
        for rest in (part, old):    # left there by a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        if final.exists():          # the same step once more, after a resume
            os.replace(final, old)
        os.replace(part, final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        print(f"could not save {final}: {error.strerror or error}; the earlier checkpoint is kept",
              file=sys.stderr)
        return None
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
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


def move_earlier_run(out: Path, resume: bool, hw: Hardware, say=print):
    """Rename an earlier run to out.1, out.2, ... unless it is to be resumed: nothing is
    overwritten. All ranks call this once they have loaded the weights that they start from, which
    may be in that folder."""
    if hw.world > 1:
        dist.barrier()
    if hw.rank == 0 and not resume and checkpoints(out):
        kept = next(p for i in range(1, 10_000) if not (p := Path(f"{out}.{i}")).exists())
        out.rename(kept)
        say(f"{out} held a run: kept as {kept}")


def checkpoints(run) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(p for p in Path(run).glob("step_*") if p.suffix == "" and p.is_dir())


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
        if any(path.parent.glob("**/step_*")):
            write_json(path, asked)


def write_text(path, text: str):
    """Write a file under a temporary name, then rename it: nobody ever reads half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path, value):
    """Write `value` as JSON, by write_text."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path):
    """Read a JSON file that a script of ours has written. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: remove it to go on") from None


# ---- logs ---------------------------------------------------------------------------------------

def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; [] where there is no such file. A line that was cut short is left
    out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


class Log:
    """log.jsonl (one line a step), a progress bar on a terminal, plain lines elsewhere.

    Only rank 0 writes. On resume, the lines of steps that will run again are cut off.
    """

    def __init__(self, run: Path, name: str, steps: int, start: int = 0, rank: int = 0):
        self.name, self.steps, self.start = name, steps, start
        self.file = None            # log.jsonl; None on the other ranks
        self.bar = None             # tqdm's progress bar, on a terminal only
        self.began = time.time()
        self.reader_gone = False    # stdout was a pipe (`| head`), and its reader has closed it
        if rank:
            return
        path = run / "log.jsonl"
        kept = [line for line in read_log(path) if line["step"] <= start] if start else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, desc=name, dynamic_ncols=True)

    def step(self, step: int, show: bool, **values):
        """Record one step. show: also print it, where there is no progress bar."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk must not end a run
            print(f"step {step} is missing from the log: {error.strerror}", file=sys.stderr)
        text = " | ".join(f"{k} {_short(v)}" for k, v in values.items() if not isinstance(v, dict))
        if self.bar:
            self.bar.update(1)
            self.bar.set_postfix_str(text)
        elif show:
            left = (time.time() - self.began) / max(1, step - self.start) * (self.steps - step)
            try:
                print(f"{self.name} {step:05d}/{self.steps} ({step / self.steps:.0%}) | {text} | "
                      f"{clock(left)} left", flush=True)
            except BrokenPipeError:     # `| head` has ended, or the same Ctrl-C has ended `| tee`
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                self.reader_gone = True

    def close(self):
        if self.bar:
            self.bar.close()
        if self.file:
            self.file.close()


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:,.4g}"
    return str(value)


def clock(seconds: float) -> str:
    """75 -> '1m15s'"""
    seconds = int(seconds)
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def first_sentence(error: Exception) -> str:
    """The first sentence of an exception's message, as a part of a message of ours. torch adds
    advice after it, which may be unsafe (`weights_only=False`)."""
    return str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__


@contextlib.contextmanager
def heartbeat(what: str, every: float = 20):
    """Print every `every` seconds what the program is waiting for, until the block ends."""
    done, began = threading.Event(), time.time()

    def beat():
        while not done.wait(every):
            print(f"... waiting for {what} ({clock(time.time() - began)})", file=sys.stderr)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


# ---- to save and to stop ------------------------------------------------------------------------

class StopSignal:
    """SIGTERM and the first Ctrl-C only set `received`, so that the loop finishes its step and
    saves. The second one raises KeyboardInterrupt at once."""

    def __init__(self):
        self.received = 0           # the signal's number
        self.before = {}            # {signal: handler}, for `restore`
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                self.before[which] = signal.signal(which, self._note)

    def restore(self):
        """Put the earlier handlers back: no loop will look at `received` any more."""
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def _note(self, which, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = which
        # The handler may run in the middle of a print, and print is not reentrant: it would raise
        # here. os.write fails only if stderr was a pipe (`2>&1 | tee`) and its reader has ended.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step (saving; once more to stop at once)\n")


class Checkpointer:
    """Saves every `every` steps, after the last step and when a signal asks to stop; ends a run
    whose loss is not finite any more. A training loop uses it in this order:

        checkpointer = Checkpointer(...)            # from here on, signals are only noted
        for step in range(start, steps):
            ...                                     # one step
            checkpointer.check_loss(loss, norm)
            if checkpointer.after_step(step + 1):   # saves when due
                break
        checkpointer.close()                        # saves what is not saved yet

    write(folder) fills a checkpoint's folder; only rank 0 calls it. group: the ranks that stop
    together, as a torch.distributed group; None: all.
    """

    def __init__(self, out: Path, hw: Hardware, steps: int, every: int, start: int, write,
                 group=None):
        self.out, self.hw, self.steps, self.every, self.write = out, hw, steps, every, write
        self.group, self.stop_signal = group, StopSignal()
        self.done = start               # steps done
        self.saved = start              # of these, steps saved
        self.skipped = 0                # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0
        self.stopping = False           # some rank has been asked to stop

    def check_loss(self, loss: float, norm: float) -> bool:
        """Return whether loss and gradient norm are finite. Raises UserError where they were not in
        five steps in a row."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.hw.rank == 0:
            print(f"step {self.done}: loss {loss}, gradient norm {norm}: step skipped "
                  f"({self.skipped_in_a_row} in a row)")
        if self.skipped_in_a_row == 5:
            raise UserError(f"five steps in a row were not finite; the last checkpoint of "
                            f"{self.out} is from before; try a lower --lr")
        return False

    def after_step(self, done: int, reader_gone: bool = False) -> bool:
        """Call after each step, on all ranks: saves when due; returns True to stop.

        done: the number of steps done. All ranks stop if one has received a signal, or if nobody
        reads the printed lines any more.
        """
        self.done = done
        stop = torch.tensor(float(self.stop_signal.received or reader_gone), device=self.hw.device)
        if self.hw.world > 1:
            dist.all_reduce(stop, group=self.group)
        self.stopping = bool(stop)
        if done % self.every == 0 or done == self.steps or self.stopping:
            self.save()
        return self.stopping

    def save(self):
        """Save now, on rank 0. If that fails, `saved` stays smaller than `done`."""
        if self.hw.rank or save_checkpoint(self.out, self.done, self.write):
            self.saved = self.done

    def close(self):
        """Save what is not saved yet. Raises UserError if that fails, KeyboardInterrupt after a
        signal: the script then ends with exit code 130."""
        if self.saved != self.done:     # the run has ended between two steps, or the disk was full
            self.save()
        self.stop_signal.restore()
        if self.saved != self.done:
            raise UserError(f"step {self.done} could not be saved; {self.out} has step "
                            f"{self.saved}")
        if self.saved and self.hw.rank == 0:
            print(f"saved {self.out}/step_{self.saved:06d}")
        if self.stop_signal.received or self.stopping:
            raise KeyboardInterrupt
