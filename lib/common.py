"""Hardware, torchrun, files and logs: what every script needs.

Nothing here knows about models. Errors that the user can correct are `UserError`s: `lib.cli.main`
prints them as one line and exits with code 2.
"""
import contextlib
import errno
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from zlib import crc32

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
    store: object = None    # torch.distributed's key-value store, shared by all ranks
    deadline: float = math.inf      # on time.monotonic's clock: when --max_hours are over


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


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware. With AVX-512 alone oneDNN supports bf16 too, by
    converting it: five times slower than fp32 (measured on an Ice Lake Xeon)."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def setup(device: str = "auto", dtype: str = "auto", max_hours: float = 0,
          generates: bool = False) -> Hardware:
    """Choose device and dtype, and join torchrun's process group if there is one.

    device: auto | cpu | cuda | mps; dtype: auto | float32 | bfloat16. A CPU process uses all its
    cores, or OMP_NUM_THREADS; one where torchrun has started several. fp16 is never used: it needs
    loss scaling on a GPU and is a hundred times slower on a CPU. max_hours: from now to the
    deadline, 0 for none. generates: the process mainly generates; a CPU then takes fp32, in which
    steps of a few tokens are 1.3 to 1.7 times as fast and a reply does not depend on what is
    generated beside it. Raises UserError where there is no such device, a rank does not join, or
    two ranks would share a GPU.
    """
    deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf
    rank, world = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    local = from_environment("LOCAL_RANK", 0)
    if rank >= world:
        raise UserError(f"RANK={rank} in the environment, but WORLD_SIZE={world}: ranks count from "
                        "0; torchrun sets both")
    if dist.is_torchelastic_launched():
        end_with_launcher()
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available()
                  else "mps" if torch.backends.mps.is_available() else "cpu")
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device takes auto, cpu, cuda or mps, not '{device}'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no GPU here")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps, but torch sees no Apple GPU here")
    # A batch system may show each task one GPU, its own: that is device 0, whatever LOCAL_RANK is.
    index = local if device == "cuda" and torch.cuda.device_count() > 1 else 0
    if device == "cuda" and index >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK={local}, but this machine has {torch.cuda.device_count()} "
                        "GPUs: start fewer processes on it")
    if device == "cuda":
        torch.cuda.set_device(index)
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        bf16, because = capability >= (8, 0), f"{name}, compute capability {capability}"
        peak, price = next((v for k, v in PEAKS.items() if k in name), (100e12, 1.0))
        torch.set_float32_matmul_precision("high")
    elif device == "mps":
        bf16, because, peak, price = False, "Apple GPU (untested)", 5e12, 0.0
    else:
        flags = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
        fast = fast_bf16()
        bf16 = fast and not generates
        because = f"CPU with {flags}, {'fast' if fast else 'no fast'} bf16"
        threads = from_environment("OMP_NUM_THREADS", 0) or (1 if world > 1 else cores())
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # tiny optimizer moments otherwise stall the CPU
        peak, price = threads * (160e9 if fast else 80e9), 0.0
        because += f", {threads} thread{'s' * (threads > 1)}"
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype takes auto, float32 or bfloat16, not '{dtype}'")
    chosen = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if bf16 else torch.float32
    where = torch.device(device, index) if device == "cuda" else torch.device(device)
    store = None
    if world > 1:
        try:
            store = store_of_this_attempt(next(dist.rendezvous("env://"))[0], rank, world)
        except dist.DistStoreError:
            raise UserError(f"rank {rank} waited too long for {world} ranks to join") from None
        except (dist.DistError, ValueError) as error:   # MASTER_ADDR is missing, its port is in use
            raise UserError(f"{world} processes (WORLD_SIZE) can't join: {first_sentence(error)}; "
                            "start them with torchrun") from None
        if device == "cuda":
            own = torch.cuda.get_device_properties(index).uuid
            check_own_gpu(store, rank, world, f"{own} of {platform.node()}")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world, timeout=GROUP_TIMEOUT)
    description = f"{where} in {str(chosen)[6:]}: {because}"
    if world > 1:
        description += f", {world} processes"
    return Hardware(where, chosen, description, peak, price, rank, world, store, deadline)


def check_own_gpu(store, rank: int, world: int, gpu: str):
    """Raise UserError, on all ranks, where two have the same `gpu`, a name that no other has. That
    is so where one GPU is visible and several processes were started; NCCL would end with a message
    that says less."""
    store.set(f"gpu/{rank}", gpu)
    ranks = defaultdict(list)
    for other in range(world):
        ranks[store.get(f"gpu/{other}").decode()].append(other)
    for name, sharing in ranks.items():
        if len(sharing) > 1:
            raise UserError(f"ranks {sharing} would share GPU {name}: start one process for each "
                            "GPU, or show each its own")


def multiples(value: int, unit: int) -> str:
    """The multiples of `unit` next to value, as text for a message: "8 or 16" for 10 and 8."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def from_environment(name: str, default: int) -> int:
    """The number in an environment variable, which torchrun or the user has set. OMP_NUM_THREADS
    may list one for each level of nested loops, "2,1": the first one counts."""
    text = os.environ.get(name) or str(default)
    first = text.split(",")[0].strip()
    if not (first.isascii() and first.isdecimal()):
        raise UserError(f"{name} in the environment is a number from 0 on, not '{text}'")
    return int(first)


def end_with_launcher():
    """Let this process receive SIGTERM once torchrun is gone. Killed, it can't end its ranks, and
    they would train and save without anybody who knows of them."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:     # an orphan gets another parent
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


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
    steps = of_all_ranks(start)
    if len(set(steps)) > 1:
        raise UserError(f"--resume: ranks find steps {steps} in {out}: not all see that folder")


def check_same_data(digest: str):
    """Raise UserError where ranks see different own data: each would pack other rows."""
    checksums = of_all_ranks(crc32(digest.encode()))
    if len(set(checksums)) > 1:
        raise UserError(f"--data: ranks see different files (checksums {checksums}): not all have "
                        "the same shards")


def of_all_ranks(number: int) -> list[int]:
    """The number that each rank has."""
    if not dist.is_initialized():
        return [number]
    found = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    found[dist.get_rank()] = number
    return sum_over_ranks(found).tolist()


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


@dataclass
class Part:
    """Steps of a run that are alike."""
    name: str
    steps: float
    trace: object           # of one step: a Trace of lib/roofline.py
    flops: float            # what the model needs in one step, over all GPUs of the trace's machine
    beside: bool = False    # other GPUs take them while these take the rest


def print_plan_on(machine, parts: dict[str, int], tokens: float, steps: list, loading: float,
                  how: str, beside: bool = True):
    """Print what a run would need and cost on a machine that is not here (`--plan --on`).

    machine: a Machine of lib/roofline.py; steps: Parts; loading: hours in which samples are
    made, `beside` the steps or between them; how: by whom and how fast.
    """
    fullest = max((s.trace.memory() for s in steps), key=lambda memory: memory["total"])
    own, others = (sum(s.steps * s.trace.seconds for s in steps if s.beside == beside) / 3600
                   for beside in (False, True))
    hours = max(own, others, loading) if beside else max(own, others) + loading
    price = hours * machine.price * machine.count
    kinds = ", ".join(f"{kind} {n / 2**30:,.2f}" for kind, n in fullest.items() if kind != "total")
    print(f"on          {machine}: what is computed comes from a model of it, not a measurement")
    for name, count in parts.items():
        print(f"{name:<11} {count / 1e6:,.2f}M parameters")
    print(f"memory      {fullest['total'] / 2**30:,.2f} GiB a GPU, which has "
          f"{machine.memory / 2**30:,.0f}, computed: {kinds}")
    print(f"tokens      {tokens / 1e6:,.1f}M")
    print(f"compute     {sum(s.steps * s.flops for s in steps):.3g} FLOPs")
    for s in steps:
        print(f"step        {s.trace.seconds:.4f} s computed, MFU "
              f"{s.trace.mfu(s.flops / s.trace.machine.count):.1%}, {s.steps:,.0f} {s.name}: GPU "
              f"{s.trace.total().seconds:.4f} s, host {s.trace.host_seconds:.4f} s, waiting for "
              f"other GPUs {s.trace.exposed:.4f} s")
    print(f"loading     {loading:,.2f} h computed, {'beside' if beside else 'between'} the steps; "
          f"{how}")
    print(f"time        {hours:,.2f} h computed")
    print(f"price       ${price:,.2f} computed, at ${machine.price} a GPU-hour, an assumption")


# ---- files --------------------------------------------------------------------------------------

def write_text(path, text: str):
    """Write a file under a temporary name, then rename it: nobody ever reads half of it. Half of a
    surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark. Raises OSError
    that names the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")
        os.replace(part, path)
    except OSError as error:        # of a full disk it has no name
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path, value):
    """Write `value` as JSON, by write_text."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type = dict):
    """Read a JSON file that a script of ours has written. Raises UserError where it is damaged or
    holds something else than a `kind`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise UserError(f"{path} is damaged: remove it to go on")
    return found


# ---- logs ---------------------------------------------------------------------------------------

def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl, each an object with a number of a step; [] where there is no such
    file. Other lines are left out: they were cut short or damaged."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):   # also a text that is no UTF-8
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int and line["step"] >= 0:
                lines.append(line)
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
            print(f"step {step} is missing from {self.file.name}: {error.strerror}",
                  file=sys.stderr)
        text = " | ".join(f"{k} {_short(v)}" for k, v in values.items() if not isinstance(v, dict))
        if self.bar:
            self.bar.update(1)
            self.bar.set_postfix_str(text)
        elif show:
            left = (time.time() - self.began) / max(1, step - self.start) * (self.steps - step)
            try:
                print(f"{self.name} {step:05d}/{self.steps} ({step / self.steps:.0%}) | {text} | "
                      f"{clock(left)} left", flush=True)
            except OSError as error:    # a full disk (`> file`) is not the end
                # `| head` has ended, the same Ctrl-C has ended `| tee`, or the terminal is gone.
                if error.errno in (errno.EPIPE, errno.EIO):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    self.reader_gone = True

    def close(self):
        if self.bar:
            self.bar.close()
        if self.file:
            with contextlib.suppress(OSError):      # the disk is still full, which was said
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
def heartbeat(what: str):
    """Print every 20 seconds what the program is waiting for, until the block ends."""
    done, began = threading.Event(), time.time()

    def beat():
        while not done.wait(20):
            print(f"... waiting for {what} ({clock(time.time() - began)})", file=sys.stderr)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
