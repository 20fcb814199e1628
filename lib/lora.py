"""What learns (--train), and LoRA: low-rank matrices beside frozen ones.

    all        every parameter
    decoder    all but the vision tower. The adapter learns too: it translates what the tower sees
               into what the decoder reads, so it has to follow the decoder
    adapter    only the adapter between the tower and the decoder
    lora:16    only low-rank matrices of rank 16 in the decoder's layers

What is frozen needs no gradient and no optimizer state, which are most of the memory: `all` takes
18 bytes a parameter in bf16, a frozen parameter 2.

LoRA [Hu et al. 2021] is for tuning a whole model with little memory. A linear layer computes

    y = W x + (alpha / R) B A x         W (out, in), A (R, in), B (out, R)

where only A and B learn. They have R (in + out) entries, W has in x out: with R = 16 they are 1.5%
as many in `base`. B is 0 at the start, so that training begins exactly at the model that was
loaded; A is random, otherwise neither of the two would get a gradient. At the end W + (alpha / R)
B A is an ordinary matrix: a checkpoint holds the merged weights under GLM-OCR's names, and who
reads it can't tell that LoRA was used.

alpha = 2 R [R: LLaVA-1.5's recipe], so that the factor is 2 for any rank. The best learning rate
is higher than that of `all`: 1e-2 was better than 4e-3 for the demo's model (LOG.md) [O].

Letters: R rank, T tokens, in and out: the widths of a linear layer.
"""
import torch
import torch.nn.functional as F
from torch import nn, Tensor

from lib.cli import UserError
from mmtp import attach, head_of, prefix
from model import GLMV
from optim import Optimizer

SCALE = 2.0     # alpha / R
# The linear layers that get low-rank matrices: of attention and MLP in each decoder layer. The MTP
# head is a decoder layer more, and eh_proj is its own.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "eh_proj")


# ---- what learns --------------------------------------------------------------------------------

def parse_train(text: str) -> tuple[str, int]:
    """The option --train: (all | decoder | adapter | lora, rank), the rank 0 unless it is lora.
    Raises UserError."""
    kind, _, rank = text.partition(":")
    if text in ("all", "decoder", "adapter"):
        return text, 0
    if kind == "lora" and rank.isascii() and rank.isdecimal() and len(rank) < 9 and int(rank):
        return kind, int(rank)
    raise UserError("--train takes all, decoder, adapter, or lora:R with a rank R of at least 1, "
                    f"as lora:16; not '{text}'")


def check_train(args) -> str:
    """all, decoder, adapter or lora: what the option --train of a script says. Raises UserError if
    it says nothing that there is, or leaves another option without effect."""
    kind, _ = parse_train(args.train)
    if kind == "lora" and args.vision_scale != 1:
        raise UserError(f"--vision_scale={args.vision_scale:g} changes nothing with --train=lora, "
                        "which freezes tower and adapter")
    return kind


def set_learning(model: GLMV, train: str, seed: int = 0, mtp: int = 0):
    """Freeze what does not learn with this option --train; with lora:R, add the low-rank matrices,
    whose random values depend on the seed alone. Raises UserError if R is too large.

    mtp: how far ahead the MTP head is to look. If the model has no head, a new one is attached
    where all of it can learn. A head that was there before gets low-rank matrices as all layers.
    """
    kind, rank = parse_train(train)
    visual = model.model.visual
    if mtp and not head_of(model) and kind in ("all", "decoder"):
        attach(model, mtp, seed)
    model.requires_grad_(kind in ("all", "decoder"))
    if kind == "decoder":
        visual.requires_grad_(False)
    if kind in ("decoder", "adapter"):
        visual.downsample.requires_grad_(True)
        visual.merger.requires_grad_(True)
    if kind == "lora":
        generator = torch.Generator().manual_seed(seed)
        for block in list(model.model.language_model.layers.modules()):
            for name, child in list(block.named_children()):
                if name in TARGETS:
                    setattr(block, name, LoraLinear(child.weight, rank, generator))
    if learns(head_of(model)):
        model.config.mtp_depths = max(model.config.mtp_depths, mtp)


def let_head_learn(model: GLMV, optimizer: Optimizer, on: bool):
    """Freeze what learns in the MTP head, if there is one, or let it learn again. The optimizer
    skips what is frozen."""
    for name, p in optimizer.params.items():
        if name.startswith(prefix(model)):
            p.requires_grad_(on)


def learns(module: nn.Module | None) -> bool:
    """Whether any parameter of a module learns; False for None."""
    return module is not None and any(p.requires_grad for p in module.parameters())


def count_learning(model: nn.Module) -> int:
    """The number of entries that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- the layer ----------------------------------------------------------------------------------

class LoraLinear(nn.Module):
    """A linear layer without bias: a frozen matrix, and two low-rank ones that learn.

    weight (out, in): the matrix of the layer that this one replaces, under the same name. Raises
    UserError unless the rank is at most the smaller of both sides: B A has no more.
    """

    def __init__(self, weight: nn.Parameter, rank: int, generator: torch.Generator):
        super().__init__()
        outputs, inputs = weight.shape
        if rank > min(outputs, inputs):
            raise UserError(f"--train=lora:{rank} is above {min(outputs, inputs)}, the highest "
                            f"rank of a matrix of {outputs} x {inputs} in this model")
        self.weight = weight.requires_grad_(False)
        self.lora_A = nn.Parameter(weight.new_empty(rank, inputs))
        self.lora_B = nn.Parameter(weight.new_zeros(outputs, rank))
        if not weight.is_meta:
            random = torch.randn(rank, inputs, generator=generator)
            self.lora_A.data.copy_(random * inputs ** -0.5)     # A x is about as large as x

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)"""
        low = F.linear(x, self.lora_A)                                      # (T, R)
        # addmm adds the product of two matrices to another one as it writes it.
        return torch.addmm(F.linear(x, self.weight), low, self.lora_B.T, alpha=SCALE)


# ---- checkpoints --------------------------------------------------------------------------------

def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an ordinary model from those of a model with LoRA, {name: tensor}: each matrix
    W + (alpha / R) B A, in fp32, and no low-rank ones. Other weights are returned as they are."""
    found = dict(state)
    for layer in layers_in(state):
        a, b = (found.pop(layer + name).float() for name in ("lora_A", "lora_B"))
        found[layer + "weight"] = torch.addmm(found[layer + "weight"].float(), b, a, alpha=SCALE)
    return found


def unmerged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of such weights that `merged` replaces, {name: tensor}: a run that is resumed needs
    it. The frozen matrix can't be had from the merged one again without a rounding error."""
    return {layer + name: state[layer + name] for layer in layers_in(state)
            for name in ("weight", "lora_A", "lora_B")}


def layers_in(state: dict[str, Tensor]) -> list[str]:
    """The beginnings of the names of all LoRA layers: model.language_model.layers.0.mlp.down_proj.
    with the dot at the end."""
    return [name.removesuffix("lora_A") for name in state if name.endswith(".lora_A")]
