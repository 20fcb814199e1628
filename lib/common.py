"""What every script needs and no reader comes for: hardware, command line, checkpoints, logs.

Nothing here knows about models. Errors that are the user's to mend are `UserError`s: `main`
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
LONG = timedelta(hours=2)   # rank 0 may examine or save for long while others wait for it


# ---- hardware ---------------------------------------------------------------------------------

PEAKS = {  # dense bf16 FLOP/s by the data sheet, and a rental price in $/h (our guess; edit it)
    "H200": (989e12, 3.5), "H100": (989e12, 2.5), "A100": (312e12, 1.5), "L40S": (362e12, 1.0),
    "4090": (165e12, 0.5), "3090": (71e12, 0.25),
}


@dataclass
class Hardware:
    """Where this process runs. `peak` is FLOP/s of one device, `price` $/h of one device; `store`
    is the key-value store of all ranks."""
    device: torch.device
    dtype: torch.dtype
    description: str
    peak: float
    price: float
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: object = None


def setup(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Choose device and dtype, join torchrun's process group if there is one.

    device: auto | cpu | cuda | mps; dtype: auto | float32 | bfloat16. A CPU process takes all
    cores, or one where torchrun started several, or OMP_NUM_THREADS. fp16 is never used: it needs
    loss scaling on a GPU and is a hundred times slower on a CPU.
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
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or (
            1 if world > 1 else os.cpu_count() or 1)
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
                                rank=rank, world_size=world, timeout=LONG)
    why = f"{where} in {str(chosen)[6:]}: {because}" + (f", {world} processes" * (world > 1))
    return Hardware(where, chosen, why, peak, price, rank, world, local, store)


def store_of_this_attempt(store, rank: int, world: int):
    """The part of `store` that belongs to this life of the run. torchrun keeps one store through
    all its restarts: gloo would call on the dead at the addresses that they left there. Its count
    of restarts differs from machine to machine, so rank 0 names the life: as it may find what a
    dead rank wrote, it answers until all who live have heard."""
    own = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", own)
        life = store.get(f"answer/{own}").decode()      # waits until it is there
        store.set(f"{life}/heard/{rank}", "")
        return dist.PrefixStore(life, store)
    missing = list(range(1, world))
    while missing:
        for other in missing:
            store.set(f"answer/{store.get(f'here/{other}').decode()}", own)
        time.sleep(0.01)
        missing = [other for other in missing if not store.check([f"{own}/heard/{other}"])]
    return dist.PrefixStore(own, store)


def check_same_start(start: int, out):
    """Raises UserError where ranks found different checkpoints to go on from: they would add up
    gradients of different weights."""
    if dist.is_initialized():
        found = [0] * dist.get_world_size()
        dist.all_gather_object(found, start)
        if len(set(found)) > 1:
            raise UserError(f"--resume: ranks find steps {found} in {out}: not all see that folder")


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def print_plan(hw: Hardware, parts: dict[str, int], tokens: float, flops: float, memory: float):
    """Print what a run would take and cost (`--plan`). flops: of the whole run, all ranks."""
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


# ---- tensors on disk: the safetensors format, a JSON header and raw bytes -----------------------


# ---- checkpoints: a folder a step, written beside and then renamed -------------------------------

def save_checkpoint(run: Path, step: int, write, keep: int = 2) -> Path | None:
    """Save run/step_NNNNNN by calling write(folder), so that a kill at any moment loses nothing.

    The folder gets its name only once it is complete; then all but the newest `keep` go. A write
    that fails (a full disk) leaves the earlier checkpoints alone and returns None.
    """
    final = Path(run) / f"step_{step:06d}"
    part, old = final.with_suffix(".part"), final.with_suffix(".old")
    try:
        for left in (part, old):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        if final.exists():  # the same step once more, after a resume
            os.replace(final, old)
        os.replace(part, final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        print(f"could not save {final}: {error.strerror or error}; the earlier checkpoint stands",
              file=sys.stderr)
        return None
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def save_state(path, state: dict):
    """torch.save that tells a full disk from a bug and is on the disk when it returns."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides a full disk's OSError behind one
            raise error.__context__ or error from None
        file.flush()
        os.fsync(file.fileno())


def move_earlier_run(out: Path, resume: bool, hw: Hardware, say=print):
    """Move an earlier run out of the way, unless it is to be resumed: nothing is written over. To
    be called by all ranks once they have loaded what they begin from, which may lie in there."""
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
    """A folder with a model: `path` itself, or the newest step of the run folder `path`."""
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
    """Raises UserError where the file `path` says that its folder was begun with other options:
    what lies there would pass for what is asked for now. It is written when the block, whole or
    broken off, has left a checkpoint for which it holds."""
    if path.exists() and read_json(path) != asked:
        raise UserError(f"{path.parent} was begun with other options, see {path}: take another")
    try:
        yield
    finally:
        if any(path.parent.glob("**/step_*")):
            write_json(path, asked)


def write_text(path, text: str):
    """Write a file whole: under a temporary name, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path, value):
    """Write `value` as JSON, whole."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path):
    """What a file of our own holds. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: remove it to go on") from None


# ---- logs ---------------------------------------------------------------------------------------

def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl, none where there is no such file; lines cut short are left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


class Log:
    """log.jsonl (one line a step), a progress bar on a terminal, plain lines elsewhere.

    Only rank 0 writes. On resume, lines of steps that will be run again are cut off.
    """

    def __init__(self, run: Path, name: str, steps: int, start: int = 0, rank: int = 0):
        self.steps, self.name, self.file, self.bar = steps, name, None, None
        self.began, self.start = time.time(), start
        self.reader_gone = False       # whoever read the printed lines
        if rank:
            return
        path = run / "log.jsonl"
        kept = [line for line in read_log(path) if line["step"] <= start] if start else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, desc=name, dynamic_ncols=True)

    def step(self, step: int, show: bool, **values):
        """Record one step; `show`: also print it where there is no progress bar."""
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
            except BrokenPipeError:     # nobody reads: `| head`, or `| tee` by the same Ctrl-C
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
    """What went wrong, in one line of a message: torch's advice behind it may be unsafe."""
    return str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__


class StopSignal:
    """SIGTERM and the first Ctrl-C become a flag, so that the loop saves before it leaves."""

    def __init__(self):
        self.received, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                self.before[which] = signal.signal(which, self._note)

    def restore(self):
        """There is no loop any more that would look at the flag."""
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def _note(self, which, frame):
        if self.received:  # asked twice: leave now
            raise KeyboardInterrupt
        self.received = which     # `print` would raise where the signal came in the midst of one,
        with contextlib.suppress(OSError):      # and this where `2>&1 | tee` has heard it too
            os.write(2, b"\nstopping after this step (saving; once more to stop at once)\n")


class Checkpointer:
    """What keeps a run safe from step to step: checkpoints every `every` steps, at the last and
    where a signal asks to stop; and an end where nothing is finite any more.

    write(folder) fills a checkpoint; only rank 0 does. group: the ranks that leave together.
    """

    def __init__(self, out: Path, hw: Hardware, steps: int, every: int, start: int, write,
                 group=None):
        self.out, self.hw, self.steps, self.every, self.write = out, hw, steps, every, write
        self.done = self.saved = start
        self.group, self.stop_signal = group, StopSignal()
        self.skipped = self.skipped_in_a_row = 0
        self.stopping = False       # some rank was told to leave

    def check_loss(self, loss: float, norm: float) -> bool:
        """Whether a step counts; the fifth in a row that doesn't ends the run."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row, self.skipped = self.skipped_in_a_row + 1, self.skipped + 1
        if self.hw.rank == 0:
            print(f"step {self.done}: loss {loss}, gradient norm {norm}: step skipped "
                  f"({self.skipped_in_a_row} in a row)")
        if self.skipped_in_a_row == 5:
            raise UserError(f"five steps in a row were not finite; the last checkpoint of "
                            f"{self.out} is from before; try a lower --lr")
        return False

    def after_step(self, done: int, reader_gone: bool = False) -> bool:
        """To be asked after every step: save where it is time; whether to leave now, all ranks,
        as a signal says or as nobody reads any more (`reader_gone`)."""
        self.done = done
        stop = torch.tensor(float(self.stop_signal.received or reader_gone), device=self.hw.device)
        if self.hw.world > 1:
            dist.all_reduce(stop, group=self.group)
        if done % self.every == 0 or done == self.steps or stop:
            self.save()
        self.stopping = bool(stop)
        return self.stopping

    def save(self):
        """Save now, if this rank is the one to; where that fails `saved` stays behind `done`."""
        if self.hw.rank or save_checkpoint(self.out, self.done, self.write):
            self.saved = self.done

    def close(self):
        """The last word. Raises UserError where what was done is not saved."""
        if self.saved != self.done:     # it left between two steps, or the disk was full
            self.save()
        self.stop_signal.restore()
        if self.saved != self.done:
            raise UserError(f"step {self.done} could not be saved; {self.out} has step "
                            f"{self.saved}")
        if self.saved and self.hw.rank == 0:
            print(f"saved {self.out}/step_{self.saved:06d}")
        if self.stop_signal.received or self.stopping:
            raise KeyboardInterrupt
