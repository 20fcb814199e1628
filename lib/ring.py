"""The sigmoid loss of a contrastive batch that lies on many ranks.

The loss compares each image with the texts of all ranks. Instead of gathering all texts everywhere,
each rank passes them on to its two neighbours, a block at a time, and adds up what it computes with
each block: whatever the number of ranks, it holds the texts of three of them at most.

Letters: N images and texts of this rank, E width of the common space.
"""
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import sigmoid_loss


def swap(to_right: Tensor | None, to_left: Tensor | None) -> list:
    """Send a tensor to each neighbour in the ring of ranks; returns [from left, from right]. Where
    None is sent in one direction, nothing arrives in that direction."""
    rank, world = dist.get_rank(), dist.get_world_size()
    requests, received = [], []
    for tensor, target, origin in ((to_right, rank + 1, rank - 1), (to_left, rank - 1, rank + 1)):
        received.append(None if tensor is None else torch.empty_like(tensor))
        if tensor is not None:
            requests.append(dist.P2POp(dist.isend, tensor.contiguous(), target % world))
            requests.append(dist.P2POp(dist.irecv, received[-1], origin % world))
    for request in dist.batch_isend_irecv(requests):
        request.wait()
    return received


class Exchange(torch.autograd.Function):
    """`swap` with gradients, which travel in the opposite direction."""

    @staticmethod
    def forward(ctx, to_right, to_left):
        return tuple(swap(to_right, to_left))

    @staticmethod
    def backward(ctx, from_left, from_right):
        return tuple(swap(from_right, from_left)[::-1])


def ring(texts: Tensor):
    """Yield the texts of every other rank, two blocks a round: what came from the left goes on to
    the right, and the reverse. With an even number of ranks one block is left; a one-way shift
    brings it. [C: bidirectional; R: open_clip's rounds]"""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rightward = leftward = texts
    for _ in range((world - 1) // 2):
        rightward, leftward = Exchange.apply(rightward, leftward)
        yield rightward
        yield leftward
    if world % 2 == 0:
        yield Exchange.apply(rightward, None)[0]


def ring_sigmoid_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """This rank's part of the summed SigLIP loss of all ranks: its images x (N, E) against its own
    texts y (N, E), then against those of every other rank, of which none is its pair. The parts add
    up to the loss of one process, and so do their gradients. On one rank: `sigmoid_loss`."""
    loss = sigmoid_loss(x, y, scale, bias)
    for others in ring(y):
        loss = loss + sigmoid_loss(x, others, scale, bias, paired=False)
    return loss
