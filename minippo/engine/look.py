"""Look: what a model says of the answers in a batch, as (B, R), 0 where masked.

As from one padded pass over all rows. Behind that, padding is taken out, rows of similar length are
read together, few at a time, and each process reads its share. With gradients the batch is one
micro-batch (see gradients.py) and is read whole; without them every process gets all rows.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from minippo.engine import ranks
from minippo.engine.devices import to_device
from minippo.engine.packing import Rows, packed_logits, packed_values, to_device_of
from minippo.engine.passes import forward_pass
from minippo.kl import kl_full
from minippo.logprobs import entropy_from_logits, gather_logprobs


def response_logprobs(policy, batch: Rows, temperature: float = 1.0) -> Tensor:
    """log pi of each response token: (B, R)."""

    def look(packed):
        return (gather_logprobs(packed_logits(policy, packed), packed.targets, temperature),)

    return _of_all_rows(batch, look)[0]


def response_logprobs_and_entropy(policy, batch: Rows, temperature: float = 1.0):
    """The same, and the entropy of each next-token distribution, both (B, R), from one pass."""

    def look(packed):
        logits = packed_logits(policy, packed)
        entropy = entropy_from_logits(logits / temperature)
        return gather_logprobs(logits, packed.targets, temperature), entropy

    return _of_all_rows(batch, look)


def response_logprobs_and_kl(policy, ref_policy, batch: Rows, temperature: float = 1.0):
    """log pi and the exact KL(policy, ref), both (B, R); no gradient reaches ref_policy."""

    def look(packed):
        logits = packed_logits(policy, packed)
        with torch.no_grad():
            ref_logits = packed_logits(ref_policy, packed)
        pair = (torch.log_softmax(x / temperature, -1) for x in (logits, ref_logits))
        return gather_logprobs(logits, packed.targets, temperature), kl_full(*pair)

    return _of_all_rows(batch, look)


def response_values(value_model, batch: Rows) -> Tensor:
    """V(query, response[:t]) before each response token: (B, R)."""
    return _of_all_rows(batch, lambda packed: (packed_values(value_model, packed),))[0]


def answer_scores(score_fn, batch: Rows) -> Tensor:
    """(B,) what score_fn makes of the answers, of which it sees a few at once.

    Raises ValueError if it returns anything but one score per answer.
    """
    return _in_chunks(batch, lambda chunk: (_checked_scores(score_fn, chunk),))[0]


def _checked_scores(score_fn, chunk: Rows) -> Tensor:
    tokens, count = chunk.tokens, len(chunk.tokens)
    scores = score_fn(tokens, chunk.attention_mask, tokens.shape[1] - chunk.mask.shape[1])
    got = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
    if got != (count,):
        message = f"score_fn must return one score per answer, a tensor of shape ({count},)"
        raise ValueError(f"{message}; got {got}")
    return scores.to(tokens.device)  # a rule may have worked on the CPU


def _of_all_rows(batch: Rows, look) -> tuple[Tensor, ...]:
    """look(packed) -> tensors (N,), unpacked to (B, R); in chunks where there are no gradients."""

    def unpacked(rows: Rows):
        return tuple(map(rows.packed.unpack, look(rows.packed)))

    is_read_whole = torch.is_grad_enabled() or batch.is_micro_batch
    return unpacked(batch) if is_read_whole else _in_chunks(batch, unpacked)


def _in_chunks(batch: Rows, look) -> tuple[Tensor, ...]:
    """look(chunk) -> tensors with a row for each of the chunk's: the same of all rows, in order."""
    found = [look(chunk) for chunk, _ in batch.chunks]
    indices = torch.cat([indices for _, indices in batch.chunks])
    indices = to_device(indices, batch.tokens.device)
    columns = (torch.cat(column) for column in zip(*found, strict=True))
    return tuple(ranks.gather_rows(column, indices, len(batch.tokens)) for column in columns)


# what has no answers yet, or several to a prompt


def shared(model, compute, *rows: Tensor, fill=0) -> Tensor:
    """compute(*rows) -> (B, L), each process on its rows; L is that of the longest.

    compute: calls the model as often as it likes, or a part of it equally often for any rows
    rows: tensors of B rows each; they are taken to the device of the model
    """
    count, rows = len(rows[0]), to_device_of(model, *rows)
    own = ranks.share(count)
    with _in_step(model):
        found = compute(*(x[own] for x in rows))
    found = F.pad(found, (0, ranks.largest(found.shape[1]) - found.shape[1]), value=fill)
    return ranks.gather_rows(found, own, count)


@contextmanager
def _in_step(model):
    """Inside, each process may make as many passes through a sharded model as it needs.

    All must make each of them together. So whoever makes one says so before, and whoever is done
    takes part until nobody says so.
    """
    if ranks.world() == 1 or not any(map(ranks.is_sharded, model.parameters())):
        yield
        return
    hook = model.register_forward_pre_hook(_announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    while ranks.on_any_rank(False):
        forward_pass(model, token, use_cache=True)


def _announce(*arguments) -> None:
    ranks.on_any_rank(True)
