"""Same numbers as transformers' towers, from folders it saved; and what a student is handed.

Parity runs where requirements-peers.txt is installed.
"""
import json

import numpy as np
import pytest
import torch
from einops import rearrange

from lib import teachers
from lib.cli import UserError
from lib.teachers import load_teacher
from lib.tensors import load_tensors, save_tensors
from vit import fit, naflex, patchify

BASE = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=6)
ODD = dict(hidden_size=40, num_hidden_layers=3, num_attention_heads=5, patch_size=7)
SIZES = ((5, 3), (2, 8), (4, 4))  # rows and columns of patches: two that are not square

CASES = {
    "siglip": [("SiglipVision", dict(BASE, intermediate_size=56, image_size=26)),
               ("SiglipVision", dict(ODD, intermediate_size=90, image_size=21,
                                     hidden_act="gelu", layer_norm_eps=1e-3))],
    "siglip2": [("Siglip2Vision", dict(BASE, intermediate_size=56, num_patches=16)),
                ("Siglip2Vision", dict(ODD, intermediate_size=90, num_patches=25))],
    "dinov2": [("Dinov2", dict(BASE, image_size=24)),
               ("Dinov2", dict(ODD, image_size=35, use_swiglu_ffn=True, qkv_bias=False))],
    "registers": [("Dinov2WithRegisters", dict(BASE, image_size=24, use_swiglu_ffn=True)),
                  ("Dinov2WithRegisters", dict(ODD, image_size=35, num_register_tokens=1))],
    "dinov3": [("DINOv3ViT", dict(BASE, intermediate_size=56, num_register_tokens=4)),
               ("DINOv3ViT", dict(ODD, hidden_size=60, intermediate_size=90, use_gated_mlp=True,
                                  hidden_act="silu", query_bias=False, rope_theta=10.0))],
}


def shaken(model):
    """Random norms, biases, scales and tokens too, so that a swapped name shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) if p.ndim != 2 else 0.05 * torch.randn_like(p))
    return model.eval()


def pictures(patch: int, sizes=SIZES) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h * patch, w * patch, 3)).astype(np.uint8) for h, w in sizes]


def own_features(teacher, images) -> list[torch.Tensor]:
    """Row by row and in the teacher's own grid, with no resizing of picture or features."""
    p = teacher.patch_size
    grids = [(len(i) // p, i.shape[1] // p) for i in images]
    patches = np.concatenate([patchify(i, p, merge=1)[0][:, 0] for i in images])
    with torch.no_grad():
        return teacher.features(torch.from_numpy(patches), grids).split([h * w for h, w in grids])


@torch.no_grad()
def their_features(peer, name, teacher, image) -> torch.Tensor:
    pixels = (torch.tensor(image) / 255 - torch.tensor(teacher.mean)) / torch.tensor(teacher.std)
    if name == "Siglip2Vision":  # takes patches, the colours last
        p = teacher.patch_size
        flat = rearrange(pixels, "(h i) (w j) c -> 1 (h w) (i j c)", i=p, j=p)
        shape = torch.tensor([[len(image) // p, image.shape[1] // p]])
        return peer(flat, torch.ones(flat.shape[:2], dtype=torch.long), shape).last_hidden_state[0]
    options = {"interpolate_pos_encoding": True} if name == "SiglipVision" else {}
    out = peer(rearrange(pixels, "h w c -> 1 c h w"), **options).last_hidden_state[0]
    return out[len(teacher.prefix()):]


@pytest.mark.parametrize("name, fields", [c for two in CASES.values() for c in two],
                         ids=[f"{name}-{i}" for name in CASES for i in range(2)])
def test_features_are_those_of_transformers(name, fields, tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = getattr(transformers, name + "Config")(**fields)
    peer = shaken(getattr(transformers, name + "Model")(config))
    peer.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert (teacher.width, teacher.patch_size) == (fields["hidden_size"], fields["patch_size"])
    images = pictures(teacher.patch_size)
    for image, ours in zip(images, own_features(teacher, images)):
        want = their_features(peer, name, teacher, image)
        assert want.std() > 0.1 and (ours - want).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_a_whole_siglip_and_shards_open_too(family, tmp_path):
    """What is published: text tower and logit scale beside the tower, a config that leaves out
    its family's defaults, several files."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    small = dict(hidden_size=48, num_hidden_layers=1, intermediate_size=32, patch_size=6)
    config = getattr(transformers, family + "Config")(
        text_config=dict(hidden_size=48, num_hidden_layers=1, intermediate_size=32, vocab_size=9),
        vision_config=small)
    peer = shaken(getattr(transformers, family + "Model")(config))
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["vision_config"] = small
    (tmp_path / "config.json").write_text(json.dumps(raw))
    teacher, image = load_teacher(tmp_path), pictures(6)[0]
    want = their_features(peer.vision_model, family + "Vision", teacher, image)
    assert (own_features(teacher, [image])[0] - want).abs().max() < 1e-4


@pytest.mark.parametrize("kind", list(teachers.KINDS))
def test_what_a_config_leaves_out_is_their_default(kind, tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    theirs = transformers.AutoConfig.for_model(kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    _, ours = teachers.load_config(tmp_path)
    for field, value in vars(ours).items():
        assert getattr(theirs, field, value) == value, field


def test_naflex_sizes_and_pixels_are_those_of_siglip2():
    pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.siglip2.image_processing_pil_siglip2 import (
        Siglip2ImageProcessorPil, get_image_size_for_max_num_patches)
    rng = np.random.default_rng(0)
    for h, w, budget in zip(rng.integers(8, 900, 99), rng.integers(8, 900, 99), [4, 100, 256] * 33):
        size = naflex(int(h), int(w), 14, budget)
        assert size == get_image_size_for_max_num_patches(int(h), int(w), 14, budget), (h, w)
        assert size[0] * size[1] <= budget * 14 ** 2
    teacher = teacher_of("siglip2_vision_model", num_patches=16)
    image = pictures(1, [(40, 70)])[0]
    made = Siglip2ImageProcessorPil(patch_size=6, max_num_patches=16)(image, return_tensors="np")
    ours = rearrange(teacher.resize(image), "(h i) (w j) c -> (h w) (i j c)", i=6, j=6)
    assert tuple(made["spatial_shapes"][0]) == (3, 5)
    assert np.abs(made["pixel_values"][0][:15] - (ours / 255 - 0.5) / 0.5).max() < 1e-5


# ---- without a peer: from a folder of our own making --------------------------------------------

THEIRS = {"patch.": "embeddings.patch_embeddings.", ".attn.": ".attention.",
          "scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}


def folder_of(path, **fields):
    """A small DINOv3's folder with random weights, written without transformers."""
    fields = {"model_type": "dinov3_vit", **BASE, "intermediate_size": 56, "image_size": 24,
              "num_register_tokens": 2, **fields}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    cls, config = teachers.load_config(path)
    tensors = {}
    for name, value in shaken(cls(config)).state_dict().items():
        for ours, their in THEIRS.items():
            name = name.replace(ours, their)
        name = name.replace("blocks.", "layer.").replace("cls", "embeddings.cls_token")
        name = name.replace("register", "embeddings.register_tokens")
        for part in ("q", "k", "v", "o"):
            name = name.replace(f"attention.{part}.", f"attention.{part}_proj.")
        tensors[name.replace("up.", "up_proj.").replace("down.", "down_proj.")] = value
    save_tensors(path / "model.safetensors", tensors)
    return path


def teacher_of(kind: str, **fields):
    cls, defaults = teachers.KINDS[kind]
    return shaken(cls(teachers.TeacherConfig(**{**defaults, **BASE, **fields})))


def test_a_student_gets_features_on_its_grid_in_its_order(tmp_path):
    """Same grid: the teacher's own, block-major. Half as fine: means over two by two patches."""
    teacher = load_teacher(folder_of(tmp_path))
    images = pictures(6, [(4, 4), (2, 8)])
    own = own_features(teacher, images)
    got = teacher(images, torch.tensor([[1, 4, 4], [1, 2, 8]]))
    want = [rearrange(x, "(y b x d) c -> (y x b d) c", b=2, d=2, x=w // 2)
            for x, (_, w) in zip(own, [(4, 4), (2, 8)])]
    assert torch.allclose(got, torch.cat(want), atol=1e-5)
    assert not got.requires_grad and got.dtype == torch.float32
    # Antialiasing reaches a little beyond a patch's border; a linear ramp is met exactly inside.
    ramp = torch.arange(8.0).repeat(8)[:, None]
    halved = teachers.resample(ramp, (8, 8), (1, 4, 4)).view(2, 2, 2, 2)  # y x b d
    assert torch.allclose(halved[:, 0, :, 1], torch.tensor(2.5))
    assert torch.allclose(halved[:, 1, :, 0], torch.tensor(4.5))


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other(tmp_path):
    teacher = load_teacher(folder_of(tmp_path))
    images, grids = pictures(5, [(9, 4), (3, 3), (9, 4)]), torch.tensor([[1, 4, 2]] * 3)
    together = teacher(images, grids).split(8)
    for image, part in zip(images, together):
        assert torch.allclose(teacher([image], grids[:1]), part, atol=1e-5)


@pytest.mark.parametrize("kind", list(teachers.KINDS))
def test_a_square_picture_fills_the_budget_and_others_stay_within(kind):
    teacher = teacher_of(kind, image_size=24, num_patches=16 * (kind == "siglip2_vision_model"))
    assert teacher.resize(pictures(1, [(90, 90)])[0]).shape == (24, 24, 3)
    for image in pictures(1, [(50, 70), (9, 80), (1, 30)]):
        h, w = teacher.resize(image).shape[:2]
        assert h % 6 == w % 6 == 0 and 0 < h * w <= 24 * 24
        assert teacher([image], torch.tensor([[1, 2, 4]])).isfinite().all()


def test_bfloat16_is_close_to_float32(tmp_path):
    folder, grid = folder_of(tmp_path), torch.tensor([[1, 4, 4]])
    images = pictures(6, [(4, 4)])
    full, half = (load_teacher(folder, dtype=t)(images, grid) for t in (torch.float32,
                                                                         torch.bfloat16))
    assert half.dtype == torch.float32 and (full - half).abs().mean() < 0.05


# ---- what is refused, in one line ---------------------------------------------------------------

def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_kind_of_folder(tmp_path):
    assert "there is no config.json" in refused(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "glm_ocr", "vision_config": {"depth": 24}}')
    assert "kind 'glm_ocr'" in refused(tmp_path) and "dinov3_vit" in refused(tmp_path)
    for text in ("{", "[]", '{"model_type": "dinov3_vit", "hidden_size": "wide"}'):
        config.write_text(text)
        assert "does not describe a teacher" in refused(tmp_path)
    config.write_text('{"model_type": "dinov3_vit"}')
    assert "no weights" in refused(tmp_path)


def test_sizes_that_do_not_divide(tmp_path):
    for fields, said in ((dict(hidden_size=50), "no multiple of 12"),
                         (dict(patch_size=[6, 7]), "patch_size is [6, 7]; it must be int"),
                         (dict(patch_size=30), "no patch of 30 fits in 24 pixels"),
                         (dict(patch_size=0), "patch_size is 0; it must be int, above 0"),
                         (dict(layer_norm_eps=float("nan")), "layer_norm_eps is NaN"),
                         (dict(num_hidden_layers=10 ** 9), "num_hidden_layers is 1000000000"),
                         (dict(hidden_act="relu6"), "relu6")):
        raw = {"model_type": "dinov3_vit", **BASE, "image_size": 24, **fields}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert said in refused(tmp_path)
    teacher = teacher_of("dinov3_vit")
    with pytest.raises(ValueError, match="even sides"):
        teacher(pictures(6, [(3, 3)]), torch.tensor([[1, 3, 3]]))
    with pytest.raises(ValueError, match="one grid"):
        teacher(pictures(6, [(2, 2)]), torch.tensor([[1, 2, 2], [1, 2, 2]]))


def test_odd_values_of_a_config(tmp_path):
    """One line, or a teacher: no field may end in a traceback."""
    raw = json.loads((folder_of(tmp_path) / "config.json").read_text())
    raw |= {"num_patches": 0, "use_gated_mlp": False, "query_bias": True, "layer_norm_eps": 1e-6}
    for name in raw:
        for odd in (-1, 0, 1, 0.5, 10 ** 9, 10 ** 400, "x", None, [], {}, True, float("nan")):
            (tmp_path / "config.json").write_text(json.dumps({**raw, name: odd}))
            try:
                load_teacher(tmp_path)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 600, (name, odd)


def test_damaged_and_other_weights(tmp_path):
    folder = folder_of(tmp_path)
    path = folder / "model.safetensors"
    whole, tensors = path.read_bytes(), load_tensors(folder)
    path.write_bytes(whole[:-100])
    assert "damaged" in refused(folder)
    index = folder / "model.safetensors.index.json"
    for text, said in (("{", "no index of shards"),
                       ('{"weight_map": {"x": "gone.safetensors"}}', "no weights at")):
        index.write_text(text)
        assert said in refused(folder)
    index.unlink()
    first = next(name for name in tensors if "q_proj.weight" in name)
    save_tensors(path, {k: v for k, v in tensors.items() if k != first})
    assert "blocks.0.attn.q.weight" in refused(folder) and "found nothing" in refused(folder)
    save_tensors(path, {**tensors, first: torch.zeros(3, 5)})
    assert "expected (48, 48), found (3, 5)" in refused(folder)
    save_tensors(path, {**tensors, "layer.7.norm1.weight": torch.zeros(48)})
    assert "1 tensors differ, blocks.7.norm1.weight" in refused(folder)
    for name, shape in (("embeddings.cls_token", (48,)), ("layer.0.mlp.weights_in.weight", ())):
        save_tensors(path, {**tensors, name: torch.zeros(shape)})
        assert "has no teacher's weights: " in refused(folder)


def test_an_impossible_picture_is_refused():
    with pytest.raises(ValueError, match="no side may be"):
        teacher_of("dinov3_vit").resize(np.zeros((1, 300, 3), np.uint8))
    assert fit(28, 28, 28, 1, 4) == naflex(28, 28, 28, 1) == (28, 28)
