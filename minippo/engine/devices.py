"""What depends on the device: precision, copies to it, and what is traded for its memory.

Nothing here changes what is computed on a CPU by default: there it is torch's default dtype, and
copies are none.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minippo.config import RunConfig

_autocast = ContextVar("autocast", default=RunConfig.autocast)  # what the run in progress asks for


@contextmanager
def precision(autocast: str = RunConfig.autocast, tf32: bool = RunConfig.tf32):
    """The precision of the matrix products inside; `RunConfig` explains both settings."""
    before, token = torch.get_float32_matmul_precision(), _autocast.set(autocast)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _autocast.reset(token)


def autocast(device: torch.device):
    """bfloat16 autocast for a forward pass, if that is the precision on this device."""
    choice = _autocast.get()
    enabled = choice == "bf16" or (choice == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is: formulas are not for bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor there. The host does not wait for the copy: it leaves pinned memory."""
    if x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True)


def checkpoint_layers(model: nn.Module) -> None:
    """Each layer keeps its input only; what the backward pass needs is computed once more then.

    transformers does that in training mode alone, in which dropout is on, so it is done here.
    Raises ValueError if the model has no layers that say they can be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        message = f"{type(model).__name__} has no layers that can be recomputed"
        raise ValueError(f"{message}; leave out --gradient-checkpointing")
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)
    _below(model).reads_whole = True


def _recomputed(forward, *arguments, **options):
    from transformers import Cache

    # A cache that is written to must not be written to again when the layer is recomputed.
    has_cache = any(isinstance(x, Cache) for x in (*arguments, *options.values()))
    if has_cache or not torch.is_grad_enabled():
        return forward(*arguments, **options)
    # There is no dropout whose random numbers would have to be kept.
    kept = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(forward, *arguments, **kept, **options)


def compile_forward(model: nn.Module, backend: str = "inductor") -> None:
    """`torch.compile` of all below the head; a copy of the model is not compiled."""
    _below(model).compile(dynamic=True, backend=backend)  # every batch has another length
    _below(model).reads_whole = True


def reads_whole(model: nn.Module) -> bool:
    """Whether layers are recomputed or compiled, which passes over a cache are not."""
    return getattr(_below(model), "reads_whole", False)


def _below(model: nn.Module) -> nn.Module:
    """The backbone, without the head."""
    return getattr(getattr(model, "classifier", model), "base_model", model)


def uncompiled():
    """Inside, a compiled model runs as it is written: sampling, where no two passes are alike."""
    return torch.compiler.set_stance("force_eager")


def stored_as(model: nn.Module, dtype: str) -> nn.Module:
    """A frozen model whose weights have this dtype; a head of width 1 keeps its own."""
    below = model.classifier.base_model if hasattr(model, "classifier") else model
    below.to(getattr(torch, dtype))
    return model
