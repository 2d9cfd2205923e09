"""Rows without padding: what models read, and what they say of it, back in the contract's shape."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from minippo.engine import ranks
from minippo.engine.devices import at_least_float32, to_device
from minippo.engine.passes import forward_pass, real_first
from minippo.masking import position_ids


@dataclass(frozen=True)
class Packed:
    """Rows without the padding between, before and behind their tokens, as training reads them.

    Padding costs as much arithmetic as text does, and the vocabulary projection of a token that
    does not count is for nothing. So each row begins with its first real token, and the heads see
    the N = mask.sum() positions that predict a token that counts, one after the other.
    """

    tokens: Tensor  # (B, W) real tokens, then whatever; W is the longest row less its last token
    positions: Tensor  # (N,) which of the B * W positions predicts each token that counts
    targets: Tensor  # (N,) the tokens that count, row by row
    slots: Tensor  # (N,) where each of them stands in the B * R of a flat response
    shape: tuple[int, int]  # (B, R)

    def unpack(self, x: Tensor) -> Tensor:
        """(N,) -> (B, R), 0 where masked."""
        flat = x.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy(0, self.slots, x).view(self.shape)


def pack(tokens: Tensor, attention_mask: Tensor, mask: Tensor, lengths=None) -> Packed:
    """Takes the padding out of [query | response] rows.

    tokens, attention_mask: (B, T)
    mask: (B, R)    the response tokens that count
    lengths: (B, 2) what `row_lengths` returns; without it the CPU has to wait for the device
    """
    lengths = row_lengths(attention_mask, mask) if lengths is None else lengths
    width = int(lengths[:, 0].max()) - 1  # the last token of a row predicts nothing
    count = int(lengths[:, 1].sum())
    response_length = mask.shape[1]
    order = real_first(attention_mask)[:, :width]  # (B, W)
    slots = real_first(mask.flatten())[:count]  # (N,)
    before = position_ids(attention_mask)[:, -response_length:].flatten()[slots] - 1
    positions = slots // response_length * width + before
    targets = tokens[:, -response_length:].flatten()[slots]
    return Packed(tokens.gather(1, order), positions, targets, slots, tuple(mask.shape))


def row_lengths(attention_mask: Tensor, mask: Tensor) -> Tensor:
    """(B, 2) on the CPU: the real tokens of each row, and its response tokens that count."""
    return torch.stack([attention_mask.sum(1), mask.sum(1)], 1).cpu()


def packed_logits(model, packed: Packed) -> Tensor:
    """Logits (N, V) that predict the tokens that count; no others are computed.

    The hidden states are chosen in front of the model's own vocabulary projection, so that what a
    model does to its logits afterwards (Gemma bounds them, Cohere scales them) is done here too.
    """

    def choose(head, inputs):
        return (inputs[0].flatten(0, 1).index_select(0, packed.positions),)

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        return at_least_float32(forward_pass(model, packed.tokens).logits)
    finally:
        hook.remove()


def packed_values(value_model, packed: Packed) -> Tensor:
    """Values (N,) before each token that counts."""
    hidden = value_model.hidden(packed.tokens)
    return value_model.read(hidden.flatten(0, 1).index_select(0, packed.positions))


class Rows:
    """What a batch of rows can do, whatever tensors it names: a base for dataclasses.

    Its fields are tensors of B rows each, among them `tokens` and `attention_mask` (B, T) and
    `mask` (B, R).
    """

    # No fields: how many rows models read at a time, and whether this is one process's micro-batch.
    rows_at_once, is_micro_batch = 256, False

    @cached_property
    def lengths(self) -> Tensor:
        """(B, 2) on the CPU: tokens of each row, and those of its response that count.

        The device is asked once per batch; rows of it take theirs along.
        """
        return row_lengths(self.attention_mask, self.mask)

    @property
    def token_count(self) -> int:
        """How many tokens count."""
        return int(self.lengths[:, 1].sum())

    @cached_property
    def packed(self) -> Packed:
        """The rows as the models read them."""
        return pack(self.tokens, self.attention_mask, self.mask, self.lengths)

    def rows(self, indices):
        """The same with these rows only; indices are on the CPU, where the lengths are."""
        indices = torch.arange(len(self.tokens))[indices]
        there = to_device(indices, self.tokens.device)
        chosen = replace(self, **{name: x[there] for name, x in self._columns().items()})
        return self._told(chosen, lengths=self.lengths[indices])

    def with_columns(self, kind, **columns: Tensor):
        """The same rows as another kind of batch, which has more columns."""
        return self._told(kind(**self._columns(), **columns))

    def to_device_of(self, model):
        """The same on the device of a model."""
        columns = self._columns()
        moved = dict(zip(columns, to_device_of(model, *columns.values()), strict=True))
        return self._told(replace(self, **moved))

    def with_chunk_size(self, size: int):
        """The same, of which models without gradients read `size` rows at a time."""
        return self._told(replace(self), rows_at_once=size)

    @cached_property
    def chunks(self) -> list[tuple["Rows", Tensor]]:
        """This process's rows, `rows_at_once` a chunk, and where each of them stands in all."""
        own = ranks.share(len(self.tokens))
        return [(self.rows(i), i) for i, _ in self._by_length(own, self.rows_at_once)]

    def micro_batches(self, size: int):
        """This process's rows, `size` a chunk, each with its share of the tokens that count.

        Token means weighted by these shares add up to the mean over the whole, whichever rows
        stand together, in whichever process.
        """
        own = ranks.rows_of_this_rank(len(self.tokens))
        for i, counts in self._by_length(own, size):
            chunk = self._told(self.rows(i), lengths=self.lengths[i], is_micro_batch=True)
            yield chunk, counts * chunk.token_count / self.token_count

    def _by_length(self, own: slice, size: int) -> list[tuple[Tensor, bool]]:
        order = self.lengths[:, 0].argsort(stable=True)  # least padding
        return ranks.in_lockstep(order[own].split(size))

    def _columns(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _told(self, other, **facts):
        """The other batch, which learns what this one knows; facts are what differs."""
        known = {"lengths": self.lengths, "rows_at_once": self.rows_at_once}
        vars(other).update(known | {"is_micro_batch": self.is_micro_batch} | facts)
        return other


def to_device_of(model, *tensors: Tensor) -> list[Tensor]:
    """The tensors on the device of a model."""
    device = next(model.parameters()).device
    return [to_device(x, device) for x in tensors]
