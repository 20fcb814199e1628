"""The files beside the weights: with them, tokenizers and transformers get the ids, pixels and
replies that we get. Tests that need a peer run where requirements-peers.txt is installed."""
import base64
import io
import json
import random
import subprocess
import sys

import pytest
import torch

import hub_peer
from conftest import odd_config, shaken, their_pixels
from data import document
from engine import Engine, Request
from hub_peer import picture
from lib.checkpoint import load_model, save_config, save_model
from lib.common import ROOT
from lib.conversations import conversation
from lib.hub import tokenizer_json
from lib.images import pack, resize
from lib.shards import Record
from lib.tensors import is_whole
from model import Config, GLMV
from tasks.base import Message
from test_engine import plain, same
from tokenizer import SPECIAL, Tokenizer
from vit import STD, VitConfig


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

SPACES = ("\t", "\n", "\v", "\f", "\r", " ", " ", " ", "\x85", "\xa0", "\u1680", "\u2003", "\u2028",
          "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "\x1c", "\x1f", "a", "1", ".")
LOOKALIKES = ("<|user", "|user|>", "<|", "|>", "<think", "think>", "[gMASK", "<sop", "< |user|>",
              "<|USER|>", " ", "x", "7")
RUNS = ("a", "aa", "aaa", "b", "ab", "ba", "A", "th", "e", "in", " ", "-", "==")
EMOJI = [chr(i) for i in range(0x1f300, 0x1fa00)] + 400 * ["\ufe0f", "\u200d"]
CHINESE = [chr(i) for i in range(0x4e00, 0xa000)]
CONTROL = [chr(i) for i in range(32)]


def any_character(rng) -> str:
    """Any character but a surrogate, most of them from the first blocks."""
    i = rng.choice((rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(256)))
    return chr(i) if not 0xd800 <= i < 0xe000 else "\ufffd"


def texts(n: int, tokens: Tokenizer, seed: int) -> list[str]:
    """n texts of eleven kinds, none of which has the name of a special token in it."""
    rng = random.Random(seed)
    sources = [(ROOT / name).read_text(encoding="utf-8") for name in ("corpus.txt", "tokenizer.py")]
    alphabets = (SPACES, LOOKALIKES, RUNS, EMOJI, CHINESE, CONTROL, "0123456789 ,.()-")
    found = []
    while len(found) < n:
        kind, length = len(found) % 11, rng.randrange(40)
        if kind < 7:
            text = "".join(rng.choices(alphabets[kind], k=length))
        elif kind < 9:
            source = sources[kind - 7]
            start = rng.randrange(len(source))
            text = source[start:start + 5 * length]
        elif kind == 9:
            text = "".join(any_character(rng) for _ in range(length))
        else:
            text = tokens.decode(rng.randrange(tokens.n_ranks) for _ in range(length))
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
@pytest.mark.parametrize("n_ranks", [1024, 4096])
def test_tokenizers_gives_the_same_ids_for_10000_texts(n_ranks):
    compare_ids(n_ranks, 10_000)


# ---- the chat template --------------------------------------------------------------------------

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


# ---- transformers' processor and model ----------------------------------------------------------

MOST = 64           # greedy tokens that are compared
MODELS = ("demo", "odd 0", "odd 1")
MARKED = "say <|user|>, [gMASK] or <|image|> <think>"
DRAWN = random.Random(1)
SIZES = [(int(2 ** DRAWN.uniform(4, 8)), int(2 ** DRAWN.uniform(4, 8))) for _ in range(50)]
PATCHES = {"released": Config(),        # the sizes of the released preprocessor_config.json
           "8": Config(vision=VitConfig(patch_size=8), min_tokens=4, max_tokens=400),
           "6": Config(vision=VitConfig(patch_size=6), min_tokens=1, max_tokens=64),
           "16": Config(vision=VitConfig(patch_size=16), min_tokens=16, max_tokens=256)}


def questions(unit: int) -> dict:
    """Conversations that end with a question. Sides of pictures are multiples of `unit`, so that
    nobody resizes them."""
    def fits(columns, rows):
        return shown(columns * unit, rows * unit, columns)
    return {
        "a picture": [says("user", [fits(4, 4), said("What color is the diamond?")])],
        "two pictures": [says("user", [fits(3, 2), said("List all."), fits(2, 5)])],
        "turns": [says("system", "Be brief."), says("user", [fits(2, 3), said("Red?")]),
                  says("assistant", "<|begin_of_box|>yes<|end_of_box|>", reasoning_content="r"),
                  says("user", "And now?")],
        "tools": [says("user", [fits(4, 3), said("Who?")]),
                  says("assistant", None, tool_calls=[call("crop", [1, 2, 3, 4])]),
                  says("tool", [fits(2, 2), said("a crop")])],
        "text": [says("user", "Which numbers follow 1, 2, 3?")]}


def our_pixels(images: list, config: Config):
    """(pixels, grids) in transformers' form."""
    patches, grids = pack(images, config.vision)
    return their_pixels(patches), grids


@pytest.mark.slow
@pytest.mark.parametrize("which", PATCHES)
def test_grids_and_pixels_agree_on_50_sizes(which, tmp_path):
    """With Pillow, by which transformers resizes where torchvision is missing."""
    module = pytest.importorskip("transformers.models.glm46v.image_processing_pil_glm46v",
                                 exc_type=ImportError)
    config = PATCHES[which]
    save_config(config, tmp_path)
    processor = module.Glm46VImageProcessorPil.from_pretrained(tmp_path)
    for size in SIZES:
        pixels, grids = our_pixels([resize(picture(*size), config)], config)
        made = processor(images=[picture(*size)], return_tensors="pt")
        assert torch.equal(made["image_grid_thw"], grids), size
        assert (made["pixel_values"] - pixels).abs().max() < 1e-5, size


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """The folders of a trained and of two random models, and what transformers makes of them."""
    pytest.importorskip("transformers", exc_type=ImportError)
    root, chats, sizes = tmp_path_factory.mktemp("hub"), {}, []
    for name in MODELS:
        model = load_model(ROOT / "ckpt" / name) if name == "demo" else shaken(int(name[-1]))
        save_model(model, root / name)
        chats[str(root / name)] = questions(2 * model.config.vision.patch_size)
    for which, config in PATCHES.items():
        (root / which).mkdir()
        save_config(config, root / which)
        sizes.append([str(root / which), SIZES])
    job = {"most": MOST, "chats": chats, "pixels": sizes, "plain": [str(root / "demo"), MARKED]}
    (root / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run([sys.executable, hub_peer.__file__, root / "job.json", root / "made.pt"],
                          capture_output=True, text=True)
    if done.returncode == hub_peer.MISSING:
        pytest.skip("torchvision is not installed")
    assert done.returncode == 0, done.stderr[-3000:]
    return root, torch.load(root / "made.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_chats_with_a_saved_model(peer, name):
    """Ids and pixels are the same, and so are 64 greedy tokens, up to a tie of the two best."""
    root, made = peer
    model = load_model(root / name)
    tokens = Tokenizer(model.config.n_ranks)
    for kind, theirs in made["chats"][str(root / name)].items():
        turns = questions(2 * model.config.vision.patch_size)[kind] + [says("assistant", "x")]
        messages = conversation(Record("made up", {"messages": turns}))[:-1]
        prompt = document(messages, tokens, model.config, answer=True)
        assert theirs["inputs"]["input_ids"][0].tolist() == prompt.ids.tolist(), kind
        if prompt.images:
            pixels, grids = our_pixels(prompt.images, model.config)
            assert torch.equal(theirs["inputs"]["image_grid_thw"], grids), kind
            assert (theirs["inputs"]["pixel_values"] - pixels).abs().max() < 1e-5, kind
        engine = Engine(model, slots=1, context=len(prompt.ids) + MOST + 1)
        engine.stops = set()
        engine.submit(Request(prompt, MOST))
        results = []
        while engine.busy:
            results += engine.step()
        got, want = results[0].ids, theirs["greedy"]
        assert len(want) == MOST and (got == want or same(want, *plain(model, prompt, MOST, ())))
        # The reply ends at the first of our stops, and its text is the same.
        ends = [n for n, i in enumerate(want, 1) if i in tokens.stops]
        assert theirs["reply"] == want[:min(ends, default=MOST)], kind
        assert theirs["text"] == tokens.plain(theirs["reply"]), kind


@pytest.mark.slow
def test_torchvision_resizes_almost_alike(peer):
    """Grids are the same. Bicubic resizing of torchvision differs from Pillow's by at most two of
    255 levels, and in one of 20 values by more than a half."""
    _, made = peer
    for config, results in zip(PATCHES.values(), made["pixels"]):
        more = 0.0
        for size, (pixels, grid) in zip(SIZES, results):
            ours, grids = our_pixels([resize(picture(*size), config)], config)
            assert torch.equal(grid, grids), size
            difference = (pixels - ours).abs()
            assert difference.max() < 2.01 / 255 / min(STD), size
            more += float((difference > 1e-2).float().mean()) / len(SIZES)
        assert more < 0.06


@pytest.mark.slow
def test_names_of_special_tokens_can_stay_text(peer):
    """In transformers only where it is asked for. They are encoded by themselves there, so the ids
    around them can differ from ours."""
    tokens, (_, made) = Tokenizer(512), peer
    ours = [i for ids, _, _ in tokens.chat([Message("user", MARKED)]) for i in ids]
    assert tokens.decode(made["plain"]) == tokens.decode(ours)
    assert [i for i in made["plain"] if i >= 512] == ours[:3]
