"""The files beside the weights: tokenizers and transformers open them, and get the same ids, pixels
and replies as we do. Runs where requirements-peers.txt is installed."""
import base64
import io
import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import odd_config
from data import document
from engine import Engine, Request
from lib.checkpoint import load_model, save_config, save_model
from lib.common import ROOT
from lib.conversations import conversation
from lib.hub import tokenizer_json
from lib.images import pack, resize
from lib.shards import Record
from lib.tensors import is_whole
from lib.vocabulary import build
from model import Config, GLMV
from tasks.base import Message
from test_engine import plain, same
from tokenizer import SPECIAL, Tokenizer
from vit import VitConfig


# ---- the files ----------------------------------------------------------------------------------

def test_a_saved_model_has_all_files(model, tmp_path):
    save_model(model, tmp_path)
    assert is_whole(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors", "digests.json",
                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                     "generation_config.json"}
    generation = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert tuple(generation["eos_token_id"]) == Tokenizer(512).stops
    save_model(load_model(tmp_path), tmp_path)          # once more, to the same folder
    assert is_whole(tmp_path)


def test_a_model_without_a_known_tokenizer_gets_no_other_one(tmp_path):
    config = odd_config(0)
    config.n_ranks = 0
    save_model(GLMV(config), tmp_path)
    assert not list(tmp_path.glob("tokenizer*")) and not list(tmp_path.glob("*.jinja"))


@pytest.mark.parametrize("name", ["demo", "gym", "untold"])
def test_the_included_checkpoints_have_the_files_of_today(name):
    """If it fails: load_model and save_model write them again."""
    folder = ROOT / "ckpt" / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert made == tokenizer_json(config["nanoglmv"]["n_ranks"])
    template = ROOT / "lib" / "chat_template.jinja"
    assert (folder / "chat_template.jinja").read_bytes() == template.read_bytes()


# ---- tokenizer.json -----------------------------------------------------------------------------

@pytest.mark.parametrize("n_ranks", [256, 512, 4096])
def test_our_reader_finds_our_ranks_in_it(n_ranks):
    tokens = Tokenizer(n_ranks)
    found = build(tokenizer_json(n_ranks))
    assert found.special == tokens.special and found.words == tokens.words
    assert found.ranks == {word: i for i, word in tokens.words.items() if i < n_ranks}


SPACES = ("\t", "\n", "\v", "\f", "\r", " ", " ", " ", "\x85", "\xa0", "\u1680", "\u2003", "\u2028",
          "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "\x1c", "\x1f", "a", "1", ".")
LOOKALIKES = ("<|user", "|user|>", "<|", "|>", "<think", "think>", "[gMASK", "<sop", "< |user|>",
              "<|USER|>", " ", "x", "7")
RUNS = ("a", "aa", "aaa", "b", "ab", "ba", "A", "th", "e", "in", " ", "-", "==")


def any_character(rng) -> str:
    """Any character but a surrogate; half of them from the first blocks."""
    i = rng.choice((rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(256)))
    return chr(i) if not 0xd800 <= i < 0xe000 else "\ufffd"


def texts(n: int, tokens: Tokenizer, seed: int = 0) -> list[str]:
    """n texts of ten kinds, none of which has the name of a special token."""
    rng = random.Random(seed)
    corpus = (ROOT / "corpus.txt").read_text(encoding="utf-8")
    code = (ROOT / "tokenizer.py").read_text(encoding="utf-8")

    def some(draw, most):
        return "".join(draw() for _ in range(rng.randrange(most)))

    def stretch(text):
        start = rng.randrange(len(text))
        return text[start:start + rng.randrange(200)]

    kinds = (
        lambda: some(lambda: any_character(rng), 40),
        lambda: some(lambda: rng.choice(SPACES), 40),
        lambda: stretch(corpus),
        lambda: stretch(code),
        lambda: some(lambda: rng.choice("0123456789 ,.()-"), 30),
        lambda: some(lambda: chr(rng.randrange(0x1f300, 0x1fa00)) + rng.choice(("", "\ufe0f",
                                                                               "\u200d")), 12),
        lambda: some(lambda: chr(rng.randrange(0x4e00, 0x9fff)), 30),
        lambda: some(lambda: chr(rng.randrange(32)), 30),
        lambda: tokens.decode(rng.randrange(tokens.n_ranks) for _ in range(30)),
        lambda: some(lambda: rng.choice(RUNS), 40),
        lambda: some(lambda: rng.choice(LOOKALIKES), 9))
    found = []
    while len(found) < n:
        text = kinds[len(found) % len(kinds)]()
        if not any(name in text for name in SPECIAL):
            found.append(text)
    return found


def compare_ids(n_ranks: int, n: int):
    peer = pytest.importorskip("tokenizers")
    ours = Tokenizer(n_ranks)
    theirs = peer.Tokenizer.from_str(json.dumps(tokenizer_json(n_ranks)))
    for text in texts(n, ours, n_ranks):
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text), text
        assert theirs.decode(ids, skip_special_tokens=False) == text
    for name, i in ours.special.items():
        assert theirs.encode(f"a {name} b").ids == [*ours.encode("a "), i, *ours.encode(" b")]


def test_tokenizers_gives_the_same_ids():
    compare_ids(512, 1500)


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [256, 1024, 4096])
def test_tokenizers_gives_the_same_ids_for_10000_texts(n_ranks):
    compare_ids(n_ranks, 10_000)


# ---- the chat template --------------------------------------------------------------------------

def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that resizing has something to compute."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (1 + height // 7, 1 + width // 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def shown(width: int, height: int, seed: int = 0) -> dict:
    """A part of a message: a picture as a data URI, which both sides read."""
    file = io.BytesIO()
    picture(width, height, seed).save(file, "PNG")
    return {"type": "image",
            "url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def says(role: str, content, **fields) -> dict:
    return {"role": role, "content": content, **fields}


def call(name: str, arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


HARD = {"text": 'say "hä"\n\t\\ 红 <b>', "n": -3, "f": 0.5, "big": 1e30, "yes": True, "no": None,
        "list": [1, [], {}, {"a b": [False]}]}
TALKS = {
    "one question": [says("user", "Red?"), says("assistant", "yes")],
    "pictures": [
        says("user", [shown(40, 30), said(" first,\n then "), shown(64, 48, 1), shown(20, 90, 2),
                      said("?")]),
        says("assistant", "<|begin_of_box|>3<|end_of_box|>"),
        says("user", [said("And "), said("now?")]), says("assistant", "4")],
    "white space": [says("system", "  Be brief.\n"), says("user", "\n\n\tx \n"),
                    says("assistant", "yes \n\n"), says("user", "   1"), says("assistant", " ok")],
    "tools": [
        says("developer", "One call a turn: search(text), open(name)."),
        says("user", [shown(32, 32), said("Who?")]),
        says("assistant", None, tool_calls=[call("search", HARD)]),
        says("tool", "two hits", tool_call_id="1"), says("tool", [shown(24, 24), said("a crop")]),
        says("assistant", "I look.", tool_calls=[call("open", {"from": "x", "a-b": 1}),
                                                 call("click", [412, 377, "x"]), call("end", {})]),
        says("tool", "nothing"), says("assistant", "Nobody.")],
    "thinking": [
        says("user", "2 + 2?"), says("assistant", "4", reasoning_content="two and two"),
        says("user", "And 3?"), says("assistant", "<think>six</think>\n6"),
        says("user", "So?"),
        says("assistant", None, reasoning_content="call it", tool_calls=[call("calc", {"t": "1"})]),
        says("observation", "1"), says("assistant", "1")]}


@pytest.mark.parametrize("kind", TALKS)
def test_the_template_gives_the_ids_of_a_conversation(kind):
    chat_utils = pytest.importorskip("transformers.utils.chat_template_utils",
                                     exc_type=ImportError)
    peer = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(tokenizer_json(512)))
    template = (ROOT / "lib" / "chat_template.jinja").read_text(encoding="utf-8")
    tokens, turns = Tokenizer(512), TALKS[kind]

    def theirs(turns, **options):
        text = chat_utils.render_jinja_template([turns], chat_template=template, **options)[0][0]
        return peer.encode(text).ids

    def ours(messages, answer=False):
        ids = []
        for piece, _, image in tokens.chat(messages, answer):
            ids += piece if image is None else [piece[0], tokens.image, piece[1]]
        return ids

    messages = conversation(Record("made up", {"messages": turns}))
    assert theirs(turns) == ours(messages)
    assert theirs(turns[:-1], add_generation_prompt=True) == ours(messages[:-1], answer=True)
    # lib/rollout.py leaves <think> open where a model may think.
    open_thought = ours(messages[:-1], answer=True)[:-1 - len(tokens.encode("\n"))]
    assert theirs(turns[:-1], add_generation_prompt=True, enable_thinking=True) == open_thought


@pytest.mark.parametrize("turns,options,words", [
    ([says("robot", "x")], {}, "no role robot"),
    ([says("user", [{"type": "video", "url": "x"}])], {}, "user can't say what is video"),
    ([says("assistant", [shown(8, 8)])], {}, "assistant can't say what is image"),
    ([says("assistant", None, tool_calls=[call("f", "{}")])], {}, "not a string"),
    ([says("user", "x")], {"tools": [{"type": "function"}]}, "which tools there are")])
def test_what_the_template_refuses(turns, options, words):
    chat_utils = pytest.importorskip("transformers.utils.chat_template_utils",
                                     exc_type=ImportError)
    template = (ROOT / "lib" / "chat_template.jinja").read_text(encoding="utf-8")
    with pytest.raises(Exception, match=words):
        chat_utils.render_jinja_template([turns], chat_template=template, **options)
