"""Same numbers as transformers' GlmOcr classes, and folders that travel both ways.

Runs where requirements-peers.txt is installed.
"""
import math
import random

import pytest
import torch

from conftest import odd_config, random_document, shaken, their_pixels
from data import collate
from lib.checkpoint import load_model, save_model

transformers = pytest.importorskip("transformers", exc_type=ImportError)
SIZES = ((4, 6), (2, 2), (8, 4))


def theirs(folder):
    from transformers import GlmOcrForConditionalGeneration
    return GlmOcrForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("which", [0, 1, 2])
@torch.no_grad()
def test_tower_adapter_and_logits_agree(which, tmp_path):
    ours = shaken(which)
    save_model(ours, tmp_path)
    peer = theirs(tmp_path)
    batch = collate([random_document(ours.config, SIZES, seed=which)], ours.config)
    features = ours.model.visual(batch.patches, batch.grids)
    merged = ours.model.visual.merge(features)
    logits = ours.lm_head(ours(batch, merged))

    pixels = their_pixels(batch.patches)
    kept = {}
    peer.model.visual.post_layernorm.register_forward_hook(
        lambda module, inputs, output: kept.update(tower=output))
    out = peer.model.visual(pixels, batch.grids)
    assert torch.allclose(kept["tower"], features, atol=1e-4)
    assert torch.allclose(out.pooler_output, merged, atol=1e-4)
    kinds = (batch.tokens == ours.config.image_token_id).int()[None]
    want = peer(input_ids=batch.tokens[None], pixel_values=pixels, image_grid_thw=batch.grids,
                mm_token_type_ids=kinds).logits[0]
    assert (logits - want).abs().max() < 1e-4
    positions, _ = peer.model.get_rope_index(batch.tokens[None], kinds, batch.grids)
    assert torch.equal(positions[:, 0], batch.positions)


@torch.no_grad()
def test_a_folder_saved_by_transformers_opens_here(tmp_path):
    save_model(shaken(0), tmp_path / "ours")
    theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    for name, value in shaken(0).state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    assert back.config.sections == odd_config(0).sections


@pytest.mark.parametrize("unit,least,most", [(28, 8, 6144), (16, 4, 400), (12, 1, 64)])
def test_image_sizes_agree(unit, least, most):
    """Wherever theirs is not longer than the limit, which happens to strips one unit high."""
    from transformers.models.glm46v.image_processing_pil_glm46v import smart_resize
    from vit import fit
    rng, strips = random.Random(unit), 0
    sizes = [(28, 28), (76, 38), (24, 3084), (154, 154)] + [
        [int(2 ** rng.uniform(2, 12)) for _ in range(2)] for _ in range(3000)]
    for h, w in sizes:
        if max(h, w) > 190 * min(h, w):     # near 200 they refuse by other rounding
            continue
        want = smart_resize(2, h, w, 2, unit, 2 * least * unit ** 2, 2 * most * unit ** 2)
        got = fit(h, w, unit, least, most)
        if math.prod(want) > most * unit ** 2:
            assert min(got) == unit and max(got) == most * unit
            strips += 1
        else:
            assert got == want, (h, w)
    assert strips < 400
