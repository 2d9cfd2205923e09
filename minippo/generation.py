"""Sampling over the model's KV cache: rows stop one by one, and each row has its own randomness."""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minippo.batching import chunks, left_pad
from minippo.engine.look import shared
from minippo.engine.passes import next_logits


def row_uniforms(seed: int, step: int, rows, length: int) -> Tensor:
    """The random numbers of each row: (B, length) in [0, 1), keyed by (seed, step, row) alone.

    Philox is counter-based: row 7 of step 3 has its own stream, whichever rows stand beside it in
    the batch, on which rank, and whether others have finished. So a batch may be split at will.
    """
    streams = [np.random.Philox(key=seed, counter=[0, 0, step, row]) for row in rows]
    return torch.from_numpy(np.stack([np.random.Generator(s).random(length) for s in streams]))


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """One token per row by inverting the cumulative distribution.

    logits: (B, V), in float32 or better
    uniforms: (B,) in [0, 1)
    returns: tokens (B,), the first whose cumulative probability exceeds the uniform number
    """
    cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(-1)  # (B, V)
    threshold = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]  # the sum may miss 1
    below = cumulative[:, -1:].nextafter(cumulative.new_zeros(()))
    threshold = torch.minimum(threshold, below)  # u may round to 1
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    policy, query: Tensor, query_mask: Tensor, max_response_tokens: int, eos_id: int, pad_id: int,
    seed: int, step: int = 0, rows=None, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Samples a response to each query; a row stops at its EOS and leaves the batch.

    query, query_mask: (B, Q)  left-padded prompts
    rows: the global number of each row, which keys its randomness; 0 .. B-1 if None
    returns: response (B, R), R <= max_response_tokens, padded with pad_id after the first EOS
    """
    rows = range(len(query)) if rows is None else rows
    uniforms = row_uniforms(seed, step, rows, max_response_tokens)  # (B, max_response_tokens)
    write = partial(_write, policy, eos_id, pad_id, temperature)
    return shared(policy, write, query, query_mask, uniforms, fill=pad_id)


def _write(policy, eos_id, pad_id, temperature, query, query_mask, uniforms) -> Tensor:
    """The loop of `generate`, token by token."""
    count, limit = uniforms.shape
    response = torch.full((count, limit), pad_id, device=query.device)
    alive = torch.arange(count, device=query.device)  # (A,) rows that are still being written
    tokens, attention_mask, cache = query, query_mask.long(), None
    for t in range(limit):
        logits, cache = next_logits(policy, tokens, attention_mask, cache)  # (A, V)
        sampled = sample_tokens(logits, uniforms[alive, t], temperature)  # (A,)
        response[alive, t] = sampled
        going_on = (sampled != eos_id).nonzero().squeeze(-1)  # which of the A
        if len(going_on) == 0:
            break
        if len(going_on) < len(alive):
            cache.batch_select_indices(going_on)
            alive, sampled = alive[going_on], sampled[going_on]
            attention_mask = attention_mask[going_on]
        tokens, attention_mask = sampled[:, None], F.pad(attention_mask, (0, 1), value=1)
    return response[:, : t + 1]


def generate_many(
    policy, prompts: list[list[int]], tokenizer, max_response_tokens, seed, step=0, *,
    batch_size=256, temperature=1.0, on_batch=None,
) -> list[list[int]]:  # fmt: skip
    """Answers to any number of tokenised prompts, in their order, as lists of token ids.

    Prompts of similar length share a batch. Which ones do changes nothing, since randomness is
    keyed by the prompt's place.
    batch_size: prompts in the model at once, of all processes together
    on_batch: called with the number of prompts of each batch that is done
    """
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for rows in chunks(order, batch_size):
        query, mask = left_pad([prompts[i] for i in rows], pad_id)
        limits = (max_response_tokens, eos_id, pad_id)
        response = generate(policy, query, mask, *limits, seed, step, rows, temperature)
        for row, ids in zip(rows, response.tolist(), strict=True):
            answers[row] = ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
        if on_batch:
            on_batch(len(rows))
    return [answers[row] for row in range(len(prompts))]
