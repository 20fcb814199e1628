"""What a checkpoint folder stands on: the safetensors format, digests that show whether a file is
damaged, and checked fields of a config.json.

A file is 8 bytes with the length n of the header (little-endian), n bytes of JSON, then raw data:

    {"__metadata__": {"format": "pt"},
     "lm_head.weight": {"dtype": "F32", "shape": [544, 96], "data_offsets": [0, 208896]}, ...}

Offsets count bytes from the end of the header. There is no code in such a file, so that opening
one from the internet is safe, unlike a pickle.

A disk or a copy can change a bit of a file without an error. Therefore a checkpoint folder holds a
digests.json, {file's name: SHA-256}; a file that it lists is compared with its digest when it is
loaded. Folders without it, like those from the internet, load unchecked.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
from pathlib import Path

import torch

from lib.cli import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def save_tensors(path, tensors: dict[str, torch.Tensor]):
    """Write `tensors` as one .safetensors file, in the order given."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)     # the data starts on a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            # numpy has no bfloat16, but every dtype can be viewed as bytes.
            flat = t.detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())         # on the disk, before the folder gets its final name


def load_tensors(path) -> dict[str, torch.Tensor]:
    """Read a .safetensors file, or every shard that `model.safetensors.index.json` names.

    path: the file, or the folder it is in. Raises UserError on a missing or damaged file.
    """
    path = Path(path)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.exists():
            return load_shards(index)
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    check_digest(path)
    data = bytearray(path.read_bytes())
    try:
        header, start = read_header(path, data)
        raw, tensors = memoryview(data)[start:], {}
        for name, item in header.items():
            start, stop = item["data_offsets"]
            flat = torch.empty(0, dtype=DTYPES[item["dtype"]])
            if stop > start:            # frombuffer refuses an empty buffer
                flat = torch.frombuffer(raw[start:stop], dtype=torch.uint8).clone().view(flat.dtype)
            tensors[name] = flat.view(item["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({str(error)[:200]})") from None


def read_header(path: Path, data: bytearray) -> tuple[dict, int]:
    """The header of a .safetensors file without its metadata, and where the raw data starts.

    Raises ValueError, KeyError or TypeError unless the tensors fill the raw data without gap or
    overlap, and UserError if a dtype is not in DTYPES.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < max(8, start):
        raise ValueError("the header is cut off")
    header = json.loads(bytes(data[8:start]).decode(), object_pairs_hook=without_repeats)
    if not isinstance(header, dict):
        raise TypeError("the header is no JSON object")
    header.pop("__metadata__", None)
    for name, item in header.items():
        numbers = [*item["shape"], *item["data_offsets"]]
        if not name.isprintable() or len(item["data_offsets"]) != 2 or any(
                type(n) is not int or not 0 <= n < 2 ** 63 for n in numbers):
            raise ValueError(f"{name!r} has an impossible name, shape or offset")
        if item["dtype"] not in DTYPES:
            kind = "FP8 weights" if str(item["dtype"]).startswith("F8_") else "weights of a dtype"
            raise UserError(f"{path} holds {kind} ({str(item['dtype'])[:20]}) that can't be read "
                            "here; convert them to BF16 first")
    end = 0                             # of the tensors so far, in the order of the raw data
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        size = math.prod(item["shape"]) * DTYPES[item["dtype"]].itemsize
        if item["data_offsets"] != [end, end + size]:
            raise ValueError(f"{name} is not at bytes {end} to {end + size}, where it belongs")
        end += size
    if end != len(data) - start:
        raise ValueError(f"{len(data) - start} bytes of data, where the header describes {end}")
    return header, start


def without_repeats(pairs: list[tuple]) -> dict:
    """A JSON object as a dict. Raises ValueError if a name occurs twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def load_shards(index: Path) -> dict[str, torch.Tensor]:
    """Read all files that an index names: {"weight_map": {tensor's name: file's name}}."""
    check_digest(index)
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(shard).name != shard or (index.parent / shard).is_dir() for shard in shards):
            raise ValueError("a shard is not a file in the same folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged or no index of shards ({error!r})") from None
    tensors = {}
    for shard in shards:
        more = load_tensors(index.parent / shard)
        if twice := tensors.keys() & more.keys():
            raise UserError(f"{index.parent / shard} repeats {min(twice)} of another shard")
        tensors |= more
    return tensors


def check_shapes(complaint: str, want: dict[str, torch.Tensor], have: dict[str, torch.Tensor]):
    """Raise UserError, with a message that begins with `complaint`, unless both have the same names
    and shapes."""
    wanted = {name: tuple(t.shape) for name, t in want.items()}
    found = {name: tuple(t.shape) for name, t in have.items()}
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if different:
        first = different[0]
        raise UserError(f"{complaint}; {len(different)} tensors differ, {first} first: expected "
                        f"{wanted.get(first, 'nothing')}, found {found.get(first, 'nothing')}")


# ---- digests ------------------------------------------------------------------------------------

DIGESTED = ("*config.json", "*.index.json", "*.safetensors", "*.pt")     # what loading reads


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder):
    """Write digests.json, with the digest of each file in `folder` that loading reads."""
    folder = Path(folder)
    files = sorted(path for pattern in DIGESTED for path in folder.glob(pattern))
    with open(folder / "digests.json", "w", encoding="utf-8") as file:
        json.dump({path.name: digest(path) for path in files}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_digests(folder: Path) -> dict[str, str]:
    """{file's name: digest}; {} where there is no digests.json."""
    path = folder / "digests.json"
    try:
        wanted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(wanted, dict) or any("/" in name for name in wanted):
            raise ValueError("it does not list files of this folder")
        return wanted
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged; remove it to load the files unchecked") from None


def is_whole(folder: Path) -> bool:
    """Whether `folder` has a digests.json and all files that it lists, unchanged."""
    try:
        wanted = read_digests(folder)
        return bool(wanted) and all(digest(folder / name) == value
                                    for name, value in wanted.items())
    except (UserError, OSError, ValueError):
        return False


def newest_whole(run: Path) -> Path | None:
    """The newest step_NNNNNN folder of a run that is whole."""
    steps = {int(path.name[5:]): path for path in run.glob("step_*")
             if re.fullmatch("step_[0-9]+", path.name)}
    return next((steps[n] for n in sorted(steps, reverse=True) if is_whole(steps[n])), None)


def check_digest(path: Path):
    """Raise UserError if the file `path` is missing, or differs from its digest, where digests.json
    beside it has one. The message names the newest checkpoint of the same run that is whole."""
    wanted = read_digests(path.parent).get(path.name)
    if wanted is None or path.is_file() and digest(path) == wanted:
        return
    fault = "damaged (its digest differs)" if path.is_file() else "missing (digests.json lists it)"
    advice = ""
    if path.suffix == ".json":
        advice = f"; if you have changed it, remove {path.parent / 'digests.json'}"
    if whole := newest_whole(path.parent.parent):
        advice += f"; the newest whole checkpoint is {whole}"
    raise UserError(f"{path} is {fault}{advice}")


# ---- fields of a config.json --------------------------------------------------------------------

MOST = {"depth": 1000, "num_hidden_layers": 1000, "mtp_depths": 1000, "mlp_ratio": 1000,
        "rms_norm_eps": 1, "layer_norm_eps": 1, "rope_theta": 1e12}


def checked(kind, values: dict, section: str = ""):
    """An instance of the dataclass `kind` with the values of a section of a config.json; others
    than its fields are ignored. Raises ValueError unless a value has the field's type and is above
    0, or 0 where that is the default, and at most MOST."""
    known = {}
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value, most = values[field.name], MOST.get(field.name, 2 ** 24)
        if field.type in (int, float):
            wanted = f"{field.type.__name__}, above 0 and at most {most:,}"
            right = type(value) in (int, field.type) and (
                0 < value <= most or value == field.default == 0)
        else:
            wanted, right = field.type.__name__, type(value) is field.type
        if not right:
            raise ValueError(f"{section}{field.name} is {shown(value)}; it must be {wanted}")
        known[field.name] = field.type(value)
    return kind(**known)


def shown(value) -> str:
    """A value of a JSON file as a part of a message."""
    return json.dumps(value)[:60]
