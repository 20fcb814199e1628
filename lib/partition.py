"""Who draws, loads, encodes and receives what: the paper's topology-aware partitioning [C].

The conventional way is that every rank loads the pictures of all ranks, encodes its part of them,
and gathers the features of all. Here all is decided before any pixel is loaded, since the sizes of
pictures are known before (from an index, a header, or the fixed size of a gym's task), and every
rank computes the same plan from the same integers:

    1. each sample has a home, the rank that makes it: it draws a task of the gym, whose pixels then
       stay there, or reads a record of own data, without its pictures
    2. the ranks exchange the samples without pixels, as plain bytes between CPUs
    3. samples are packed into the rows of a global batch, so that these take equally long (`pack`)
    4. in each micro-step, in which every rank has one row, the frames whose pixels are not at a
       home are dealt out so that the towers of all ranks take equally long (`assign_encoders`)
    5. a rank loads and encodes its frames only, and one all-to-all carries the merged visual tokens
       to the rank whose row needs them, while that one embeds its text (`exchange`)

Attention of the tower is bidirectional inside a frame, so a frame is the smallest part; it consists
of whole downsample groups. A video is a list of frames, so a long one is shared by several ranks.
Not here: context parallelism of the decoder. One rank computes a row, whose length is therefore
limited by its memory.

Letters: P patches, T tokens of a row, W width of the decoder.
"""
from dataclasses import dataclass

import numpy as np

from model import Config

AHEAD = 8       # global batches that samples are chosen from; more balances better, and waits longer


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

    @classmethod
    def of(cls, config: Config) -> "Costs":
        """By widths and depths. A matrix takes 2 FLOPs a parameter and row; attention, queries with
        keys and weights with values, 4 times its width, half of it where it is causal."""
        t, v = config.text, config.vision
        heads = t.num_attention_heads * t.head_dim
        matrices = (2 * heads + 2 * t.num_key_value_heads * t.head_dim
                    + 3 * t.intermediate_size) * t.hidden_size
        tower = (4 * v.hidden_size + 3 * v.intermediate_size) * v.hidden_size
        out = v.out_hidden_size     # the convolution and vit.Merger, for each group of patches
        adapter = v.spatial_merge_size ** 2 * v.hidden_size * out + 10 * out ** 2
        return cls(token=2 * t.num_hidden_layers * matrices, pair=2 * t.num_hidden_layers * heads,
                   learnt=2 * t.hidden_size * t.vocab_size,
                   patch=2 * v.depth * tower + 2 * adapter // v.spatial_merge_size ** 2,
                   patch_pair=4 * v.depth * v.hidden_size, patch_size=v.patch_size)

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
        images = {id(image): image for d in documents for image in d.images}
        return sum(lengths), decoder, sum(map(self.frame, images.values()))


# ---- which samples make up a global batch -------------------------------------------------------

def pack(sizes, rows: int, room: int) -> list[list[int]]:
    """Choose from waiting samples what stands in the `rows` rows of a global batch: the numbers of
    the samples in each row, none of which exceeds `room` tokens.

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


def assign_encoders(costs: list[int], owners: list[int], homes: list[int | None],
                    ranks: int) -> list[int]:
    """Which rank encodes each frame of a micro-step, so that the towers of all take equally long.

    costs: what the tower takes for each frame; owners: the rank whose row shows it; homes: the rank
    that has its pixels and has to encode it, or None: then any rank may load it.
    """
    loads, encoders = [0] * ranks, list(homes)
    for cost, home in zip(costs, homes):
        if home is not None:
            loads[home] += cost
    mean = sum(costs) / ranks
    for frame in sorted(range(len(costs)), key=lambda k: -costs[k]):
        if homes[frame] is None:
            # A frame stays where it is needed if it can: its tokens need not travel then.
            rank = owners[frame]
            if loads[rank] + costs[frame] > mean:
                rank = loads.index(min(loads))
            loads[rank] += costs[frame]
            encoders[frame] = rank
    return encoders
