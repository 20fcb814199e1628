"""Chatting with saved folders by transformers alone, in a process of its own.

    python tests/hub_peer.py JOB.json RESULT.pt

transformers' processor needs torchvision, which `make .venv/peers` puts into a folder of its own.
On a CPU build of torch, a wheel that was made for CUDA can't load its operators and fails where it
adds to them; so these are declared first, and never called. Other tests do not see any of this.
"""
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TORCHVISION = Path(__file__).resolve().parent.parent / ".venv" / "torchvision"
MISSING = 77        # the exit code where torchvision is not installed


def import_torchvision():
    """Import torchvision. Returns what must be kept: its operators go when that goes."""
    sys.path.append(str(TORCHVISION))
    try:
        import torchvision      # noqa: F401
    except ImportError:
        sys.exit(MISSING)
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision      # noqa: F401
        return library


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that resizing has something to compute."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (1 + height // 7, 1 + width // 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def opened(talk: list) -> list:
    """A conversation with its pictures opened by Pillow: torchvision's decoder is one of those
    operators."""
    def part_of(part):
        if not isinstance(part, dict) or part["type"] != "image":
            return part
        data = base64.b64decode(part["url"].partition(",")[2])
        return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}
    return [turn | {"content": [part_of(part) for part in turn["content"]]}
            if isinstance(turn["content"], list) else turn for turn in talk]


def chat(folder: str, talks: dict, most: int) -> dict:
    """{name: {"inputs", "reply", "greedy", "text"}} of talks that end with a question: what the
    processor makes of them, the ids of the reply, `most` ids where nothing ends it, its text."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    stops, found = model.generation_config.eos_token_id, {}
    for name, talk in talks.items():
        inputs = processor.apply_chat_template(opened(talk), add_generation_prompt=True,
                                               tokenize=True, return_dict=True,
                                               return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        reply = greedy = model.generate(**inputs, max_new_tokens=most)[0, length:]
        if len(reply) < most:
            model.generation_config.eos_token_id = None
            greedy = model.generate(**inputs, max_new_tokens=most)[0, length:]
            model.generation_config.eos_token_id = stops
        found[name] = {"inputs": dict(inputs), "reply": reply.tolist(), "greedy": greedy.tolist(),
                       "text": processor.decode(reply, skip_special_tokens=True)}
    return found


def plain_marks(folder: str, text: str) -> list[int]:
    """The ids of a message in which the names of special tokens stay text."""
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained(folder)
    made = processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True,
                                         return_dict=True, sanitize_control_tokens=True)
    ids = made["input_ids"]
    return ids[0] if isinstance(ids[0], list) else ids


def pixels(folder: str, sizes: list) -> list:
    """(pixels, grid) of pictures of these sizes, by the processor that works with torchvision."""
    from transformers import AutoImageProcessor
    processor = AutoImageProcessor.from_pretrained(folder)
    made = [processor(images=[picture(*size)], return_tensors="pt") for size in sizes]
    return [(one["pixel_values"], one["image_grid_thw"]) for one in made]


if __name__ == "__main__":
    kept = import_torchvision()
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.save({"chats": {folder: chat(folder, talks, job["most"])
                          for folder, talks in job["chats"].items()},
                "plain": plain_marks(*job["plain"]),
                "pixels": [pixels(*one) for one in job["pixels"]]}, sys.argv[2])
