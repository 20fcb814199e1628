"""Checkpoint folders in GLM-OCR's format, read and written: whole models and vision towers.

    config.json                 sizes, special tokens; ours has a section `nanoglmv` [O]
    preprocessor_config.json    limits of an image's size; processor_config.json in some folders [R]
    tokenizer.json, ...         what transformers and vLLM need to chat, see lib/hub.py
    model.safetensors           weights, or several files and an index [R]
    train.pt                    in a run's step_ folders: what is needed to resume
    digests.json                SHA-256 of these files, see lib/tensors.py
"""
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch import nn, Tensor

import mmtp
from lib.cli import UserError
from lib.common import first_sentence, write_json
from lib.hub import CLASSES, save_hub_files
from lib.lora import merged
from lib.runs import checkpoints, step_of
from lib.tensors import (check_digest, check_shapes, checked, is_whole, load_tensors, save_tensors,
                         shown, write_digests)
from model import Config, GLMV, TextConfig
from tokenizer import N_RANKS, SPECIAL, tokenizer_of
from vit import CogViT, MEAN, STD, VitConfig


# ---- a whole model ------------------------------------------------------------------------------

def load_model(folder, device="cpu", dtype=torch.float32) -> GLMV:
    """Load the model in a folder, with its MTP head if there is one.

    The head is recognised by the names of its tensors, since a released config.json may say
    `num_nextn_predict_layers: 0` although the layer is there [R]. Raises UserError if a file is
    missing or damaged, or if config.json describes another model than the weights.
    """
    config, tensors = load_config(folder), load_tensors(folder)
    with torch.device("meta"):
        model = GLMV(config)
    prefix = mmtp.prefix(model)
    trunk = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    check_shapes(f"{folder}: the weights are not of the model that config.json describes",
                 model.state_dict(), trunk)
    model = model.to_empty(device=device).to(dtype)
    model.load_state_dict(trunk, strict=True)
    model.model.visual.patch_embed.set_normalisation()
    if len(trunk) < len(tensors):
        load_head(model, {k.removeprefix(prefix): v for k, v in tensors.items()
                          if k.startswith(prefix)}, trunk, folder)
    return model


def load_head(model: GLMV, own: dict[str, Tensor], trunk: dict[str, Tensor], folder):
    """Attach an MTP head to `model` and load the tensors `own` into it. trunk: all other tensors.

    Released checkpoints store an embedding and an output matrix for the head as well [R]. If they
    equal those of the trunk, the head uses the trunk's; otherwise it keeps its own. Raises
    UserError if names or shapes are wrong.
    """
    head = mmtp.attach(model, model.config.mtp_depths or 3)     # 3, where no file says it [C]
    for name, of_trunk in (("embed_tokens", "model.language_model.embed_tokens.weight"),
                           ("shared_head.head", "lm_head.weight")):
        copy = own.get(name + ".weight")
        if copy is None or copy.shape != trunk[of_trunk].shape:     # refused below
            continue
        if torch.equal(copy, trunk[of_trunk]):
            del own[name + ".weight"]
        elif name == "embed_tokens":
            head.embed_tokens = nn.Embedding(*copy.shape)
        else:
            head.shared_head.head = nn.Linear(*copy.shape[::-1], bias=False)
    head.to(model.lm_head.weight.device, model.lm_head.weight.dtype)
    check_shapes(f"{folder}: the tensors of the MTP layer {mmtp.prefix(model)}* are not of the "
                 "model that config.json describes", head.state_dict(), own)
    head.load_state_dict(own)


def save_model(model: GLMV, folder, dtype=torch.float32, weights: dict | None = None):
    """Write config.json, preprocessor_config.json, model.safetensors and the files of lib/hub.py to
    `folder`. weights: values to save instead of the model's own, for example the optimizer's fp32
    masters. Low-rank matrices (lib/lora.py) are merged into those beside which they are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # On the CPU: a GPU that holds the model in bf16 may have no room for a copy in fp32.
    state = {k: v.cpu() for k, v in {**model.state_dict(), **(weights or {})}.items()}
    save_tensors(folder / "model.safetensors", {k: v.to(dtype) for k, v in merged(state).items()})
    has_head = mmtp.head_of(model) is not None
    config = model.config if has_head else dataclasses.replace(model.config, mtp_depths=0)
    save_config(config, folder, str(dtype).removeprefix("torch."))
    save_hub_files(config, folder)
    write_digests(folder)


# ---- starting and resuming a training -----------------------------------------------------------

def start_from(folder, optimizer):
    """Set the optimizer's fp32 masters to the weights in `folder`. The model itself may be in bf16,
    which would give them rounded values. Parameters that the file lacks (a new head) stay."""
    optimizer.load_masters(load_tensors(folder))


def restore(folder, module: nn.Module, optimizer=None, train: str = "all") -> dict:
    """Resume from the checkpoint `folder`: load the module and the optimizer, if this rank has one,
    and return what else the script has saved in train.pt (step, args, ...). train: the option
    --train, of what learns in `module`. Raises UserError if a file is damaged, comes from an
    earlier version, or from a run in which something else learned."""
    folder = Path(folder)
    with errors_of_resuming(folder):
        check_digest(folder / "train.pt")
        # To the CPU: of the optimizer's state, each rank takes its share to the device.
        state = torch.load(folder / "train.pt", map_location="cpu", weights_only=True)
        saved, begun = state.pop("optimizer"), state.get("args", {}).get("train", "all")
    if begun != train:
        raise UserError(f"{folder} is of a run with --train={begun}: resume it with the same, or "
                        f"start from its weights with --init={folder}")
    if "adam" in saved:         # the state of AdamW as torch numbers its parameters
        raise UserError(f"{folder} holds the optimizer of an earlier version, which can't be "
                        f"resumed; --init={folder} starts from its weights")
    with errors_of_resuming(folder):
        # With LoRA, train.pt holds the frozen matrices too, and the low-rank ones that learn.
        weights = {**load_tensors(folder), **state.pop("unmerged", {})}
        module.load_state_dict(weights)
        if optimizer:
            optimizer.load_state_dict(saved)
            optimizer.load_masters(weights)
    return state


@contextlib.contextmanager
def errors_of_resuming(folder: Path):
    """Turn any error of reading the checkpoint `folder` into a UserError that says how to go on."""
    try:
        yield
    except Exception as error:  # torch.load reports damage by some ten types of exception
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_sentence(error)
        raise UserError(f"{folder} can't be resumed ({reason}); {advice(folder)}") from None


def advice(folder: Path) -> str:
    """How to go on with a run whose newest checkpoint `folder` is damaged."""
    earlier = [p for p in checkpoints(folder.parent) if step_of(p) < step_of(folder)]
    if not earlier:
        return "without --resume the run begins again"
    whole = next((p for p in reversed(earlier) if is_whole(p)), earlier[-1])
    later = [str(p) for p in earlier if step_of(p) > step_of(whole)]
    return f"remove {' and '.join(['it', *later])} to go on from {whole}"


# ---- a vision tower -----------------------------------------------------------------------------

def tower_weights(folder) -> dict[str, Tensor]:
    """The weights of a vision tower, without its adapter, from a checkpoint of train_vit.py or of a
    whole model. Raises UserError if the folder has none."""
    tensors = load_tensors(folder)
    prefix = next((p for p in ("visual.", "model.visual.")
                   if p + "post_layernorm.weight" in tensors), None)
    if prefix is None:
        raise UserError(f"{folder} holds no vision tower")
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v for k, v in found.items() if not k.startswith(("downsample.", "merger."))}


def load_tower(visual: CogViT, folder):
    """Load the tower in `folder` into `visual`, whose adapter stays. Raises UserError if its sizes
    are others."""
    have = tower_weights(folder)
    want = {k: v for k, v in visual.state_dict().items()
            if not k.startswith(("downsample.", "merger."))}
    check_shapes(f"the tower in {folder} is not of this model's sizes", want, have)
    visual.load_state_dict(have, strict=False)


def export_tower(folder: Path, to: Path):
    """Write the tower of a checkpoint of train_vit.py to the folder `to`, in bf16 and without the
    rest of that checkpoint."""
    check_digest(folder / "config.json")
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "config.json", to)
    save_tensors(to / "model.safetensors", {
        f"visual.{name}": value.bfloat16() for name, value in tower_weights(folder).items()})
    write_digests(to)


# ---- config.json --------------------------------------------------------------------------------

def save_config(config: Config, folder, dtype: str = "float32"):
    """Write config.json and preprocessor_config.json as GLM-OCR has them [R], and what only we need
    in a section `nanoglmv`. dtype: the name of the weights' dtype."""
    c, v = config.text, config.vision
    text = dataclasses.asdict(c) | {
        "model_type": "glm_ocr_text", "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": False, "dtype": dtype, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta,
                            "partial_rotary_factor": 1.0, "mrope_section": list(config.sections)}}
    text.pop("rope_theta")
    if config.mtp_depths:
        text["num_nextn_predict_layers"] = 1        # one physical layer, whatever the depth
    ids = {"image_token_id": config.image_token_id}
    if config.n_ranks or config.vocabulary:
        tokens = tokenizer_of(config)
        text["eos_token_id"] = list(tokens.stops)
        ids |= {field: tokens.special[name] for field, name in (
            ("video_token_id", "<|video|>"), ("image_start_token_id", "<|begin_of_image|>"),
            ("image_end_token_id", "<|end_of_image|>"),
            ("video_start_token_id", "<|begin_of_video|>"),
            ("video_end_token_id", "<|end_of_video|>")) if name in tokens.special}
    vision = dataclasses.asdict(v) | {"model_type": "glm_ocr_vision", "hidden_act": "silu"}
    write_json(Path(folder) / "config.json", {
        "architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr", **ids,
        "tie_word_embeddings": False, "dtype": dtype, "text_config": text,
        "vision_config": vision,
        "nanoglmv": {"n_ranks": config.n_ranks, "mtp_depths": config.mtp_depths}})
    pixels = pixels_per_token(v)
    write_json(Path(folder) / "preprocessor_config.json", {
        "size": {"shortest_edge": config.min_tokens * pixels,
                 "longest_edge": config.max_tokens * pixels},
        "patch_size": v.patch_size, "temporal_patch_size": v.temporal_patch_size,
        "merge_size": v.spatial_merge_size, "do_rescale": True,
        "image_mean": list(MEAN), "image_std": list(STD), **CLASSES})


def pixels_per_token(v: VitConfig) -> int:
    """Pixels that one visual token stands for, in both frames: the unit of the limits of an image's
    size in preprocessor_config.json [R]."""
    return v.temporal_patch_size * (v.patch_size * v.spatial_merge_size) ** 2


@contextlib.contextmanager
def one_line_errors(path: Path):
    """Turn the errors of reading the JSON file `path` into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}") from None
    except KeyError as error:
        raise UserError(f"{path} does not describe a model: {error} is missing") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not describe a model: {error}") from None


# Fields that change the computation, with the only value for which it is built here, or a tuple of
# several. A file may leave them out.
BUILT = {
    "architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr",
    "tie_word_embeddings": False, "quantization_config": None,
    "text_config": {
        "model_type": "glm_ocr_text", "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": False, "rope_scaling": None,
        "partial_rotary_factor": 1.0, "sliding_window": None, "use_sliding_window": False,
        "num_nextn_predict_layers": (0, 1, None),
        "rope_parameters": {"rope_type": "default", "type": "default",
                            "partial_rotary_factor": 1.0, "mrope_interleaved": False}},
    "vision_config": {
        "model_type": "glm_ocr_vision", "hidden_act": "silu", "attention_dropout": 0.0,
        "in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "rope_theta": 10000.0, "window_size": None,
        "rope_parameters": {"rope_type": ("axial", "default"), "rope_theta": 10000.0,
                            "partial_rotary_factor": 1.0}},
    "nanoglmv": {}}
BUILT_PICTURES = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": list(MEAN), "image_std": list(STD), "resample": 3, "size": {},
    "merge_size": 2, "temporal_patch_size": 2}


def check_built(values: dict, built: dict, section: str = ""):
    """Raise ValueError if a field of `values` has another value than in `built`."""
    for name in built.keys() & values.keys():
        value, wanted = values[name], built[name]
        if isinstance(wanted, dict):
            value = {} if value is None else value      # null is as if it were left out
            if not isinstance(value, dict):
                raise ValueError(f"{section}{name} is no JSON object")
            check_built(value, wanted, f"{section}{name}.")
        elif value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise ValueError(f"{section}{name} is {shown(value)}; only {shown(wanted)} is built")


def check_relations(config: Config):
    """Raise ValueError if sizes of `config`, each of them possible, do not fit together."""
    text, vision = config.text, config.vision
    image_id = config.n_ranks + SPECIAL.index("<|image|>")
    for holds, message in (
        (text.num_attention_heads % text.num_key_value_heads == 0,
         "text_config.num_attention_heads is no multiple of num_key_value_heads"),
        (text.head_dim % 2 == 0, "text_config.head_dim is odd"),
        (vision.hidden_size % (4 * vision.num_heads) == 0,
         f"vision_config.hidden_size is no multiple of 4 * num_heads, {4 * vision.num_heads}"),
        (vision.out_hidden_size == text.hidden_size,
         "vision_config.out_hidden_size is not text_config.hidden_size"),
        (config.image_token_id < text.vocab_size, "image_token_id is not below vocab_size"),
        (config.n_ranks == 0 or 256 <= config.n_ranks <= N_RANKS,
         f"nanoglmv.n_ranks is {config.n_ranks}; it must be 0, or 256 to {N_RANKS}"),
        (not config.n_ranks or config.image_token_id == image_id,
         f"image_token_id is not {image_id}, as nanoglmv.n_ranks {config.n_ranks} says")):
        if not holds:
            raise ValueError(message)


def read_fields(path: Path) -> dict:
    """The JSON object in the file `path`, which is compared with its digest."""
    check_digest(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    return values


def read_limits(folder: Path, config: Config):
    """Set the limits of an image's size in `config` from preprocessor_config.json, or from the part
    of processor_config.json where transformers 5 writes the same [R]; a folder without these files
    has the limits that `config` has. Raises UserError where the file is damaged or another
    preprocessing than ours."""
    path = folder / "preprocessor_config.json"
    check_digest(path)
    if not path.exists():
        path = folder / "processor_config.json"
    if not path.exists():
        return
    with one_line_errors(path):
        raw = read_fields(path)
        if path.name == "processor_config.json":
            raw = raw["image_processor"]
        check_built(raw, BUILT_PICTURES)
        patch = config.vision.patch_size
        if raw.get("patch_size", patch) != patch:
            raise ValueError(f"patch_size is {shown(raw['patch_size'])}; config.json says {patch}")
        size, pixels = raw["size"], pixels_per_token(config.vision)
        for name in ("shortest_edge", "longest_edge"):
            if type(size[name]) is not int or size[name] < 1:
                raise ValueError(f"size.{name} is {shown(size[name])}; it must be an integer "
                                 "above 0")
        config.min_tokens = max(1, size["shortest_edge"] // pixels)
        config.max_tokens = size["longest_edge"] // pixels
        most = config.text.max_position_embeddings
        if not config.min_tokens <= config.max_tokens <= most:
            raise ValueError(f"size allows {config.min_tokens} to {config.max_tokens} tokens "
                             f"an image, of at most {most} (max_position_embeddings)")


def find_vocabulary(folder: Path, config: Config):
    """Set `config.vocabulary` where the folder has a tokenizer that is not ours, and read it.
    Raises UserError where it is damaged or not of this model."""
    path = folder / "tokenizer.json"
    if config.n_ranks or not path.is_file():
        return
    check_digest(path)
    config.vocabulary = str(path.absolute())
    tokens = tokenizer_of(config)
    if tokens.image != config.image_token_id or tokens.vocab_size > config.text.vocab_size:
        raise UserError(f"{path} is not of the model in {folder / 'config.json'}: the id of "
                        f"<|image|> is {tokens.image}, not {config.image_token_id}, or its "
                        f"{tokens.vocab_size} ids are more than vocab_size")


def load_config(folder) -> Config:
    """Read config.json, preprocessor_config.json and a released tokenizer.json; of these only the
    first must be there.

    Fields that change the computation in a way that is not built here are refused, others that we
    do not know are ignored. Raises UserError if a file is missing, damaged, or of another format.
    """
    path = Path(folder) / "config.json"
    with one_line_errors(path):
        raw = read_fields(path)
        check_built(raw, BUILT)
        text, ours = raw["text_config"], raw.get("nanoglmv", {})
        rope = text.get("rope_parameters") or {}
        config = checked(Config, {"image_token_id": raw["image_token_id"], **{
            name: ours[name] for name in ("n_ranks", "mtp_depths") if name in ours}})
        config.text = checked(TextConfig, {**text, **rope}, "text_config.")
        config.vision = checked(VitConfig, raw["vision_config"], "vision_config.")
        if "mrope_section" in rope:
            section = rope["mrope_section"]
            if not (isinstance(section, list) and [type(n) for n in section] == [int] * 3
                    and min(section) > 0 and sum(section) == config.text.head_dim // 2):
                raise ValueError(f"mrope_section is {shown(section)}; it must be three integers "
                                 "above 0 that add up to half of head_dim")
            config.mrope = tuple(section)
        check_relations(config)
    read_limits(Path(folder), config)
    find_vocabulary(Path(folder), config)
    return config
