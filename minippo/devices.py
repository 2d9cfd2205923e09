"""What depends on the device: which one, in which precision, and what is traded for its memory.

Nothing here changes what is computed on a CPU by default: there it is torch's default dtype, and
copies are none.
"""

import ctypes
import functools
import inspect
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minippo.config import RunConfig
from minippo.distributed import shard

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_autocast = ContextVar("autocast", default=RunConfig.autocast)  # what the run in progress asks for


def pick_device(name: str) -> torch.device:
    """The device of a run: "auto" is cuda if there, else cpu."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(auto if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is none torch knows; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    return device


def device_of(config: RunConfig) -> torch.device:
    """The device of a run; ValueError if it cannot do what the run wants of it."""
    device = pick_device(config.device)
    if config.compile and device.type != "cuda":
        raise ValueError(f"--compile is for CUDA, and the device is {device}; leave it out")
    return device


def keep_freed_memory() -> bool:
    """Lets this process keep the memory it frees, as torch does on CUDA: the next pass needs it.

    glibc gives a large tensor back to the system, which clears every page of the next one: a tenth
    of a step of GPT-2. For the whole process, so it is for a command to call; where libc is another
    one, or an old glibc that refuses, all stays as it is.

    returns: whether it does
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Not M_MMAP_MAX = 0, which has the same effect: there GPT-2 needs more of it.
    if mallopt is None or not mallopt(M_MMAP_THRESHOLD, 2**31 - 1):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, -1))  # never


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


def to_device(tensors, device: torch.device | None) -> tuple[Tensor, ...]:
    """CPU tensors on the device. The host does not wait for the copies: they leave pinned memory.

    device: None leaves them on the CPU
    """
    if device is None or device.type == "cpu":
        return tuple(tensors)
    return tuple(x.pin_memory().to(device, non_blocking=True) for x in tensors)


def prepared(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model on the run's device, checkpointed, compiled and in parts if the run wants it.

    Copies of a model are made before, from a whole one.
    """
    device = device_of(config)
    if not config.fsdp:
        model = model.to(device)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    if config.compile:
        compile_forward(model)
    return shard(model, device) if config.fsdp else model


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


@functools.cache
def cache_argument(kind: type) -> str:
    """What a model calls its cache: transformers 5.24 renamed it, and warns of the old name."""
    names = inspect.signature(kind.forward).parameters.keys()
    if not names & {"cache", "past_key_values"}:  # it wraps a model of transformers
        from transformers import GPT2LMHeadModel

        return cache_argument(GPT2LMHeadModel)
    return "cache" if "cache" in names else "past_key_values"


def cache_of(output):
    """The keys and values that a forward pass with use_cache=True gave back."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def unasked_mask(model, attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """On a GPU a mask that transformers takes as it is, elsewhere the one that was given.

    transformers asks a mask (B, S) whether all of it is True, and where there is none the positions
    whether they are in order. On a GPU the host waits for the answer, in every pass.
    tokens: (B, T), the last ones of (B, S) if there is a cache
    returns: (B or 1, 1, T, S), which tokens each of the T sees; what was given also for attention
        that wants it so: with a window, or by another kernel than torch's
    """
    config, device = getattr(model, "config", None), tokens.device
    is_plain = getattr(config, "_attn_implementation", None) == "sdpa"
    special = ("sliding_window", "attention_chunk_size", "alibi")
    is_plain &= not any(getattr(config, name, None) for name in special)
    is_plain &= set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    if device.type == "cpu" or not is_plain:
        return attention_mask
    queries = tokens.shape[1]
    size = queries if attention_mask is None else attention_mask.shape[1]
    earlier = torch.ones(1, 1, queries, size, dtype=torch.bool, device=device)
    earlier = earlier.tril(size - queries)
    return earlier if attention_mask is None else earlier & attention_mask.bool()[:, None, None]
