"""A GPU that is not here: what a script would do on one, as far as a CPU can tell.

    with pretend() as book:
        pretrain.run(Args(device="cuda"))
    book.steps[1].waits         # {"optim.py:123 item": 1}

All tensors are the CPU's, with their true values, and a note on every storage says whether it
pretends to lie on the GPU. Two modes of PyTorch see every call: `Calls` those of functions, where
devices are named; `Ops` the operators below them, also those of a backward pass. They note

    mixed       operators whose tensors lie on both devices: an error on a GPU
    waits       what makes the host wait for the device: .item(), nonzero, an index by a mask ...
    pageable    copies to the device that are not both from pinned memory and non_blocking: the
                host waits for them too
    launches    operators that start a kernel; with plain PyTorch in place of our Triton kernels

by line of the project (launches by operator), in a Counts for each step, which ends with Log.step.

What this can't tell: whether CUDA's kernels give the right numbers, and anything of NCCL (several
ranks speak gloo). It knows the names of PyTorch's operators and a few of ours (lib.attention's
varlen_attn, Log.step). FakeTensorMode, which is made for this, aborts the process on a CPU build of
PyTorch as soon as a tensor on a fake GPU gets a gradient.
"""
import contextlib
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import attention, common

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# {address of a storage: weak reference, which keeps the address from being used again}
ON_DEVICE: dict[int, StorageWeakRef] = {}
PINNED: dict[int, StorageWeakRef] = {}

# Operators whose result, or its size, the host has to know.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount",
         "equal", "is_nonzero", "unique_consecutive"}
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}
# Operators that start no kernel; views don't either.
FREE = {"detach", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "alias",
        "lift_fresh", "_local_scalar_dense", "new_empty_strided", "resolve_conj", "resolve_neg"}
device_of, is_cuda_of = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__


@dataclass
class Counts:
    """What was noted: {"pretrain.py:123 item": times}."""
    mixed: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    pageable: Counter = field(default_factory=Counter)
    pinned: Counter = field(default_factory=Counter)
    launches: Counter = field(default_factory=Counter)

    def __str__(self):
        lines = []
        for title, counter in vars(self).items():
            lines.append(f"{title}: {counter.total()}")
            lines += [f"   {n:5d} {where}" for where, n in counter.most_common(40)]
        return "\n".join(lines)


class Book(Counts):
    """The Counts of the step that is running, and of those that have ended."""

    def __init__(self):
        super().__init__()
        self.steps: list[Counts] = []

    def end_step(self):
        self.steps.append(Counts(**{k: Counter(getattr(self, k)) for k in vars(Counts())}))
        for name in vars(Counts()):
            getattr(self, name).clear()

    def note(self, counter: Counter, what: str):
        counter[f"{where()} {what}"] += 1


def where() -> str:
    """The innermost line of the project, or of a test, that is being executed."""
    frame, root = sys._getframe(1), str(common.ROOT)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(root) and "site-packages" not in name and name != __file__:
            return f"{name[len(root) + 1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def address(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def on_device(t: torch.Tensor) -> bool:
    return address(t) in ON_DEVICE


def put(t: torch.Tensor, place: dict = ON_DEVICE) -> torch.Tensor:
    place[address(t)] = StorageWeakRef(t.untyped_storage())
    return t


class Calls(TorchFunctionMode):
    """Answers what a tensor's device is, and takes the device out of every call."""

    def __init__(self, book: Book):
        super().__init__()
        self.book = book
        self.inside = 0         # calls on tensors of the device that are running
        self.backward = False   # whether a backward pass on the device is running
        self.quiet = False      # inside an operator that waits on a CPU only

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        given = tensors((args, kwargs))
        far = any(map(on_device, given))
        if func in (device_of, is_cuda_of):
            return far if func == is_cuda_of else CUDA if far else CPU
        if func is torch.Tensor.backward:
            with self:          # the modes are off in here, and backwards of ours ask for devices
                return torch.autograd.backward(args[0], kwargs.get("gradient"))
        if name == "pin_memory":
            return args[0] if address(args[0]) in PINNED else put(args[0].clone(), PINNED)
        if name == "is_pinned":
            return address(args[0]) in PINNED
        if name in ("to", "cpu", "cuda") and given:
            return self.move(name, func, args, kwargs)
        if name == "numpy" and far:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and far:
            self.book.note(self.book.waits, name)
        if kwargs.pop("out_dtype", None):       # matrix products of bf16 in fp32: CUDA only
            args = [t.float() for t in args]
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = "cpu"
        made = self.run(func, args, kwargs, far and asked is None, quiet=name == "one_hot")
        if asked is not None and torch.device(asked).type == "cuda":
            for t in tensors(made):
                put(t)
            if name in ("tensor", "as_tensor"):
                self.book.note(self.book.pageable, f"{name}(..., device=cuda)")
        return made

    def run(self, func, args, kwargs, inside: bool, quiet: bool = False):
        """Call func; `inside`: what it makes on its way lies on the device, as its tensors do."""
        self.inside, before = self.inside + inside, self.quiet
        self.quiet = quiet or before
        try:
            return func(*args, **kwargs)
        finally:
            self.inside, self.quiet = self.inside - inside, before

    def move(self, name, func, args, kwargs):
        """.to(...), .cpu() and .cuda(): a copy where the device changes."""
        t, *rest = args
        was = on_device(t)
        wanted = {"cpu": CPU, "cuda": CUDA}.get(name) or kwargs.pop("device", None)
        for i, x in enumerate(rest):
            if isinstance(x, (str, torch.device)):
                wanted, rest[i] = x, CPU
            elif isinstance(x, torch.Tensor):           # to the device and dtype of another tensor
                wanted, rest[i] = (CUDA if on_device(x) else CPU), x.dtype
        goes = was if wanted is None else torch.device(wanted).type == "cuda"
        if goes == was:
            return self.run(func, (t, *rest), kwargs, was) if name == "to" else t
        if goes:
            ahead = address(t) in PINNED and kwargs.get("non_blocking")
            self.book.note(self.book.pinned if ahead else self.book.pageable, "to the device")
        else:
            self.book.note(self.book.waits, "to the host")
        made = func(t, *rest, **kwargs) if name == "to" else t
        made = made.clone() if address(made) == address(t) else made
        if goes:
            return put(made)
        ON_DEVICE.pop(address(made), None)
        return made


class Ops(TorchDispatchMode):
    """Notes operators. What they make lies where their tensors do."""

    def __init__(self, calls: Calls):
        super().__init__()
        self.calls, self.book = calls, calls.book

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        given = tensors((args, kwargs))
        far = any(map(on_device, given))
        if far:
            self.check(name, given, args, kwargs)
        made = func(*args, **kwargs)
        if far or self.calls.inside or not given and self.calls.backward:
            for t in tensors(made):
                put(t)
            if not (func.is_view or name in FREE):
                self.book.launches[name] += len(args[0]) if name.startswith("_foreach") else 1
        return made

    def check(self, name: str, given, args, kwargs):
        """Note an operator, of whose tensors at least one lies on the device."""
        book = self.book
        near = [t for t in given if not on_device(t) and t.dim()]   # a scalar may be the host's
        if name == "copy_" and on_device(args[0]) != on_device(args[1]):
            ahead = address(args[1]) in PINNED and args[2:3] == (True,)
            if on_device(args[1]):
                book.note(book.waits, "copy_ to the host")
            else:
                book.note(book.pinned if ahead else book.pageable, "copy_ to the device")
        elif near and name in INDEX and on_device(args[0]):
            book.note(book.pageable, "an index from the host")
        elif near and name not in COPIES:
            places = (f"{'device' if on_device(t) else 'host'} {tuple(t.shape)}" for t in given)
            book.note(book.mixed, f"{name}: {', '.join(places)}")
        masked = name in INDEX and any(t.dtype in (torch.bool, torch.uint8)
                                       for t in tensors(args[1:2]))
        unknown = name == "repeat_interleave" and kwargs.get("output_size") is None
        if (name in WAITS or masked or unknown) and not self.calls.quiet:
            book.note(book.waits, name)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, **_):
    """What torch.nn.attention.varlen demands on a GPU, then plain attention."""
    assert q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype, q.dtype
    assert all(x.is_cuda for x in (q, k, v, cu_q, cu_k)) and q.shape[-1] % 8 == 0
    assert cu_q.dtype == torch.int32 and type(max_q) is int and cu_q.is_contiguous()
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert enable_gqa or q.shape[1] == k.shape[1]
    with torch._C.DisableTorchFunction():
        borders = cu_q.tolist()
    assert max_q == max(b - a for a, b in zip(borders, borders[1:]))
    outs = [torch.nn.functional.scaled_dot_product_attention(
        *(x[start:end].transpose(0, 1).float() for x in (q, k, v)), enable_gqa=True,
        is_causal=window_size == (-1, 0)).transpose(0, 1).to(q.dtype)
        for start, end in zip(borders, borders[1:]) if end > start]
    return torch.cat(outs)


@contextlib.contextmanager
def pretend():
    """Pretend to have a GPU until the block ends; yields the Book. Threads that begin in it pretend
    too."""
    book, local = Book(), threading.local()
    run, backward, log, join = (threading.Thread.run, torch.autograd.backward, common.Log.step,
                                dist.init_process_group)

    @contextlib.contextmanager
    def modes():
        local.calls = Calls(book)
        with Ops(local.calls), local.calls:
            yield

    def run_pretending(thread):
        with modes():
            run(thread)

    def backward_pretending(what, *args, **kwargs):
        before = local.calls.backward
        local.calls.backward = any(map(on_device, tensors((what,))))
        try:
            return backward(what, *args, **kwargs)
        finally:
            local.calls.backward = before

    def step_and_count(*args, **kwargs):
        book.end_step()
        return log(*args, **kwargs)

    patches = [
        (torch.cuda, "is_available", lambda: True), (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "current_device", lambda: 0), (torch.cuda, "device_count", lambda: 8),
        (torch.cuda, "get_device_name", lambda device=0: "NVIDIA H100 80GB HBM3"),
        (torch.cuda, "get_device_capability", lambda device=0: (9, 0)),
        (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=str(device))),
        (dist, "init_process_group", lambda backend, **rest: join("gloo", **rest)),
        (threading.Thread, "run", run_pretending),
        (torch.autograd, "backward", backward_pretending),
        # torch.autograd.grad would otherwise be a call like others, and the modes off in all of it.
        (torch.autograd, "has_torch_function", lambda tensors: False),
        (common.Log, "step", step_and_count), (attention, "varlen_attn", varlen)]
    before = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, new in patches:
        setattr(place, name, new)
    try:
        with modes():
            yield book
    finally:
        for place, name, old in before:
            setattr(place, name, old)
