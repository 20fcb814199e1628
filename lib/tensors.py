"""Tensors on disk: the safetensors format, a JSON header and raw bytes."""
import json
import os
from pathlib import Path

import torch

from lib.cli import UserError


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
           "U8": torch.uint8, "BOOL": torch.bool}


def save_tensors(path, tensors: dict[str, torch.Tensor]):
    """Write `tensors` as one .safetensors file, in the order given."""
    names, offset = {v: k for k, v in _DTYPES.items()}, 0
    header = {"__metadata__": {"format": "pt"}}
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of eight
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path) -> dict[str, torch.Tensor]:
    """Read a .safetensors file, or every shard that `model.safetensors.index.json` names.

    path: the file, or the folder it is in. Raises UserError on a missing or damaged file.
    """
    path = Path(path)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged or no index of shards ({error!r})") from None
            return {k: v for shard in shards for k, v in load_tensors(path / shard).items()}
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
            empty = torch.empty(0, dtype=_DTYPES[item["dtype"]])
            flat = (torch.frombuffer(raw[start:stop], dtype=torch.uint8).clone().view(empty.dtype)
                    if stop > start else empty)
            tensors[name] = flat.view(item["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error})") from None


def check_shapes(complaint: str, want: dict[str, torch.Tensor], have: dict[str, torch.Tensor]):
    """Raise UserError, which begins with `complaint`, unless names and shapes are the same."""
    wanted, found = ({k: tuple(v.shape) for k, v in side.items()} for side in (want, have))
    odd = [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
    if odd:
        raise UserError(f"{complaint}; {len(odd)} tensors differ, {odd[0]} first: expected "
                        f"{wanted.get(odd[0], 'nothing')}, found {found.get(odd[0], 'nothing')}")
