"""A released folder in our code and in transformers: do both compute the same?

    python -m lab.verify --ckpt=FOLDER                      GLM-OCR's folder, as it is released
    python -m lab.verify --ckpt=FOLDER --image=page.png --dtype=bfloat16
    python -m lab.verify --ckpt=FOLDER --device=cuda

It compares the ids of many strings, the prompts that the chat template makes, the pixels of a
picture, the logits at every position of a prompt with that picture, and greedy replies to it: plain
ones, and with drafts of the MTP layer. transformers does not run that layer; but drafts must not
change a reply, and where they are good, a step gives more than one token. Replies may part where
the two best logits are nearly equal.

The result is a table, and one line with all figures. Please send this line to us, whatever it says:
our code has not yet been run on the released weights. It needs requirements-peers.txt, and in fp32
8.2 GB of memory (measured with random weights of GLM-OCR's sizes).
"""
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import mmtp
from data import collate, document, unit_of
from engine import Engine, Request
from lib.checkpoint import load_config, load_model
from lib.cli import cli, Device, Dtype, main, Positive, UserError
from lib.common import ROOT, setup
from lib.images import open_image
from lib.runs import find_checkpoint
from model import Config
from tasks.base import IMAGE, Message
from tokenizer import CORPUS, Tokenizer, tokenizer_of
from vit import MEAN, STD

STRINGS = 600       # texts whose ids are compared
# Largest difference of a logit, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass
class Args:
    ckpt: str = ""             # a folder as it is released, with its tokenizer.json
    image: str = ""            # a picture; default: docs/example.png
    question: str = "Text Recognition:"     # what is asked about it
    max_new: Positive = 32     # tokens of the replies that are compared
    device: Device = "cpu"     # auto, cpu, cuda or mps
    dtype: Dtype = "float32"   # auto, float32 or bfloat16


# ---- transformers -------------------------------------------------------------------------------

def peers():
    """The model class, the tokenizer class and the image processor class of transformers. Raises
    UserError where it is missing, or too old to have them."""
    try:
        from transformers import AutoTokenizer, GlmOcrForConditionalGeneration
        from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f"lab.verify compares with transformers ({error}): "
                        "pip install -r requirements-peers.txt") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return GlmOcrForConditionalGeneration, AutoTokenizer, Glm46VImageProcessorPil


def their_prompt(theirs, chat: list[dict], image_id: int, slots: list[int]) -> list[int]:
    """The ids of a conversation by the folder's template, up to where the reply begins. slots: how
    many visual tokens each picture gets; the processor repeats the one that the template writes."""
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids, slots = [], iter(slots)
    for i in theirs(text, add_special_tokens=False)["input_ids"]:
        ids += [i] * next(slots) if i == image_id else [i]
    return ids


@torch.no_grad()
def their_results(model_class, folder: Path, prompt, made, stops, args: Args, hw):
    """transformers' logits (T, V) at the prompt and its greedy reply. made: the picture as its
    image processor returned it."""
    model = model_class.from_pretrained(folder, dtype=hw.dtype).eval().to(hw.device)
    ids = torch.tensor([prompt.ids.tolist()], device=hw.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == model.config.image_token_id).int(),
              "pixel_values": made["pixel_values"].to(hw.device, hw.dtype),
              "image_grid_thw": made["image_grid_thw"].to(hw.device)}
    logits = model(**inputs).logits[0].float().cpu()
    reply = model.generate(**inputs, max_new_tokens=args.max_new, do_sample=False,
                           eos_token_id=list(stops), pad_token_id=stops[0])
    return logits, reply[0, ids.shape[1]:].tolist()


# ---- what is compared ---------------------------------------------------------------------------

def some_strings(tokens: Tokenizer) -> list[str]:
    """Stretches of our corpus and random characters of many kinds, without special tokens."""
    rng, corpus = random.Random(0), CORPUS.read_text(encoding="utf-8")
    kinds = [(32, 127), (0x4e00, 0x9fff), (9, 14), (0xa0, 0x250), (0x300, 0x500), (0x590, 0xe00),
             (0x2000, 0x2100), (0x3040, 0x3100), (0xac00, 0xd7a4), (0x1f300, 0x1fa00)]
    found = []
    while len(found) < STRINGS:
        start = rng.randrange(len(corpus))
        text = corpus[start:start + rng.randrange(1, 200)]
        if len(found) % 2:
            low, high = rng.choice(kinds)
            text = "".join(chr(rng.randrange(low, high)) if rng.random() < 0.7 else
                           rng.choice(" \n'sa1-_") for _ in range(rng.randrange(1, 60)))
        if not any(name in text for name in tokens.special):
            found.append(text)
    return found


def as_chat(messages: list[Message]) -> list[dict]:
    """Messages in transformers' form; the pictures come first."""
    return [{"role": m.role, "content": [{"type": "image"}] * len(m.images) + [
        {"type": "text", "text": m.text.replace(IMAGE, "")}]} for m in messages]


def conversations(image, question: str) -> list[list[Message]]:
    asked = Message("user", IMAGE + question, (image,))
    return [[asked], [Message("user", question)],
            [Message("system", "Be brief."), asked], [asked, asked]]


@torch.no_grad()
def our_logits(model, prompt) -> torch.Tensor:
    batch = collate([prompt], model.config).to(model.lm_head.weight.device)
    return model.lm_head(model(batch, model.encode_images(batch))).float().cpu()


def our_reply(model, prompt, args: Args, drafts: int) -> tuple[list[int], float]:
    """The greedy reply, and how many tokens a step gave."""
    engine = Engine(model, 1, len(prompt.ids) + args.max_new + 1, drafts, adapt=False)
    engine.submit(Request(prompt, args.max_new))
    results = []
    while engine.busy:
        results += engine.step()
    return results[0].ids, engine.tokens / max(1, engine.steps)


def compare_replies(model, prompt, ours: list[int], theirs: list[int], near: float):
    """(whether both are the same, a note): equal, or first different at a token where our two best
    logits are closer than `near`, so that rounding decides."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b),
                min(len(ours), len(theirs)))
    if len(ours) == len(theirs) == same:
        return True, f"{same}/{same}"
    longer = [*prompt.ids.tolist(), *theirs[:same]]
    row = type(prompt)(np.array(longer, np.int32), np.ones(len(longer), np.float32), prompt.images)
    first, second = our_logits(model, row)[-1].topk(2).values.tolist()
    return first - second < near, f"{same}/{len(theirs)}, then logits {first - second:.1e} apart"


def compare_text(theirs, talks: list, config: Config) -> list[tuple]:
    """Ids of strings, and prompts of conversations by the folder's template."""
    tokens, strings = tokenizer_of(config), some_strings(tokenizer_of(config))
    equal = sum(theirs(text, add_special_tokens=False)["input_ids"] == tokens.encode(text)
                for text in strings)
    rows = [("tokenizer", equal == len(strings), f"{equal}/{len(strings)}")]
    equal = 0
    for talk in talks:
        prompt = document(talk, tokens, config, answer=True)
        slots = [x.shape[0] * x.shape[1] // unit_of(config) ** 2 for x in prompt.images]
        equal += prompt.ids.tolist() == their_prompt(theirs, as_chat(talk), tokens.image, slots)
    return [*rows, ("template", equal == len(talks), f"{equal}/{len(talks)}")]


def compare_pixels(made, prompt, config: Config) -> tuple:
    """The picture of `prompt` as both encoders get it. made: what transformers' processor returned.
    Raises UserError where the numbers of patches differ: then nothing else can be compared."""
    batch = collate([prompt], config)
    if not torch.equal(made["image_grid_thw"], batch.grids):
        raise UserError(f"the picture becomes {batch.grids.tolist()} patches here, but "
                        f"{made['image_grid_thw'].tolist()} in transformers: please report this")
    area = config.vision.patch_size ** 2
    mean, std = (torch.tensor(x).repeat_interleave(area) for x in (MEAN, STD))
    ours = ((batch.patches[:, 0] / 255 - mean) / std).view(-1, 3, 1, area)
    ours = ours.expand(-1, -1, 2, -1).flatten(1)        # a still image is two equal frames
    off = (ours - made["pixel_values"]).abs().max().item()
    height, width = prompt.images[0].shape[:2]
    return "pixels", off < 1e-2, f"{off:.1e} at {width}x{height}"


# ---- the report ---------------------------------------------------------------------------------

def run(args: Args):
    if not args.ckpt:
        raise UserError("--ckpt=FOLDER names the folder to verify")
    model_class, tokenizer_class, image_processor = peers()
    hw, folder = setup(args.device, args.dtype), find_checkpoint(args.ckpt)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json, so transformers can't read text with it")
    config = load_config(folder)
    tokens = tokenizer_of(config)
    image = open_image(args.image or ROOT / "docs" / "example.png")
    talks = conversations(image, args.question)
    rows = compare_text(tokenizer_class.from_pretrained(folder), talks, config)
    prompt = document(talks[0], tokens, config, answer=True)
    made = image_processor.from_pretrained(folder)([image], return_tensors="pt")
    rows.append(compare_pixels(made, prompt, config))

    # The two models one after the other: both in memory would be twice as much.
    logits, reply = their_results(model_class, folder, prompt, made, tokens.stops, args, hw)
    model = load_model(folder, hw.device, hw.dtype)
    largest = logits.abs().max().item()
    near = TOLERANCE[hw.dtype] * largest
    off = (logits - our_logits(model, prompt)).abs().max().item()
    rows.append(("logits", off < near, f"{off:.1e} of {largest:.1f}"))
    found, _ = our_reply(model, prompt, args, 0)
    rows.append(("greedy", *compare_replies(model, prompt, found, reply, near)))
    has_head = mmtp.head_of(model) is not None
    if has_head:
        drafted, pace = our_reply(model, prompt, args, 3)
        agrees, note = compare_replies(model, prompt, drafted, reply, near)
        rows.append(("drafts", agrees, f"{note}, {pace:.2f} tokens a step"))
    report(rows, tokens.plain(found), model, has_head, hw)


def report(rows: list[tuple], answer: str, model, has_head: bool, hw):
    """Print the table, the reply and the line to send."""
    import tokenizers
    import transformers
    for name, agrees, figure in rows:
        print(f"{name:<12}{'agrees' if agrees else 'DIFFERS':<9}{figure}")
    print(f"reply       {answer.strip()[:200]!r}\n")
    wrong = [name for name, agrees, _ in rows if not agrees]
    verdict = f"{', '.join(wrong)} DIFFER" if wrong else "all agree"
    sizes = (f"{model.counts()['total'] / 1e6:.1f}M parameters, {'an' if has_head else 'no'} MTP "
             f"layer, {len(tokenizer_of(model.config).words)} ids")
    figures = "; ".join(f"{name} {figure}" for name, _, figure in rows)
    versions = (f"torch {torch.__version__}, transformers {transformers.__version__}, tokenizers "
                f"{tokenizers.__version__}, {hw.device.type} "
                f"{str(hw.dtype).removeprefix('torch.')}")
    print(f"lab.verify: {verdict} | {sizes} | {figures} | {versions}")


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
