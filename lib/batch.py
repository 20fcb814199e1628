"""A batch: one packed row of documents, as the model and the losses read it.

Letters: T tokens of a row, L tokens of a document, D documents, P patches, N images, F frames,
p patch side in pixels.
"""
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lib.images import pack
from lib.prefetch import send
from model import Config, rope_positions


@dataclass
class Document:
    """A stretch of tokens that attend to each other and to nothing else in the row."""
    ids: np.ndarray         # (L,) int32
    weights: np.ndarray     # (L,) float32: loss weight of predicting this token; 0 = not learnt
    images: list = field(default_factory=list)   # (h, w, 3) uint8 each, as the model sees them
    source: int = 0         # which entry of the mixture it comes from
    extras: dict = field(default_factory=dict)   # name -> (L,), e.g. log-probabilities in RL
    passed: tuple = ()      # (kind, detail) of records passed over for this one: they can't be used


@dataclass
class Batch:
    """One packed row: all that a forward pass and a loss need. A picture that several documents ask
    about is in `patches`, and is encoded, once.

    The host must not ask the GPU for a number. So what has a size that depends on the data, such as
    the places of learnt tokens, is in the batch already, and `host` is the batch on the CPU, for
    what else has to be known there.
    """
    tokens: Tensor       # (T,) int64; every visual slot holds the <|image|> id
    weights: Tensor      # (T,) float32, of predicting this token; 0 at each document's start
    positions: Tensor    # (3, T) int64: t, h, w for M-RoPE; they restart with each document
    cu_seqlens: Tensor   # (D+1,) int32, document borders; the tail is a last document of weight 0
    source: Tensor       # (D,) int64: the document's entry of the mixture; the tail's is -1
    patches: Tensor      # (P, F, 3*p*p) uint8, block-major; F = 2 where any image is a video
    grids: Tensor        # (N, 3) int64: 1, height, width in patches; always on the CPU
    visual: Tensor       # (slots,) int64: which of the P/4 encoded groups goes into a visual slot
    slots: Tensor        # (slots,) int64: the places of the visual slots in the row
    learnt: Tensor       # (n,) int64: the places t whose next token, t + 1, has a weight
    extras: dict = field(default_factory=dict)      # name -> (T,) float32
    sent_from: "Batch | None" = None                # the batch on the CPU, if this one is not
    # Where ranks encode for each other (lib/partition.py): how many groups this one sends to each
    # rank, and how many arrive from each. Then `patches` and `grids` are what this rank encodes,
    # and `visual` counts in what arrives.
    splits: tuple = ()

    @property
    def host(self) -> "Batch":
        return self.sent_from or self

    def to(self, device) -> "Batch":
        device = torch.device(device)
        if device.type == "cpu":
            return self
        sent = self._mapped(lambda x: send(x, device))
        return replace(sent, grids=self.grids, sent_from=self)

    def pinned(self) -> "Batch":
        """The batch in pinned memory, from which a GPU copies by itself: see `send`."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function) -> "Batch":
        tensors = {k: function(x) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors, extras={k: function(x) for k, x in self.extras.items()})


def images_of(documents: list[Document]) -> list:
    """The different images of some documents, in order of appearance."""
    return list({id(image): image for d in documents for image in d.images}.values())


def collate(documents: list[Document], config: Config, room: int = 0,
            arriving: list | None = None) -> Batch:
    """Join documents into one row, filled up to `room` tokens by a tail of weight 0.

    arriving: the images of the documents, in the order in which other ranks will send them encoded.
    Only shapes are needed then, and there are no patches. Raises ValueError where the image tokens
    are not as many as the groups of patches.
    """
    parts = list(documents)
    used = sum(len(d.ids) for d in parts)
    if room > used:
        # <|endoftext|>, the first id after the ranks (0 with a released tokenizer: no one reads it)
        tail = np.full(room - used, config.n_ranks, np.int32)
        parts.append(Document(tail, np.zeros(len(tail), np.float32), source=-1))
    tokens = torch.from_numpy(np.concatenate([d.ids for d in parts]).astype(np.int64))
    weights = torch.from_numpy(np.concatenate([d.weights for d in parts]))
    borders = np.cumsum([0] + [len(d.ids) for d in parts])
    cu_seqlens = torch.from_numpy(borders.astype(np.int32))
    weights[borders[:-1]] = 0   # a document's first token has nothing before it to predict it from

    # Each array once, in order of appearance; documents about one picture hold the same array.
    shown = [image for d in parts for image in d.images]
    encoded = images_of(parts) if arriving is None else arriving
    number = {id(image): n for n, image in enumerate(encoded)}
    patches = pack(encoded if arriving is None else [], config.vision)[0]
    sides = [np.array(image.shape[-3:-1]) // config.vision.patch_size for image in encoded]
    grids = torch.tensor([(1, *side) for side in sides], dtype=torch.long).view(-1, 3)

    # Image n owns the groups starts[n] .. starts[n] + counts[n] - 1 of the encoded ones; a picture
    # that is shown again brings the same groups again.
    order = torch.tensor([number[id(image)] for image in shown], dtype=torch.long)
    counts = grids.prod(1) // config.vision.spatial_merge_size ** 2
    starts, counts = (counts.cumsum(0) - counts)[order], counts[order]
    # Slot s of the row is slot s - before of its image, which has `before` slots before it.
    before = counts.cumsum(0) - counts
    visual = torch.repeat_interleave(starts - before, counts)
    visual += torch.arange(len(visual))
    slots = (tokens == config.image_token_id).nonzero()[:, 0]
    if len(slots) != len(visual):
        raise ValueError(f"{len(slots)} image tokens for {len(visual)} groups of patches")
    positions = rope_positions(tokens, grids[order], cu_seqlens, config.image_token_id)
    learnt = weights[1:].nonzero()[:, 0]

    extras = {}
    for name in {name for d in parts for name in d.extras}:
        values = [d.extras.get(name, np.zeros(len(d.ids), np.float32)) for d in parts]
        extras[name] = torch.from_numpy(np.concatenate(values))
    source = torch.tensor([d.source for d in parts])
    return Batch(tokens, weights, positions, cu_seqlens, source, patches, grids, visual, slots,
                 learnt, extras)
