"""What a command asks of the machine before it begins: a device, its memory, other processes."""

import ctypes
import os
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from minippo.config import RunConfig
from minippo.engine.devices import checkpoint_layers, compile_forward
from minippo.engine.ranks import rank, shard

# A process that dies is noticed at once, since its connections close. This is for one that hangs,
# and longer than rank 0 takes to write the checkpoint of a large model, while the others wait.
TIMEOUT = timedelta(minutes=10)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


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
def joined():
    """Inside, the processes that torchrun started work together, and only rank 0 has a terminal.

    CPU tensors travel by gloo, those on CUDA by nccl; each process takes the card of its number.
    Raises ProcessLost if another process is gone, ValueError if there are too few cards.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if 0 < cards <= local:
        message = f"{local + 1} processes on a machine with {cards} cards"
        raise ValueError(f"{message}; lower --nproc-per-node, or hide them: CUDA_VISIBLE_DEVICES=")
    if cards:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", timeout=TIMEOUT)
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        with _one_terminal():
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise _lost() from error
    finally:
        dist.destroy_process_group()
        if signal.getsignal(signal.SIGTERM) is _stopped:
            signal.signal(signal.SIGTERM, before)


def _stopped(signum, frame):
    """torchrun ends all processes when one has ended."""
    raise _lost()


class ProcessLost(KeyboardInterrupt):
    """Another process has ended, so this one is over as well: no error of what it was doing."""

    is_said_by_all = True  # whoever is left, says it


def _lost() -> ProcessLost:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is something to be said before the end
    message = "another process of this run ended, or torchrun was told to stop"
    return ProcessLost(f"{message}; what was saved is whole: go on with --resume")


@contextmanager
def _one_terminal():
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
