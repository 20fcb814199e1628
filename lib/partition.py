"""Who draws, loads, encodes and receives what: the paper's topology-aware partitioning [C].

The conventional way is that every rank loads the pictures of all ranks, encodes its part of them,
and gathers the features of all. Here all is decided before any pixel is loaded, since the sizes of
pictures are known before (from an index, a header, or the fixed size of a gym's task), and every
rank computes the same plan from the same integers:

    1. each sample has a home, the rank that makes it: it draws a task of the gym, or reads a record
       of own data without its pictures
    2. the ranks exchange the samples without pixels, as plain bytes between CPUs
    3. samples are packed into the rows of a global batch, so that these take equally long (`pack`)
    4. in each micro-step, in which every rank has one row, the frames are dealt out so that the
       towers of all ranks take equally long. What was drawn is encoded at its home as far as that
       allows; the pixels of the rest move (`assign_encoders`, `PixelLoader.move_drawn`)
    5. a rank loads and encodes its frames only, and one all-to-all carries the merged visual tokens
       to the rank whose row needs them, while that one embeds its text (`exchange`)

Attention of the tower is bidirectional inside a frame, so a frame is the smallest part; it consists
of whole downsample groups. A video is a list of frames, so a long one is shared by several ranks.
A picture that turns out to be damaged when it is loaded is grey; one rank alone loads pictures with
their records, and takes another record. Not here: context parallelism of the decoder. One rank
computes a row, whose length is therefore limited by its memory.

Letters: P patches, T tokens of a row, W width of the decoder.
"""
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.batch import Batch, collate, Document, images_of
from lib.cli import UserError
from lib.common import GROUP_TIMEOUT
from lib.images import pack as pack_images, Unread
from lib.loader import make_sample
from model import Config, GLMV

AHEAD = 8       # global batches that samples are chosen from: with more, all wait longer
SHARE = 16      # samples of each rank that are exchanged together


# ---- costs --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Costs:
    """FLOPs of a forward pass of both parts of a model; a backward takes about twice as many. They
    are integers, so that all ranks compute the same plan."""
    token: int          # of the decoder, for each token
    pair: int           # of its attention, for each pair of tokens in a document
    learnt: int         # of the output matrix, for each token whose weight is not 0
    patch: int          # of tower and adapter, for each patch
    patch_pair: int     # of the tower's attention, for each pair of patches in a frame
    patch_size: int     # side of a patch in pixels
    merge: int          # patches of a downsample group, which becomes one visual token

    @classmethod
    def of(cls, config: Config) -> "Costs":
        """By widths and depths. A matrix takes 2 FLOPs a parameter and row; attention, queries with
        keys and weights with values, 4 times its width, half of it where it is causal."""
        t, v = config.text, config.vision
        heads = t.num_attention_heads * t.head_dim
        matrices = (2 * heads + 2 * t.num_key_value_heads * t.head_dim
                    + 3 * t.intermediate_size) * t.hidden_size
        embedding = v.in_channels * v.patch_size ** 2 * v.hidden_size       # of a still image
        tower = (4 * v.hidden_size + 3 * v.intermediate_size) * v.hidden_size
        out = v.out_hidden_size     # the convolution and vit.Merger, for each group of patches
        adapter = v.spatial_merge_size ** 2 * v.hidden_size * out + 10 * out ** 2
        return cls(token=2 * t.num_hidden_layers * matrices, pair=2 * t.num_hidden_layers * heads,
                   learnt=2 * t.hidden_size * t.vocab_size,
                   patch=2 * (embedding + v.depth * tower + adapter // v.spatial_merge_size ** 2),
                   patch_pair=4 * v.depth * v.hidden_size, patch_size=v.patch_size,
                   merge=v.spatial_merge_size ** 2)

    def patches(self, image) -> int:
        """The patches of an image (h, w, 3), or of two frames (2, h, w, 3)."""
        height, width = image.shape[-3:-1]
        return height * width // self.patch_size ** 2

    def frame(self, image) -> int:
        """What the tower takes for one image."""
        patches = self.patches(image)
        return patches * (self.patch + patches * self.patch_pair)

    def documents(self, documents) -> tuple[int, int, int]:
        """(tokens, what the decoder takes beyond `token` for each, what the tower takes) of some
        documents. A picture that several of them show is encoded once."""
        lengths = [len(d.ids) for d in documents]
        learnt = sum(int(np.count_nonzero(d.weights[1:])) for d in documents)
        decoder = self.pair * sum(n * n for n in lengths) + self.learnt * learnt
        return sum(lengths), decoder, sum(map(self.frame, images_of(documents)))


# ---- which samples make up a global batch -------------------------------------------------------

def pack(sizes, rows: int, room: int) -> list[list[int]]:
    """Choose from waiting samples what the `rows` rows of a global batch hold, `room` tokens each
    at most: for each row, the places of its samples in `sizes`.

    sizes: (tokens, decoder, tower) of each sample, as Costs.documents gives them, the oldest first;
    none has more than `room` tokens. The packing is joint, by sequence length and by visual tokens
    [C]: the oldest samples, as many as would fill the rows, go largest first to the row in which
    they add least to the larger of its two loads. Then each row takes what fits best of all that
    waits, so that hardly any of it is padded. The oldest sample is always among the chosen ones.
    """
    tokens, *costs = np.array(sizes, np.int64).reshape(-1, 3).T
    first = int(np.searchsorted(tokens.cumsum(), rows * room, "right"))
    # (2, n): what decoder and tower take for a sample, as a share of a whole batch.
    shares = np.stack([cost / max(1, int(cost[:first].sum())) for cost in costs])
    largest = shares.max(0)
    free, loads = np.full(rows, room), np.zeros((2, rows))
    packed, waiting = [[] for _ in range(rows)], np.ones(len(tokens), bool)

    def put(sample: int, row: int):
        packed[row].append(sample)
        free[row] -= tokens[sample]
        loads[:, row] += shares[:, sample]
        waiting[sample] = False

    for sample in [0, *sorted(range(1, first), key=lambda k: -largest[k])]:
        load = (loads + shares[:, sample, None]).max(0)
        load[free < tokens[sample]] = np.inf
        row = int(load.argmin())
        if free[row] >= tokens[sample]:
            put(sample, row)

    by_length = np.argsort(tokens, kind="stable")
    by_length = by_length[waiting[by_length]]
    filled = False
    while not filled:
        filled = True
        for row in np.argsort(-free, kind="stable").tolist():   # the emptiest row first
            fitting = int(np.searchsorted(tokens[by_length], free[row], "right"))
            if fitting:
                put(int(by_length[fitting - 1]), row)
                by_length = np.delete(by_length, fitting - 1)
                filled = False
    return [sorted(row) for row in packed]


# ---- which rank takes which row, and encodes which frame ----------------------------------------

def assign_rows(costs: list[int], ranks: int) -> list[list[int]]:
    """Deal the rows of a global batch to micro-steps, in each of which every rank has one row:
    result[m][rank] is the number of a row. costs: what the decoder takes for each row; there are as
    many on each rank.

    All wait for the slowest in a micro-step, so it gets rows that take about equally long.
    """
    order = sorted(range(len(costs)), key=lambda row: -costs[row])
    steps = [order[first:first + ranks] for first in range(0, len(order), ranks)]
    # Every second one is dealt in reverse, so that no rank always gets the longest.
    return [step[::-1] if number % 2 else step for number, step in enumerate(steps)]


def assign_encoders(costs: list[int], preferred: list[int], ranks: int) -> list[int]:
    """Which rank encodes each frame of a micro-step, so that the towers of all take equally long.

    costs: what the tower takes for each frame; preferred: the rank that should encode it, unless
    that one would have more to do than the mean of all.
    """
    loads, encoders, mean = [0] * ranks, [0] * len(costs), sum(costs) / ranks
    for frame in sorted(range(len(costs)), key=lambda k: -costs[k]):
        rank = preferred[frame]
        if loads[rank] + costs[frame] > mean:
            rank = loads.index(min(loads))
        loads[rank] += costs[frame]
        encoders[frame] = rank
    return encoders


def assign_stretches(costs: list[int], ranks: int) -> list[int]:
    """Which rank encodes each frame, where each encodes the next part of the list."""
    ends, total = np.cumsum(costs, dtype=np.int64), max(1, sum(costs))
    return [int((2 * end - cost) * ranks // (2 * total)) for end, cost in zip(ends, costs)]


@dataclass
class MicroStep:
    """Who does what while each rank computes one row. A list has an entry for each rank."""
    rows: list[list[Document]]      # the row that it computes
    loaded: list[list]              # the images whose pixels it holds
    encoded: list[list]             # of these, the images that it encodes, by whom they go to
    arriving: list[list]            # the images that it receives, by whom they come from
    groups: np.ndarray              # [a, b]: how many groups rank a encodes for rank b
    tower: list[int]                # FLOPs of the tower
    decoder: list[int]              # FLOPs of the decoder

    def bytes_in(self, rank: int, visual_token: int) -> int:
        """Bytes that a rank reads or receives: ids and weights of all rows, the pixels that it
        holds, the embeddings that come from other ranks, and in the backward their gradients, of
        `visual_token` bytes each. What a rank draws itself counts as read."""
        text = 8 * sum(len(d.ids) for row in self.rows for d in row)
        crossing = self.groups - np.diag(self.groups.diagonal())
        received = int(crossing[:, rank].sum() + crossing[rank].sum())
        pixels = sum(math.prod(image.shape) for image in self.loaded[rank])
        return text + pixels + received * visual_token


def plan_steps(rows: list[list[Document]], room: int, costs: Costs, ranks: int,
               how: str = "planned") -> list[MicroStep]:
    """The micro-steps of a global batch; all ranks compute the same ones. Of an image only its
    shape is needed, and its `home` if it is a Stub.

    how: `planned`, or one of two ways to compare with. `gathered` is the conventional way: each
    rank holds all pictures of a micro-step, encodes a stretch of them, and receives what all have
    encoded. `plain` is data parallelism: each rank encodes the pictures of its row.
    """
    sizes, steps, everyone = [costs.documents(row) for row in rows], [], range(ranks)
    for numbers in assign_rows([decoder for _, decoder, _ in sizes], ranks):
        images, owners = [], []
        for owner, row in enumerate(numbers):
            shown = images_of(rows[row])
            images += shown
            owners += [owner] * len(shown)
        flops = [costs.frame(image) for image in images]
        encoders = owners
        if how == "planned":
            # At best a picture is encoded where it was drawn; or else where its tokens are needed.
            homes = [getattr(image, "home", None) for image in images]
            preferred = [owner if home is None else home for home, owner in zip(homes, owners)]
            encoders = assign_encoders(flops, preferred, ranks)
        elif how == "gathered":
            encoders = assign_stretches(flops, ranks)

        groups, tower = np.zeros((ranks, ranks), np.int64), [0] * ranks
        encoded, arriving = [[] for _ in everyone], [[] for _ in everyone]
        # From encoder to encoder, and of each from owner to owner: in this order images are sent
        # and received.
        for k in sorted(range(len(images)), key=lambda k: encoders[k]):
            encoded[encoders[k]].append(images[k])
            tower[encoders[k]] += flops[k]
            for rank in everyone if how == "gathered" else [owners[k]]:
                arriving[rank].append(images[k])
                groups[encoders[k], rank] += costs.patches(images[k]) // costs.merge
        loaded = [images] * ranks if how == "gathered" else encoded
        decoder = [costs.token * room + sizes[row][1] for row in numbers]
        steps.append(MicroStep([rows[row] for row in numbers], loaded, encoded, arriving, groups,
                               tower, decoder))
    return steps


def balance(steps: list[MicroStep]) -> float:
    """How long a step takes, over how long it would take if all ranks had equally much to do: 1 at
    best. In a micro-step the ranks wait for each other twice, for the slowest tower and for the
    slowest decoder."""
    slowest = sum(max(step.tower) + max(step.decoder) for step in steps)
    return slowest / sum(sum(step.tower + step.decoder) / len(step.rows) for step in steps)


def most_bytes_in(steps: list[MicroStep], visual_token: int) -> int:
    """What the rank reads or receives in a step that reads and receives most: see MicroStep."""
    ranks = range(len(steps[0].rows))
    return max(sum(step.bytes_in(rank, visual_token) for step in steps) for rank in ranks)


# ---- samples without pixels ---------------------------------------------------------------------

@dataclass(eq=False)        # each is itself, whatever it looks like
class Stub:
    """An image of a sample in place of its pixels."""
    shape: tuple            # (h, w, 3), or (2, h, w, 3) of two frames of a video
    sample: int             # number of the sample
    number: int             # of the image among those of the sample
    home: int | None        # the rank that has drawn it; None: any rank can load it
    source: object = None   # where this rank has it: an array, or an Unread


def to_bytes(samples: list[list[Document]]) -> bytes:
    """Samples without their pixels: a header in JSON, then all ids and all weights."""
    header, documents = [], [d for sample in samples for d in sample]
    for sample in samples:
        images = images_of(sample)
        number = {id(image): n for n, image in enumerate(images)}
        header.append({
            "images": [[image.shape, isinstance(image, Unread)] for image in images],
            "documents": [[len(d.ids), d.source, [number[id(x)] for x in d.images], d.passed]
                          for d in sample]})
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(8, "little"), head,
                     *(d.ids.astype(np.int32).tobytes() for d in documents),
                     *(d.weights.astype(np.float32).tobytes() for d in documents)])


def from_bytes(data: bytes, numbers: list[int], home: int) -> list[list[Document]]:
    """The samples of these numbers, which `home` has made, with Stubs as images. Raises the
    UserError that it sent in their place."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, samples = json.loads(data[8:start]), []
    if isinstance(header, str):
        raise UserError(header)
    ids, weights = np.frombuffer(data, np.int32, offset=start).reshape(2, -1)
    weights = weights.view(np.float32)
    for number, sample in zip(numbers, header):
        frames = [Stub(tuple(shape), number, n, None if free else home)
                  for n, (shape, free) in enumerate(sample["images"])]
        documents = []
        for length, source, images, passed in sample["documents"]:
            documents.append(Document(ids[:length], weights[:length], [frames[n] for n in images],
                                      source, passed=tuple(map(tuple, passed))))
            ids, weights = ids[length:], weights[length:]
        samples.append(documents)
    return samples


class Skeletons:
    """All samples by number, without pixels: a function for Packer, which asks in ascending order.

    Each rank makes the samples whose home it is, and sends the others all but their pixels. Large
    Python objects stay off the GPU: these travel as bytes between CPUs [C].
    """

    def __init__(self, loader, rank: int, world: int):
        """loader: SampleLoader of the rank's own samples, RankShard(stream, rank, world, share=1):
        the home of sample i is rank i mod world. All ranks make this object together."""
        self.loader, self.rank, self.world = loader, rank, world
        self.ready = {}         # {number: sample}
        # A group of their own: samples are exchanged in a thread that is ahead of the training
        # loop, whose collectives must not come in between.
        self.group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)

    def __call__(self, i: int) -> list[Document]:
        # What is there else, if anything, was used before the run was resumed.
        if i not in self.ready:
            self._exchange(i // (SHARE * self.world) * SHARE)
        return self.ready.pop(i)

    def _exchange(self, first: int):
        """Make samples `first` to `first` + SHARE - 1 of those of each rank, and exchange them.
        Raises the same UserError on all ranks where one of them can't be made."""
        try:
            own = [self.loader(first + k) for k in range(SHARE)]
            data = to_bytes(own)
        except UserError as error:
            head = json.dumps(str(error)).encode()
            own, data = [], len(head).to_bytes(8, "little") + head
        self.ready = {}
        for rank, part in enumerate(all_gather_bytes(data, self.group)):
            numbers = [(first + k) * self.world + rank for k in range(SHARE)]
            self.ready.update(zip(numbers, from_bytes(part, numbers, rank)))
        for k, mine in enumerate(own):
            sample = self.ready[(first + k) * self.world + self.rank]
            for stub, source in zip(images_of(sample), images_of(mine)):
                stub.source = source


def all_gather_bytes(data: bytes, group) -> list[bytes]:
    """What each rank of the process group passes in, on all of them."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[:len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:int(size)].numpy().tobytes() for part, size in zip(parts, sizes)]


# ---- the batch of a rank ------------------------------------------------------------------------

class PixelLoader:
    """Loads the pixels of images: a Stub's, an Unread's, or those of an array, which has them."""

    def __init__(self, stream, threads: int = 1, group=None):
        self.stream = stream    # data.Stream, which makes the sample of a Stub again
        self.threads = threads  # that decode pictures side by side
        self.group = group      # that of Skeletons
        self.damaged = 0        # how many pictures of this rank turned out to be damaged

    def __call__(self, images: list) -> list[np.ndarray]:
        sources = self._sources(images)
        with ThreadPoolExecutor(self.threads) as threads:
            arrays = list(threads.map(np.asarray, sources))
        # Their documents are in the plan of all ranks already, so such pictures stay, and are grey.
        for damage in filter(None, (getattr(source, "damage", "") for source in sources)):
            self.damaged += 1
            if self.damaged in (1, 10, 100, 1000):
                print(f"{damage}: its pixels are grey; damaged pictures so far on this rank: "
                      f"{self.damaged}", file=sys.stderr)
        return arrays

    def move_drawn(self, steps: list[MicroStep], rank: int):
        """Send the pixels of pictures that were drawn here to the ranks that encode them, where the
        plan has found too much for their home, and receive those of others; all ranks call it."""
        ranks = range(len(steps[0].rows))
        moving = [(image, encoder) for step in steps for encoder in ranks
                  for image in step.encoded[encoder]
                  if isinstance(image, Stub) and image.home not in (None, encoder)]
        if not moving:
            return
        sent = [[x for x, encoder in moving if x.home == rank and encoder == other]
                for other in ranks]
        received = [[x for x, encoder in moving if encoder == rank and x.home == other]
                    for other in ranks]
        sizes = [[sum(math.prod(x.shape) for x in part) for part in parts]
                 for parts in (received, sent)]
        pixels = [x.source.reshape(-1) for part in sent for x in part]
        data = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *pixels]))
        arrived = torch.empty(sum(sizes[0]), dtype=torch.uint8)
        dist.all_to_all_single(arrived, data, *sizes, group=self.group)
        arrived = arrived.numpy()
        for image in (x for part in received for x in part):
            size = math.prod(image.shape)
            image.source, arrived = arrived[:size].reshape(image.shape), arrived[size:]

    def _sources(self, images: list) -> list:
        """The arrays and Unreads of the images. A record that another rank has read is read again:
        a sample is a function of its number."""
        made, sources = {}, []
        for image in images:
            if isinstance(image, Stub) and image.source is None:
                if image.sample not in made:
                    made[image.sample] = images_of(make_sample(self.stream, image.sample))
                image.source = made[image.sample][image.number]
                if image.source.shape != image.shape:
                    raise UserError(f"sample {image.sample} differs from that of another rank: "
                                    "have its files changed?")
            sources.append(image.source if isinstance(image, Stub) else image)
        return sources


def load_batch(step: MicroStep, rank: int, config: Config, load: PixelLoader, room: int) -> Batch:
    """The row of this rank in a micro-step, with the patches of the images that it encodes."""
    batch = collate(step.rows[rank], config, room, arriving=step.arriving[rank])
    pixels = dict(zip(map(id, step.loaded[rank]), load(step.loaded[rank])))
    patches, grids = pack_images([pixels[id(x)] for x in step.encoded[rank]], config.vision)
    splits = ()
    if (step.groups != np.diag(step.groups.diagonal())).any():      # some rank encodes for another
        splits = step.groups[rank].tolist(), step.groups[:, rank].tolist()
    return replace(batch, patches=patches, grids=grids, splits=splits)


# ---- the exchange of visual tokens --------------------------------------------------------------

class Travel:
    """One all-to-all forward and its reverse in the backward; both run beside other work."""

    def __init__(self, sent: list[int], received: list[int]):
        self.sent, self.received = sent, received
        self.work = self.gradient = None

    def begin(self, x: Tensor, back: bool = False) -> Tensor:
        """Start to send the rows of x (N, W); returns the tensor that the others' will be in."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        out = x.new_empty(sum(received), x.shape[1])
        self.work = dist.all_to_all_single(out, x.contiguous(), received, sent, async_op=True)
        return out

    def end(self):
        """Wait until all has arrived: with NCCL the device waits, with gloo the host."""
        self.work.wait()


class Send(torch.autograd.Function):
    """Starts to send embeddings. Its backward, the last of the two, waits for the gradients."""

    @staticmethod
    def forward(ctx, encoded, travel):
        ctx.travel = travel
        return travel.begin(encoded)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.travel.end()
        return ctx.travel.gradient, None


class Receive(torch.autograd.Function):
    """Waits for embeddings. Its backward starts to send their gradients back; what it returns only
    lets autograd go on to the backward of Send."""

    @staticmethod
    def forward(ctx, received, travel):
        ctx.travel = travel
        travel.end()
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.travel.gradient = ctx.travel.begin(grad, back=True)
        return grad, None


class Arriving:
    """The embeddings (slots, W) of the visual slots of a row, on their way from other ranks. The
    model calls `to` when it has embedded the text, and only then are they waited for."""

    def __init__(self, received: Tensor, travel: Travel, visual: Tensor):
        self.received, self.travel, self.visual, self.arrived = received, travel, visual, None

    def to(self, dtype) -> Tensor:
        if self.arrived is None:
            self.arrived = Receive.apply(self.received, self.travel)[self.visual]
        return self.arrived.to(dtype)


def exchange(model: GLMV, batch: Batch) -> Tensor | Arriving | None:
    """Encode the images of a batch and send each embedding to the rank that needs it. Returns what
    GLMV takes as `merged`: one embedding for each visual slot of this rank's row, or None. All
    ranks call it together, forward and backward. Without other ranks: GLMV.encode_images.
    """
    if not batch.splits:
        return model.encode_images(batch)
    sent, received = batch.splits
    if len(batch.patches):
        encoded = model.encode(batch.patches, batch.grids)
    else:       # nothing to encode here; but what this rank receives needs gradients
        encoded = model.lm_head.weight.new_empty(0, model.config.text.hidden_size)
        encoded.requires_grad_(any(p.requires_grad for p in model.model.visual.parameters()))
    if len(encoded) < sum(sent):        # `gathered`: the same to each rank
        encoded = encoded.repeat(len(sent), 1)
    travel = Travel(sent, received)
    return Arriving(Send.apply(encoded, travel), travel, batch.visual)
