"""The tokenizer.json of a released model, read and made ready for tiktoken.

Such a file is written by the `tokenizers` package and describes a pipeline. Only GLM-OCR's kind is
built here [R]; a file that says anything else is refused:

    "pre_tokenizer"   a regular expression splits the text into words; then each byte of a word is
                      written as one printable character (GPT-2's byte alphabet: a space is "Ġ")
    "model"           byte-level BPE: {"vocab": {"Ġthe": 262, ...}, "merges": [["Ġ", "t"], ...]}
    "added_tokens"    special tokens, each with its id: {"id": 59253, "content": "<|user|>", ...}

tokenizers and tiktoken both begin with the single bytes of a word and join two neighbours at a
time, but they choose differently:

    tokenizers   joins the pair that comes first in the list of merges, and no other pair
    tiktoken     has no such list. It joins the pair whose joined token has the lowest rank, and
                 takes a word that is a token as a whole at once

The model was trained with the file's list, so the list is right. With the ids as ranks tiktoken
gives the same ids, if two conditions hold:

1. The list makes its tokens in the order of their ids, as trainers and converters write it. A file
   with another order is refused.
2. The merges turn the bytes of every token into this token. A token for which they do not could
   only come from a pair that is not in the list. The list never makes it, in no word; so it is left
   out of the ranks, and can be decoded only.

Why these are enough: suppose that tiktoken joins two neighbours into a token t, and that the pair
is not in the list. All merges before t's have been done by then and have left the two side by side.
They do the same to the bytes of t alone, so the list does not make t: t has no rank.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from lib.cli import UserError

# Settings that change how a text is cut into ids, with the only values that are built. What is not
# named here changes no id (decoder, post_processor: the chat template writes all special tokens).
BUILT = {
    "normalizer": (None, {"type": "Sequence", "normalizers": []}),
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
              "continuing_subword_prefix": ("", None), "end_of_word_suffix": ("", None)},
    "pre_tokenizer": {"type": "Sequence"}}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False}
# Some of everything: a pattern must not leave out any of it.
PROBE = "Aé红ßs'll 12½ 3.\t\r\n\n  \u0301\0\x85\u2028🎈_-/"


@dataclass
class Vocabulary:
    """What a tokenizer.json says."""
    encoding: tiktoken.Encoding     # text to ids
    special: dict[str, int]         # the ids of the added tokens
    words: dict[int, bytes]         # the bytes of every id, special tokens included


def byte_alphabet() -> dict[str, int]:
    """{character: byte} of GPT-2's alphabet [R]: a printable byte of Latin-1 stands for itself, the
    n-th of the others is written as character 256 + n."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)}


def merged(word: str, order: dict[tuple[str, str], int]) -> list[str]:
    """The tokens of a word, as the list of merges gives them: again and again it joins, of all
    neighbours, the pair that comes first in the list; of equal pairs the left one. order: the place
    of each pair in the list."""
    parts, never = list(word), len(order)
    while len(parts) > 1:
        places = [order.get(pair, never) for pair in zip(parts, parts[1:])]
        i = places.index(min(places))
        if places[i] == never:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def splits(word: str) -> list[tuple[str, str]]:
    return [(word[:i], word[i:]) for i in range(1, len(word))]


# ---- reading the file ---------------------------------------------------------------------------

def check_settings(values, built: dict, section: str):
    """Raise ValueError unless all settings of `values` that `built` names, if they are there, have
    the values that they have in it. A tuple lists several values."""
    if not isinstance(values, dict):
        raise ValueError(f"{section} is no JSON object")
    for name, wanted in built.items():
        value, where = values.get(name), f"{section}.{name}".removeprefix("tokenizer.json.")
        if isinstance(wanted, dict):
            check_settings(value, wanted, where)
        elif name in values and value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise ValueError(f"{where} is {json.dumps(value)[:60]}, which is not built")


def read_pattern(raw: dict) -> str:
    """The regular expression that splits a text into words."""
    steps = raw["pre_tokenizer"]["pretokenizers"]
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise ValueError("pre_tokenizer is no Split and ByteLevel, which alone are built")
    check_settings(steps[0], SPLIT, "pre_tokenizer.Split")
    check_settings(steps[1], BYTES, "pre_tokenizer.ByteLevel")
    return steps[0]["pattern"]["Regex"]


def read_added(raw: dict, vocab: dict) -> dict[str, int]:
    """{name: id} of the added tokens."""
    special = {}
    for token in raw["added_tokens"]:
        name, i = token["content"], token["id"]
        check_settings(token, ADDED, f"added token {name}")
        if type(i) is not int or not 0 <= i < 2 ** 31 or not name or name in special:
            raise ValueError(f"added token {name!r} has an impossible id, or occurs twice")
        if vocab.get(name, i) != i:
            raise ValueError(f"{name} has two ids, {vocab[name]} and {i}")
        special[name] = i
    return special


def read_merges(merges: list, vocab: dict) -> dict[tuple[str, str], int]:
    """The place of each pair in the list. Merges stand as "a b" in older files, as ["a", "b"] in
    newer ones. Raises ValueError where they do not make tokens in the order of their ids."""
    order, last = {}, -1
    for merge in merges:
        left, right = pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if not {left, right, left + right} <= vocab.keys() or pair in order:
            raise ValueError(f"the merge {merge} is of no tokens, or occurs twice")
        if vocab[left + right] < last:
            raise ValueError(f"the merge {merge} is not in the order of the ids: not built")
        order[pair], last = len(order), vocab[left + right]
    return order


def tokens_of_merges(vocab: dict, order: dict, whole_words: bool) -> set[str]:
    """The tokens that get a rank (condition 2 above). whole_words: the file's `ignore_merges`,
    by which a word that is a token is taken as a whole, as tiktoken does. Then tokens that the
    merges do not make need a rank as well. Raises ValueError where one of them could also come from
    a pair that is not in the list."""
    kept = set()
    for word in vocab:
        if merged(word, order) == [word]:
            kept.add(word)
        elif whole_words:
            if any(pair not in order and {*pair} <= vocab.keys() for pair in splits(word)):
                raise ValueError(f"the merges do not make {word}, ignore_merges does: not built")
            kept.add(word)
    return kept


def build(raw: dict) -> Vocabulary:
    """A Vocabulary from the contents of a tokenizer.json. Raises ValueError, KeyError, TypeError or
    AttributeError where they are damaged or say what is not built."""
    check_settings(raw, BUILT, "tokenizer.json")
    model, alphabet = raw["model"], byte_alphabet()
    special = read_added(raw, model["vocab"])
    vocab = {word: i for word, i in model["vocab"].items() if word not in special}
    ids = [*vocab.values(), *special.values()]
    if any(type(i) is not int or not 0 <= i < 2 ** 31 for i in ids) or len({*ids}) < len(ids):
        raise ValueError("ids are impossible, or occur twice")
    if lacking := alphabet.keys() - vocab.keys():
        raise ValueError(f"{len(lacking)} of the 256 bytes are no tokens")
    odd = next((word for word in vocab if not word or not {*word} <= alphabet.keys()), None)
    if odd is not None:
        raise ValueError(f"the token {odd!r} is not written in bytes")

    order = read_merges(model["merges"], vocab)
    kept = tokens_of_merges(vocab, order, model.get("ignore_merges", False))
    as_bytes = {word: bytes(alphabet[c] for c in word) for word in vocab}
    words = {i: as_bytes[word] for word, i in vocab.items()}
    words |= {i: name.encode() for name, i in special.items()}
    encoding = tiktoken.Encoding(
        "released", pat_str=read_pattern(raw), special_tokens=special,
        mergeable_ranks={as_bytes[word]: vocab[word] for word in kept})
    try:
        for text in (PROBE, *PROBE):
            if encoding.decode(encoding.encode_ordinary(text)) != text:
                raise ValueError(f"the pattern of pre_tokenizer leaves out parts of {text!r}")
    except BaseException as error:      # tiktoken's code in Rust panics, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("the pattern of pre_tokenizer matches an empty text") from None
    return Vocabulary(encoding, special, words)


def read_vocabulary(path) -> Vocabulary:
    """Read a tokenizer.json. Raises UserError where it is missing or damaged, or says what is not
    built."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}")
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        raise UserError(f"{path} can't be used: {error} is missing") from None
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} can't be used: {str(error)[:300]}") from None
