"""Folders as GLM-OCR's is released: tokenizer.json, config, weights, template, stops, MTP layer.
They are written by transformers and tokenizers (released.py), never by our own code."""
import copy
import json
import pickle
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import gym
import mmtp
import pretrain
import released
import rl
import sample
from data import document, Stream
from engine import Result
from lib.checkpoint import load_config, load_model
from lib.cli import UserError
from lib.common import ROOT
from lib.episodes import Episode
from lib.hub import tokenizer_json
from lib.rollout import Rollout, rollout, RolloutSettings
from lib.vocabulary import build, read_vocabulary
from model import Config, GLMV
from tasks.base import Message, Task
from tokenizer import ReleasedTokenizer, Tokenizer, tokenizer_of

tokenizers = pytest.importorskip("tokenizers", exc_type=ImportError)


@pytest.fixture(scope="module")
def theirs():
    """A tokenizer of the package `tokenizers`."""
    return released.trained_tokenizer()


@pytest.fixture
def raw(theirs) -> dict:
    """The contents of its tokenizer.json."""
    return json.loads(theirs.to_str())


@pytest.fixture
def folder(raw, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return tmp_path


def refused(act, *args) -> str:
    with pytest.raises((UserError, ValueError)) as error:
        act(*args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


# ---- the vocabulary -----------------------------------------------------------------------------

KINDS = ((32, 127), (0x4e00, 0x4f80), (9, 14), (0xa0, 0x250), (0x300, 0x370), (0x600, 0xe00),
         (0x2000, 0x2100), (0x10000, 0x1fbff))
PIECES = ("'s", "'LL", "'ſ", "don't", "ß", "İ", "  ", "\n\n", " \n", "123", "½", "²", "aaa", "----",
          "红红")


def random_text(rng) -> str:
    pieces = []
    for _ in range(rng.randrange(1, 30)):
        piece = chr(rng.randrange(*rng.choice(KINDS))) if rng.random() < 0.6 else rng.choice(PIECES)
        pieces.append(piece * rng.choice((1, 1, 1, 2, 5)))
    return "".join(pieces)


@pytest.mark.parametrize("merges,count", [
    ("pairs", 1000), ("strings", 100), pytest.param("pairs", 8000, marks=pytest.mark.slow)])
def test_ids_are_those_of_the_tokenizers_package(raw, theirs, merges, count):
    if merges == "strings":
        raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    encoding, rng = build(raw).encoding, random.Random(1)
    for _ in range(count):
        text = random_text(rng)
        assert encoding.encode_ordinary(text) == theirs.encode(text).ids, text


def test_merges_that_tiktoken_alone_would_join_otherwise(raw):
    """Random lists over three letters: many have tokens that their merges do not make."""
    rng, differ = random.Random(2), 0
    pattern = r"\S+|\s+"       # a short one is faster to compile
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    raw["added_tokens"] = []
    letters = {word: i for word, i in raw["model"]["vocab"].items() if len(word) == 1}
    for _ in range(40):
        vocab, merges, have = dict(letters), [], list("abc")
        for _ in range(rng.randrange(1, 12)):
            left, right = rng.choice(have), rng.choice(have)
            if left + right not in vocab:
                vocab[left + right] = max(vocab.values()) + 1
                have.append(left + right)
                merges.append([left, right])
        raw["model"] |= {"vocab": vocab, "merges": merges}
        found, peer = build(raw), tokenizers.Tokenizer.from_str(json.dumps(raw))
        all_ranked = tiktoken.Encoding(
            "all", pat_str=pattern, special_tokens={},
            mergeable_ranks={found.words[i]: i for i in vocab.values()})
        for _ in range(50):
            text = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 20)))
            want = peer.encode(text).ids
            assert found.encoding.encode_ordinary(text) == want
            differ += all_ranked.encode_ordinary(text) != want
    assert differ > 10          # so many would be wrong where every token has a rank


def test_whole_words_by_ignore_merges(raw):
    vocab = {word: i for word, i in raw["model"]["vocab"].items() if len(word) == 1}
    top = max(vocab.values())
    raw["added_tokens"], raw["model"]["ignore_merges"] = [], True
    # No merge makes "abc", and no two tokens are it: only the word abc becomes that token.
    raw["model"] |= {"vocab": vocab | {"abc": top + 1}, "merges": []}
    peer, encoding = tokenizers.Tokenizer.from_str(json.dumps(raw)), build(raw).encoding
    for text in ("abc", " abc", "abcabc", "xabc"):
        assert encoding.encode_ordinary(text) == peer.encode(text).ids
    # With "ab" tiktoken would join (ab, c), which the list does not have.
    raw["model"] |= {"vocab": vocab | {"ab": top + 1, "abc": top + 2}, "merges": [["a", "b"]]}
    assert "do not make abc" in refused(build, raw)


def test_our_own_tokenizer_json_gives_our_ids():
    ours, rng = Tokenizer(512), random.Random(3)
    found = build(copy.deepcopy(tokenizer_json(512)))
    assert found.special == ours.special and found.words == ours.words
    for _ in range(300):
        text = random_text(rng)
        assert found.encoding.encode_ordinary(text) == ours.encode(text)


@pytest.mark.parametrize("path,value,words", [
    ("model.type", "WordPiece", 'model.type is "WordPiece", which is not built'),
    ("model.dropout", 0.1, "model.dropout"), ("model.unk_token", "<unk>", "model.unk_token"),
    ("model.byte_fallback", True, "model.byte_fallback"),
    ("model.continuing_subword_prefix", "##", "continuing_subword_prefix"),
    ("model.end_of_word_suffix", "</w>", "end_of_word_suffix"),
    ("normalizer", {"type": "NFC"}, 'normalizer is {"type": "NFC"}'),
    ("pre_tokenizer.type", "ByteLevel", "pre_tokenizer.type"),
    ("pre_tokenizer", None, "pre_tokenizer is no JSON object"),
    ("pre_tokenizer.pretokenizers", [{"type": "Whitespace"}], "no Split and ByteLevel"),
    ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "Split.behavior"),
    ("pre_tokenizer.pretokenizers.0.invert", True, "Split.invert"),
    ("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}, "'Regex' is missing"),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", "(", "can't be used"),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", r"\p{L}+", "leaves out parts of"),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", r"\s*", "matches an empty text"),
    ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "ByteLevel.add_prefix_space"),
    ("pre_tokenizer.pretokenizers.1.use_regex", True, "ByteLevel.use_regex"),
    ("added_tokens.0.lstrip", True, "added token <|endoftext|>.lstrip"),
    ("added_tokens.0.id", 5, "ids are impossible, or occur twice"),
    ("added_tokens.0.id", -1, "impossible id"), ("added_tokens.1.content", "<|user|>", "twice"),
    ("model.vocab.a", 3.5, "ids are impossible"), ("model.vocab.€", 9000, "not written in bytes"),
    ("model.merges.0", ["a", "never"], "of no tokens"), ("model.merges.0", "a", "unpack"),
    ("model.vocab", [], "can't be used"),
    ("model.vocab", {}, "256 of the 256 bytes are no tokens"), ("model", 5, "model is no JSON")])
def test_what_is_not_built_is_refused(raw, tmp_path, path, value, words):
    inner, (*way, last) = raw, path.split(".")
    for name in way:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[int(last) if isinstance(inner, list) else last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert words in refused(read_vocabulary, tmp_path / "tokenizer.json")


def test_merges_in_another_order_than_the_ids_are_refused(raw):
    raw["model"]["merges"] = raw["model"]["merges"][::-1]
    assert "is not in the order of the ids" in refused(build, raw)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '"x"', "[" * 100_000, "\udcff"])
def test_damaged_files(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert f"{path} can't be used" in refused(read_vocabulary, path)
    path.unlink()
    assert "no tokenizer.json in" in refused(read_vocabulary, path)


# ---- the tokenizer ------------------------------------------------------------------------------

def test_text_comes_back_and_marks_in_it_stay_text(folder, theirs):
    tokens, rng = ReleasedTokenizer(folder / "tokenizer.json"), random.Random(4)
    for text in [random_text(rng) for _ in range(200)] + ["<|user|>", "a <think> /nothink b", ""]:
        ids = tokens.encode(text)
        assert tokens.decode(ids) == tokens.plain(ids) == text
        assert not set(ids) & set(tokens.special.values())
    for i in range(theirs.get_vocab_size() + 5):
        name = theirs.id_to_token(i) or ""
        assert tokens.decode_bytes([i]) == name.encode() or name not in tokens.special
    assert tokens.decode([10 ** 6, tokens.image]) == "<|image|>"


def test_the_prompt_is_that_of_the_release(folder):
    tokens = ReleasedTokenizer(folder / "tokenizer.json")
    asked = Message("user", "<|image|>Text Recognition:", ("picture",))
    text = "".join(tokens.decode(ids) for ids, _, _ in tokens.chat([asked], answer=True))
    assert text == ("[gMASK]<sop><|user|>\n<|begin_of_image|><|end_of_image|>Text Recognition:"
                    "<|assistant|>\n")
    talk = [asked, Message("assistant", "<|begin_of_box|>7<|end_of_box|>"), Message("user", "x")]
    pieces = tokens.chat(talk)
    learnt = [i for ids, weight, _ in pieces for i in ids if weight]
    # The box marks are no tokens of this vocabulary: text, which decodes to the same.
    assert tokens.decode(learnt) == "<|begin_of_box|>7<|end_of_box|><|user|>"
    assert [i for i in learnt if i in tokens.special.values()] == [tokens.special["<|user|>"]]
    assert "no special token <|tool|>" in refused(tokens.chat, [Message("tool", "x")])


@pytest.mark.parametrize("file,values,more", [
    ("generation_config.json", {"eos_token_id": [3, 700]}, {3}),
    ("generation_config.json", {"eos_token_id": 4}, {4}), ("generation_config.json", {}, set()),
    ("config.json", {"text_config": {"eos_token_id": [5]}}, {5})])
def test_stops(folder, file, values, more):
    (folder / file).write_text(json.dumps(values))
    tokens = ReleasedTokenizer(folder / "tokenizer.json")
    roles = {tokens.special[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")}
    assert set(tokens.stops) == roles | more


@pytest.mark.parametrize("text", [
    "{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}', '{"eos_token_id": -1}',
    '{"eos_token_id": [1, 100000000000000000000]}'])
def test_damaged_stops(folder, text):
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json is damaged" in refused(ReleasedTokenizer,
                                                          folder / "tokenizer.json")


def test_a_vocabulary_without_what_every_prompt_needs(raw, tmp_path):
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<sop>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert "lacks the special token <sop>" in refused(ReleasedTokenizer,
                                                      tmp_path / "tokenizer.json")
    none = SimpleNamespace(n_ranks=0, vocabulary="")
    assert "comes without a tokenizer" in refused(tokenizer_of, none)


# ---- the whole folder ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with shards and an MTP layer, and transformers' model of it."""
    pytest.importorskip("transformers", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("released")
    return folder, released.write_folder(folder)


def test_sizes_of_the_released_file():
    """GLM-OCR's model.safetensors has 526 tensors of 1,325,258,240 numbers, as public ports of it
    count them: our model has as many, with the MTP layer and its own two matrices [R]."""
    with torch.device("meta"):
        model = GLMV(Config())
        head = mmtp.attach(model)
        head.embed_tokens = torch.nn.Embedding(59392, 1536)
        head.shared_head.head = torch.nn.Linear(1536, 59392, bias=False)
    sizes = [value.numel() for value in model.state_dict().values()]
    assert (len(sizes), sum(sizes)) == (526, 1_325_258_240)


def copy_of(folder, to, drop=()):
    return shutil.copytree(folder, to, ignore=lambda _, names: set(names) & set(drop))


def changed(path, change):
    """Change the JSON in a file by the function `change`."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.slow
def test_ask_with_drafts_answers_as_transformers_does(whole, capsys):
    from transformers import AutoTokenizer
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
    folder, peer = whole
    picture = sample.open_image(ROOT / "docs/example.png")
    made = Glm46VImageProcessorPil.from_pretrained(folder)([picture], return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Text:"}]}],
        tokenize=False, add_generation_prompt=True)
    slots = int(made["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image|>", "<|image|>" * slots), return_tensors="pt").input_ids
    reply = peer.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **made, max_new_tokens=40,
        mm_token_type_ids=(ids == peer.config.image_token_id).int(), do_sample=False)
    want = tokenizer.decode(reply[0, ids.shape[1]:], skip_special_tokens=True)

    config = load_config(folder)
    message = Message("user", "<|image|>Text:", (picture,))
    assert document([message], tokenizer_of(config), config, True).ids.tolist() == ids[0].tolist()
    sample.ask(sample.Ask("Text:", [str(ROOT / "docs/example.png")], str(folder), 40, drafts=3,
                          dtype="float32"))
    said = capsys.readouterr()
    assert said.out.strip() == want.strip()
    assert "tokens a step" in said.err


@pytest.mark.slow
def test_every_tensor_is_read_in_fp32_and_bf16(whole):
    from safetensors import safe_open
    folder, _ = whole
    stored = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}
    for dtype in (torch.float32, torch.bfloat16):
        state = load_model(folder, dtype=dtype).state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(value, stored[name].to(dtype)) for name, value in state.items())


@pytest.mark.slow
def test_folders_of_one_file_and_without_an_mtp_layer(whole, tmp_path, capsys):
    pytest.importorskip("transformers", exc_type=ImportError)
    released.write_folder(tmp_path, mtp=False, shard="1GB")
    assert (tmp_path / "model.safetensors").exists()
    sample.ask(sample.Ask("Text:", ckpt=str(tmp_path), max_new=3, drafts=3, dtype="float32"))
    assert "no MTP head in this checkpoint: speculation is off" in capsys.readouterr().err


@pytest.mark.slow
def test_limits_stand_in_either_file(whole, tmp_path):
    folder = copy_of(whole[0], tmp_path / "new", ["preprocessor_config.json"])
    assert load_config(folder).max_tokens == 6144           # no file says it: GLM-OCR's
    limits = json.loads((whole[0] / "preprocessor_config.json").read_text())
    path = folder / "processor_config.json"     # as transformers 5 writes it
    path.write_text(json.dumps({"image_processor": limits, "processor_class": "Glm46VProcessor"}))
    found = load_config(folder)
    assert (found.min_tokens, found.max_tokens) == (4, 64)
    path.write_text('{"processor_class": "Glm46VProcessor"}')
    assert "'image_processor' is missing" in refused(load_config, folder)
    path.write_text(json.dumps({"image_processor": {**limits, "do_rescale": False}}))
    assert "do_rescale is false; only true is built" in refused(load_config, folder)


@pytest.mark.slow
def test_a_tokenizer_of_another_model_is_refused(whole, tmp_path):
    folder = copy_of(whole[0], tmp_path / "new")
    changed(folder / "config.json", lambda values: values.update(image_token_id=5))
    assert "the id of <|image|> is 719, not 5" in refused(load_config, folder)
    (folder / "tokenizer.json").unlink()
    assert load_config(folder).vocabulary == ""
    with pytest.raises(UserError, match="comes without a tokenizer"):
        sample.load(str(folder), "cpu", "float32")


@pytest.mark.slow
def test_training_from_it_and_resuming_when_it_is_gone(whole, tmp_path):
    from transformers import AutoTokenizer, GlmOcrForConditionalGeneration
    begin, out = copy_of(whole[0], tmp_path / "begin"), tmp_path / "run"
    args = pretrain.Args(init=str(begin), out=str(out), steps=2, rows=1, row_tokens=512, workers=0,
                         mix="point,gui_form,text", dtype="bfloat16", save_every=1, eval_every=0)
    pretrain.run(args)
    shutil.rmtree(begin)            # each step removes an older checkpoint as well
    args.steps, args.resume = 5, True
    pretrain.run(args)
    last = out / "step_000005"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "generation_config.json"):
        assert (last / name).read_bytes() == (whole[0] / name).read_bytes()
    # The new folder is a whole one again.
    assert load_model(last).config.max_tokens == 64
    assert AutoTokenizer.from_pretrained(last)("Red?").input_ids == tokenizer_of(
        load_config(last)).encode("Red?")
    GlmOcrForConditionalGeneration.from_pretrained(last)

    args = rl.Args(init=str(last), out=str(tmp_path / "rl"), steps=1, prompts=1, group=2, max_new=4,
                   think=3, mix="point,gui_form", context=600, eval_every=0, dtype="bfloat16")
    rl.run(args)
    assert (tmp_path / "rl/step_000001/tokenizer.json").exists()


@pytest.mark.slow
def test_a_thought_is_opened_after_the_prompt(whole):
    """With ours it replaces the empty one, here the prompt has none."""
    config = load_config(whole[0])
    tokens = tokenizer_of(config)
    settings = RolloutSettings(tokens, config, context=600, max_new=4, think=3)
    request = Rollout(Episode(Task("point", 1), 0, 0), settings).advance()
    assert tokens.decode(request.prompt.ids.tolist()).endswith("<|assistant|>\n<think>")
    assert request.prompt.ids.dtype == np.int32


class Oracle:
    """An engine that answers with given ids, one list a request."""
    version = 0

    def __init__(self, replies):
        self.replies, self.busy = iter(replies), False

    def submit(self, request) -> int:
        self.busy = True
        return 1

    def step(self) -> list[Result]:
        self.busy, ids = False, next(self.replies)
        return [Result(1, ids, "stop", [-0.5] * len(ids), [0] * len(ids))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["counting", "gui_form", "text_tools", "ocr_line"])
def test_the_gym_scores_what_it_reads_in_these_tokens(whole, name):
    """The oracle's replies earn the full reward, though the box marks are plain text here; and a
    stream draws the same category for this model."""
    config = load_config(whole[0])
    tokens, task = tokenizer_of(config), Task(name, 5)
    script, append = gym.play_out(task)[1], gym.make(task).layout == "append"
    ends = [*["<|observation|>" if append else "<|user|>"] * (len(script) - 1), "<|user|>"]
    replies = [tokens.encode_reply(reply) + [tokens.mark(end)] for reply, end in zip(script, ends)]
    assert all(reply[-1] in tokens.stops for reply in replies)
    settings = RolloutSettings(tokens, config, context=4096, max_new=500)
    [episode] = rollout(Oracle(replies), [Episode(task, 0, 0)], settings, gym.Rewards())
    assert episode.score.reward == pytest.approx(1) and episode.replies(tokens) == script
    drawn = Stream(config, ((name, 1.0),))
    for d in pickle.loads(pickle.dumps(drawn))(3):      # as a worker process gets it
        assert (d.ids == tokens.image).sum() * 28 * 28 == sum(
            image.shape[0] * image.shape[1] for image in d.images)
        assert tokens.decode(d.ids.tolist()).startswith("[gMASK]<sop><|")


@pytest.mark.slow
def test_verify_says_whether_all_agrees(whole, capsys, monkeypatch):
    from lab import verify
    args = verify.Args(ckpt=str(whole[0]), max_new=8)
    verify.run(args)
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("lab.verify: all agree | 0.4M parameters, an MTP layer, 721 ids")
    assert "tokenizer 600/600; template 4/4; pixels 0.0e+00 at 56x56;" in line
    assert "greedy 8/8; drafts 8/8" in line
    logits = verify.our_logits
    monkeypatch.setattr(verify, "our_logits", lambda *given: logits(*given) + 0.1)
    monkeypatch.setattr(verify, "our_reply", lambda *_: ([1, 2], 1.0))
    verify.run(args)
    said = capsys.readouterr().out
    assert "logits      DIFFERS" in said and "lab.verify: logits, greedy, drafts DIFFER |" in said


def test_verify_names_what_is_missing(monkeypatch, tmp_path):
    from lab import verify
    assert "--ckpt=FOLDER" in refused(verify.run, verify.Args())
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = refused(verify.run, verify.Args(ckpt=str(tmp_path)))
    assert "transformers" in said and "requirements-peers.txt" in said
