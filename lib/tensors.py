"""Tensors on disk: the safetensors format, in fifty lines.

A file is 8 bytes with the length n of the header (little-endian), n bytes of JSON, then raw data:

    {"__metadata__": {"format": "pt"},
     "lm_head.weight": {"dtype": "F32", "shape": [544, 96], "data_offsets": [0, 208896]}, ...}

Offsets count bytes from the end of the header. There is no code in such a file, so that opening
one from the internet is safe, unlike a pickle.
"""
import json
import os
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
    data = bytearray(path.read_bytes())
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:8 + length]).decode())
        header.pop("__metadata__", None)
        raw, tensors = memoryview(data)[8 + length:], {}
        for name, item in header.items():
            start, stop = item["data_offsets"]
            if not 0 <= start <= stop <= len(raw):
                raise ValueError(f"{name} lies beyond the end of the file")
            flat = torch.empty(0, dtype=DTYPES[item["dtype"]])
            if stop > start:            # frombuffer refuses an empty buffer
                flat = torch.frombuffer(raw[start:stop], dtype=torch.uint8).clone().view(flat.dtype)
            tensors[name] = flat.view(item["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error})") from None


def load_shards(index: Path) -> dict[str, torch.Tensor]:
    """Read all files that an index names: {"weight_map": {tensor's name: file's name}}."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged or no index of shards ({error!r})") from None
    tensors = {}
    for shard in shards:
        tensors |= load_tensors(index.parent / shard)
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
