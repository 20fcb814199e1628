"""From samples to batches: conversations and text, mixed and packed into rows.

    sample i --Stream--> Documents --Packer--> row of Documents --collate--> Batch (lib/batch.py)

Sample i of a stream is a pure function of (seed, i). So a run sees the same samples whatever the
number of worker processes or ranks, and a resumed run continues bit for bit: a checkpoint holds the
next i and the numbers of the few samples that wait for a row with room. Samples are drawn by the
gym, or come from own data: records that lib/shards.py reads and lib/conversations.py understands.

A worked example, with a 32 x 32 picture, 8 x 8 patches and one visual token per 2 x 2 patches:

    conversation  [Message("user", "<|image|>Red?", (picture,)), Message("assistant", "yes")]
    ids           [gMASK] <sop> <|user|> \\n <|begin_of_image|> 4 x <|image|> <|end_of_image|>
                  Re d ? <|assistant|> \\n <think> </think> \\n y es <|user|>         21 tokens
    weights       0 everywhere but 1 for the reply: y es <|user|>
    row           two such Documents, of two questions about one picture, T = 48
    Batch         tokens (48,): 21 + 21 ids, then a tail of 6 <|endoftext|> of weight 0
                  cu_seqlens [0, 21, 42, 48]: three stretches, which do not attend to each other
                  patches (16, 1, 192), grids [[1, 4, 4]]: the shared picture is encoded once
                  visual [0, 1, 2, 3, 0, 1, 2, 3]: the encoded group for each <|image|> slot

Letters: T tokens of a row, L tokens of a document.
"""
import contextlib
import functools
import itertools
import math
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import gym
from lib.batch import collate, Document      # the scripts import both from here
from lib.cli import UserError
from lib.conversations import conversation, layout_of, plain_text
from lib.images import BadRecord, load, seen_size, Unread
from lib.partition import Costs, pack
from lib.shards import open_shards, Record, Shards
from model import Config
from tasks.atlas import atlas_text
from tasks.base import IMAGE, Message, OneShot, Task
from tasks.driver import MOST_PIXELS
from tokenizer import Tokenizer, tokenizer_of


# ---- documents ----------------------------------------------------------------------------------

def document(messages, tokens: Tokenizer, config: Config, answer: bool = False,
             source: int = 0, lazy: bool = False) -> Document:
    """Turn a conversation into a Document. Only the assistant's replies have a weight, unless a
    message has one of its own.

    answer: make a prompt, which ends where the next reply begins. lazy: leave the pixels of files
    `Unread`.
    """
    ids, weights, images = [], [], []
    pixels_per_token = unit_of(config) ** 2
    for piece, weight, image in tokens.chat(messages, answer):
        if image is not None:       # the piece is the two marks around the visual tokens
            size = seen_size(image, config)
            unread = lazy and not isinstance(image, Image.Image)    # what is drawn is there already
            images.append(Unread(image, *size) if unread else load(image, *size))
            height, width = images[-1].shape[-3:-1]     # two frames of a video: (2, h, w, 3)
            count = height * width // pixels_per_token
            piece = [piece[0], *[tokens.image] * count, piece[1]]
        ids += piece
        weights += [weight] * len(piece)
    return Document(np.array(ids, np.int32), np.array(weights, np.float32), images, source)


# ---- own data -----------------------------------------------------------------------------------

TRIES = 100     # a run ends after so many unusable records in a row: nothing seems to be left


@dataclass
class OwnData:
    """A source of own data. split: which of its records: `train`, `test` (held out) or `all`."""
    name: str
    shards: Shards
    split: str = "train"

    def __post_init__(self):
        self.count = len(self.shards.numbers(self.split))

    def record(self, seed: int, i: int) -> Record:
        """The record for sample i. Each epoch of `count` samples has every record once, in an order
        of its own."""
        return self.shards[self.shards.order(seed, i, self.split)]

    def description(self) -> str:
        """One line for the log, with the layout of the first record that has one."""
        layout = "no layout that is known"
        for number in range(min(TRIES, len(self.shards))):
            with contextlib.suppress(BadRecord):
                layout = layout_of(self.shards[number])
                break
        held = len(self.shards) - self.count
        held_out = f", {held:,} of them held out" if self.split == "train" else ""
        return f"{self.name}: {len(self.shards):,} records{held_out}, {layout}"


def parse_data(text: str, split: str = "train",
               option: str = "--data") -> tuple[tuple[OwnData, ...], dict[str, float]]:
    """'data/cats.jsonl:2,notes' -> (the OwnData of both, {"cats": 2.0, "notes": 1.0})

    option: for messages. Raises UserError on a wrong weight, or on what `open_shards` refuses.
    """
    sources, weights = [], {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        path, colon, weight = part.rpartition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            raise UserError(f"{option} takes FILE:weight, not '{part}'") from None
        if not 0 <= value < math.inf:       # true for nan as well
            raise UserError(f"{option} takes weights from 0 on, not '{part}'")
        path = path if colon else part
        name = source_name(path, weights)
        sources.append(OwnData(name, open_shards(path), split))
        weights[name] = value
    if text and not sources:
        raise UserError(f"{option} names no file: '{text}'")
    return tuple(sources), weights


def source_name(path: str, taken) -> str:
    """A short name for the file or folder: its stem, and a number if there is such a source."""
    stem = re.sub(r"\W+", "_", Path(path).stem).strip("_")[:24] or "own"
    names = itertools.chain([stem], (f"{stem}_{k}" for k in itertools.count(2)))
    return next(n for n in names if n not in {"gym", *gym.names(), *TEXTS, *taken})


# ---- the mixture --------------------------------------------------------------------------------

# The share of dialogues that stay whole. After 800 steps with one question a document, the smallest
# model pointed at the named one of two things in 68% of the cases; with dialogues of five turns in
# 49%, which is chance. [O]
DIALOGUES = 0.05
# Questions asked about one picture, each in a document of its own that sees nothing of the others.
# Different answers to different names in the same picture teach what a name refers to, and the
# encoder sees the picture once. [O]
QUESTIONS = 3
# The sources that are plain text and not a category of the gym: see Stream._text.
TEXTS = ("text", "code", "atlas")


def one_turn(messages, turn: int) -> list[Message]:
    """Cut one question and its reply out of a dialogue about the pictures of its first message."""
    question, reply = messages[2 * turn:2 * turn + 2]
    if turn > 0:
        images = messages[0].images
        question = Message("user", IMAGE * len(images) + question.text, images)
    return [question, reply]


@functools.cache
def library_files() -> list[Path]:
    """The Python standard library's own source: plain code that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    found = []
    for path in root.rglob("*.py"):
        if skip & set(path.parts) or "topics" in path.name:     # topics.py is the source `text`
            continue
        if path.stat().st_size > 2000:                          # not an almost empty __init__.py
            found.append(path)
    return sorted(found)


@functools.cache
def library_text() -> str:
    """The language reference as prose; it comes with Python for `help()`."""
    from pydoc_data.topics import topics
    return "\n".join(topics[name] for name in sorted(topics))


@functools.lru_cache(maxsize=256)
def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@dataclass
class Stream:
    """A mixture of named sources: the gym's categories, `text`, `code`, `atlas` (the pages that
    world_knowledge asks about), and own data. `stream(i)` makes sample i.

    Raises UserError where mix or parts name what is not there.
    """
    config: Config              # of the model: sizes of images, number of ranks
    mix: tuple                  # ((name, weight), ...)
    seed: int = 0
    split: str = "train"        # of the tasks: train or test
    levels: int = 1             # tasks are sampled from levels 0..levels-1 ...
    easy_samples: int = 0       # ... but the first samples from level 0 only: a curriculum [O]
    think: float = 0.0          # share of conversations in which the oracle states its reasons
    text_tokens: int = 128      # tokens of a stretch of text
    parts: tuple = ()           # categories shown only in single questions about their screens
    own_question: bool = False  # a picture's own question is always among those asked about it
    pixels: int = 0             # side of the pictures; 0: see `task_pixels`
    own: tuple = ()             # OwnData, each named in mix
    own_tokens: int = 2048      # tokens of a stretch of own text
    lazy: bool = False          # own pictures are `Unread`: only their sizes are known

    def __post_init__(self):
        self.own_data = {data.name: data for data in self.own}
        known = [*gym.names(), *TEXTS, *self.own_data]
        for name, _ in self.mix:
            if name not in known:
                raise UserError(f"--mix names '{name}'; there are {', '.join(known)}")
            if name in gym.names():
                task_pixels(name, self.config, self.pixels)     # refuses what can't be seen
        for name in self.parts:
            if name not in gym.names() or not gym.demonstrate(Task(name, 0), parts=True):
                raise UserError(f"--parts: there are no questions about the screens of '{name}'")
            if name not in dict(self.mix):
                raise UserError(f"--parts names {name}, which is no part of --mix")
        total = sum(weight for _, weight in self.mix)
        if not 0 < total < math.inf:
            raise UserError("--data and --mix take weights with a finite sum above 0; theirs is "
                            f"{total:g}")
        # Source k owns the numbers between edges[k-1] and edges[k] in [0, 1].
        self.edges = np.cumsum([weight / total for _, weight in self.mix])
        self.tokens = tokenizer_of(self.config)

    @property
    def digest(self) -> str:
        """What differs where two runs, or two ranks, have other own data; "" without any."""
        return " ".join(f"{data.name}:{data.split}:{data.shards.digest}" for data in self.own)

    def __call__(self, i: int) -> list[Document]:
        """Sample i: the questions about one picture as documents that share its pixels, one
        stretch of text, or one record of own data."""
        rng, source = self._source(i)       # all that is random below comes from this generator
        name = self.mix[source][0]
        if name in TEXTS:
            return [self._text(rng, name, source)]
        if name in self.own_data:
            return [self._own(rng, self.own_data[name], i, source)]
        conversations = self._conversations(rng, name, i)
        order = rng.permutation(len(conversations)).tolist()
        if self.own_question and issubclass(gym.CATEGORIES[name].env, OneShot):
            order.sort(key=lambda k: k > 0)     # the task's own question first, then the others
        documents = [document(conversations[k], self.tokens, self.config, source=source)
                     for k in order[:QUESTIONS]]
        # The same arrays, not copies: `collate` packs, and the tower encodes, a picture once.
        for other in documents[1:]:
            other.images = documents[0].images
        return documents

    def _source(self, i: int) -> tuple[np.random.Generator, int]:
        """The random generator of sample i, and its entry of the mixture."""
        rng = np.random.default_rng([self.seed, i])
        source = int(np.searchsorted(self.edges, rng.random(), "right"))
        return rng, min(source, len(self.mix) - 1)      # the last edge may be 0.9999999

    def _conversations(self, rng, name: str, i: int) -> list[list[Message]]:
        """Conversations about the same pictures, from one task of the category `name`."""
        level = int(rng.integers(self.levels)) if i >= self.easy_samples else 0
        task = Task(name, int(rng.integers(2 ** 31)), level, self.split,
                    task_pixels(name, self.config, self.pixels))
        think = rng.random() < self.think
        try:
            conversations = gym.demonstrate(task, think, parts=name in self.parts)
        except Exception as error:
            error.add_note(f"while drawing {task}")
            raise
        chosen = conversations[int(rng.integers(len(conversations)))]
        keep_whole = rng.random() < DIALOGUES
        # In an episode (it has observations) a turn makes no sense without those before it.
        if keep_whole or any(message.role == "observation" for message in chosen):
            return [chosen]
        if len(chosen) > 2:     # a dialogue about one picture: its turns, each by itself
            return [one_turn(chosen, turn) for turn in range(len(chosen) // 2)]
        # a single question: with it, all the others about the same pictures
        return [talk for talk in conversations if talk[0].images == chosen[0].images]

    def _text(self, rng, name: str, source: int) -> Document:
        """A stretch of `text_tokens` tokens that begins at the start of a line."""
        if name == "text":
            text = library_text()
        elif name == "atlas":
            text = "\n" + atlas_text(int(rng.integers(2 ** 31)))
        else:
            files = library_files()
            text = read_text(files[int(rng.integers(len(files)))])
        # A token is about 4 characters, so the text goes on long enough after `start`; 8 characters
        # a token surely make enough tokens.
        start = int(rng.integers(max(1, len(text) - 4 * self.text_tokens)))
        start = text.find("\n", start) + 1
        ids = self.tokens.encode(text[start:start + 8 * self.text_tokens])[:self.text_tokens]
        return self._plain(ids, source)

    def _plain(self, ids: list[int], source: int) -> Document:
        """A text without a conversation: every token is learnt."""
        ids = [self.tokens.special["[gMASK]"], self.tokens.special["<sop>"], *ids]
        weights = np.ones(len(ids), np.float32)
        weights[:2] = 0         # the two marks that begin every document are given
        return Document(np.array(ids, np.int32), weights, [], source)

    def _own(self, rng, data: OwnData, i: int, source: int) -> Document:
        """The record for sample i, or the next one in the shuffled order that can be used; the
        document's `passed` says which were not. Raises UserError after TRIES of them in a row."""
        passed = []
        for k in range(min(TRIES, 2 * data.count)):     # two epochs: all records, at any i
            record = None
            try:
                record = data.record(self.seed, i + k)
                made = self._record(rng, record, source)
            except BadRecord as error:
                where = f"{record.where}: " if record and record.where not in str(error) else ""
                passed.append((error.kind, where + str(error)))
            else:
                made.passed = tuple(passed)
                return made
        raise UserError(f"{data.name}: {len(passed)} records in a row can't be used; the last: "
                        f"{': '.join(passed[-1])}")

    def once(self, data: OwnData, room: int, tokens: int) -> list[Document]:
        """The records of `data` as documents, each once, until they have `tokens` tokens in all;
        without those that can't be used or are longer than `room`."""
        documents, used = [], 0
        for i in range(data.count):
            with contextlib.suppress(BadRecord):
                rng = np.random.default_rng([self.seed, i])
                made = self._record(rng, data.record(self.seed, i), 0)
                if len(made.ids) <= room:
                    documents.append(made)
                    used += len(made.ids)
            if used >= tokens:
                break
        return documents

    def _record(self, rng, record: Record, source: int) -> Document:
        """A record of own data as a document. Raises BadRecord."""
        text = plain_text(record)
        if text is not None:
            return self._plain(self._stretch(rng, text), source)
        # A video has as many visual tokens as a picture: so many pairs of frames can share them.
        pairs = max(1, self.config.max_tokens // self.config.min_tokens)
        return document(conversation(record, pairs), self.tokens, self.config, source=source,
                        lazy=self.lazy)

    def _stretch(self, rng, text: str) -> list[int]:
        """The ids of a text, or of a stretch of it that fits into a row with its two marks. It
        begins at the start of a line, if one is near."""
        most = self.own_tokens - 2
        head = text[:8 * most]
        ids = self.tokens.encode(head)
        if len(ids) <= most and len(head) == len(text):
            return ids
        length = most * len(head) // len(ids)       # of a stretch in characters, about
        start = int(rng.integers(max(1, len(text) - length)))
        start = text.rfind("\n", max(0, start - 1000), start) + 1 or start
        return self.tokens.encode(text[start:start + 8 * most])[:most]


def unit_of(config: Config) -> int:
    """The side in pixels of the square that one visual token stands for."""
    return config.vision.patch_size * config.vision.spatial_merge_size


def task_pixels(name: str, config: Config, pixels: int = 0) -> int:
    """The side in pixels at which a task of the category `name` is drawn for a model.

    The least size of a category suits patches of 8 pixels, those of `tiny`. For larger patches the
    picture is larger in proportion, so that every model has as many visual tokens of it. [O]
    pixels: take this side instead, where the category can be drawn so small. Raises UserError if
    it is more than the model can see.
    """
    least, unit = gym.CATEGORIES[name].env.min_pixels, unit_of(config)
    most = min(MOST_PIXELS, math.isqrt(config.max_tokens) * unit)
    if pixels > most:
        raise UserError(f"--pixels={pixels} is more than this model can see: {most}")
    side = pixels or least * config.vision.patch_size / 8
    return min(MOST_PIXELS, max(least, math.ceil(side / unit) * unit))


def sight(config: Config) -> int:
    """The largest `min_pixels` of a category whose pictures this model sees without scaling them
    down: drawn at `task_pixels`, they have at most `max_tokens` visual tokens."""
    patch = min(8, config.vision.patch_size)    # smaller patches do not make a picture smaller
    return math.isqrt(config.max_tokens) * patch * config.vision.spatial_merge_size


def parse_mix(text: str, pixels: int = MOST_PIXELS) -> tuple:
    """'point:2,text' -> (('point', 2.0), ('text', 1.0))

    'gym' means every category whose least size is at most `pixels`, which `sight` gives for a
    model, with equal shares of its weight. The weights of a name that comes twice are added. Raises
    UserError on a larger category, a wrong weight, or a sum that is not finite and above 0.
    """
    mix = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            raise UserError(f"--mix takes name:weight, not '{part}'") from None
        if not 0 <= value < math.inf:       # true for nan as well
            raise UserError(f"--mix takes weights from 0 on, not '{part}'")
        names = gym.names(pixels) if name == "gym" else [name]
        for n in names:
            if n in gym.names() and (least := gym.CATEGORIES[n].env.min_pixels) > pixels:
                raise UserError(f"--mix names {n}, which needs pictures of {least} pixels; this "
                                f"model sees {pixels}, and one of --size=mini or larger sees all")
            mix[n] = mix.get(n, 0.0) + value / len(names)
    total = sum(mix.values())
    if not 0 < total < math.inf:
        raise UserError(f"--mix takes weights with a finite sum above 0; that of '{text}' is "
                        f"{total:g}")
    return tuple(mix.items())


# ---- packing ------------------------------------------------------------------------------------

class Packer:
    """Packs samples into global batches of `rows` rows of `room` tokens each.

    It keeps a window of waiting samples, at least `window` of them and the tokens of `ahead`
    batches, from which lib.partition.pack chooses: the oldest, and what fills the rows well. So
    little is padded (1% of rows of 2,048 tokens, less of longer ones), the rows of a batch take
    about equally long, and no sample waits for long. The questions about a picture stay together.

    samples: a function of i that returns a list of Documents; costs: the model's FLOPs, by which
    rows are made equal, those of `base` unless given; state: what `state()` returned.
    """

    def __init__(self, samples, room: int, rows: int = 1, costs: Costs = Costs.of(Config()),
                 window: int = 64, ahead: int = 2, state: dict | None = None, say=print):
        self.samples, self.room, self.rows, self.costs, self.say = samples, room, rows, costs, say
        self.window, self.tokens_ahead = window, ahead * rows * room
        state = state or {"next": 0, "waiting": [], "skipped": 0}
        self.next, self.skipped = state["next"], state["skipped"]
        self.passed = dict(state.get("passed", {}))     # {kind: number of records passed over}
        self.waiting = []           # [(number, documents, their size: see Costs.documents), ...]
        for i in state["waiting"]:
            if not self._add(i, samples(i)):
                self.skipped += 1   # the rows have become shorter

    def _add(self, i: int, sample: list[Document]) -> bool:
        """Let sample i wait: its first documents, as many as fit into a whole row. Returns whether
        there are any."""
        ends = np.cumsum([len(d.ids) for d in sample])
        documents = sample[:int((ends <= self.room).sum())]
        if documents:
            self.waiting.append((i, documents, self.costs.documents(documents)))
        return bool(documents)

    def batch(self) -> list[list[Document]]:
        """The rows of the next global batch. Raises UserError where nearly all samples are longer
        than a row."""
        tokens = sum(size[0] for *_, size in self.waiting)
        while len(self.waiting) < self.window or tokens < self.tokens_ahead:
            sample = self.samples(self.next)
            self._count(sample[0].passed)
            if self._add(self.next, sample):
                tokens += self.waiting[-1][2][0]
            else:
                self._skip(sample)
            self.next += 1
        rows = pack([size for *_, size in self.waiting], self.rows, self.room)
        made = [[d for k in row for d in self.waiting[k][1]] for row in rows]
        taken = {k for row in rows for k in row}
        self.waiting = [entry for k, entry in enumerate(self.waiting) if k not in taken]
        return made

    def row(self) -> list[Document]:
        """The next row, if a batch is one row."""
        [row] = self.batch()
        return row

    def _count(self, passed):
        """Count the records that were passed over, by kind, and say the first one of each kind."""
        for kind, detail in passed:
            if kind not in self.passed:
                self.say(f"skipped: {kind} ({detail}); others of this kind are only counted")
            self.passed[kind] = self.passed.get(kind, 0) + 1

    def _skip(self, sample: list[Document]):
        """Count sample `next` as skipped: its first document is longer than a row."""
        if not self.skipped:
            self.say(f"sample {self.next} has {len(sample[0].ids)} tokens, a row {self.room}: "
                     "skipped, and so are others of its kind")
        self.skipped += 1
        if self.skipped > 100 and self.skipped > 0.99 * self.next:
            raise UserError(f"of {self.next + 1} samples, {self.skipped} are longer than "
                            f"--row_tokens={self.room}")

    def state(self) -> dict:
        return {"next": self.next, "waiting": [i for i, *_ in self.waiting],
                "skipped": self.skipped, "passed": dict(self.passed)}


def pack_rows(documents: list[Document], room: int, ranks: int = 1) -> list[list[Document]]:
    """Pack documents into rows of `room` tokens, each into the first row that has room for it.

    ranks: how many share the rows. Then rows become shorter, so that each rank gets equally many:
    of 9 full rows, one of 8 ranks would compute two, while the others wait for it.
    """
    lengths = [len(d.ids) for d in documents]
    if ranks > 1 and documents:
        each = sum(lengths) / ranks         # tokens of a rank
        each /= math.ceil(each / room)      # tokens of a row; 2% more, since no row is quite full
        room = min(room, max(math.ceil(1.02 * each), *lengths))
    rows, free = [], []
    for d in documents:
        k = next((k for k in range(len(rows)) if free[k] >= len(d.ids)), len(rows))
        if k == len(rows):
            rows.append([])
            free.append(room)
        rows[k].append(d)
        free[k] -= len(d.ids)
    return rows


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade pack`.
# 1. pack in lib/partition.py: hardly any token of a row is padded. How many are with next-fit,
#    which closes a row at the first sample that does not fit?
#    pytest tests/test_data.py -k padded; 20 minutes.
# 2. Write a source: captions in another language for the scenes of tasks/scenes.py, as another
#    name in Stream. 30 minutes; `python pretrain.py --mix=gym:8,captions:2` trains on it.
