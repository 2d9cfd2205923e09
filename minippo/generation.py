"""Sampling answers over the model's KV cache, with per-row stopping and randomness that belongs to the row."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minippo.models import position_ids


def row_uniforms(seed: int, step: int, rows, length: int) -> Tensor:
    """The random numbers of each row: (B, length) in [0, 1), keyed by (seed, step, row) alone.

    Philox is counter-based: row 7 of step 3 has its own stream, whichever rows stand beside it in
    the batch, on which rank, and whether others have finished. So a batch may be split at will.
    """
    streams = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, row])).random(length)
        for row in rows
    ]
    return torch.from_numpy(np.stack(streams))


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """One token per row by inverting the cumulative distribution.

    logits: (B, V), uniforms: (B,) in [0, 1) -> tokens (B,): the first whose cumulative probability exceeds u
    """
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    threshold = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]  # the sum may miss 1
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    policy,
    query: Tensor,
    query_mask: Tensor,
    max_response_tokens: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    step: int = 0,
    rows=None,
    temperature: float = 1.0,
) -> Tensor:
    """Samples a response to each query; a row stops at its EOS and leaves the batch.

    query, query_mask: (B, Q)  left-padded prompts
    rows: the global number of each row, which keys its randomness; 0 .. B-1 if None
    returns: response (B, R), R <= max_response_tokens, padded with pad_id after the first EOS
    """
    count = query.shape[0]
    rows = range(count) if rows is None else rows
    uniforms = row_uniforms(seed, step, rows, max_response_tokens).to(query.device)
    response = torch.full((count, max_response_tokens), pad_id, device=query.device)
    alive = torch.arange(count, device=query.device)  # rows that are still being written
    mask, tokens, cache = query_mask.long(), query, None
    for t in range(max_response_tokens):
        positions = position_ids(mask)[:, -tokens.shape[1] :]
        output = policy(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        sampled = sample_tokens(output.logits[:, -1], uniforms[alive, t], temperature)
        response[alive, t] = sampled
        going_on = (sampled != eos_id).nonzero().squeeze(-1)
        if len(going_on) == 0:
            break
        if len(going_on) < len(alive):
            cache.batch_select_indices(going_on)
            alive, mask, sampled = alive[going_on], mask[going_on], sampled[going_on]
        tokens, mask = sampled[:, None], F.pad(mask, (0, 1), value=1)
    return response[:, : t + 1]


def generate_many(policy, prompts: list[list[int]], tokenizer, max_response_tokens, seed, step=0, **options):
    """Answers to any number of tokenised prompts, in batches of similar length; returns lists of token ids.

    Which prompts share a batch changes nothing, since randomness is keyed by the prompt's place.
    options: batch_size (256), temperature (1.0), on_batch (called with the number of prompts done)
    """
    from minippo.batching import left_pad

    size, on_batch = options.pop("batch_size", 256), options.pop("on_batch", None)
    device = next(policy.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        query, mask = left_pad([prompts[i] for i in rows], tokenizer.pad_token_id)
        response = generate(
            policy,
            query.to(device),
            mask.to(device),
            max_response_tokens,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            seed,
            step,
            rows,
            **options,
        ).cpu()
        for row, ids in zip(rows, response.tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            answers[row] = ids[:end]
        if on_batch:
            on_batch(len(rows))
    return answers
