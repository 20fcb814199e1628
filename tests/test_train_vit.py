"""The vision tower's training: streams, masks, losses, ring, cached gradients, resume, errors."""
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from test_pretrain import after_step, child_dies

import pretrain
import train_vit
from conftest import odd_config, on_ranks
from kernels import sigmoid_loss
from lab import report
from lib import common, probes
from lib.captions import (Captions, clip, collate_pairs, LabelledScenes, pack_texts, Pair,
                          patch_labels, Pictures, quality, random_mask, stack_masks, TwoTowers)
from lib.checkpoint import load_tower
from lib.cli import UserError
from lib.images import budgeted, open_image, pack
from lib.pairs import open_pairs, Skipped
from lib.loader import RankShard
from lib.probes import (evaluate_tower, extract_features, linear_probe, pca_picture, probe,
                        probe_language, probe_moves, probe_pairs, probe_random_weights,
                        probe_towers, ProbeSet, read_report, salient)
from lib.ring import ring_sigmoid_loss
from lib.runs import checkpoints
from lib.tensors import load_tensors
from model import GLMV, init, sized
from tasks.draw import SHAPES
from tasks.scenes import caption, Item, MOVES, moving, window
from train_vit import (Args, cached_gradients, check, contrastive_loss, distill_loss, Distiller,
                       measure_teachers, PatchClassifier, shape_loss)
from vit import AttentionPool, naflex

SMALL = dict(steps=4, batch=8, warmup=1, workers=0, eval_every=0, save_every=2, device="cpu",
             dtype="float32", probes=16)


def train(out, stage, **changes):
    train_vit.run(Args(**{**SMALL, "stage": stage, "out": str(out), **changes}))
    return [json.loads(line) for line in (Path(out) / stage / "log.jsonl").read_text().splitlines()
            ] if stage in ("distill", "align") else None


def settled(**changes) -> Args:
    return check(Args(**{**SMALL, **changes}))


def two_towers(config) -> TwoTowers:
    return TwoTowers(train_vit.tower(Args(), config), config)


# ---- pictures and captions ----------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.9, 1.0])
def test_a_mask_hides_exactly_its_share(kind, share):
    rng = np.random.default_rng(0)
    for h, w in ((8, 8), (6, 10), (16, 4)):
        mask = random_mask(rng, h, w, share, kind)
        assert mask.shape == (h * w,) and mask.dtype == bool
        hidden = round(share * h * w)
        assert mask.sum() == hidden, f"{mask.sum()} of {h * w} patches are hidden, not {hidden}"


def test_block_masks_hang_together():
    """A hidden patch has more hidden neighbours than where each is drawn by itself: 2.15 times as
    many, and 1.5 times if the order is wrong."""
    def neighbours(kind):
        rng, found = np.random.default_rng(1), []
        for _ in range(50):
            stored = random_mask(rng, 8, 8, 0.35, kind).reshape(4, 4, 2, 2)
            grid = stored.transpose(0, 2, 1, 3).reshape(8, 8)
            found.append((grid[:, 1:] & grid[:, :-1]).sum() + (grid[1:] & grid[:-1]).sum())
        return np.mean(found)
    block, random = neighbours("block"), neighbours("random")
    assert block > 1.8 * random, (f"pairs of hidden neighbours: {block:.1f} in blocks, "
                                  f"{random:.1f} at random. Are the patches in stored order?")


def test_samples_are_functions_of_seed_and_index():
    config = sized("tiny")
    stream, again = (Pictures(config, 64, 3) for _ in range(2))
    a, b = [stream(i) for i in (0, 5)], [again(i) for i in (5, 0)][::-1]
    for x, y in zip(a, b):
        assert np.array_equal(x.image, y.image) and np.array_equal(x.mask, y.mask)
    assert not np.array_equal(a[0].image, a[1].image)
    scenes = LabelledScenes(config, 64, 3)
    assert all(map(np.array_equal, scenes(9), LabelledScenes(config, 64, 3)(9)))
    assert not np.array_equal(scenes(9)[0], LabelledScenes(config, 64, 4)(9)[0])
    pairs = Captions(config, (36, 64, 100), 4, 3)
    assert np.array_equal(pairs(9).image, Captions(config, (36, 64, 100), 4, 3)(9).image)


def test_the_mixture_is_80_10_10_and_of_the_better_of_two():
    drawn = [Pictures(sized("tiny"), 64)(i) for i in range(150)]
    share = sum(p.source == "natural" for p in drawn) / 150
    assert 0.7 < share < 0.9 and {p.source for p in drawn} == {
        "natural", "instruction", "scientific"}
    rng = np.random.default_rng(0)
    busy = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    blurred = np.asarray(Image.fromarray(busy).resize((8, 8)).resize((64, 64)))
    assert quality(busy) > quality(blurred) > quality(np.full((64, 64, 3), 9, np.uint8)) == 0
    small, large = (Pictures(sized("tiny"), side) for side in (64, 256))
    drawn = [np.asarray(stream._render(np.random.default_rng(3), "natural"))
             for stream in (small, large)]
    sharp = [np.abs(np.diff(image, axis=0)).max(-1) > 60 for image in drawn]    # edges: one pixel
    assert sharp[1].shape == (255, 256) and sharp[1].mean() < 0.5 * sharp[0].mean()


def test_a_batch_has_one_budget_and_uses_it():
    stream = Captions(sized("tiny"), (36, 64, 100), 16)
    sizes = [[stream(i).image.shape for i in range(k, k + 16)] for k in range(0, 160, 16)]
    most = [max(h * w // 64 for h, w, _ in batch) for batch in sizes]
    assert set(most) == {36, 64, 100}
    assert len({shape for batch in sizes for shape in batch}) > 4


def test_naflex_keeps_to_the_budget_and_the_aspect():
    for h, w in ((64, 64), (30, 90), (500, 333), (17, 1000)):
        high, wide = naflex(h, w, 16, 25)
        assert high % 16 == wide % 16 == 0 and 25 / 2 < high * wide / 256 <= 25
        if max(h, w) < 4 * min(h, w):
            assert abs(math.log((high / wide) / (h / w))) < 0.45


def test_captions_say_the_same_in_both_languages():
    items = [Item("red", "star", (0, 0, 200, 200)), Item("blue", "circle", (760, 510, 960, 700))]
    assert caption(items) == "red star top left, blue circle bottom right"
    assert caption(items, language="zh") == "左上红色五角星，右下蓝色圆形"
    assert caption(items, parts=("shape", "place")) == "star top left, circle bottom right"
    assert caption(items, language="zh", parts=("color", "shape")) == "红色五角星，蓝色圆形"
    rng = np.random.default_rng(0)
    for _ in range(50):
        (x0, x1), (y0, y1) = window(rng, items)
        assert x0 == y0 == 0 and x1 == 4 and y1 >= 3


# ---- own pairs: see tests/test_pairs.py for their forms ----------------------------------------

def fill(folder, names="abcdefghijkl"):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (20 + i, 30), (4 * i, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"thing {name}\nde.utf8=Ding\nzh_cn.utf8=东西\n")


def test_corrupt_pictures_are_counted_and_too_many_are_one_line(tmp_path, capsys):
    fill(tmp_path / "pairs")
    (tmp_path / "pairs" / "a.png").write_bytes(b"")
    log = train(tmp_path, "align", pairs=str(tmp_path / "pairs"), steps=6)
    count = sum(line["skipped"] for line in log)
    said = capsys.readouterr().out
    assert count > 0 and f"skipped {count:.0f} in all: {count:.0f} times damaged picture" in said
    assert said.count("a.png can't be read as a picture: it is empty") == 1
    held_out = open_pairs(str(tmp_path / "pairs")).numbers("test")
    assert log[-1]["pairs"] == len(held_out) > 1 and 0 <= log[-1]["pairs_t2i"] <= 1
    for i, path in enumerate((tmp_path / "pairs").glob("*.png")):
        if i % 2:
            path.write_bytes(b"")
        else:           # found before, gone now
            path.with_suffix(".txt").unlink()
    with pytest.raises(UserError, match="20 pairs in a row can't be used"):
        train(tmp_path / "second", "align", pairs=str(tmp_path / "pairs"))


# ---- the loss, in tiles and over the ring -------------------------------------------------------

def unit(n, width=8, seed=0):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1).requires_grad_()


def plain_loss(x, y, scale, bias):
    signs = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(signs * (x @ y.T * scale + bias)).sum()


@pytest.mark.parametrize("tile", [5, 16, 64])
def test_the_loss_in_tiles_is_the_plain_one(tile):
    x, y = unit(37), unit(37, seed=1)
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (7.0, -3.0))
    losses = [loss(x, y, scale, bias) for loss in (
        plain_loss, lambda *given: sigmoid_loss(*given, tile=tile))]
    grads = [torch.autograd.grad(loss, (x, y, scale, bias)) for loss in losses]
    assert torch.allclose(*losses, rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))


def test_the_loss_takes_sixteen_bytes_a_number_and_no_copy_more(monkeypatch):
    """The gradients that the forward makes are those that arrive."""
    made, zeros_like = [], torch.zeros_like

    def noted_zeros(x):
        zeros = zeros_like(x)
        made.append(zeros.data_ptr())
        return zeros
    monkeypatch.setattr(torch, "zeros_like", noted_zeros)
    x, y = (side.detach().requires_grad_() for side in (unit(9), unit(9, seed=1)))
    (sigmoid_loss(x, y, torch.tensor(7.0), torch.tensor(-3.0)) / 9).backward()
    assert [x.grad.data_ptr(), y.grad.data_ptr()] == made


def part_of_ring(rank, world, folder):
    """One rank: its share of the loss and of all gradients, left in a file."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    x, y = unit(12), unit(12, seed=1)
    own = slice(rank * 12 // world, (rank + 1) * 12 // world)
    mine = [t.detach()[own].requires_grad_() for t in (x, y)]
    mine += [torch.tensor(v, requires_grad=True) for v in (7.0, -3.0)]
    loss = ring_sigmoid_loss(*mine)
    grads = torch.autograd.grad(loss, mine)
    torch.save([loss.detach(), *grads], f"{folder}/{rank}.pt")
    dist.barrier()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_ring_equals_one_process(tmp_path, world):
    on_ranks(world, part_of_ring, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    x, y = unit(12), unit(12, seed=1)
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (7.0, -3.0))
    whole = plain_loss(x, y, scale, bias)
    d_x, d_y, d_scale, d_bias = torch.autograd.grad(whole, (x, y, scale, bias))
    sums = [sum(part[k] for part in parts) for k in (0, 3, 4)]
    for one, many in ((whole, sums[0]), (d_scale, sums[1]), (d_bias, sums[2])):
        assert abs(one - many) / abs(one) < 1e-5
    for k, one in ((1, d_x), (2, d_y)):
        assert (torch.cat([part[k] for part in parts]) - one).abs().max() < 1e-5


# ---- global batches of any size -----------------------------------------------------------------

def gradients(model, loss, stream, args, n) -> dict:
    """The loss and all gradients of the first n samples, in micro-batches, as in `train`."""
    found = {"loss": 0.0}

    def collect():
        for name, p in model.named_parameters():
            if p.grad is not None:
                found[name] = found.get(name, 0) + p.grad
                p.grad = None
    if loss is contrastive_loss and args.micro < n:
        found["loss"] = cached_gradients(model, stream, range(n), args, Skipped())["loss"]
        collect()
        return found
    for i in range(0, n, args.micro):
        part, _ = loss(model, [stream(k) for k in range(i, i + args.micro)], args)
        part.backward()
        found["loss"] += part.detach()
        collect()
    return found


def compare_with_one_batch(n, micro):
    """The gradients of n pairs in micro-batches of `micro`, and those of one large batch."""
    config = odd_config()
    model = two_towers(config)
    init(model, 0)
    model.logit_bias.data.fill_(-3.0)
    stream = Captions(config, (16, 24), n)
    one, many = (gradients(model, contrastive_loss, stream, Args(batch=n, micro=m), n)
                 for m in (n, micro))
    missing = sorted(one.keys() - many.keys())
    assert not missing, f"no gradient arrives at {missing[:3]}"
    assert one.keys() == many.keys() and len(one) > 40
    for name, value in one.items():
        most = 1e-5 * max(1.0, float(value.abs().max()))
        assert (value - many[name]).abs().max() <= most, f"{name} is not that of one batch"


def test_cached_gradients_are_those_of_one_batch():
    compare_with_one_batch(24, 8)


@pytest.mark.slow
def test_gradients_of_64_micro_batches_are_those_of_one_batch():
    compare_with_one_batch(4096, 64)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's memory count")
def test_memory_does_not_grow_with_the_number_of_micro_batches(tmp_path):
    """As a user gets it, `--dtype=auto`; kernels of a thousand shapes once made it 1.5 GiB."""
    args = check(Args(batch=1280, micro=32, budgets="16", device="cpu", out=str(tmp_path)))
    model, stream, *_ = train_vit.prepare("align", args, sized("tiny"), common.setup("cpu"), print)
    pages, embed = [], model.embed

    def watched(batch):
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        return embed(batch)
    model.embed = watched
    cached_gradients(model, stream, range(args.batch), args, Skipped())
    assert len(pages) == 80 and (pages[39] - pages[7]) * os.sysconf("SC_PAGESIZE") < 50e6


class Ramp:
    """A teacher whose features of a patch only depend on its place: (P, 5)."""
    width = 5

    def __call__(self, images, grids):
        each = torch.linspace(-1, 1, int(grids[0].prod()))[:, None]
        return (each ** torch.arange(1, 6)).repeat(len(images), 1)


def test_micro_batches_add_up_to_the_batch():
    config, args = sized("tiny"), settled()
    for make, loss, stream in (
            (lambda: PatchClassifier(train_vit.tower(args, config)), shape_loss,
             LabelledScenes(config, 64)),
            (lambda: Distiller(args, config, {"ramp": Ramp()}), distill_loss,
             Pictures(config, 64))):
        found = []
        for micro in (8, 2):
            model = make()
            init(model, 0)
            if isinstance(model, Distiller):
                measure_teachers(model, stream)
            found.append(gradients(model, loss, stream, replace(args, micro=micro), 8))
        one, many = found
        assert one.keys() == many.keys() and len(one) > 20
        for name, value in one.items():
            assert (value - many[name]).abs().max() < 1e-5, name


def test_targets_are_standardised():
    """Each channel of a teacher, whatever its size, as the student sees it."""
    model = Distiller(settled(), sized("tiny"), {"ramp": Ramp()})
    measure_teachers(model, Pictures(sized("tiny"), 64))
    targets = model.targets([np.zeros((64, 64, 3), np.uint8)])["ramp"]
    assert targets.mean(0).abs().max() < 1e-3 and (targets.std(0) - 1).abs().max() < 0.02


def test_a_video_of_two_frames_passes():
    """Stills of its batch repeat their frame, and get the vector that they get alone."""
    config = sized("tiny")
    model = two_towers(config)
    init(model, 0)
    still = Captions(config, (36,), 4)(0)
    other = Captions(config, (36,), 4)(1)
    video = Pair(np.stack([other.image, 255 - other.image]), other.ids)
    with torch.no_grad():
        alone = model.embed(collate_pairs([still], config.vision))[0]
        batch = collate_pairs([still, video], config.vision)
        both = model.embed(batch)[0]
        frozen = model.embed(collate_pairs([other], config.vision))[0]
    assert batch.patches.shape[1] == 2
    assert torch.allclose(alone[0], both[0], atol=1e-5)
    assert not torch.allclose(both[1], frozen[0], atol=1e-3)


def test_attention_pooling_sees_its_own_segment_only():
    pool, x = AttentionPool(8, 2), torch.randn(10, 8)
    both = pool(x, torch.tensor([3, 7]))
    assert torch.allclose(both[0], pool(x[:3], torch.tensor([3]))[0], atol=1e-6)
    assert torch.allclose(both[1], pool(x[3:].flip(0), torch.tensor([7]))[0], atol=1e-6)


# ---- hidden patches and teachers ----------------------------------------------------------------

def test_the_student_cannot_see_what_is_hidden():
    config = sized("tiny")
    model = Distiller(settled(), config, {})
    init(model, 0)
    picture = Pictures(config, 64)(0)
    mask = stack_masks([picture])
    patches, grids = pack([picture.image], config.vision)
    changed = patches.clone()
    changed[mask] = 255 - changed[mask]
    a, b = (model.visual(p, grids, mask, model.token) for p in (patches, changed))
    assert torch.equal(a, b) and not torch.allclose(model.visual(patches, grids), a)


def test_the_texture_teacher_learns_the_shape_under_each_patch(tmp_path):
    train(tmp_path, "teachers", teachers="texture", steps=60, batch=4, warmup=20, log_every=60)
    log = [json.loads(line) for line in (tmp_path / "texture/log.jsonl").read_text().splitlines()]
    assert len(log) == 60 and {"loss", "lr", "norm", "dt"} <= log[0].keys()
    assert log[0]["loss"] > 1 and log[-1]["loss"] < 0.6     # of ground alone it would be higher


@pytest.mark.slow
# ---- runs ---------------------------------------------------------------------------------------

def test_all_stages_resume_bit_for_bit_and_the_tower_goes_on(tmp_path, monkeypatch):
    """Stopped by SIGTERM after step 2 of each stage and resumed, or killed at step 3, beside an
    uninterrupted run."""
    train(tmp_path / "whole", "all", eval_every=2)
    passed = tmp_path / "passed"

    def dies_the_first_time(step):
        if step == 3:
            passed.write_text(passed.read_text() + "3" if passed.exists() else "3")
            if len(passed.read_text()) % 2:
                os._exit(9)
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: step == 2 and signal.raise_signal(signal.SIGTERM))
        for stage in range(4):
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "parts", "all", resume=True)
        train(tmp_path / "parts", "all", resume=True)
    with monkeypatch.context() as patch:
        after_step(patch, dies_the_first_time)
        for stage in range(4):
            assert child_dies(lambda: train(tmp_path / "killed", "all", resume=True, save_every=2))
        train(tmp_path / "killed", "all", resume=True, save_every=2)
    for stage in ("semantic", "texture", "distill", "align"):
        whole, *others = (tmp_path / run / stage / "step_000004/model.safetensors"
                          for run in ("whole", "parts", "killed"))
        assert all(whole.read_bytes() == other.read_bytes() for other in others)
    facts = json.loads((tmp_path / "whole/report.json").read_text())
    assert list(facts["figures"]) == ["random weights", "semantic", "texture", "distill", "align"]
    assert 0 <= facts["figures"]["align"]["i2t_zh"] <= 1
    page = report.page(tmp_path / "whole")
    assert page.count("data:image/png;base64,") == 8 and "by chance 1 in 48" in page
    for title in ("naming and retrieval", "cosine to"):
        assert title in page

    pretrain.run(pretrain.Args(vit=str(tmp_path / "whole/align"), steps=1, rows=1, row_tokens=256,
                               lr=0.0, workers=0, device="cpu", dtype="float32", eval_every=0,
                               out=str(tmp_path / "pretrain")))
    name = "visual.blocks.1.attn.qkv.weight"
    ours, theirs = (load_tensors(checkpoints(tmp_path / run)[-1])
                    for run in ("pretrain", "whole/align"))
    assert torch.equal(ours["model." + name], theirs[name])
    with pytest.raises(UserError, match="not of this model's sizes"):
        pretrain.run(pretrain.Args(vit=str(tmp_path / "whole/align"), size="small", steps=1,
                                   workers=0, device="cpu", out=str(tmp_path / "other")))
    shutil.copytree(tmp_path / "whole/texture", tmp_path / "again/texture")
    with pytest.raises(UserError, match="no semantic teacher in"):
        train(tmp_path / "again", "distill")
    switches = dict(teachers="texture", supervise="all", mask="random", cosine=0.5, qk_norm=False)
    with pytest.raises(UserError, match="not of this model's sizes"):
        train(tmp_path / "again", "distill", **switches)  # the teacher has what this tower lacks
    log = train(tmp_path / "again", "distill", **{**switches, "qk_norm": True})
    assert "cos_semantic" not in log[-1] and -1 <= log[-1]["cos_texture"] <= 1


SMALL_TEACHER = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
FOLDERS = {  # (semantic, texture): class of transformers and its fields; the student's patch is 8
    "fixed and DINOv2": (("Siglip", dict(
        vision_config=dict(SMALL_TEACHER, intermediate_size=56, patch_size=16, image_size=64),
        text_config=dict(SMALL_TEACHER, intermediate_size=56, vocab_size=9))),
        ("Dinov2", dict(SMALL_TEACHER, patch_size=14, image_size=70))),
    "NaFlex and DINOv3": (("Siglip2Vision", dict(
        SMALL_TEACHER, intermediate_size=56, patch_size=16, num_patches=16)),
        ("DINOv3ViT", dict(SMALL_TEACHER, intermediate_size=56, patch_size=16,
                           num_register_tokens=4)))}


@pytest.mark.slow
@pytest.mark.parametrize("pair, dtype", list(zip(FOLDERS, ("float32", "bfloat16"))))
def test_teachers_of_hugging_face_are_distilled_from(pair, dtype, tmp_path):
    """Folders as transformers writes them, in steps that go on bit for bit."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    for folder, (name, fields) in zip(("semantic", "texture"), FOLDERS[pair]):
        torch.manual_seed(0)
        config = getattr(transformers, name + "Config")(**fields)
        getattr(transformers, name + "Model")(config).save_pretrained(tmp_path / folder)
    options = dict(semantic_teacher=str(tmp_path / "semantic"), micro=4, save_every=1, dtype=dtype,
                   texture_teacher=str(tmp_path / "texture"), steps=2)
    log = train(tmp_path / "run", "distill", **options)
    assert len(log) == 2 and all(math.isfinite(line["loss"]) for line in log)
    assert all(-1 <= line[f"cos_{name}"] <= 1 for line in log for name in ("semantic", "texture"))
    saved = load_tensors(tmp_path / "run/distill/step_000002")
    for name in ("semantic", "texture"):  # of the teachers nothing but the size of a head
        assert saved[f"heads.{name}.weight"].shape == (48, 96)
        assert saved[f"std_{name}"].min() > 1e-4  # their channels tell one patch from another
    assert not [name for name in saved if name.startswith("teachers")]
    shutil.rmtree(tmp_path / "run/distill/step_000002")
    train(tmp_path / "run", "distill", **options, resume=True)
    again = load_tensors(tmp_path / "run/distill/step_000002")
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    with pytest.raises(UserError, match="nothing to train"):
        train(tmp_path / "run", "teachers", **options)
    with pytest.raises(UserError, match="texture_teacher=.* holds a teacher of the other kind"):
        settled(stage="distill", texture_teacher=options["semantic_teacher"])


def test_align_goes_on_from_distill_and_teachers_start_from_weights_of_their_own(tmp_path):
    """After a step of rate 0 a stage has the tower that it began from."""
    train(tmp_path, "all", steps=1, lr=0.0)
    towers = {stage: {name: value for name, value in load_tensors(
        tmp_path / stage / "step_000001").items() if name.startswith("visual.")}
        for stage in ("semantic", "texture", "distill", "align")}
    assert all(torch.equal(towers["align"][k], v) for k, v in towers["distill"].items())
    name = "visual.blocks.0.attn.qkv.weight"
    assert not torch.equal(towers["texture"][name], towers["semantic"][name])
    assert not torch.equal(towers["texture"][name], towers["distill"][name])


def test_either_teacher_can_be_trained_alone(tmp_path):
    train(tmp_path, "teachers", teachers="texture", steps=1)
    assert checkpoints(tmp_path / "texture") and not checkpoints(tmp_path / "semantic")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The folder of a run of the last stage, with checkpoints of steps 2 and 4; it is made once,
    and tests change a copy."""
    folder = tmp_path_factory.mktemp("aligned")
    train(folder, "align")
    return folder


def test_a_wrong_start_leaves_an_earlier_run_where_it_is(tmp_path, aligned):
    shutil.copytree(aligned / "align", tmp_path / "align")
    (tmp_path / "other").mkdir()
    for init in (tmp_path / "other", tmp_path / "none"):
        with pytest.raises(UserError):
            train(tmp_path, "align", init=str(init))
    assert checkpoints(tmp_path / "align")
    train(tmp_path, "align", steps=1, init=str(tmp_path / "align"))    # which lies in its own way
    assert checkpoints(tmp_path / "align") and checkpoints(tmp_path / "align.1")


def test_a_rank_draws_its_own_samples_and_no_others():
    dealt = [RankShard(lambda i: i, rank, 3, 2) for rank in range(3)]
    assert [[d(i) for i in range(4)] for d in dealt] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_the_default_batch_can_be_dealt_out(monkeypatch):
    for world, batch in ((1, 64), (3, 66), (8, 64)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert train_vit.check(Args()).batch == batch


def test_what_would_change_the_samples_is_refused_on_resume(tmp_path, aligned):
    shutil.copytree(aligned / "align", tmp_path / "align")
    for changes in (dict(batch=16), dict(seed=1)):
        (name, _), = changes.items()
        with pytest.raises(UserError, match=f"was begun with --{name}="):
            train(tmp_path, "align", resume=True, steps=6, **changes)
        train(tmp_path, "align", resume=True, **changes)        # it is done
    (tmp_path / "align/step_000004/train.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="remove it to go on from .*step_000002"):
        train(tmp_path, "align", resume=True, steps=6)
    shutil.rmtree(tmp_path / "align/step_000004")
    assert len(train(tmp_path, "align", resume=True, lr=1e-4, micro=2)) == 4


def test_the_probes_of_both_towers_take_the_memory_of_a_small_batch(monkeypatch):
    config, sizes = sized("tiny"), []
    model = two_towers(config)
    init(model, 0)
    embed = model.embed_images
    monkeypatch.setattr(model, "embed_images", lambda patches, grids: (
        sizes.append(len(grids)), embed(patches, grids))[1])
    probe_towers(model, ProbeSet(config, 64, 300), False)
    assert sum(sizes) == 300 and max(sizes) <= 64


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """All stages; the same losses and weights on gloo."""
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    train(tmp_path / "one", "all", steps=3)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train_vit.py", *options, "--steps=3", "--micro=2", f"--out={tmp_path / 'two'}"],
        cwd=common.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for stage in ("semantic", "texture", "distill", "align"):
        logs = [(tmp_path / run / stage / "log.jsonl").read_text() for run in ("one", "two")]
        losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
        assert np.allclose(*losses, atol=1e-4), stage
        one, two = (load_tensors(tmp_path / run / stage / "step_000003") for run in ("one", "two"))
        assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3, stage


@pytest.mark.parametrize("changes,words", [
    (dict(pairs=".", clips=0.5), "--clips is a share of drawings"), (dict(clips=2.0), "--clips"),
    (dict(batch=10, micro=4), "1 ranks x --micro=4: take 8 or 12"),
    (dict(side=40), "--side takes a multiple of 16"), (dict(side=32), "at least 64"),
    (dict(size="huge"), "--size takes tiny, mini, small"),
    (dict(stage="third"), "--stage takes all"),
    (dict(mask="none"), "--mask takes block"), (dict(masked=0.0), "hides no patch"),
    (dict(masked=1.5), "--masked takes 0 to 1"), (dict(budgets="64,many"), "--budgets takes"),
    (dict(budgets="2"), "--budgets takes"), (dict(pairs="nowhere"), "nowhere is not there"),
    (dict(semantic_teacher="nowhere"), "no teacher in nowhere"), (dict(steps=0), "--steps"),
    (dict(supervise="none"), "--supervise"), (dict(seed=-1), "--seed"),
    (dict(save_every=0), "--save_every takes 1 or more"), (dict(micro=-1), "--micro"),
    (dict(lr=-1.0), "--lr takes 0 or more"), (dict(probes=4), "--probes takes 16 to"),
    (dict(stage="align", init="nowhere"), "no such folder"), (dict(init="nowhere"), "no such"),
    (dict(stage="teachers", init="."), "no teacher does"),
    (dict(stage="distill"), "no semantic teacher"), (dict(out=""), "--out is empty"),
    (dict(batch=10 ** 18), "--batch takes 0 to"), (dict(side=10 ** 18), "--side takes 0 to 1024"),
    (dict(budgets="64,99999"), "--budgets takes"), (dict(budgets=","), "--budgets takes"),
    (dict(workers=10 ** 9), "--workers"), (dict(probes=10 ** 18), "--probes"),
    (dict(warmup=-1), "--warmup"), (dict(lr=math.nan), "--lr"), (dict(lr=math.inf), "--lr")])
def test_bad_options_are_one_line(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        train_vit.run(Args(**{**SMALL, "out": "run", **changes}))
    assert "\n" not in str(error.value) and not checkpoints(tmp_path / "run/semantic")


def test_a_plan_prints_every_stage_and_stops(tmp_path, capsys):
    train_vit.run(Args(plan=True, device="cpu", micro=32, out=str(tmp_path / "run")))
    first, *plans = capsys.readouterr().out.split("stage       ")
    assert [plan.split(",")[0] for plan in plans] == ["semantic", "texture", "distill", "align"]
    for plan in plans:
        words = {line.split()[0] for line in plan.splitlines()[1:] if line}
        assert {"tower", "memory", "compute"} <= words
        assert ("text" in words) == plan.startswith(("semantic", "align"))
    assert not (tmp_path / "run").exists()


def test_a_plan_is_printed_by_one_rank(monkeypatch, capsys):
    other = replace(common.setup("cpu"), rank=1)
    monkeypatch.setattr(train_vit, "setup", lambda *_: other)
    train_vit.run(Args(plan=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("micro", [8, 4])
def test_samples_that_cant_be_loaded_end_a_run_that_saves(tmp_path, monkeypatch, micro):
    """A drawing fails in the middle of the fourth step."""
    draw = Captions.__call__
    monkeypatch.setattr(Captions, "__call__", lambda self, i: draw(self, i if i < 30 else None))
    with pytest.raises(UserError, match="^sample 30 can't be made: TypeError: "):
        train(tmp_path, "align", micro=micro)
    assert [p.name for p in checkpoints(tmp_path / "align")] == ["step_000002", "step_000003"]


def test_what_is_done_is_saved_when_a_sum_over_ranks_breaks_off(tmp_path, monkeypatch):
    """Of one process. With several, each holds a share of the state, and all have to save."""
    sums = []

    def closed(value):
        sums.append(value)
        if len(sums) == 4:
            raise RuntimeError("Connection closed by peer")
        return value
    monkeypatch.setattr(train_vit, "sum_over_ranks", closed)
    with pytest.raises(RuntimeError, match="closed by peer"):
        train(tmp_path, "align")
    assert [p.name for p in checkpoints(tmp_path / "align")] == ["step_000002", "step_000003"]


def test_a_size_that_the_checkpoint_does_not_have_is_refused(tmp_path, aligned):
    """With --resume, where the newest checkpoint is not damaged, and with --init."""
    shutil.copytree(aligned / "align", tmp_path / "align")
    for changes, words in ((dict(resume=True), "was begun with --size=tiny$"),
                           (dict(init=str(tmp_path / "align")), "not of this model's sizes")):
        with pytest.raises(UserError, match=words):
            train(tmp_path, "align", size="small", steps=9, **changes)


# ---- probes -------------------------------------------------------------------------------------

def test_probes_find_what_is_there_and_nothing_more():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 2] > 0).long()
    right = (linear_probe(x[:200], labels[:200], x[200:]) == labels[200:]).float().mean()
    blind = torch.cat([x[:, :2], x[:, 3:]], dim=1)  # all but the column that tells
    lost = (linear_probe(blind[:200], labels[:200], blind[200:]) == labels[200:]).float().mean()
    assert right > 0.9 and 0.3 < lost < 0.7


def test_the_salient_patches_are_those_of_the_shape():
    features = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(0)) / 10
    features[torch.arange(3)[:, None], torch.tensor([[3, 9, 10, 60]] * 3)] += 2.0
    assert torch.allclose(salient(features), features[:, [3, 9, 10, 60]].mean(1))


def vector(line: str, known=None) -> torch.Tensor:
    """A random vector for each line, always the same; `known`: {picture's bytes: line} instead of
    a line."""
    line = line if isinstance(line, str) else known[line.tobytes()]
    return F.normalize(torch.from_numpy(np.random.default_rng(
        list(line.encode())).standard_normal(64)), dim=0)


@pytest.mark.parametrize("language,other", [("en", "zh"), ("zh", "en")])
def test_a_tower_that_knows_the_captions_passes_the_language_probes_and_no_other_does(
        language, other):
    probes, parts = ProbeSet(sized("tiny"), 64, 64), ("color", "shape")
    known = {image.tobytes(): caption(items, language=language)
             for image, items in probes.scenes["test"]}
    known |= {image.tobytes(): caption(items, language=language, parts=parts)
              for image, items in probes.single["test"]}
    figures = probe_language(lambda images: torch.stack([vector(x, known) for x in images]),
                             lambda lines: torch.stack([vector(x) for x in lines]), probes)
    for name in ("zero_shot", "i2t", "t2i"):
        assert figures[f"{name}_{language}"] == 1
        assert figures[f"{name}_{other}"] < 0.2
    lines = [caption(items) for _, items in probes.scenes["test"]]
    same = sum(a == b for a in lines for b in lines) / len(lines) ** 2
    assert figures["chance_en"] == pytest.approx(same) and same >= 1 / len(lines)
    frames = {np.stack(list(map(np.asarray, pair))).tobytes(): moving(item, move, language)
              for pair, item, move in (clip(5_000_000 + i, "test", 64) for i in range(32))}
    moves = probe_moves(lambda clips: torch.stack([vector(x, frames) for x in clips]),
                        lambda lines: torch.stack([vector(x) for x in lines]), 64, 32)
    assert moves[f"moves_{language}"] == 1 and moves[f"moves_{other}"] < 0.6


def test_held_out_pairs_are_retrieved(tmp_path):
    fill(tmp_path, [f"n{i}" for i in range(60)])
    pairs, vision = open_pairs(str(tmp_path)), sized("tiny").vision
    paths = [tmp_path / pairs.shards[n].names[0] for n in pairs.numbers("test")]
    known = {budgeted(open_image(p), vision, 64).tobytes(): f"thing {p.stem}" for p in paths[1:]}
    paths[0].write_bytes(b"not a picture")
    Image.new("RGB", (700, 3)).save(paths[1])       # a strip
    ask = (lambda images: torch.stack([vector(x, known) for x in images]),
           lambda lines: torch.stack([vector(x) for x in lines]), ProbeSet(sized("tiny"), 64, 8),
           pairs)
    n = len(paths) - 2
    assert n > 2 and probe_pairs(*ask) == {
        "pairs_i2t": 1, "pairs_t2i": 1, "pairs_chance": pytest.approx(1 / n), "pairs": n}
    assert probe_pairs(*ask, count=3)["pairs"] == 2     # every fourth; the first is no picture
    assert probe_pairs(*ask, count=1) == {}
    fill(tmp_path / "few", "a")
    assert probe_pairs(*ask[:3], open_pairs(str(tmp_path / "few"))) == {}


def test_patches_are_labelled_with_the_shape_that_covers_them():
    for image, items in ProbeSet(sized("tiny"), 64, 64).scenes["test"]:
        labels = patch_labels(image, items, 8).view(4, 4, 2, 2).transpose(1, 2).reshape(8, 8)
        for y, x in labels.nonzero().tolist():
            assert any(labels[y, x] == 1 + SHAPES.index(item.shape)
                       and item.area[0] - 63 <= x * 125 + 62 <= item.area[2] + 63
                       and item.area[1] - 63 <= y * 125 + 62 <= item.area[3] + 63 for item in items)
        for item in items:      # what fills its place has a patch at least
            assert item.shape != "square" or (labels == 1 + SHAPES.index("square")).any()


def test_figures_of_stages_that_are_gone_are_left_out_and_a_full_disk_is_survived(
        tmp_path, monkeypatch, capsys):
    probe_set, model = ProbeSet(sized("tiny"), 64, 16), PatchClassifier(
        train_vit.tower(Args(), sized("tiny")))
    init(model, 0)

    def facts():
        return json.loads((tmp_path / "report.json").read_text())

    for stage in ("semantic", "distill"):
        (tmp_path / stage / "step_000005").mkdir(parents=True)
        evaluate_tower(model, probe_set, tmp_path / stage, 5)
    assert list(facts()["figures"]) == ["random weights", "semantic", "distill"]
    assert len(facts()["pictures"]) == 2
    (tmp_path / "distill").rename(tmp_path / "distill.1")
    figures = evaluate_tower(model, probe_set, tmp_path / "semantic", 9)
    assert figures.keys() == {"linear", "knn", "dense"}
    assert facts()["figures"] == {
        "random weights": probe_random_weights(model.visual, probe_set),
        "semantic": {"step": 9, **figures}}
    assert [name for name, _ in facts()["pictures"]] == [
        f"semantic/features-00000{step}.png" for step in (5, 9)]
    assert report.page(tmp_path).count("data:image/png") == 2
    before = facts()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probes, "pca_picture", full)
    assert evaluate_tower(model, probe_set, tmp_path / "semantic", 10) == figures
    assert facts() == before and "not kept ([Errno 28] No space" in capsys.readouterr().out


def test_what_an_earlier_run_left_of_later_stages_is_moved_away_too(tmp_path):
    for stage in ("semantic", "align"):
        (tmp_path / stage / "step_000004").mkdir(parents=True)
    common.write_json(tmp_path / "report.json", {"figures": {"align": {"step": 4}}})
    train(tmp_path, "teachers", teachers="semantic", steps=1)
    assert (tmp_path / "align.1/step_000004").exists() and not (tmp_path / "align").exists()
    assert checkpoints(tmp_path / "semantic") == [tmp_path / "semantic/step_000001"]
    assert list(read_report(tmp_path)["figures"]) == ["random weights", "semantic"]
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="report.json is damaged"):
        train(tmp_path, "teachers", teachers="semantic", steps=1, resume=True)
    (tmp_path / "report.json").unlink()         # as a full disk leaves it
    (tmp_path / "none").mkdir()
    common.write_json(tmp_path / "none/report.json", {"figures": {"random weights": {"knn": 1}}})
    assert read_report(tmp_path / "none")["figures"] == {}    # of a run that has gone
    train(tmp_path, "teachers", teachers="semantic", steps=1, resume=True)
    assert read_report(tmp_path)["figures"]["semantic"]["step"] == 1
    with pytest.raises(UserError, match="is part of what it replaces"):
        settled(stage="all", out=str(tmp_path), init=str(tmp_path / "semantic"))
    shutil.copytree(tmp_path / "semantic", tmp_path / "align.2")
    settled(stage="all", out=str(tmp_path), init=str(tmp_path / "align.2"))
    settled(stage="align", out=str(tmp_path), init=str(tmp_path / "semantic"))


def test_probes_and_pictures_of_a_tower(tmp_path):
    config = sized("tiny")
    model = GLMV(config, 0)
    probes = ProbeSet(config, 64, 24)
    figures = probe(model.model.visual, probes)
    assert figures.keys() == {"linear", "knn", "dense"} and all(
        0 <= value <= 1 for value in figures.values())
    images = [image for image, _ in probes.scenes["test"][:3]]
    assert extract_features(model.model.visual, images).shape == (3, 64, 96)
    pca_picture(model.model.visual, images, tmp_path / "pictures/a.png")
    assert Image.open(tmp_path / "pictures/a.png").size == (294, 194)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory) -> Path:
    """The folder of Tux Paint's stamps: this machine's, or Debian's package, unpacked for now."""
    installed, package = Path("/usr/share/tuxpaint/stamps"), "tuxpaint-stamps-default"
    if installed.is_dir():
        return installed
    folder = tmp_path_factory.mktemp("debian")
    try:
        for command in (f"apt-get download {package}", "dpkg-deb -x *.deb ."):
            subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True,
                           timeout=120)
    except subprocess.SubprocessError as error:
        pytest.skip(f"{package} is not installed and can't be had: {error}")
    return folder / str(installed)[1:]


@pytest.mark.slow
def test_stamps_are_told_apart_by_the_folders_they_lie_in(tmp_path, stamps):
    """Pictures and captions of Tux Paint, held out by file name: three times chance, and twice
    chance as the mean over folders; means of three seeds, which differ much."""
    shares, means = [], []
    for seed in range(3):
        out = tmp_path / f"run{seed}"
        train(out, "align", pairs=str(stamps), steps=150, batch=32, warmup=10, budgets="64",
              save_every=150, seed=seed)
        model = two_towers(sized("tiny"))
        model.load_state_dict(load_tensors(checkpoints(out / "align")[-1]))
        right, truth = stamps_named(model, stamps)
        sizes = truth.bincount()
        each = [right[truth == kind].float().mean().item() for kind in range(len(sizes))]
        shares.append(right.float().mean().item())
        means.append(np.mean(each))
        print(f"seed {seed}: {shares[-1]:.1%} named rightly, a mean of {means[-1]:.1%} over "
              f"{len(sizes)} folders, the largest has {sizes.max() / len(truth):.1%}")
    assert np.mean(shares) > 3 / len(sizes) and np.mean(means) > 2 / len(sizes)


def stamps_named(model, stamps: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each held-out stamp's folder is named rightly, and which it is."""
    config = sized("tiny")
    encode = Captions(config, (64,), 1).encode
    pairs = open_pairs(str(stamps))
    paths = [stamps / pairs.shards[n].names[0] for n in pairs.numbers("test")]
    truth = [path.relative_to(stamps).parts[0] for path in paths]
    kinds = sorted(set(truth))
    images = [budgeted(open_image(path), config.vision, 64) for path in paths]
    with torch.no_grad():
        seen = torch.cat([model.embed_images(*pack(images[i:i + 32], config.vision))
                          for i in range(0, len(images), 32)])
        named = model.embed_texts(*pack_texts([encode(kind) for kind in kinds]))
    truth = torch.tensor([kinds.index(kind) for kind in truth])
    return (seen @ named.T).argmax(1) == truth, truth


def test_clips_show_one_shape_that_moves_by_half_a_patch():
    for seed in range(30):
        frames, item, move = clip(seed)
        before, after = (np.asarray(frame).astype(int) for frame in frames)
        y, x = np.abs(after - before).sum(-1).nonzero()
        (dx, dy), (x0, y0, x1, y1) = MOVES[move], (c * 64 / 999 for c in item.area)
        # What changed reaches from where the thing was to four pixels on.
        assert abs((x.min() + x.max() + 1 - x0 - x1) / 2 - 2 * dx) < 1.2
        assert abs((y.min() + y.max() + 1 - y0 - y1) / 2 - 2 * dy) < 1.2
    assert moving(Item("red", "star", ()), "left", "zh") == "红色五角星向左移动"
    assert moving(Item("red", "star", ()), "left", parts=("shape",)) == "star moves left"


def test_clips_are_pairs_of_two_frames_and_are_evaluated(tmp_path):
    config = sized("tiny")
    stream = Captions(config, (64,), 4, clips=0.5)
    shapes = [stream(i).image.shape for i in range(40)]
    assert set(shapes) == {(64, 64, 3), (2, 64, 64, 3)}
    plain, none = Captions(config, (64,), 4), Captions(config, (64,), 4, clips=0.0)
    assert all((plain(i).image == none(i).image).all() for i in range(5))
    train(tmp_path / "run", "align", steps=2, clips=0.5, micro=2)
    figures = json.loads((tmp_path / "run/report.json").read_text())["figures"]["align"]
    assert 0 <= figures["moves_en"] <= 1 and 0 <= figures["moves_zh"] <= 1


@pytest.mark.parametrize("stage", ["semantic", "texture"])
def test_a_kept_tower_is_the_stages_own_in_bf16(tmp_path, stage):
    train(tmp_path / "run", "teachers", teachers=stage, steps=1, keep=str(tmp_path / "kept"))
    whole = load_tensors(checkpoints(tmp_path / "run" / stage)[-1])
    visual = train_vit.tower(Args(), sized("tiny"))
    load_tower(visual, tmp_path / "kept" / stage)
    assert all(torch.equal(value, whole["visual." + name].bfloat16().float())
               for name, value in visual.state_dict().items())
