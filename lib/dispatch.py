"""Which of two twins runs: a Triton kernel, or the plain PyTorch that says what it computes.

    NANOGLMV_KERNELS=0   always plain PyTorch
    NANOGLMV_KERNELS=1   always the kernels, or an error where they can't run
    not set              the kernels on an NVIDIA GPU of compute capability 8.0 or newer, since
                         older ones have no bf16; plain PyTorch elsewhere

With TRITON_INTERPRET=1 Triton's interpreter runs the kernels on the CPU, slowly: to test them.

A kernel is written with `@kernel` and launched as Triton's own, `name[grid](...)`. The decorator
adds one thing: on meta tensors, which have shapes but no memory, the launch is only noted, with the
bytes of its tensors. This is how lib/roofline.py tells what a step would take on a GPU that is not
there.
"""
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lib.cli import UserError

FORCED = os.environ.get("NANOGLMV_KERNELS", "")
if FORCED not in ("", "0", "1"):
    raise SystemExit(f"error: NANOGLMV_KERNELS takes 0 or 1, not '{FORCED}'")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton = tl = None
if FORCED != "0" and (FORCED == "1" or INTERPRETED or torch.cuda.is_available()):
    try:    # only where it is needed: the import takes half a second
        import triton
        import triton.language as tl
    except ImportError:
        if FORCED == "1":
            raise SystemExit("error: NANOGLMV_KERNELS=1 needs Triton: pip install triton") from None
        print("Triton is not installed: plain PyTorch is used instead of its kernels",
              file=sys.stderr)
if triton is None:
    class tl:           # what the signatures of kernels name, so that they can be read without it
        constexpr = None

noted: Callable | None = None   # lib/roofline.py's: (name, tensors, constants) of a meta launch
old: set = set()        # GPUs that are too old for the kernels, each of which was named once


class Kernel:
    """A Triton function that can also be launched on meta tensors."""

    def __init__(self, function):
        self.function, self.__doc__ = function, function.__doc__
        self.name = function.__name__.strip("_").removesuffix("_kernel")
        self.jit = triton.jit(function) if triton else None

    def __getitem__(self, grid):
        def launch(*args, **constants):
            tensors = [x for x in args if isinstance(x, Tensor)]
            if not tensors[0].is_meta:
                return self.jit[grid](*args, **constants)
            if noted:
                noted(self.name, tensors, constants)
        return launch


kernel = Kernel
inline = triton.jit if triton else lambda function: function    # what kernels call inside


def use_kernels(x: Tensor) -> bool:
    """Whether the kernels run on the device of x: see the top. Raises UserError if they are forced
    on tensors that nothing here can run them on."""
    if FORCED == "0":
        return False
    if x.is_meta:
        return noted is not None
    if x.device.type == "cuda" and triton:
        if torch.cuda.get_device_capability(x.device) >= (8, 0):
            return True
        if x.device not in old:
            old.add(x.device)
            print(f"{torch.cuda.get_device_name(x.device)} is too old for the Triton kernels, "
                  "which need compute capability 8.0: plain PyTorch is used", file=sys.stderr)
        return False
    if FORCED == "1" and not INTERPRETED:
        raise UserError(f"NANOGLMV_KERNELS=1 on {x.device.type} needs TRITON_INTERPRET=1")
    return INTERPRETED and triton is not None


def expect(name: str, x: Tensor, shape: tuple, like: Tensor | None = None, dtype=None):
    """Raise ValueError, with the argument's name, unless x has this shape (None: any size), the
    device of `like`, the dtype, and neighbours in its last dimension lie side by side in memory.
    A kernel computes addresses from these and would read other memory without an error."""
    if x.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape)):
        raise ValueError(f"{name} has the shape {tuple(x.shape)}, not "
                         f"{tuple('any' if n is None else n for n in shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, not on {like.device}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype}, not {dtype}")
    if x.dim() and x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} has stride {x.stride(-1)}, not 1")
