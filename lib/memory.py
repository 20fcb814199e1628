"""What the backward pass needs: kept, computed again, or moved to the host; and torch.compile.

The backward pass of a block needs the block's activations, all that its forward has computed: about
34 values a token and layer. They take more memory than weights and optimizer once rows are long or
images are many. Vision tower, adapter and decoder each have a policy of their own [C]:

    none        keep all activations
    recompute   keep only the input of each block; the backward runs the block's forward again. A
                third more time, about a thirtieth of the memory
    offload     the same, and the inputs wait in pinned host memory. A second CUDA stream copies
                them while the GPU computes, and brings each back one block ahead of its use

    --memory=recompute                              for all three
    --memory=vit:offload,decoder:recompute          a part that is not named keeps everything

What is kept then still grows with the number of images. With --chunk_patches=N the tower and the
adapter encode whole images in chunks of at most N patches, and a chunk keeps nothing but its
pixels: the backward encodes it again. So the activations of the tower are those of one chunk,
whether a row has one image or a thousand [C: activations should not grow with the images]. Chunks
cost one more forward of tower and adapter; with vit:recompute, which makes a chunk of few large
images smaller still, two. With vit:offload they bring nothing more: so little is left to move.

Every policy gives the same gradients, bit for bit: the backward runs the very operations of the
forward, and nothing here is random, so no state of a generator needs to be restored. Chunks change
the last bits, since the gradient of a matrix is then a sum over chunks.

--compile lets torch.compile write one kernel where a block has several elementwise operations.
"""
import functools
from dataclasses import dataclass, fields

import torch
import torch._dynamo
from torch import nn, Tensor
from torch.autograd.function import once_differentiable

from lib.cli import UserError

# How many values of each channel, token and layer every policy keeps on the device, about.
KEPT = {"none": 34, "recompute": 1, "offload": 0}
POLICIES = tuple(KEPT)


@dataclass(frozen=True)
class Memory:
    """The policies of a run. chunk_patches: the most patches that are encoded at once, unless one
    image alone has more; 0: all."""
    vit: str = "none"
    adapter: str = "none"
    decoder: str = "none"
    chunk_patches: int = 0

    def use_in(self, model: nn.Module):
        """Set these policies in all parts of a model that have any: its attributes `memory`."""
        for module in model.modules():
            if hasattr(module, "memory"):
                module.memory = self

    def kept(self, config, tokens: float, patches: float) -> float:
        """About how many values wait for the backward: of so many tokens in the decoder's layers
        and so many patches in the tower's blocks."""
        text, vision = config.text, config.vision
        patches = min(patches, self.chunk_patches or patches)
        # A block that is run again keeps everything until its own backward is done.
        layers = KEPT[self.decoder] * text.num_hidden_layers
        layers += KEPT["none"] * (self.decoder != "none")
        blocks = KEPT[self.vit] * vision.depth + KEPT["none"] * (self.vit != "none")
        return tokens * text.hidden_size * layers + patches * vision.hidden_size * blocks


def parse_memory(text: str, chunk_patches: int = 0) -> Memory:
    """--memory: a policy for all parts, or part:policy,part:policy. Raises UserError."""
    parts = [field.name for field in fields(Memory) if field.type is str]
    if text in POLICIES:
        return Memory(*[text] * len(parts), chunk_patches)
    policies = {}
    for word in filter(None, text.split(",")):
        part, _, policy = word.partition(":")
        if part not in parts or policy not in POLICIES:
            raise UserError(f"--memory takes {', '.join(POLICIES)} for all parts, or part:policy "
                            f"with the parts {', '.join(parts)}, as vit:offload,decoder:recompute; "
                            f"not '{word}'")
        policies[part] = policy
    return Memory(**policies, chunk_patches=chunk_patches)


# ---- one block ----------------------------------------------------------------------------------

class Recompute(torch.autograd.Function):
    """function(x, *others) that keeps only x for the backward, or only its copy on the host.

    The parameters of `function` are inputs as well, and their gradients are outputs of the
    backward: so autograd adds them up as always, and its hooks run once.
    """

    @staticmethod
    def forward(ctx, function, others, copy, x, *parameters):
        ctx.function, ctx.others, ctx.copy, ctx.parameters = function, others, copy, parameters
        if copy is None:
            ctx.save_for_backward(x)
        # With a graph, which is dropped at once: where none is wanted, some operations choose
        # another algorithm, which rounds differently.
        with torch.enable_grad():
            return function(alone(x, ctx.needs_input_grad[3]), *others).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x = ctx.saved_tensors[0] if ctx.copy is None else ctx.copy.fetch()
        x, needed = alone(x, ctx.needs_input_grad[3]), ctx.needs_input_grad[3:]
        with torch.enable_grad():
            y = ctx.function(x, *ctx.others)
        wanted = [t for t, needs in zip((x, *ctx.parameters), needed) if needs]
        # A block may have parameters that its forward does not use (the MTP head's): None.
        grads = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, None, None, *(next(grads) if needs else None for needs in needed)


def alone(x: Tensor, needs_grad: bool) -> Tensor:
    """x as the beginning of a graph of its own."""
    return x.detach().requires_grad_(needs_grad)


class Runner:
    """Runs the blocks of one stack, in order, under one policy."""

    def __init__(self, policy: str):
        self.policy, self.copy = policy, None

    def __call__(self, block, x: Tensor, *others, parameters=None) -> Tensor:
        """block(x, *others); `others` need no gradient. parameters: of a block that is no module,
        all that may need a gradient. A block without gradients, as in a frozen tower, keeps nothing
        under any policy."""
        parameters = list(block.parameters() if parameters is None else parameters)
        learns = any(t.requires_grad for t in (x, *parameters))
        if self.policy == "none" or not learns or not torch.is_grad_enabled():
            return block(x, *others)
        if self.policy == "offload":
            self.copy = HostCopy(x.detach(), self.copy)
        y = Recompute.apply(block, others, self.copy, x, *parameters)
        if self.copy:
            self.copy.finish()
        return y


# ---- offload ------------------------------------------------------------------------------------

@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies, beside the one that computes."""
    return torch.cuda.Stream(device)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not x.is_meta      # lib/meta.py lets meta tensors look like CUDA's


class HostCopy:
    """A tensor that waits in host memory until the backward pass needs it.

        forward    compute  | block 1 | block 2 | block 3 |
                   copy     | x1 out  | x2 out  | x3 out  |
        backward   compute            | block 3 | block 2 | block 1 |
                   copy     |  x3 in  |  x2 in  |  x1 in  |

    The copies need pinned memory, which the GPU reads and writes by itself while the host goes on.
    From other devices it is a plain copy, so that a CPU can test all but the streams.

    before: the copy of the block before, which the backward needs next.
    """

    def __init__(self, x: Tensor, before: "HostCopy | None" = None):
        self.before, self.x, self.device, self.back = before, x, x.device, None
        self.on_gpu = on_gpu(x)
        self.host = torch.empty_like(x, device="cpu", pin_memory=self.on_gpu)
        if self.on_gpu:
            copy = side_stream(x.device)
            copy.wait_stream(torch.cuda.current_stream(x.device))   # x has to be there first
            with torch.cuda.stream(copy):
                self.host.copy_(x, non_blocking=True)
            self.done = copy.record_event()
        elif not x.is_meta:
            self.host.copy_(x)

    def finish(self):
        """Let go of x, once its block is queued. The next block waits for the end of the copy: so
        at most two inputs are on the device, and nobody writes to the memory of x too early."""
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self.done)
        self.x = None

    def prefetch(self):
        """Begin to copy the tensor back, behind all that is queued by now."""
        if self.back is not None or self.host is None:
            return
        if self.on_gpu:
            # Memory of the computing stream, so that it may be freed there without another wait.
            self.back = torch.empty_like(self.host, device=self.device)
            copy = side_stream(self.device)
            copy.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(copy):
                self.back.copy_(self.host, non_blocking=True)
            self.done = copy.record_event()
        else:
            self.back = self.host.to(self.device)
        self.host = None

    def fetch(self) -> Tensor:
        """The tensor on its device, once. The copy of the block before it begins meanwhile."""
        self.prefetch()
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self.done)
        if self.before is not None:
            self.before.prefetch()
        x, self.back, self.before = self.back, None, None
        if x is None:
            raise RuntimeError("a backward pass frees what was kept for it: there is no second one")
        return x


# ---- images in chunks ---------------------------------------------------------------------------

def chunks_of(sizes: list[int], limit: int) -> list[tuple[int, int]]:
    """Cut images of so many patches into ranges (first, end) of at most `limit` patches, or of one
    image that has more. ([4, 4, 9, 2], 8) -> [(0, 2), (2, 3), (3, 4)]"""
    chunks, first, used = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and used + size > limit:
            chunks.append((first, i))
            first, used = i, 0
        used += size
    return [*chunks, (first, len(sizes))]


def in_chunks(encode, parameters, limit: int, patches: Tensor, grids: Tensor, *others) -> Tensor:
    """encode(patches, grids, *others) for some images at a time: the results, one after the other.
    Where there are several chunks, each is encoded again in the backward.

    patches (P, ...), grids (N, 3); others: None, or (P, ...) too; parameters: of `encode`; limit:
    patches of a chunk, 0 for one chunk of all.
    """
    sizes = grids.prod(1).tolist() if limit else []
    chunks = chunks_of(sizes, limit) if limit else []
    if len(chunks) < 2:
        return encode(patches, grids, *others)
    parts, at, parameters = [], 0, list(parameters)
    for first, end in chunks:
        here = slice(at, at + sum(sizes[first:end]))
        rest = grids[first:end], *(x if x is None else x[here] for x in others)
        if torch.is_grad_enabled():
            parts.append(Recompute.apply(encode, rest, None, patches[here], *parameters))
        else:
            parts.append(encode(patches[here], *rest))
        at = here.stop
    return torch.cat(parts)


# ---- torch.compile ------------------------------------------------------------------------------

def compile_blocks(model: nn.Module, kinds, device: torch.device):
    """torch.compile every module of these kinds (--compile), in place: names and checkpoints stay
    as they are. Raises UserError where no compiler works.

    A block and not the whole model: all blocks of a kind share the compiled code. dynamic: of any
    number of tokens; otherwise each new number would be compiled anew. Evaluation compiles once
    more, since no gradients are needed there.
    """
    try:        # of a tiny function first: in a block the error would come pages later
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--compile finds no compiler that works ({reason}): install one, as g++, "
                        "or leave --compile out") from None
    torch._dynamo.config.specialize_float = True    # the eps of norms: a constant, no variable
    for module in model.modules():
        if isinstance(module, kinds):
            module.compile(dynamic=True)
