"""Reading own data: `python -m lab.bench loader`. It needs webdataset, for comparison.

Four questions, about shards that it writes first:

    speed    How many samples a second are read from tars of pictures and JSON, decoded and resized
             as training does? Beside the webdataset package, which reads the same tars from front
             to back, in turns within one run. We read in an order that is shuffled over all shards.
    resume   How long does a process that has just started take until it has a sample out of the
             middle of 64 shards of 10,000? Their indices are there already.
    memory   How much more memory does it use after 100,000 samples than after the first 1,000?
    wait     Which share of its time does the trainer of `tiny` wait for two loading processes?

resume and memory run in a process of their own: `python -m lab.bench_loader SHARDS START SAMPLES`
reads that many samples from sample START on and prints what it has measured, as JSON. Linux only,
as the memory is read from /proc.
"""
import lib  # first of all, before torch: see lib/__init__.py

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data import collate, OwnData, Packer, Stream
from lab.bench_case import case_of_speeds
from lib.cli import main, UserError
from lib.common import ROOT
from lib.images import resize
from lib.loader import SampleLoader
from lib.shards import open_shards
from model import GLMV, sized
from optim import OptimConfig, Optimizer
from pretrain import loss_sum

SHARDS, SAMPLES = 64, 10_000    # of `resume` and `memory`: shards, and records in each
READ = 100_000                  # samples that `memory` reads
CHUNK = 200                     # samples that a side of `speed` reads in its turn
STEPS = 12                      # training steps of `wait`, after a first burst of samples
BURST = 256                     # samples that `wait` loads ahead
# The pictures of `speed` and `wait`: photos as they are on the web, and small ones, where the time
# goes into finding and opening them rather than into decoding.
PICTURES = {"photos": ("jpeg", 512, 384), "small pictures": ("png", 64, 64)}


# ---- the shards ---------------------------------------------------------------------------------

def encoded(rng, kind: str, width: int, height: int) -> bytes:
    """A picture file of smooth noise, which compresses about as well as a photo."""
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    fine = rng.normal(0, 6, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, pictures: list[bytes], kind: str, first: int, count: int):
    """A tar with records first .. first + count - 1: the pictures in turn, and JSON about them."""
    with tarfile.open(path, "w") as tar:
        for n in range(first, first + count):
            value = {"number": n, "texts": [{"user": "Which number?", "assistant": f"{n}"}]}
            for ending, data in ((kind, pictures[n % len(pictures)]),
                                 ("json", json.dumps(value).encode())):
                info = tarfile.TarInfo(f"{n:08d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


# ---- speed --------------------------------------------------------------------------------------

def their_samples(folder: Path, config):
    """webdataset over the tars of a folder, decoding as its manual does, then our resize."""
    try:
        import webdataset
    except ImportError as error:
        raise UserError(f"lab.bench loader compares with webdataset ({error}): "
                        "pip install webdataset") from None
    tars = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pilrgb")
    for sample in data.repeat():
        image = sample["jpeg"] if "jpeg" in sample else sample["png"]
        yield sample["json"]["number"], resize(image, config)


def our_samples(folder: Path, config, seed: int):
    shards, i = open_shards(str(folder)), 0
    while True:
        record = shards[shards.order(seed, i, "all")]
        yield record.value["number"], resize(record.pictures[0], config)
        i += 1


def speed(folder: Path, config, args, count: int) -> dict:
    """Samples a second of both sides in turn, as a case of lab.bench. count: samples there are."""
    sides = {"ours": our_samples(folder, config, args.seed),
             "theirs": their_samples(folder, config)}
    seen = {name: dict(islice(side, count)) for name, side in sides.items()}   # also warms up
    for number, pixels in seen["ours"].items():
        if not np.array_equal(pixels, seen["theirs"][number]):
            raise UserError(f"sample {number} is not the same on both sides")
    rates = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            for _ in islice(side, CHUNK):
                pass
            rates[name].append(CHUNK / (time.perf_counter() - began))
    orders = "shuffled over all shards", "webdataset, front to back"
    return case_of_speeds(rates["ours"], rates["theirs"], orders, aim=1.0)


# ---- resume and memory --------------------------------------------------------------------------

def write_many(folder: Path, rng) -> float:
    """SHARDS shards of SAMPLES records. They are links to one tar, so that the disk has room for
    them; each has an index of its own. Returns the seconds that making one index took."""
    first = folder / "shard-000.tar"
    write_shard(first, [encoded(rng, "png", 8, 8)], "png", 0, SAMPLES)
    began = time.perf_counter()
    index = open_shards(str(first)).shards[0].index.path
    seconds = time.perf_counter() - began
    for s in range(1, SHARDS):
        name = folder / f"shard-{s:03d}.tar"
        os.link(first, name)
        shutil.copy(index, index.replace(first.name, name.name))
    return seconds


def memory() -> float:
    """Megabytes that this process holds for itself: not counted are files that are mapped."""
    with open("/proc/self/status", encoding="utf-8") as file:
        found = dict(line.split(":", 1) for line in file)
    return int(found["RssAnon"].split()[0]) / 1024


def read(spec: str, start: int, count: int) -> dict:
    """Open shards, read `count` samples from sample `start` on: seconds, megabytes."""
    began = time.perf_counter()
    shards = open_shards(spec)
    opened = time.perf_counter() - began
    config, held = sized("tiny"), []
    for i in range(start, start + count):
        record = shards[shards.order(0, i)]
        resize(record.pictures[0], config)
        if i == start:
            first = time.perf_counter() - began
        if i - start + 1 in (1000, count // 2, count):
            held.append(memory())
    return {"records": len(shards), "open": opened, "first sample": first, "MB": held}


def in_a_new_process(spec: str, start: int, count: int) -> dict:
    done = subprocess.run([sys.executable, "-m", "lab.bench_loader", spec, str(start), str(count)],
                          cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"a process that reads has ended with code {done.returncode}: see above")
    return json.loads(done.stdout)


# ---- wait ---------------------------------------------------------------------------------------

def wait(folder: Path, config, args, hw, overlap: bool) -> tuple[float, float]:
    """The share of its time that the trainer waits for two loading processes, and how many samples
    a second it takes. overlap: they load while it trains, and not between its steps."""
    own = OwnData("own", open_shards(str(folder)), "all")
    stream = Stream(config, (("own", 1.0),), args.seed, own=(own,))
    loader = SampleLoader(stream, workers=2, burst=BURST, overlap=overlap)
    packer = Packer(loader, 2048)
    model = GLMV(config, args.seed).to(hw.device, hw.dtype)
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    try:
        packer.row()                    # the workers have started, and the first burst is there
        loader.seconds, first, began = 0.0, packer.next, time.perf_counter()
        for _ in range(STEPS):
            for _ in range(2):
                batch = collate(packer.row(), config, 2048).to(hw.device)
                (loss_sum(model, batch)[0] / batch.weights.sum()).backward()
            optimizer.step(1e-3, optimizer.reduce().sqrt().item())
        seconds = time.perf_counter() - began
        return loader.seconds / seconds, (packer.next - first) / seconds
    finally:
        loader.close()


# ---- the report ---------------------------------------------------------------------------------

def measure(args, hw) -> dict:
    """Print the small table; returns {"cases": the two of `speed`, "rest": the other figures}."""
    rng, config = np.random.default_rng(args.seed), sized(args.size)
    cases, rest = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, width, height) in PICTURES.items():
            tars = Path(folder, name)
            tars.mkdir()
            pictures = [encoded(rng, kind, width, height) for _ in range(16)]
            for s in range(4):
                write_shard(tars / f"{s}.tar", pictures, kind, s * CHUNK, CHUNK)
            cases[f"{name}, {width} x {height} {kind}"] = speed(tars, config, args, 4 * CHUNK)
            for overlap in (False, True):
                how = "while it trains" if overlap else "between its steps"
                share, rate = wait(tars, config, args, hw, overlap)
                rest[f"wait, {name}, loading {how}"] = f"{share:.1%}, {rate:.0f} samples/s"
        many = Path(folder, "many")
        many.mkdir()
        rest["seconds to index 10,000 records"] = f"{write_many(many, rng) / SAMPLES * 1e4:.1f}"
        found = in_a_new_process(str(many / "*.tar"), SHARDS * SAMPLES // 2, READ)
    rest["resume, records"] = f"{found['records']:,}"
    rest["resume, seconds to open"] = f"{found['open']:.2f}"
    rest["resume, seconds to the first sample"] = f"{found['first sample']:.2f} (aim: 2)"
    rest[f"memory after 1,000, {READ // 2:,}, {READ:,} samples, MB"] = ", ".join(
        f"{value:.0f}" for value in found["MB"])
    for name, value in rest.items():
        print(f"{name:<58} {value}")
    return {"cases": cases, "rest": rest}


def entry():
    """The process of `resume` and `memory`: see the end of the docstring on top."""
    words = sys.argv[1:]
    if len(words) != 3 or not all(word.isdecimal() for word in words[1:]):
        raise UserError("`python -m lab.bench loader` starts this, with SHARDS START SAMPLES")
    print(json.dumps(read(words[0], int(words[1]), int(words[2]))))


if __name__ == "__main__":
    main(entry)
