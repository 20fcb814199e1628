"""The model: packing, caching, sizes, positions, kernels."""
import copy
import struct
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import gym
from conftest import odd_config, random_document
from data import collate, sight
from engine import Cache, probabilities
from kernels import attention, linear_cross_entropy, rotary_half, rotary_pairs, Segments
from lib.cli import UserError
from lib.images import open_image, resize
from mmtp import attach, categorical
from model import GLMV, rope_positions, sized
from pretrain import loss_sum
from vit import fit, patchify

SHAPES = [((4, 6),), (), ((2, 2), (6, 4)), ((4, 6), (4, 6))]


@torch.no_grad()
def test_packed_equals_one_by_one(model, config):
    parts = [random_document(config, s, 9 + 5 * i, i) for i, s in enumerate(SHAPES)]
    packed = collate(parts, config, room=200)
    together = model(packed, model.encode(packed.patches, packed.grids))
    at = 0
    for part in parts:
        one = collate([part], config)
        merged = model.encode_images(one)
        alone = model(one, merged)
        assert torch.allclose(together[at:at + len(alone)], alone, atol=1e-5)
        at += len(alone)


@torch.no_grad()
def test_cached_equals_uncached(model, config):
    parts = [random_document(config, s, 9 + 5 * i, i) for i, s in enumerate(SHAPES)]
    whole = collate(parts, config)
    merged = model.encode(whole.patches, whole.grids)
    want = model(whole, merged).split([len(p.ids) for p in parts])

    prompts = [copy.copy(p) for p in parts]
    for p in prompts:  # the last four tokens come later, two at a time
        p.ids, p.weights = p.ids[:-4], p.weights[:-4]
    batch = collate(prompts, config)
    cache = Cache(config, 6, 64, "cpu", torch.float32)
    got = model(batch, merged, cache.prefill(0, batch.cu_seqlens, batch.positions))
    for i, (have, p) in enumerate(zip(got.split([len(p.ids) for p in prompts]), prompts)):
        assert torch.allclose(have, want[i][:len(p.ids)], atol=1e-5)
    for step in range(2):
        tokens = [torch.from_numpy(p.ids[len(p.ids) - 4 + 2 * step:][:2]).long() for p in parts]
        for wrong in (True, False):     # other tokens first, which the cache then takes back
            extension = cache.extend(4, 2)
            new = SimpleNamespace(tokens=torch.cat(tokens) + wrong, cu_seqlens=None,
                                  positions=extension.positions)
            got = model(new, cache=extension).view(4, 2, -1)
            if wrong:
                cache.rewind(4, 2)
        for i, p in enumerate(parts):
            start = len(p.ids) - 4 + 2 * step
            assert torch.allclose(got[i], want[i][start:start + 2], atol=1e-5)


def test_released_counts():
    """In millions: the tower's blocks 403, tower and adapter 434, decoder with embedding 582,
    head 91."""
    with torch.device("meta"):
        model = GLMV(sized("base"))
    n = model.counts()
    blocks = sum(p.numel() for p in model.model.visual.blocks.parameters())
    parts = blocks, n["tower"] + n["adapter"], n["decoder"], n["head"]
    assert [round(part / 1e6) for part in parts] == [403, 434, 582, 91]


@pytest.mark.parametrize("size,least,most", [("tiny", 0.6e6, 0.9e6), ("mini", 2.5e6, 3.5e6),
                                             ("small", 45e6, 75e6)])
def test_sizes(size, least, most):
    with torch.device("meta"):
        assert least < GLMV(sized(size)).counts()["total"] < most


def test_mini_sees_every_category_and_weighs_at_most_eight_megabytes():
    """In bf16, with its MTP head. A picture of 256 x 320 pixels is not made smaller."""
    config = sized("mini")
    model = GLMV(config)
    attach(model, 3)
    assert 2 * model.counts()["total"] < 8e6 and gym.names(sight(config)) == gym.names()
    assert resize(Image.new("RGB", (320, 256)), config).shape == (256, 320, 3)
    batch = collate([random_document(config, ((16, 20), (32, 40)), 40)], config)
    loss, ahead = loss_sum(model, batch, 3)
    (loss + sum(ahead)).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("depths", [0, 2])
def test_flops_are_those_of_the_matrices(depths):
    """A step's forward and backward, counted, with half of the text learnt. The rest are norms and
    biases, and the patch embedding, whose input needs no gradient."""
    config = sized("tiny")
    model = GLMV(config)
    attach(model)
    batch = collate([random_document(config, ((8, 8),), 200)], config)
    batch.weights[len(batch.weights) // 2:] = 0
    with FlopCounterMode(display=False) as counter:
        loss, ahead = loss_sum(model, batch, depths)
        (loss + sum(ahead)).backward()
    products = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in products.items() if "attention" not in str(op))
    learnt = int((batch.weights > 0).sum())
    assert 0 < learnt < len(batch.tokens) * 0.6
    counted = model.flops(len(batch.tokens), len(batch.patches), learnt, depths)
    assert linear == pytest.approx(counted, rel=0.03)


def test_positions_by_hand():
    """Two words, a 4x4-patch image (2x2 tokens), one word; then a second document."""
    tokens = torch.tensor([5, 6, 9, 9, 9, 9, 7, 8, 5])
    got = rope_positions(tokens, torch.tensor([[1, 4, 4]]), torch.tensor([0, 7, 9]), 9)
    assert got.shape == (3, 9) and got.dtype == torch.int64
    assert got[0].tolist() == [0, 1, 2, 2, 2, 2, 4, 0, 1], "t"
    assert got[1].tolist() == [0, 1, 2, 2, 3, 3, 4, 0, 1], "h"
    assert got[2].tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1], "w"


def test_positions_of_wide_and_of_neighbouring_images():
    """A 1x3 and a 2x1 image (in tokens) side by side, a document that begins and ends with an
    image, and one of words alone."""
    tokens = torch.tensor([5, 9, 9, 9, 9, 9, 6, 9, 9, 7, 8])
    grids, borders = torch.tensor([[1, 2, 6], [1, 4, 2], [1, 2, 4]]), torch.tensor([0, 7, 9, 11])
    got = rope_positions(tokens, grids, borders, 9)
    assert got[0].tolist() == [0, 1, 1, 1, 4, 4, 6, 0, 0, 0, 1], "t"
    assert got[1].tolist() == [0, 1, 1, 1, 4, 5, 6, 0, 0, 0, 1], "h"
    assert got[2].tolist() == [0, 1, 2, 3, 4, 4, 6, 0, 1, 0, 1], "w"
    with pytest.raises(ValueError, match="image"):      # a border inside the second image
        rope_positions(tokens, grids, torch.tensor([0, 5, 9, 11]), 9)
    with pytest.raises(ValueError, match="image"):      # an image of which there is no token
        rope_positions(tokens, torch.cat([grids, grids[:1]]), borders, 9)


def test_patches_are_block_major():
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    patches, grid = patchify(image, 2)
    assert patches.shape == (8, 1, 12) and grid == (1, 2, 4)
    pixels = patches[:, 0].reshape(8, 3, 2, 2)      # channel, row, column of each patch
    # Of each patch the corner (row, column) in the image: four patches of a block, then the next.
    corners = [(y, x) for x0 in (0, 4) for y in (0, 2) for x in (x0, x0 + 2)]
    for number, (y, x) in enumerate(corners):
        assert pixels[number, :, 0, 0].tolist() == image[y, x].tolist(), (
            f"patch {number} should begin at row {y}, column {x} of the image")
        block = image[y:y + 2, x:x + 2]
        assert np.array_equal(pixels[number], block.transpose(2, 0, 1)), (
            f"patch {number} should hold its red values, row by row, then green, then blue")


@pytest.mark.parametrize("h,w,want", [
    (64, 64, (64, 64)), (10, 10, (32, 32)), (800, 600, (64, 48)), (1, 150, (16, 256))])
def test_fit(h, w, want):
    assert fit(h, w, 16, 4, 16) == want


def test_fit_refuses_ribbons():
    with pytest.raises(ValueError, match="200"):
        fit(1, 5000, 16, 4, 16)


def test_a_video_patch_of_two_equal_frames_is_a_still():
    config = odd_config()
    model = GLMV(config, seed=3)
    batch = collate([random_document(config)], config)
    twice = batch.patches.expand(-1, 2, -1)
    with torch.no_grad():
        a, b = (model.model.visual(x, batch.grids) for x in (batch.patches, twice))
    assert torch.allclose(a, b, atol=1e-5)


def photo(path, exif: bytes) -> tuple[int, int]:
    """The size as it is opened of a photo of 20 x 12 pixels with this EXIF block."""
    Image.new("RGB", (20, 12), "red").save(path, exif=b"Exif\0\0" + exif)
    return open_image(path).size


def test_a_photo_with_damaged_metadata_opens_and_is_upright_where_that_can_be_read(tmp_path):
    """Orientation 6, a quarter turn, beside a resolution of -1/0."""
    block = (b"II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHII", 0x112, 3, 1, 6)
             + struct.pack("<HHII", 0x11A, 10, 1, 38) + struct.pack("<Iii", 0, -1, 0))
    for kind in ("jpg", "png", "webp"):
        assert photo(tmp_path / f"a.{kind}", block) == (12, 20), kind
    for at in range(len(block)):
        for byte in (0, 7, 255):
            damaged = block[:at] + bytes([byte]) + block[at + 1:]
            assert photo(tmp_path / "a.jpg", damaged) in ((20, 12), (12, 20))
            assert photo(tmp_path / "a.jpg", damaged[:at]) in ((20, 12), (12, 20))


def test_whatever_pillow_raises_is_one_line(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for error in (ZeroDivisionError("a. b\nc"), struct.error(), KeyError(5), MemoryError()):
        monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
        with pytest.raises(UserError, match="a.png can't be read as a picture: [^\n]+$"):
            open_image(tmp_path / "a.png")


# ---- kernels ------------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(5, 17, 1, 17), (8, 8), (600, 3)])
def test_attention_against_the_definition(causal, lengths):
    torch.manual_seed(0)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(int(cu[-1]), n, 8, requires_grad=True) for n in (4, 2, 2))
    out = attention(q, k, v, Segments(cu, causal))
    out.pow(2).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    rows = []
    for a, b in zip(cu[:-1], cu[1:]):
        keys, values = (x[a:b].repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        scores = q[a:b].transpose(0, 1) @ keys.mT / 8 ** 0.5
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        rows.append((scores.softmax(-1) @ values).transpose(0, 1))
    want = torch.cat(rows)
    want.pow(2).sum().backward()
    assert torch.allclose(out, want, atol=1e-5)
    for x, grad in zip((q, k, v), grads):
        assert torch.allclose(x.grad, grad, atol=1e-4)


def test_the_layout_of_the_docstring():
    segments = Segments(torch.tensor([0, 3, 5, 8], dtype=torch.int32), causal=False)
    shapes, place = segments.layout
    assert f"shapes  {str(shapes)[1:-1]} " in Segments.layout.__doc__
    assert f"place   {' '.join(map(str, place.tolist()))} " in Segments.layout.__doc__


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_linear_cross_entropy_against_the_definition(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(23, 12, requires_grad=True)
    weight = torch.randn(31, 12, requires_grad=True)
    targets, weights = torch.randint(31, (23,)), torch.rand(23) * (torch.rand(23) > 0.3)
    loss = linear_cross_entropy(hidden, weight, targets, weights, chunk)
    (3 * loss).backward()
    grads = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    want = (torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
            * weights).sum()
    (3 * want).backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5), "the loss"
    assert torch.allclose(grads[0], hidden.grad, atol=1e-5), "the gradient of `hidden`"
    assert torch.allclose(grads[1], weight.grad, atol=1e-5), "the gradient of `weight`"


def test_linear_cross_entropy_of_a_frozen_matrix():
    """And of groups: a loss for each, of which the sum is differentiated."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 12, requires_grad=True), torch.randn(31, 12)
    targets, weights = torch.randint(31, (2, 9)), torch.rand(2, 9)
    losses = linear_cross_entropy(hidden, weight, targets, weights, 4)
    found, = torch.autograd.grad(losses.sum(), hidden)
    each = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(),
                                             reduction="none").view(2, 9) * weights
    assert losses.tolist() == pytest.approx(each.sum(1).tolist(), rel=1e-5), "a loss a group"
    want, = torch.autograd.grad(each.sum(), hidden)
    assert torch.allclose(found, want, atol=1e-5), "the gradient of `hidden`"


def test_rotations_keep_lengths_and_depend_on_distance_only():
    torch.manual_seed(0)
    for rotate in (rotary_half, rotary_pairs):
        q, k = torch.randn(1, 1, 8).expand(9, 1, 8), torch.randn(1, 1, 8).expand(9, 1, 8)
        freqs = torch.arange(9)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        q, k = (rotate(x, freqs.cos(), freqs.sin()) for x in (q, k))
        assert torch.allclose(q.norm(dim=-1), q[0].norm().expand(9, 1), atol=1e-5)
        products = (q[:, 0] @ k[:, 0].T)
        assert torch.allclose(products.diagonal(2), products[0, 2].expand(7), atol=1e-4)


def test_sampling_inverts_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5, 4)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.81, 0.96])
    one = torch.ones(5)
    assert categorical(probabilities(logits, one, one), uniforms).tolist() == [0, 0, 1, 2, 3]
    assert categorical(probabilities(logits, one, 0.7 * one), uniforms).tolist() == [0, 0, 0, 1, 1]
    assert categorical(probabilities(logits, 0 * one, one), uniforms).tolist() == [0] * 5
