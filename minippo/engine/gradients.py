"""Accumulate and step: the gradients of a batch, in micro-batches and processes; then the move."""

import torch
from torch import Tensor, nn

from minippo.engine import ranks
from minippo.engine.devices import at_least_float32
from minippo.engine.packing import Rows


def accumulate(loss_of, batch: Rows, micro_batch_size: int) -> dict[str, Tensor]:
    """Leaves the gradients of a batch's loss in the models, from a few rows at a time.

    loss_of: (some rows of the batch) -> loss (), stats {name: ()}, both token means
    returns: the stats' means over the batch, detached

    Each micro-batch weighs what its share of the tokens is, so the sum is the gradient of the token
    mean over the whole batch. No graph outlives its micro-batch: that is what saves the memory.
    """
    return _accumulated(loss_of, batch.micro_batches(micro_batch_size))


def accumulate_rows(loss_of, rows: list, cut=lambda rows: [rows], weight=lambda row: 1):
    """The same for rows in a list.

    cut: (rows) -> micro-batches, each a list of rows
    weight: what a row counts in the mean over the batch
    """
    total = sum(map(weight, rows))
    chunks = ranks.in_lockstep(cut(rows[ranks.rows_of_this_rank(len(rows))]))
    parts = ((chunk, counts * sum(map(weight, chunk)) / total) for chunk, counts in chunks)
    return _accumulated(loss_of, parts)


def _accumulated(loss_of, parts) -> dict[str, Tensor]:
    sums = {}
    for rows, share in parts:
        loss, stats = loss_of(rows)
        (loss * share).backward()
        for name, value in stats.items():
            value = value.detach() if torch.is_tensor(value) else value
            sums[name] = sums.get(name, 0.0) + value * share
    return ranks.sum_metrics(sums)


def check_shares(rows: int) -> None:
    """Raises ValueError if the smallest batch has fewer rows than there are processes."""
    if rows < ranks.world():
        message = f"the last minibatch has {rows} rows, too few for {ranks.world()} processes"
        raise ValueError(f"{message}; choose sizes that divide each other, or fewer processes")


def optimizer_step(optimizer, max_grad_norm: float) -> dict[str, Tensor]:
    """Clips each model's gradients on their own, moves the weights, clears the gradients.

    returns: the norms before clipping, as grad_norm/NAME
    """
    norms = {}
    for group in optimizer.param_groups:
        ranks.sum_gradients(group["params"])  # of all processes
        norm = nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
        norms[f"grad_norm/{group['name']}"] = ranks.whole(norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def weight_norms(optimizer) -> dict[str, Tensor]:
    """The norm of each model's weights, as weights/NAME."""
    norms = {}
    for group in optimizer.param_groups:
        each = [parameter.detach().norm() for parameter in group["params"]]
        norms[f"weights/{group['name']}"] = ranks.whole(torch.stack(each).norm())
    return norms


def as_floats(metrics: dict) -> dict[str, float]:
    """Metrics as floats, in one copy off the device: only here does a step make the host wait."""
    tensors = {name: x for name, x in metrics.items() if isinstance(x, Tensor)}
    if tensors:
        together = torch.stack([at_least_float32(x.detach()) for x in tensors.values()])
        metrics = metrics | dict(zip(tensors, together.tolist(), strict=True))
    return {name: float(value) for name, value in metrics.items()}
