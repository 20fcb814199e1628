"""Byte-level BPE: our own trainer, tiktoken for encoding, GLM's special tokens and chat template.

    python tokenizer.py train      rebuild ranks.txt from corpus.txt, byte for byte
    python tokenizer.py show "some text"

ranks.txt holds one token a line, in base64; a token's rank is its line number. Every token is two
earlier ones joined, so the first n >= 256 lines are a valid tokenizer by themselves: a tiny model
takes the first 512, a larger one more lines of the same file. Special tokens follow the ranks.

A released model brings its own tokenizer.json, which ReleasedTokenizer reads. The tokenizer of a
model, whichever of the two it is, is `tokenizer_of(config)`.
"""
import base64
import functools
import hashlib
import heapq
import json
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

from lib.cli import main, UserError
from lib.vocabulary import read_vocabulary

HERE = Path(__file__).resolve().parent
RANKS, CORPUS = HERE / "ranks.txt", HERE / "corpus.txt"
N_RANKS = 4096
CORPUS_DIGEST = "68e959d46e741899"

# How text is cut before any merge: words with their leading space, single digits (so that
# coordinates read digit by digit [O]), runs of marks (with a space before a digit, as in "12, 34"),
# runs of white space.
PATTERN = r" ?[A-Za-z]+| ?[^\sA-Za-z0-9]+(?: (?=[0-9]))?|[0-9]|\s+(?!\S)|\s+"

SPECIAL = [  # GLM's names [R], and in GLM's order where the released ids show one
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
]
# GLM stops where somebody else speaks next, or at the end of the text.
STOPS = "<|endoftext|>", "<|user|>", "<|observation|>"
# Without these special tokens no conversation with a picture can be written.
NEEDED = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|begin_of_image|>",
          "<|end_of_image|>", "<|image|>")
# The files of a released folder that belong to its tokenizer.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "chat_template.json", "generation_config.json")


# ---- training -----------------------------------------------------------------------------------

def train_bpe(text: str, n_ranks: int) -> list[bytes]:
    """Learn `n_ranks` tokens: the 256 bytes, then merges by frequency (ties: the smaller pair).

    Incremental: `places` holds the distinct words that a pair occurs in, so a merge touches those
    words only. A heap finds the most frequent pair; its counts may be out of date, so an entry is
    compared with `counts` when it is taken out. 4,096 ranks from 2 MB take seconds; counting every
    pair anew for each merge would take an hour.
    """
    # A word is a list of token ids, at first its bytes; n is how often it occurs.
    occurrences = sorted(Counter(re.findall(PATTERN, text)).items())
    words = [[list(word.encode()), n] for word, n in occurrences]
    tokens = [bytes([i]) for i in range(256)]
    counts: Counter = Counter()
    places = defaultdict(set)
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += n
            places[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < n_ranks and heap:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative:       # out of date: put it back with its present count
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in places.pop(pair):      # merge the pair in every word that has it
            word, n = words[i]
            merged, j = [], 0
            while j < len(word):
                matches = j + 1 < len(word) and (word[j], word[j + 1]) == pair
                merged.append(new if matches else word[j])
                j += 2 if matches else 1
            for old in zip(word, word[1:]):
                counts[old] -= n
                changed.add(old)
            for fresh in zip(merged, merged[1:]):
                counts[fresh] += n
                places[fresh].add(i)
                changed.add(fresh)
            words[i][0] = merged
        for other in changed:       # their older entries in the heap are out of date now
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
    return tokens


def digest(path: Path) -> str:
    """16 hex digits of the file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def train() -> str:
    """Rebuild ranks.txt; returns one line about it. Raises UserError where corpus.txt is not the
    text that the ranks were made from."""
    if digest(CORPUS) != CORPUS_DIGEST:
        raise UserError(f"{CORPUS.name} has digest {digest(CORPUS)}, not {CORPUS_DIGEST}: "
                        "restore it, or change CORPUS_DIGEST and retrain every model")
    tokens = train_bpe(CORPUS.read_text(encoding="utf-8"), N_RANKS)
    text = "".join(base64.b64encode(token).decode() + "\n" for token in tokens)
    RANKS.write_text(text, encoding="ascii", newline="\n")
    return f"{len(tokens)} ranks, digest {digest(RANKS)}"


# ---- encoding -----------------------------------------------------------------------------------

LONGEST = 100_000       # characters that are encoded at a time


def cut(text: str) -> list[str]:
    """Cut a text into parts that are encoded one by one; most texts are a single part. In a run of
    a million marks or spaces, tiktoken's search for words overflows its stack: an error that
    `except Exception` does not catch."""
    return [text[i:i + LONGEST] for i in range(0, len(text), LONGEST)]


class Tokenizer:
    """Text to ids and back. `special` is {name: id} of the special tokens; their names in ordinary
    text are encoded as text, so that nobody can type one.

    words: the bytes of each id; image: the id of a visual slot; stops: the ids that end a reply;
    begin_reply: the ids that come after <|assistant|> and a line break if the reply has no thought;
    files: {name: contents} of the released files that a saved model needs as well.

    n_ranks: how many lines of ranks.txt to use. Raises ValueError where there are not so many.
    """

    def __init__(self, n_ranks: int = 512):
        lines = RANKS.read_text(encoding="ascii").split()
        if not 256 <= n_ranks <= len(lines):
            raise ValueError(f"{n_ranks} ranks: the file has 256 to {len(lines)}")
        ranks = {base64.b64decode(line): i for i, line in enumerate(lines[:n_ranks])}
        self.n_ranks = n_ranks
        self.special = {name: n_ranks + i for i, name in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding("nanoglmv", pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        # rounded up to a multiple of 32, which is faster in the matmuls
        self.vocab_size = math.ceil((n_ranks + len(SPECIAL)) / 32) * 32
        self.words = {i: word for word, i in ranks.items()}
        self.words |= {i: name.encode() for name, i in self.special.items()}
        self.image = self.special["<|image|>"]
        self.stops = tuple(self.special[mark] for mark in STOPS)
        self.begin_reply = [self.special["<think>"], self.special["</think>"], *self.encode("\n")]
        self.files: dict[str, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; a "<|user|>" in it is eight characters of text."""
        return [i for part in cut(text) for i in self.encoding.encode_ordinary(part)]

    def decode_bytes(self, ids) -> bytes:
        """Bytes of ids; the padding ids at the end of the vocabulary give none."""
        return b"".join(self.words.get(i, b"") for i in ids)

    def decode(self, ids) -> str:
        """Text of ids, special tokens by name; broken UTF-8 becomes replacement characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def plain(self, ids) -> str:
        """Text of ids without the special tokens."""
        special = set(self.special.values())
        return self.decode(i for i in ids if i not in special)

    def mark(self, name: str) -> int:
        """The id of a special token. Raises UserError where a released vocabulary lacks it."""
        if name not in self.special:
            raise UserError(f"this model's vocabulary has no special token {name}")
        return self.special[name]

    def encode_reply(self, text: str) -> list[int]:
        """Ids of an assistant's reply; only here, think and box marks become special tokens. Where
        a released vocabulary lacks them, they are text, and decode to the same characters."""
        marks = {"<think>", "</think>", "<|begin_of_box|>", "<|end_of_box|>"} & self.special.keys()
        return [i for part in cut(text) for i in self.encoding.encode(
            part, allowed_special=marks, disallowed_special=())]

    def chat(self, messages, answer: bool = False) -> list[tuple[list[int], float, object]]:
        """Encode a conversation by GLM's chat template [R].

            [Message("user", "<|image|>Red?", (picture,)), Message("assistant", "yes")]

        becomes this string (wrapped here), of which only `yes<|user|>` is learnt:

            [gMASK]<sop><|user|>\\n<|begin_of_image|><|end_of_image|>Red?
            <|assistant|>\\n<think></think>\\nyes<|user|>

        messages: objects with role, text, images and weight; the text has one <|image|> for each
        image. A weight of None is 1 for an assistant's reply and 0 for all other messages.
        answer: end with the prompt of a reply, `<|assistant|>\\n<think></think>\\n`.
        Returns pieces (ids, weight, image). The piece of an image holds the ids of the two marks;
        `data.document` puts the visual tokens between them, as it knows their number. A reply ends
        with the mark of the role that speaks next (<|user|> after the last), where GLM stops; that
        mark is learnt too. A reply without <think> gets an empty one in front, which is not learnt;
        with a released tokenizer it gets nothing, see ReleasedTokenizer. Raises ValueError where a
        text has fewer <|image|> than the message has images, and UserError where a vocabulary lacks
        a role.
        """
        s, newline = self.special, self.encode("\n")
        pieces = [([s["[gMASK]"], s["<sop>"]], 0.0, None)]
        role_before = ""
        for i, message in enumerate(messages):
            # A reply has already been closed by the mark of the next role.
            mark = [] if role_before == "assistant" else [self.mark(f"<|{message.role}|>")]
            role_before = message.role
            weight = message.weight
            if weight is None:
                weight = float(message.role == "assistant")
            if message.role == "assistant":
                pieces.append((mark + newline, 0.0, None))
                if not message.text.startswith("<think>"):
                    pieces.append((self.begin_reply, 0.0, None))
                after = messages[i + 1].role if i + 1 < len(messages) else "user"
                reply = self.encode_reply(message.text) + [self.mark(f"<|{after}|>")]
                pieces.append((reply, weight, None))
                continue
            texts = message.text.split("<|image|>", len(message.images))    # any further mark: text
            if len(texts) != len(message.images) + 1:
                raise ValueError(f"{len(texts) - 1} <|image|> marks, {len(message.images)} images")
            # The newline is encoded together with the text, as in the whole string: white space
            # after it can be part of the same token.
            first, *rest = self.encode("\n" + texts[0])
            pieces += [(mark + [first], 0.0, None), (rest, weight, None)]
            for image, text in zip(message.images, texts[1:]):
                around = [s["<|begin_of_image|>"], s["<|end_of_image|>"]]
                pieces.append((around, 0.0, image))
                pieces.append((self.encode(text), weight, None))
        if answer:
            mark = [] if role_before == "assistant" else [s["<|assistant|>"]]
            pieces.append((mark + newline + self.begin_reply, 0.0, None))
        return [piece for piece in pieces if piece[0]]


# ---- released tokenizers ------------------------------------------------------------------------

class ReleasedTokenizer(Tokenizer):
    """The tokenizer of a released folder [R], from the path of its tokenizer.json. It differs from
    ours in three ways:

    - Text becomes the ids that the `tokenizers` package gives, see lib/vocabulary.py. Names of
      special tokens in ordinary text are text here as well; there they become special tokens.
    - A reply begins right after <|assistant|> and a line break: GLM-OCR's template writes an empty
      <think></think> only where it is asked to (`enable_thinking=false`).
    - `stops` are the ids in generation_config.json, or else in config.json, and those of STOPS, as
      a reply ends where an observation follows.

    Raises UserError where a file is damaged, asks for something that is not implemented, or lacks a
    special token that every conversation needs.
    """

    def __init__(self, path):
        path = Path(path)
        found = read_vocabulary(path)
        if lacking := [name for name in NEEDED if name not in found.special]:
            raise UserError(f"{path} lacks the special token {lacking[0]}: no vocabulary of GLM's")
        self.n_ranks = 0                # no line of ranks.txt
        self.encoding, self.special, self.words = found.encoding, found.special, found.words
        self.vocab_size = max(self.words) + 1
        self.image = self.special["<|image|>"]
        stops = {self.special[mark] for mark in STOPS if mark in self.special}
        self.stops = tuple(sorted(stops | read_stops(path.parent)))
        self.begin_reply = []
        self.files = {name: (path.parent / name).read_bytes() for name in FILES
                      if (path.parent / name).is_file()}


def read_stops(folder: Path) -> set[int]:
    """The ids that end a reply, by generation_config.json, or else by config.json. Raises UserError
    where the file is damaged."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            ids = values.get("eos_token_id") or values.get("text_config", {}).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
        ids = ids if isinstance(ids, list) else [ids]
        if all(type(i) is int and 0 <= i < 2 ** 31 for i in ids):
            return set(ids)
        if ids != [None]:
            raise UserError(f"{path} is damaged: eos_token_id is {json.dumps(ids)[:60]}")
    return set()


@functools.cache
def _tokenizer(n_ranks: int, vocabulary: str) -> Tokenizer:
    return ReleasedTokenizer(vocabulary) if vocabulary else Tokenizer(n_ranks)


def tokenizer_of(config) -> Tokenizer:
    """The tokenizer of the model that `config` describes, a model.Config; each is made once. Raises
    UserError where it has none."""
    if not (config.n_ranks or config.vocabulary):
        raise UserError("this model comes without a tokenizer: its weights can be loaded, but it "
                        "can't read or write text; put its tokenizer.json beside them")
    return _tokenizer(config.n_ranks, config.vocabulary)


# ---- the command line ---------------------------------------------------------------------------

def entry():
    words = sys.argv[1:]
    if words == ["train"]:
        print(train())
    elif len(words) == 2 and words[0] == "show":
        tokens = Tokenizer(N_RANKS)
        print(" ".join(f"{i}:{tokens.decode([i])!r}" for i in tokens.encode(words[1])))
    elif words and words[0] not in ("--help", "-h"):
        raise UserError(f"'{' '.join(words)}' is not a command: train, or show TEXT")
    else:
        print(__doc__)


if __name__ == "__main__":
    main(entry)
