"""Checkpoint folders: what they hold, what is damaged, what is refused."""
import json
import math
import re

import pytest
import torch

from conftest import odd_config, random_document
from data import collate
from lib.checkpoint import export_tower, load_config, load_model, restore, save_model
from lib.cli import UserError
from lib.common import ROOT
from lib.tensors import is_whole, load_tensors, save_tensors, write_digests
from mmtp import attach, prefix
from model import Config, GLMV
from optim import OptimConfig, Optimizer
from tokenizer import SPECIAL
from vit import MEAN, STD


def refused(act, *args) -> str:
    """The message, of one line, with which `act` refuses its arguments."""
    with pytest.raises(UserError) as error:
        act(*args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def test_a_folder_comes_back_bit_for_bit(model, tmp_path):
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in
               zip(model.state_dict().values(), back.state_dict().values()))
    assert back.config.n_ranks == 512 and back.config.min_tokens == 1


def test_sharded_folders_open_too(model, tmp_path):
    save_model(model, tmp_path)
    tensors = load_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_tensors(tmp_path / shard, {n: tensors[n] for n in members})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {n: shard for shard, members in shards.items() for n in members}}))
    load_model(tmp_path)


@pytest.mark.parametrize("damage,words", [
    ("missing", "model.safetensors"), ("truncated", "model.safetensors"),
    ("header", "model.safetensors"), ("other", "not of the model"),
    ("config", "config.json does not describe a model: Expecting"),
    ("options", "config.json does not describe a model: 'text_config' is missing"),
    ("preprocessor", "preprocessor_config.json does not describe a model: 'size' is missing"),
    ("patches", "patch_size is 7; config.json says 6")])
def test_damaged_folders_say_so_in_one_line(model, tmp_path, damage, words):
    save_model(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "header":
        weights.write_bytes(b"\xff" * 100)
    elif damage == "other":
        save_model(GLMV(odd_config(1)), tmp_path / "other")
        (tmp_path / "config.json").write_bytes((tmp_path / "other/config.json").read_bytes())
        (tmp_path / "preprocessor_config.json").unlink()
    elif damage == "patches":
        path = tmp_path / "preprocessor_config.json"
        path.write_text(path.read_text().replace('"patch_size": 6', '"patch_size": 7'))
    elif damage == "preprocessor":
        (tmp_path / "preprocessor_config.json").write_text("{}")
    else:
        text = "{" if damage == "config" else '{"steps": 100}'
        (tmp_path / "config.json").write_text(text)
    (tmp_path / "digests.json").unlink()
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_safetensors_reads_ours_and_we_read_theirs(tmp_path):
    peer = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(4).bfloat16(),
               "empty": torch.zeros(0, 3), "flag": torch.tensor([True, False])}
    save_tensors(tmp_path / "ours.safetensors", tensors)
    peer.save_file(tensors, tmp_path / "theirs.safetensors")
    for got in (peer.load_file(tmp_path / "ours.safetensors"),
                load_tensors(tmp_path / "theirs.safetensors")):
        assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tensors.items())


# ---- digests ------------------------------------------------------------------------------------

def flip(path, bit: int = -1):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def run_of(model, run, steps=(9, 10, 200)):
    """A run folder with checkpoints of `steps` that can be resumed; and their optimizer."""
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    for step in steps:
        save_model(model, run / f"step_{step}")
        torch.save({"step": step, "optimizer": optimizer.state_dict()},
                   run / f"step_{step}/train.pt")
        write_digests(run / f"step_{step}")
    return optimizer


def test_a_flipped_bit_is_found_and_the_newest_whole_checkpoint_named(model, tmp_path):
    optimizer = run_of(model, tmp_path)
    step = tmp_path / "step_200"
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        flip(step / name)
        said = refused(load_model, step)
        assert f"{step / name} is damaged (its digest differs)" in said
        assert said.endswith(f"the newest whole checkpoint is {tmp_path / 'step_10'}")
        assert ("if you have changed it, remove" in said) == name.endswith("json")
        (step / name).rename(tmp_path / "away")
        assert name in refused(load_model, step)
        (tmp_path / "away").rename(step / name)
        flip(step / name)
    load_model(step)
    restore(step, model, optimizer)
    for name in ("train.pt", "model.safetensors"):
        flip(step / name, 8 * 5000)
        flip(tmp_path / "step_10" / name)
        said = refused(restore, step, model, optimizer)
        assert f"{step / name} is damaged" in said
        assert said.endswith(f"remove it and {tmp_path / 'step_10'} to go on from "
                             f"{tmp_path / 'step_9'}")
        flip(step / name, 8 * 5000)
        flip(tmp_path / "step_10" / name)


def test_damaged_digests_say_so_and_a_folder_without_them_loads(model, tmp_path):
    save_model(model, tmp_path)
    for text in ("{", "[1]", "[[1, 2]]", "5", "\udcff", '{"/dev/zero": "0"}'):
        (tmp_path / "digests.json").write_text(text, errors="surrogateescape")
        assert "digests.json is damaged; remove it" in refused(load_model, tmp_path)
        assert not is_whole(tmp_path)
    (tmp_path / "digests.json").unlink()
    load_model(tmp_path)


def test_an_exported_tower_has_digests(model, tmp_path):
    save_model(model, tmp_path / "whole")
    export_tower(tmp_path / "whole", tmp_path / "tower")
    assert is_whole(tmp_path / "tower")
    flip(tmp_path / "whole/config.json")
    assert "damaged" in refused(export_tower, tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("name", ["align", "demo", "distill", "semantic", "texture", "untold"])
def test_the_included_checkpoints_are_whole(name):
    assert is_whole(ROOT / "ckpt" / name)


# ---- safetensors --------------------------------------------------------------------------------

def header_of(**changes) -> str:
    """A header of two tensors, a and b, of which b has other fields."""
    return json.dumps({
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1, 3], "data_offsets": [8, 20], **changes}})


@pytest.mark.parametrize("text,words", [
    (header_of(dtype="F8_E4M3"), "holds FP8 weights (F8_E4M3)"),
    (header_of(dtype="F8_E5M2"), "holds FP8 weights (F8_E5M2)"),
    (header_of(dtype="U16"), "a dtype (U16)"), (header_of(dtype=[]), "damaged"),
    (header_of(dtype=None), "a dtype (None)"),
    (header_of(shape=[1, 4]), "b is not at bytes 8 to 24"),
    (header_of(shape=[-1, -3]), "impossible"), (header_of(shape=[True, 3]), "impossible"),
    (header_of(shape=[1.0, 3]), "impossible"), (header_of(shape=3), "damaged"),
    (header_of(shape=[10 ** 30]), "impossible"),
    (header_of(shape=[0, 2 ** 63], data_offsets=[8, 8]), "impossible"),
    (header_of(shape="3"), "impossible"),
    (header_of(data_offsets=[4, 16]), "b is not at bytes 8 to 20"),
    (header_of(data_offsets=[12, 24]), "b is not at bytes 8 to 20"),
    (header_of(data_offsets=[8, -4]), "impossible"), (header_of(data_offsets=[8]), "impossible"),
    (header_of(data_offsets=[8, 2 ** 70]), "impossible"),
    (header_of(shape=[2 ** 62]), "b is not at bytes"),
    (header_of(dtype="BF16", data_offsets=[8, 14]), "20 bytes of data, where"),
    (header_of().replace('"b"', '"a"'), "a name occurs twice"),
    (header_of().replace('"b"', '"a\\nb"'), "impossible name"),
    ("[]", "no JSON object"), ("5", "no JSON object"), ('{"a": []}', "damaged"), ("{", "damaged"),
    ('{"a": null}', "damaged"), ("[" * 100_000, "damaged"), ("\udcff", "damaged")])
def test_damaged_headers(tmp_path, text, words):
    path, header = tmp_path / "model.safetensors", text.encode(errors="surrogateescape")
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(20))
    assert words in refused(load_tensors, path)


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 8, (2 ** 40).to_bytes(8, "little")])
def test_a_header_that_is_cut_off(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "the header is cut off" in refused(load_tensors, tmp_path)


@pytest.mark.parametrize("shard,words", [
    ("", "no index"), ("../a.safetensors", "no index"), (5, "no index"), (None, "no index"),
    ("..", "no index"), ("folder", "no index"),
    ("gone.safetensors", "no weights at"), ("b.safetensors", "repeats x of another shard")])
def test_damaged_indices(tmp_path, shard, words):
    for name in "ab":
        save_tensors(tmp_path / f"{name}.safetensors", {"x": torch.ones(1)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"x": "a.safetensors", "y": shard}}))
    assert words in refused(load_tensors, tmp_path)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_head_whose_own_table_has_another_shape(model, tmp_path, name):
    attach(model)
    save_model(model, tmp_path)
    tensors = load_tensors(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {**tensors, prefix(model) + name: torch.ones(5)})
    write_digests(tmp_path)
    assert f"{name} first: expected nothing, found (5,)" in refused(load_model, tmp_path)


def test_a_train_pt_that_lacks_something(model, tmp_path):
    optimizer = run_of(model, tmp_path, [1])
    torch.save({"step": 1}, tmp_path / "step_1/train.pt")
    write_digests(tmp_path / "step_1")
    said = refused(restore, tmp_path / "step_1", model, optimizer)
    assert "can't be resumed (it lacks 'optimizer'); without --resume" in said


def test_a_train_pt_of_an_earlier_version(model, tmp_path):
    optimizer = run_of(model, tmp_path, [1])
    torch.save({"step": 1, "optimizer": {"momenta": {}, "adam": {"state": {}}}},
               tmp_path / "step_1/train.pt")
    write_digests(tmp_path / "step_1")
    said = refused(restore, tmp_path / "step_1", model, optimizer)
    assert said.endswith(f"of an earlier version, which can't be resumed; --init={tmp_path}/step_1 "
                         "starts from its weights")


# ---- odd and foreign values of config.json ------------------------------------------------------

@pytest.mark.parametrize("section,name,value,built", [
    ("text_config.rope_parameters", "rope_type", "yarn", '"default"'),
    ("text_config.rope_parameters", "rope_type", "linear", '"default"'),
    ("text_config.rope_parameters", "partial_rotary_factor", 0.5, "1.0"),
    ("text_config.rope_parameters", "mrope_interleaved", True, "false"),
    ("text_config", "rope_scaling", {"type": "yarn", "factor": 4}, "null"),
    ("text_config", "partial_rotary_factor", 0.5, "1"), ("text_config", "hidden_act", "gelu", '"'),
    ("text_config", "attention_bias", True, "false"), ("text_config", "sliding_window", 128, "nu"),
    ("text_config", "tie_word_embeddings", True, "false"), ("", "tie_word_embeddings", True, "f"),
    ("text_config", "attention_dropout", 0.1, "0.0"), ("text_config", "model_type", "qwen2", '"g'),
    ("", "model_type", "qwen2_vl", '"glm_ocr"'), ("", "architectures", ["LlavaModel"], "["),
    ("", "quantization_config", {"quant_method": "fp8"}, "null"),
    ("vision_config", "hidden_act", "gelu", '"silu"'), ("vision_config", "in_channels", 1, "3"),
    ("vision_config", "spatial_merge_size", 4, "2"), ("vision_config", "window_size", 112, "null"),
    ("vision_config", "temporal_patch_size", 1, "2"), ("vision_config", "rope_theta", 100, "100"),
    ("vision_config.rope_parameters", "rope_type", "yarn", '["axial", "default"]'),
    ("vision_config.rope_parameters", "rope_theta", 100.0, "10000.0"),
    ("text_config", "num_nextn_predict_layers", 2, "[0, 1, null]"),
    ("vision_config", "model_type", "siglip", '"glm_ocr_vision"')])
def test_what_is_not_built_is_refused_by_name(model, tmp_path, section, name, value, built):
    save_model(model, tmp_path)
    (tmp_path / "digests.json").unlink()
    raw = inner = json.loads((tmp_path / "config.json").read_text())
    for part in filter(None, section.split(".")):
        inner = inner.setdefault(part, {})
    inner[name] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    where = f"{section}.{name}".lstrip(".")
    said = refused(load_model, tmp_path)
    assert f"{where} is {json.dumps(value)[:60]}; only {built}" in said and "is built" in said


RELEASED = {    # GLM-OCR's config.json without its ids [R]
    "architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr",
    "image_token_id": 59280, "tie_word_embeddings": False, "transformers_version": "5.0.1dev0",
    "text_config": {
        "model_type": "glm_ocr_text", "vocab_size": 59392, "hidden_size": 1536,
        "intermediate_size": 4608, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 131072,
        "initializer_range": 0.02, "num_nextn_predict_layers": 1, "pad_token_id": 59246,
        "eos_token_id": [59246, 59253], "tie_word_embeddings": False, "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000,
                            "partial_rotary_factor": 1.0, "mrope_section": [16, 24, 24]}},
    "vision_config": {
        "model_type": "glm_ocr_vision", "depth": 24, "hidden_size": 1024, "num_heads": 16,
        "intermediate_size": 4096, "hidden_act": "silu", "attention_bias": True, "patch_size": 14,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 1536,
        "image_size": 336, "rms_norm_eps": 1e-05, "initializer_range": 0.02}}


def test_the_released_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 12544, "longest_edge": 9633792}, "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2, "do_rescale": True, "image_mean": list(MEAN),
        "image_std": list(STD)}))
    assert load_config(tmp_path) == Config(mrope=(16, 24, 24))


@pytest.mark.parametrize("n_ranks", [1, 255, 4097])
def test_ranks_that_our_file_does_not_have(model, tmp_path, n_ranks):
    save_model(model, tmp_path)
    (tmp_path / "digests.json").unlink()
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["vocab_size"], raw["nanoglmv"]["n_ranks"] = 5000, n_ranks
    raw["image_token_id"] = n_ranks + SPECIAL.index("<|image|>")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert f"n_ranks is {n_ranks}; it must be 0, or 256 to 4096" in refused(load_config, tmp_path)


def leaves(values, path=()):
    """The path of each value in nested objects and lists, those of the objects included."""
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, name))


ODD = (-1, 0, 0.5, 10 ** 9, 10 ** 400, "x", None, [], {}, True, math.inf, math.nan)
OTHER_MODEL = {"rms_norm_eps", "rope_theta"}     # numbers that no weights can contradict


@torch.no_grad()
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_an_odd_value_is_refused_or_changes_nothing(model, tmp_path, file):
    save_model(model, tmp_path)
    (tmp_path / "digests.json").unlink()
    same, batch = load_config(tmp_path), collate([random_document(model.config)], model.config)
    want = model(batch, model.encode_images(batch))
    text = (tmp_path / file).read_text()
    for path in leaves(json.loads(text)):
        for odd in ODD:
            raw = inner = json.loads(text)
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = odd
            (tmp_path / file).write_text(json.dumps(raw))
            try:
                if load_config(tmp_path) == same or path[-1] in OTHER_MODEL:
                    continue            # a field that we do not read, or its own value
                loaded = load_model(tmp_path)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 600, (path, odd)
                continue
            assert torch.equal(want, loaded(batch, loaded.encode_images(batch))), (path, odd)
