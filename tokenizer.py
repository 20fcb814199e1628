"""Byte-level BPE: our own trainer, tiktoken for encoding, GLM's special tokens and chat template.

    python tokenizer.py train      rebuild ranks.txt from corpus.txt, byte for byte
    python tokenizer.py show "some text"

ranks.txt holds one token a line in base64, the rank being the line. Every token is the join of two
earlier ones, so any prefix of 256 or more lines is itself a valid tokenizer: a tiny model takes the
first 512 and the same file serves a larger one. Special tokens follow the ranks.
"""
import base64
import hashlib
import heapq
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

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


# ---- training -----------------------------------------------------------------------------------

def train_bpe(text: str, n_ranks: int) -> list[bytes]:
    """Learn `n_ranks` tokens: the 256 bytes, then merges by frequency (ties: the smaller pair).

    Incremental: each pair knows the distinct words it stands in, so a merge touches those words
    only, and a heap with stale entries skipped on sight finds the next pair. 4,096 ranks from
    2 MB take seconds where recounting every pair would take an hour.
    """
    words = [[list(w.encode()), n] for w, n in sorted(Counter(re.findall(PATTERN, text)).items())]
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
        n, pair = heapq.heappop(heap)
        if counts[pair] != -n:  # stale
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if n == 0:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in places.pop(pair):
            word, n = words[i]
            merged, j = [], 0
            while j < len(word):
                both = j + 1 < len(word) and (word[j], word[j + 1]) == pair
                merged.append(new if both else word[j])
                j += 2 if both else 1
            for old in zip(word, word[1:]):
                counts[old] -= n
                changed.add(old)
            for fresh in zip(merged, merged[1:]):
                counts[fresh] += n
                places[fresh].add(i)
                changed.add(fresh)
            words[i][0] = merged
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
    return tokens


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def train() -> str:
    """Rebuild ranks.txt. Raises ValueError where corpus.txt isn't the text it was made from."""
    if digest(CORPUS) != CORPUS_DIGEST:
        raise ValueError(f"{CORPUS.name} has digest {digest(CORPUS)}, not {CORPUS_DIGEST}: "
                         "restore it, or change CORPUS_DIGEST and retrain every model")
    tokens = train_bpe(CORPUS.read_text(encoding="utf-8"), N_RANKS)
    text = "".join(base64.b64encode(token).decode() + "\n" for token in tokens)
    RANKS.write_text(text, encoding="ascii", newline="\n")
    return f"{len(tokens)} ranks, digest {digest(RANKS)}"


# ---- encoding -----------------------------------------------------------------------------------

class Tokenizer:
    """Text to ids and back. Marks in ordinary text are text; `special` makes special tokens."""

    def __init__(self, n_ranks: int = 512):
        lines = RANKS.read_text(encoding="ascii").split()
        if not 256 <= n_ranks <= len(lines):
            raise ValueError(f"{n_ranks} ranks: between 256 and {len(lines)} are there")
        ranks = {base64.b64decode(line): i for i, line in enumerate(lines[:n_ranks])}
        self.n_ranks = n_ranks
        self.special = {name: n_ranks + i for i, name in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding("nanoglmv", pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        self.vocab_size = -(-(n_ranks + len(SPECIAL)) // 32) * 32  # padded for the matmuls
        self.image = self.special["<|image|>"]
        # GLM stops where another would speak, or at the end of the text.
        stops = "<|endoftext|>", "<|user|>", "<|observation|>"
        self.stops = tuple(self.special[mark] for mark in stops)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; "<|user|>" in it stays eight characters of text."""
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.encoding.decode_single_token_bytes(i) for i in ids if self._known(i))

    def decode(self, ids) -> str:
        """Text of ids, special tokens by name; broken UTF-8 becomes replacement characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _known(self, i: int) -> bool:
        return 0 <= i < self.n_ranks + len(SPECIAL)

    def encode_reply(self, text: str) -> list[int]:
        """Ids of an assistant's reply: here alone think and box marks are special tokens."""
        marks = ("<think>", "</think>", "<|begin_of_box|>", "<|end_of_box|>")
        return self.encoding.encode(text, allowed_special=set(marks), disallowed_special=())

    def chat(self, messages, answer: bool = False) -> list[tuple[list[int], bool, object]]:
        """GLM's template: [gMASK]<sop><|user|>\\n...<|assistant|>\\n<think></think>\\n...<|user|>

        messages: objects with role, text and images, the text holding one <|image|> a picture.
        Returns pieces (ids, learn, image): for a picture, the ids of the two marks it stands
        between. A reply is closed by the mark of who speaks next (<|user|> at the end), GLM's
        stop token, and that is learnt too. A reply without a <think> of its own gets an empty one
        in front, without loss. `answer`: end where the assistant's next words would begin.
        """
        s, newline = self.special, self.encode("\n")
        begin_reply = [s["<think>"], s["</think>"], *newline]
        pieces = [([s["[gMASK]"], s["<sop>"]], False, None)]
        spoken = ""
        for i, message in enumerate(messages):
            mark = [] if spoken == "assistant" else [s[f"<|{message.role}|>"]]
            pieces.append((mark + newline, False, None))
            spoken = message.role
            if spoken == "assistant":
                if not message.text.startswith("<think>"):
                    pieces.append((begin_reply, False, None))
                after = messages[i + 1].role if i + 1 < len(messages) else "user"
                reply = self.encode_reply(message.text) + [s[f"<|{after}|>"]]
                pieces.append((reply, True, None))
                continue
            texts = message.text.split("<|image|>", len(message.images))
            if len(texts) != len(message.images) + 1:
                raise ValueError(f"{len(texts) - 1} <|image|> marks, {len(message.images)} images")
            pieces.append((self.encode(texts[0]), False, None))
            for image, text in zip(message.images, texts[1:]):
                around = [s["<|begin_of_image|>"], s["<|end_of_image|>"]]
                pieces.append((around, False, image))
                pieces.append((self.encode(text), False, None))
        if answer:
            mark = [] if spoken == "assistant" else [s["<|assistant|>"]]
            pieces.append((mark + newline + begin_reply, False, None))
        return [piece for piece in pieces if piece[0]]


if __name__ == "__main__":
    words = sys.argv[1:]
    try:
        if words == ["train"]:
            print(train())
        elif len(words) == 2 and words[0] == "show":
            tokens = Tokenizer(N_RANKS)
            print(" ".join(f"{i}:{tokens.decode([i])!r}" for i in tokens.encode(words[1])))
        elif words and words[0] not in ("--help", "-h"):
            raise ValueError(f"'{' '.join(words)}' is neither train nor show TEXT")
        else:
            print(__doc__)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
