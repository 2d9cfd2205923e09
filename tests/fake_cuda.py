"""A GPU without a GPU: the real step runs on it, and each wait of the host is recorded.

Inside `with FakeCuda() as gpu` there is a device `gpu.device`, which is one of its own to torch. A
tensor on it wraps a CPU tensor that does the arithmetic, so results are right. What would make the
host wait for a real GPU is kept in `gpu.waits`, with the line of code that asked for it:

    scalar     a value is read: x.item(), float(x), `if x.any()`, torch.equal
    shape      a shape depends on values: x[mask], nonzero, masked_select, unique
    to host    a copy to the CPU: x.cpu(), x.to("cpu"), x.tolist()
    to device  a copy from the CPU that is not non_blocking, as in torch.tensor(..., device=device)
    pageable   a non_blocking copy from memory that is not pinned: the host waits until the driver
               has staged it

The first four are what `torch.cuda.set_sync_debug_mode` watches on a real device; it does not see
the last. As there, x.numpy() raises, and so does mixing devices. What the fake cannot show: speed,
memory, races, and what real kernels make of the last bits.
"""

import functools
import linecache
import os
import sys
from collections import namedtuple
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "fakecuda"
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = tuple(f"{ROOT / name}{os.sep}" for name in ("minippo", "tests"))
aten = torch.ops.aten
SHAPE = {aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.bincount}
SHAPE |= {aten._unique2, aten.unique_dim, aten.unique_consecutive}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPYING = {aten._to_copy, aten.copy_}
SCALARS = {"bool", "number", "int", "float"}  # as a schema writes them

Wait = namedtuple("Wait", "kind place operation")
entered = []  # FakeCudas, the innermost last: torch.tensor comes to the device beside all modes


@functools.cache
def fake_device() -> torch.device:
    """The device, made known to torch when it is first asked for."""
    from torch.utils import backend_registration as registration

    module = registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch.autocast asks
    registration._setup_privateuseone_for_python_backend(NAME, module)
    torch.library.impl("aten::empty_strided", "PrivateUse1")(_empty_strided)
    torch.library.impl("aten::_copy_from", "PrivateUse1")(_copy_from)
    return torch.device(NAME, 0)


def _empty_strided(size, stride, dtype=None, **options):
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    """Where torch.tensor(..., device=device) and x[[0, 1]] end."""
    if source.numel():  # as CUDA, which has nothing to do for none
        entered[-1].record("to device", "copy_from")
    target.host.copy_(source)
    return target


class DeviceTensor(torch.Tensor):
    """A tensor on the fake device; `host` is the CPU tensor beneath."""

    @staticmethod
    def __new__(cls, host):
        options = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        options |= {"dtype": host.dtype, "device": fake_device()}
        return torch.Tensor._make_wrapper_subclass(cls, host.size(), **options)

    def __init__(self, host):
        self.host = host

    def __repr__(self):
        return f"DeviceTensor({self.host})"  # a look in a debugger is no wait

    def tolist(self):  # torch refuses it for every subclass
        return self.cpu().tolist()

    def numpy(self):  # torch would copy without a word
        raise TypeError(f"can't convert {NAME} tensor to numpy; copy it with .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the fake device outside of FakeCuda()")

    __torch_function__ = torch._C._disabled_torch_function_impl


class FakeCuda(TorchDispatchMode):
    """The device, switched on; `waits` are those of the host so far."""

    def __init__(self):
        super().__init__()
        self.device = fake_device()
        self.waits: list[Wait] = []
        self.pinned: list[torch.Tensor] = []

    def __enter__(self):
        entered.append(self)
        # Autograd has a thread per device, counted when the process began: there was none.
        self.one_thread = torch.autograd.set_multithreading_enabled(False)
        # Without it model.to(device) would untie tied weights, since the tensors' class changes.
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(False)
        self.one_thread.__exit__(*error)
        entered.remove(self)

    def record(self, kind: str, operation) -> None:
        """Keeps a wait, with the innermost line of ours that led to it."""
        frame = sys._getframe()
        while frame and (frame.f_code.co_filename == __file__ or not _is_ours(frame)):
            frame = frame.f_back
        place = ""
        if frame:
            file, number = frame.f_code.co_filename, frame.f_lineno
            place = f"{Path(file).name}:{number} {linecache.getline(file, number).strip()}"
        self.waits.append(Wait(kind, place, str(operation)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        if packet in (aten._pin_memory, aten.is_pinned):
            return self.pin(packet, args[0])
        tensors = []
        _each(lambda x: tensors.append(x) or x, (*args, *kwargs.values()))
        here = [isinstance(x, DeviceTensor) for x in tensors]
        goal = args[0].device if packet is aten.copy_ else kwargs.get("device")
        goal = None if goal is None else torch.device(goal).type
        if not any(here) and goal != NAME:
            return func(*args, **kwargs)  # nothing of this device
        kind = self.kind(func, args, kwargs, tensors, here, goal)
        if kind:
            self.record(kind, func)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        names, hosts = list(kwargs), _each(_host, (*args, *kwargs.values()))
        named = dict(zip(names, hosts[len(args) :]))
        result = func(*hosts[: len(args)], **named)
        if goal in (None, NAME):
            result = _each(DeviceTensor, result)
        if not any(here):
            return result
        return return_and_correct_aliasing(func, args, dict(kwargs), result)

    def kind(self, func, args, kwargs, tensors, here, goal) -> str | None:
        """What the host waits for in this operation; raises where a real device would refuse."""
        packet = func.overloadpacket
        if goal not in (None, NAME):
            return "to host"
        if packet in COPYING and not here[-1] and tensors[-1].numel():  # the source stands last
            if not (kwargs.get("non_blocking") or packet is aten.copy_ and args[2:] == (True,)):
                return "to device"
            return None if self.pin(aten.is_pinned, tensors[-1]) else "pageable"
        if packet in INDEXING:
            return _kind_of_indexing(packet, args)
        if any(str(value.type) in SCALARS for value in func._schema.returns):
            return "scalar"
        if packet in SHAPE:
            return "shape"
        if packet is aten.repeat_interleave and len(tensors) == 1:
            return None if kwargs.get("output_size") is not None else "shape"
        if any(x.dim() and not ours for x, ours in zip(tensors, here)):
            raise RuntimeError(f"{packet}: expected all tensors on one device, got {NAME} and cpu")
        return None

    def pin(self, packet, x):
        """Pinned memory is a copy whose storage is remembered."""
        if packet is aten.is_pinned:
            places = [p.untyped_storage().data_ptr() for p in self.pinned]
            return not isinstance(x, DeviceTensor) and x.untyped_storage().data_ptr() in places
        self.pinned.append(x.clone())
        return self.pinned[-1]


def _host(x):
    return x.host if isinstance(x, DeviceTensor) else x


def _each(change, value):
    """`change` of each tensor in arguments or results; all that a pytree does, and faster."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, x) for x in value])
    return value


def _is_ours(frame) -> bool:
    return frame.f_code.co_filename.startswith(FOLDERS)


def _kind_of_indexing(packet, args) -> str | None:
    """Masks are turned into indices, which have to be counted; indices on the CPU are copied."""
    indices = [x for x in args[1] if x is not None]
    if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
        fills = packet is not aten.index and args[2].numel() == 1  # CUDA makes it a masked_fill
        return None if fills else "shape"
    return None if all(isinstance(x, DeviceTensor) for x in indices) else "to device"
