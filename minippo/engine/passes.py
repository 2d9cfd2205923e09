"""One pass through a model: its positions, precision and cache, whatever it is and on what device.

What comes in here is padded, as in the contract. Most of training reads packed rows (packing.py).
"""

import functools
import inspect
from contextlib import nullcontext

import torch
from torch import Tensor

from minippo.engine.devices import at_least_float32, autocast, reads_whole, uncompiled
from minippo.engine.ranks import is_sharded
from minippo.masking import position_ids


def forward_pass(
    model, tokens: Tensor, attention_mask=None, use_cache=False, cache=None, **options
):
    """One pass over padded sequences with the positions of the contract; on CUDA in bfloat16.

    tokens: (B, T), or with a KV cache only the last of them
    attention_mask: (B, T); None if every row begins with its real tokens: what stands behind them
        changes nothing, since attention is causal, and without a mask it is fastest
    cache: what `cache_of` took from an earlier pass; None begins anew
    """
    if attention_mask is not None:
        options["position_ids"] = position_ids(attention_mask)[:, -tokens.shape[1] :]
    seen = unasked_mask(model, attention_mask, tokens)
    if seen is None:  # GPT-2 would warn of padding; there is none that a real token could see
        getattr(model, "base_model", model).warn_if_padding_and_no_attention_mask = _say_nothing
    else:
        options["attention_mask"] = seen
    if cache is not None:
        options[cache_argument(type(model))] = cache
    is_compiled = use_cache and reads_whole(model)
    with autocast(tokens.device), uncompiled() if is_compiled else nullcontext():
        return model(input_ids=tokens, use_cache=use_cache, **options)


def _say_nothing(*arguments) -> None:
    return None


# logits


def token_logits(model, tokens: Tensor, attention_mask: Tensor | None, kept: int = 0) -> Tensor:
    """Logits (B, T, V), or (B, kept, V) of the last positions: no others are computed."""
    output = forward_pass(model, tokens, attention_mask, logits_to_keep=kept)
    return at_least_float32(output.logits)


def response_logits(model, tokens: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """Logits that predict the response tokens, the only ones that are computed.

    tokens, attention_mask: (B, T)  query and response
    returns: (B, R, V)              logits[:, t] predicts response[:, t]
    """
    kept = response_length + 1  # from the token before the response on; the last predicts nothing
    return token_logits(model, tokens, attention_mask, kept)[:, -kept:-1]


def next_logits(model, tokens: Tensor, attention_mask: Tensor, cache=None) -> tuple[Tensor, object]:
    """Logits (B, V) of what comes next, and the cache for the pass after this one.

    tokens: (B, Q), or with a cache the (B, 1) that came last
    attention_mask: (B, S) of all tokens so far
    """
    options = {"use_cache": True, "cache": cache, "logits_to_keep": 1}
    output = forward_pass(model, tokens, attention_mask, **options)
    return at_least_float32(output.logits[:, -1]), cache_of(output)


# hidden states, for heads of width 1


def hidden_states(backbone, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, T) -> (B, T, H), the last hidden states; no mask: as in forward_pass."""
    return forward_pass(backbone, tokens, attention_mask).last_hidden_state


def last_hidden(backbone, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T), padded on either side -> (B, H), the hidden state at the last token that counts."""
    lengths = attention_mask.long().sum(1)
    order = real_first(attention_mask)[:, : int(lengths.max())]
    rows = torch.arange(len(tokens), device=tokens.device)
    return hidden_states(backbone, tokens.gather(1, order))[rows, lengths - 1]


def last_hidden_of_candidates(backbone, query, query_mask, response, mask) -> Tensor:
    """What last_hidden returns of K responses to each query, each query read once.

    query, query_mask: (B, Q)   left-padded
    response, mask: (B, K, R)   right-padded
    returns: (B * K, H)
    """
    k, response, mask = response.shape[1], response.flatten(0, 1), mask.flatten(0, 1)
    seen = torch.cat([query_mask.repeat_interleave(k, 0), mask], 1)  # (B * K, T)
    # FSDP puts layers together for gradients of outputs, not of caches; nor are passes over a
    # cache compiled or recomputed.
    if is_sharded(next(backbone.parameters())) or reads_whole(backbone):
        return last_hidden(backbone, torch.cat([query.repeat_interleave(k, 0), response], 1), seen)
    cache = cache_of(forward_pass(backbone, query, query_mask, use_cache=True))
    cache.batch_repeat_interleave(k)  # keys and values of the query; gradients flow into them
    output = forward_pass(backbone, response, seen, use_cache=True, cache=cache)
    rows = torch.arange(len(response), device=response.device)
    return output.last_hidden_state[rows, mask.sum(1) - 1]


def real_first(mask: Tensor) -> Tensor:
    """The places along the last axis in order, but those where mask is True first."""
    return (~mask.bool()).byte().argsort(dim=-1, stable=True)


# what differs between models, devices and versions of transformers


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
