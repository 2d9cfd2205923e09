"""Several processes on one batch: which rows are whose, and how what they find is put together.

Every process (rank) reads the same data and makes the same plan. Of each global batch it takes its
own rows; what it finds is added up over the ranks or gathered, so that the formulas, the metrics
and the weights know nothing of ranks. In one process everything here does nothing.
"""

import functools
import warnings
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**24  # numbers in one message (64 MB): large enough that its latency does not count
_alone = ContextVar("alone", default=False)


def world() -> int:
    """How many processes work together: 1, unless torchrun started more."""
    together = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if together else 1


def rank() -> int:
    """The number of this process, from 0; 0 is the one that writes and speaks."""
    return dist.get_rank() if world() > 1 else 0


# what a process does of a batch


def rows_of_this_rank(count: int) -> slice:
    """Which of the rows of a batch are this process's: every world-th, so all are equally long.

    Raises ValueError if there are fewer rows than processes.
    """
    if count < world() > 1:
        message = f"{world()} processes cannot share a batch of {count} rows"
        raise ValueError(f"{message}; start fewer processes, or choose a larger batch")
    return slice(rank(), None, world())


def share(count: int) -> slice:
    """The rows that this process looks at: its own, or all where there are fewer than processes."""
    return rows_of_this_rank(count) if count >= world() else slice(None)


def in_lockstep(chunks) -> list[tuple]:
    """(chunk, counts) of this process's chunks, as many on every rank.

    Passes through a sharded model must be made by all ranks together. So a rank that has fewer
    chunks repeats its last one; `counts` is False there, and its gradients get the weight 0.
    """
    passes = largest(len(chunks))
    return [(chunks[min(i, len(chunks) - 1)], i < len(chunks)) for i in range(passes)]


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is True on any rank: ranks that generate go on until all are done."""
    return bool(largest(int(flag)))


# how results are put together


def gather_rows(x: Tensor, rows, count: int) -> Tensor:
    """The rows of all ranks in one tensor, the same on each.

    x: (B', ...)  this process's rows, its `share` of them
    rows: which of the whole they are, a slice or indices; a row may be given twice
    returns: (count, ...)
    """
    whole = x.new_zeros((count, *x.shape[1:]))
    whole[rows] = x
    return all_sum(whole) if count >= world() else whole  # the other ranks have zeros there


def all_sum(x: Tensor) -> Tensor:
    """The sum over the ranks, written into x. No gradients flow through it."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def sum_metrics(metrics: dict) -> dict:
    """Metrics that are each rank's share of a mean, added up; scalars on one device."""
    if world() == 1:
        return metrics
    device = next((v.device for v in metrics.values() if torch.is_tensor(v)), None)
    flat = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in metrics.values()]
    return dict(zip(metrics, all_sum(torch.stack(flat).detach()), strict=True))


def sum_gradients(parameters) -> None:
    """Adds up the gradients of all ranks, in place, in messages of about BUCKET numbers.

    In place of a wrapper such as DistributedDataParallel: a loss may ask two models, in
    several micro-batches whose weights are shares of the global minibatch (sums, not a mean over
    ranks), and hooks the vocabulary projection. All of this is plain when gradients are added up
    once, in front of the optimizer. What is sharded was added up during the backward pass.
    """
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    while gradients:
        bucket = [gradients.pop()]
        while gradients and sum(g.numel() for g in bucket) < BUCKET:
            bucket.append(gradients.pop())
        flat = all_sum(torch.cat([g.flatten() for g in bucket]))
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def largest(number: int) -> int:
    """The largest of the ranks' numbers, on each."""
    if world() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


# sharded models


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Splits a model's weights, gradients and optimizer state over the ranks (FSDP).

    Each layer is put together when it computes and taken apart again. Every rank has loaded the
    whole model, on the CPU. All passes through it must be made by all ranks together.
    Raises ValueError in a process that torchrun did not start.
    """
    if not dist.is_initialized():
        message = "--fsdp splits models over processes that torchrun starts"
        raise ValueError(f"{message}: torchrun --nproc-per-node 2 -m minippo ... --fsdp")
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        message = f"torch {torch.__version__} cannot add up the gradients of sharded models"
        raise ValueError(f"{message}; --fsdp needs a newer one: it is tested with 2.13")
    from transformers.modeling_layers import GradientCheckpointingLayer

    # It warns of operations in place on what a backbone returns. There are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    # What is called: a policy (passes.py), or a backbone and, apart from it, the head of width 1.
    classifier = getattr(model, "classifier", None)
    called = [classifier.base_model, classifier.score] if classifier is not None else [model]
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in [*layers, *called]:
        # In parts after every pass, the outermost as well: its `parameters()` are the parts then.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums of gradients, as in sum_gradients, and no mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(x: Tensor) -> bool:
    """Whether this process has only a part of the tensor."""
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together, on every rank; any other as it is."""
    return x.full_tensor() if is_sharded(x) else x


def collect(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole, one after the other: on rank 0 on the CPU, nothing on other ranks.

    Those that are not sharded stay as they are.
    """
    kept = {}
    for name, x in tensors.items():
        full = whole(x)
        if rank() == 0 or not is_sharded(x):
            kept[name] = full.cpu() if is_sharded(x) else full
    return kept


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's weights as `collect` gives them, a tied one once; None of any other."""
    if not any(map(is_sharded, model.parameters())):
        return None
    saved = model.state_dict().keys()
    buffers = {name: x for name, x in model.named_buffers() if name in saved}
    return collect({name: p.detach() for name, p in model.named_parameters()} | buffers)


def split_like(x: Tensor, other: Tensor) -> Tensor:
    """This rank's part of a whole tensor, split as another one is; x itself if that is whole."""
    if not is_sharded(other):
        return x
    from torch.distributed.tensor import distribute_tensor

    there = x.to(other.device)
    return distribute_tensor(there, other.device_mesh, other.placements, src_data_rank=None)


# processes


@contextmanager
def alone():
    """Inside, this process computes by itself: no rows are shared, nothing is waited for."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def on_main(action):
    """The function, called on rank 0 only; the others wait until it is done and return None.

    For what writes. What others read before the call is read before anything is written.
    """

    @functools.wraps(action)
    def once(*arguments, **options):
        result, failure = None, ValueError("the main process could not go on, and has said why")
        _wait()
        if rank() == 0:
            result, failure = _tried(action, *arguments, **options)
        if on_any_rank(rank() == 0 and failure is not None):
            raise failure
        return result

    return once


def _tried(action, *arguments, **options) -> tuple:
    """(result, None) or (None, what was raised): the others are told before it is raised."""
    try:
        with alone():
            return action(*arguments, **options), None
    except Exception as error:
        return None, error


def _wait() -> None:
    on_any_rank(False)
