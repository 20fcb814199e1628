"""The plan of who loads and encodes what: a partition, balanced, and equal to plain data
parallelism in loss and gradients on real ranks."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks, random_document
from PIL import Image
from test_pretrain import log_of, train

from data import Document, document, Packer, parse_mix, Stream
from lab import bench, bench_partition
from lib import partition
from lib.batch import images_of
from lib.cli import UserError
from lib.common import ROOT
from lib.images import Frames, Picture
from lib.loader import RankShard
from lib.partition import (all_gather_bytes, assign_encoders, assign_rows, balance, Costs,
                           from_bytes, load_batch, pack, PixelLoader, plan_steps, Skeletons, Stub,
                           to_bytes)
from model import GLMV, sized
from pretrain import loss_sum
from tasks.base import Message

TINY = sized("tiny")
COSTS = Costs.of(TINY)


# ---- costs and packing --------------------------------------------------------------------------

def test_costs_are_those_of_the_model():
    """A third of forward and backward. Norms and biases are left out, and, as vit.py leaves it
    out, the patch embedding of a still image's second frame."""
    for size, near in (("tiny", 0.08), ("base", 0.01)):
        config = sized(size)
        with torch.device("meta"):
            model = GLMV(config)
        costs = Costs.of(config)
        assert costs.token == pytest.approx(model.flops(1, 0, 0) / 3, rel=0.01)
        assert costs.learnt == pytest.approx(model.flops(0, 0, 1) / 3, rel=1e-9)
        assert costs.patch == pytest.approx(model.flops(0, 4, 0) / 12, rel=near)
    made = random_document(TINY, ((4, 6), (2, 2)), length=10)
    n, patches = len(made.ids), 28
    made.weights[5:] = 0
    assert COSTS.documents([made, made]) == (
        2 * n, 2 * (COSTS.pair * n * n + 4 * COSTS.learnt),
        COSTS.patch * patches + COSTS.patch_pair * (24 ** 2 + 4 ** 2))


def random_sizes(count: int, seed: int = 0) -> list[tuple]:
    """(tokens, decoder, tower) of samples of up to 400 tokens, half of them with a picture."""
    rng = np.random.default_rng(seed)
    sizes = []
    for _ in range(count):
        text, picture = int(np.exp(rng.uniform(2, 6))), int(rng.integers(2) * rng.integers(4, 65))
        sizes.append((text + picture, (text + picture) ** 2, picture * (1000 + picture)))
    return sizes


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_packed_rows_are_full_and_take_equally_long(rows):
    sizes = random_sizes(160 * rows)
    packed = pack(sizes, rows, 4096)
    chosen = [k for row in packed for k in row]
    assert len(packed) == rows and len(set(chosen)) == len(chosen) and 0 in packed[0]
    tokens, *loads = np.array([np.array([sizes[k] for k in row]).sum(0) for row in packed]).T
    assert tokens.max() <= 4096 and tokens.mean() > 0.99 * 4096
    if rows > 1:
        assert all(load.max() < 1.25 * load.mean() for load in loads)
        # As they come, the rows differ more.
        cut = np.searchsorted(np.cumsum([size[0] for size in sizes]), 4096 * np.arange(1, rows + 1))
        plain = [np.array(part).sum(0)[1:] for part in np.split(np.array(sizes), cut)[:rows]]
        worse = np.array(plain).T
        assert all(load.max() / load.mean() < other.max() / other.mean()
                   for load, other in zip(loads, worse))


def test_packing_of_one_sample_or_of_what_hardly_fits():
    assert pack([(5, 25, 0)], 3, 8) == [[0], [], []]
    assert pack([(8, 1, 0), (8, 1, 0), (8, 1, 0)], 2, 8) == [[0], [1]]
    assert sorted(pack([(5, 1, 0), (6, 9, 0), (3, 1, 0), (2, 1, 0)], 2, 8)) == [[0, 2], [1, 3]]


def test_no_sample_waits_for_ever():
    """One of 600 tokens among many of about 500, two of which make a better row of 1,024."""
    sizes = [(600, 600, 0)] + [(512, 512, 0)] * 20
    assert 0 in pack(sizes, 1, 1024)[0]
    sizes = [(512, 512, 0)] + [(600, 600, 0)] + [(512, 512, 0)] * 20
    packed = pack(sizes, 1, 1024)[0]
    assert 0 in packed


# ---- who takes what -----------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_of_a_micro_step_take_about_equally_long(ranks):
    costs = np.random.default_rng(0).integers(1, 100, 4 * ranks).tolist()
    steps = assign_rows(costs, ranks)
    assert sorted(row for step in steps for row in step) == list(range(4 * ranks))
    assert all(len(step) == ranks for step in steps)
    highest = 101
    for step in steps:
        ours = [costs[row] for row in step]
        assert max(ours) <= highest
        highest = min(ours)


def test_encoders_are_balanced_and_take_what_they_should():
    rng = np.random.default_rng(1)
    for ranks in (2, 4, 8):
        costs = (np.exp(rng.uniform(3, 8, 12 * ranks))).astype(int).tolist()
        preferred = [0] * (6 * ranks) + [k % ranks for k in range(6 * ranks)]
        encoders = assign_encoders(costs, preferred, ranks)
        loads = [sum(c for c, e in zip(costs, encoders) if e == rank) for rank in range(ranks)]
        assert max(loads) <= 1.03 * np.mean(loads)
        assert sum(a == b for a, b in zip(encoders, preferred)) > 3 * ranks
    # With pictures alike, and as many for each, all get what they should.
    assert assign_encoders([5] * 6, [0, 1, 2] * 2, 3) == [0, 1, 2] * 2
    assert assign_encoders([], [], 3) == []


def example_rows(rows: int, homes: bool = False) -> list[list[Document]]:
    """Rows of two samples each; the documents of the first show the same pictures, a video of two
    runs and a still picture. homes: every second picture is at rank 0."""
    made = []
    for row in range(rows):
        first = random_document(TINY, ((4, 6), (2, 2 + 2 * row), (4, 2)), seed=3 * row)
        other = Document(first.ids, first.weights, first.images)
        text = random_document(TINY, (), seed=3 * row + 1)
        last = random_document(TINY, ((6, 4),), seed=3 * row + 2)
        made.append([first, other, text, last])
        for n, image in enumerate(images_of(made[-1])):
            stub = Stub(image.shape, row, n, 0 if homes and n % 2 else None, image)
            for d in made[-1]:
                d.images = [stub if x is image else x for x in d.images]
        other.images = first.images
    return made


@pytest.mark.parametrize("how", ["planned", "gathered", "plain"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_plan_is_a_partition(how, ranks):
    """Each document is in one row, each picture is encoded once, what is sent is received."""
    rows = example_rows(4, homes=True)
    steps = plan_steps(rows, 256, COSTS, ranks, how)
    assert len(steps) == 4 // ranks
    found = [id(row) for step in steps for row in step.rows]
    assert sorted(found) == sorted(map(id, rows))
    encoded = [id(x) for step in steps for rank in step.encoded for x in rank]
    assert sorted(encoded) == sorted(id(x) for row in rows for x in images_of(row))
    assert balance(steps) >= 1
    for step in steps:
        count = [[x.shape[0] * x.shape[1] // 256 for x in rank] for rank in step.encoded]
        for rank in range(ranks):
            shown = {id(x) for x in images_of(step.rows[rank])}
            arriving = [id(x) for x in step.arriving[rank]]
            received = int(step.groups[:, rank].sum())
            if how == "gathered":
                assert len(step.loaded[rank]) == sum(map(len, step.encoded))
                assert shown <= set(arriving) and received == sum(map(sum, count))
                assert (step.groups[rank] == sum(count[rank])).all()
            else:
                assert shown == set(arriving) and len(arriving) == len(shown)
                assert step.groups[rank].sum() == sum(count[rank])
            # In the order of who encodes them, which is the order in which they are encoded.
            orders = [[id(x) for x in step.encoded[e] if id(x) in set(arriving)]
                      for e in range(ranks)]
            assert arriving == [x for order in orders for x in order]
            if how == "plain":
                assert step.groups[rank, rank] == received == step.groups[rank].sum()


# ---- samples without pixels ---------------------------------------------------------------------

class Mixed:
    """A stream of samples of four kinds: a task of the gym; a still picture and a video of two runs
    in files; plain text; and one record that was passed over. What is `lazy` is not loaded yet."""

    def __init__(self, folder, lazy: bool):
        self.folder, self.lazy = folder, lazy
        self.gym = Stream(TINY, parse_mix("point,shape_attr"))

    def __call__(self, i: int) -> list[Document]:
        if i % 2 == 0:          # of two ranks the first one draws all of these
            return self.gym(i)
        if i % 4 == 1:
            return [random_document(TINY, (), length=20 + i % 30, seed=i)]
        pictures = [Picture(self.folder / f"{(i + k) % 3}.png") for k in range(5)]
        video = (Frames(tuple(pictures[1:3]), 2), Frames(tuple(pictures[3:5]), 2))
        messages = [Message("user", "<|image|>then<|image|><|image|>", (pictures[0], *video)),
                    Message("assistant", f"it is {i}")]
        made = document(messages, self.gym.tokens, TINY, source=1, lazy=self.lazy)
        made.passed = (("damaged picture", "2.png"),)
        return [made]


@pytest.fixture
def files(tmp_path):
    """Three pictures, of noise so that every pixel counts."""
    for n, size in enumerate(((64, 48), (40, 64), (32, 32))):
        noise = np.random.default_rng(n).integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n}.png")
    return tmp_path


def same(a: Document, b: Document) -> bool:
    return (np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights)
            and (a.source, a.passed) == (b.source, b.passed)
            and [x.shape for x in a.images] == [x.shape for x in b.images])


def test_samples_travel_as_bytes_without_their_pixels(files):
    stream = Mixed(files, lazy=True)
    numbers = [0, 2, 3, 7, 8]
    data = to_bytes([stream(i) for i in numbers])
    assert len(data) < 64 * 64 * 3          # less than one picture
    samples = from_bytes(data, numbers, home=1)
    for i, sample in zip(numbers, samples):
        made = stream(i)
        assert len(made) == len(sample) and all(map(same, made, sample))
        stubs = images_of(sample)
        assert len(stubs) == len(images_of(made))
        assert [x.number for x in stubs] == list(range(len(stubs)))
        assert {(x.sample, x.home) for x in stubs} <= {(i, None if i % 2 else 1)}
    assert images_of(samples[2])[1].shape[0] == 2 and from_bytes(to_bytes([]), [], 0) == []


def on_joined_ranks(world: int, folder, work, *args):
    """work(rank, world, *args) on ranks that have joined a process group."""
    store = folder / f"store{len(list(folder.glob('store*')))}"

    def join(rank, world):
        dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank,
                                world_size=world)
        work(rank, world, *args)
    on_ranks(world, join)


def unequal_bytes(rank, world):
    assert all_gather_bytes(b"x" * 7 ** rank, None) == [b"x" * 7 ** r for r in range(world)]


class Failing(Mixed):
    def __call__(self, i):
        if i == 7:
            raise ValueError("it is cursed")
        return super().__call__(i)


def fail_alike(rank, world, stream):
    """All ranks raise what one of them has met, and do not wait for it."""
    samples = Skeletons(RankShard(stream, rank, world, 1), rank, world)
    with pytest.raises(UserError, match="^sample 7 can't be made: ValueError: it is cursed$"):
        samples(0)


def test_bytes_and_errors_reach_all_ranks(files):
    on_joined_ranks(3, files, unequal_bytes)
    on_joined_ranks(2, files, fail_alike, Failing(files, lazy=True))


# ---- loss and gradients on real ranks -----------------------------------------------------------

ROOM, ROWS = 192, 6


def gradients(model) -> torch.Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                      for p in model.parameters()])


def learn(model, steps, rank, load) -> list[float]:
    """Forward and backward of the rows of a rank; the loss of each."""
    losses = []
    for step in steps:
        loss, _ = loss_sum(model, load_batch(step, rank, TINY, load, ROOM))
        loss.backward()
        losses.append(loss.item())
    return losses


def alone(stream, state) -> tuple:
    """What one rank that draws and loads everything has after the next batch: its packer, the
    batch, the summed loss and the gradient."""
    packer = Packer(stream, ROOM, ROWS, COSTS, window=8, state=state)
    rows, model = packer.batch(), GLMV(TINY, seed=1)
    losses = learn(model, plan_steps(rows, ROOM, COSTS, 1), 0, PixelLoader(stream))
    return packer, rows, sum(losses), gradients(model)


def together(rank, world, how, stream, state, want):
    """The same on several ranks: an equal batch, equal loss and gradients."""
    packer, rows, loss, gradient = want
    samples, group = stream, None
    if how == "planned":
        samples = Skeletons(RankShard(stream, rank, world, 1), rank, world)
        group = samples.group
    ours = Packer(samples, ROOM, ROWS, COSTS, window=8, state=json.loads(json.dumps(state)))
    model, batch = GLMV(TINY, seed=1), ours.batch()
    assert all(map(same, sum(batch, []), sum(rows, []))) and ours.state() == packer.state()
    assert list(map(len, batch)) == list(map(len, rows))
    if how == "planned":    # what has another home is not here
        stubs = [x for row in batch for x in images_of(row)]
        assert all(x.source is None for x in stubs if x.home not in (None, rank))
        assert {x.home for x in stubs} >= {None, 0}
    steps, load = plan_steps(batch, ROOM, COSTS, world, how), PixelLoader(stream, 2, group)
    load.move_drawn(steps, rank)
    losses = learn(model, steps, rank, load)
    if how == "planned":    # some pictures were too much for their home, and their pixels moved
        assert any(x.home not in (None, other) for step in steps for other in range(world)
                   for x in step.encoded[other])
    summed = torch.cat([torch.tensor([sum(losses)]), gradients(model)])
    dist.all_reduce(summed)
    assert len(losses) == ROWS // world and abs(summed[0] - loss) < 1e-5 * loss
    assert (summed[1:] - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("world,how", [
    (2, "planned"), pytest.param(3, "planned", marks=pytest.mark.slow),
    pytest.param(2, "gathered", marks=pytest.mark.slow),
    pytest.param(3, "plain", marks=pytest.mark.slow)])
def test_ranks_compute_what_one_does(files, world, how):
    """Loss and gradients, over pictures of the gym and of files and a video, from the state that
    another number of ranks has left."""
    before = Packer(Mixed(files, lazy=False), ROOM, ROWS, COSTS, window=8)
    before.batch()
    state = before.state()
    assert state["waiting"] and state["passed"] == {"damaged picture": state["next"] // 4}
    want = alone(Mixed(files, lazy=False), state)
    on_joined_ranks(world, files, together, how, Mixed(files, lazy=True), state, want)


def idle(rank, world):
    """Rank 0 has the longest row, the only one with pictures. Rank 1 encodes them: rank 2 sends and
    receives nothing, but takes part, forward and backward. Or rank 0 does."""
    partition.assign_encoders = lambda costs, preferred, ranks: preferred   # however unequal
    pictures = random_document(TINY, ((4, 4), (2, 2)))
    texts = [random_document(TINY, (), length=5, seed=seed) for seed in (1, 2)]
    model = GLMV(TINY, seed=1)
    for home in (1, 0):
        stubs = [Stub(x.shape, 0, n, home, x) for n, x in enumerate(pictures.images)]
        row = [Document(pictures.ids, pictures.weights, stubs)]
        [step] = plan_steps([texts[:1], row, texts[1:]], 64, COSTS, world)
        assert step.rows[0] is row and step.encoded[home] == stubs
        batch = load_batch(step, rank, TINY, PixelLoader(None), 64)
        assert bool(batch.splits) == (home == 1) and len(batch.patches) == 20 * (rank == home)
        model.zero_grad()
        loss_sum(model, batch)[0].backward()
        assert (model.model.visual.blocks[0].norm1.weight.grad is None) == (rank != home)
        model.model.visual.requires_grad_(False)        # frozen: no gradient travels back
        loss_sum(model, batch)[0].backward()
        model.model.visual.requires_grad_(True)


def test_ranks_without_pictures_take_part(files):
    on_joined_ranks(3, files, idle)


def test_a_damaged_picture_is_grey_and_said_once(files, capsys):
    stream = Mixed(files, lazy=True)
    (files / "0.png").write_bytes((files / "0.png").read_bytes()[:200])
    load = PixelLoader(stream)
    made = load([x for i in range(3, 80, 4) for x in images_of(stream(i))])
    assert load.damaged > 5 and (made[0] == 128).all() and not (made[1] == 128).all()
    lines = capsys.readouterr().err.splitlines()
    assert "0.png" in lines[0] and lines[0].endswith("its pixels are grey; damaged pictures so far "
                                                     "on this rank: 1")
    assert len(lines) == 1 + (load.damaged >= 10)


# ---- the simulation -----------------------------------------------------------------------------

def test_the_bench_counts_what_each_way_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_partition, "STEPS", 2)
    monkeypatch.setattr(bench_partition, "RANKS", (2, 4))
    result = bench.run(bench.Args("partition", device="cpu", out=str(tmp_path)))
    written = json.loads((tmp_path / "partition-base-float32-cpu.json").read_text("utf-8"))
    assert written["ranks"]["4"] == result["ranks"][4]
    for ranks, ways in result["ranks"].items():
        assert ways["planned"]["padding"] < 0.01 < ways["data parallel"]["padding"]
        assert 1 <= ways["planned"]["max/mean"] <= ways["planned"]["worst"] < 1.02
        assert ways["planned"]["MB"] < ways["gathered"]["MB"] / 2
    assert "0.5 of the bytes: reached" in capsys.readouterr().out


def test_a_sample_of_the_bench_has_its_sizes():
    some = bench_partition.Samples(0, 14)
    made = [some(i)[0] for i in range(500)]
    visual = [d.images[0].shape[0] * d.images[0].shape[1] // 28 ** 2 for d in made]
    texts = [len(d.ids) - n for d, n in zip(made, visual)]
    assert [int(d.weights.sum()) for d in made] == texts
    assert 14 <= min(visual) and 900 < max(visual) <= 1024 and 100 < np.median(visual) < 170
    assert 16 <= min(texts) < 20 and 4000 < max(texts) <= 4096 and 200 < np.median(texts) < 330


def test_first_come_and_decreasing_rows_lose_no_sample():
    """Each fills a row of the bench as its name says."""
    for decreasing in (False, True):
        ways = bench_partition.InOrder(bench_partition.Samples(1, 14), 2, decreasing)
        seen = [d.images[0].sample for _ in range(3) for row in ways.batch() for d in row]
        waiting = [d.images[0].sample for d in ways.waiting]
        assert sorted(seen + waiting) == list(range(ways.next))
        assert decreasing or seen == sorted(seen)


# ---- a run --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_own_pictures_on_two_ranks_and_on_one(files):
    """The same losses, with worker processes; and one rank resumes what two have saved."""
    with open(files / "own.jsonl", "w", encoding="utf-8") as lines:
        for i in range(60):
            talk = [{"role": "user", "content": f"<image>Question {i}"},
                    {"role": "assistant", "content": f"Answer {i}"}]
            print(json.dumps({"messages": talk, "images": [f"{i % 3}.png"]}), file=lines)
    options = dict(data=f"{files}/own.jsonl:2", mix="point,text", rows=2, row_tokens=256, steps=4,
                   save_every=2, warmup=3, eval_every=0, mtp=0, device="cpu", dtype="float32")
    alone = train(files / "one", **options)
    words = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "pretrain.py", *words, "--workers=1", f"--out={files / 'two'}"], cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    two = log_of(files / "two")
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in alone], abs=1e-5)
    assert all(x["balance"] >= 1 and x["MB in"] > 0.001 for x in two) and "MB in" not in alone[0]
    shutil.rmtree(files / "two/step_000004")
    resumed = train(files / "two", **options, resume=True)
    assert [x["loss"] for x in resumed] == pytest.approx([x["loss"] for x in alone], abs=1e-5)
