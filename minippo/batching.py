"""From rows to padded tensors: tokenising, length limits with counts, padding, seeded batches."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from minippo.engine.packing import Rows
from minippo.hh import format_prompt


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: a prompt and its responses, each a list of token ids."""

    row: int  # the row's place in the data set
    prompt: list[int]
    responses: list[list[int]]  # each ends in EOS

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest response."""
        return len(self.prompt) + max(map(len, self.responses))


def encode_prompt(tokenizer, instruction: str, history=()) -> list[int]:
    """Token ids of a prompt, which ends in "Assistant:"; BOS stands first if there is one."""
    return [*beginning(tokenizer), *_encode_text(tokenizer, format_prompt(instruction, history))]


def beginning(tokenizer) -> list[int]:
    """The BOS that a tokenizer puts before every text (Llama's does), nothing if it puts none."""
    return [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id]


def encode_response(tokenizer, answer: str) -> list[int]:
    """Token ids of " " + answer, and EOS."""
    return [*_encode_text(tokenizer, " " + answer), tokenizer.eos_token_id]


def _encode_text(tokenizer, text: str) -> list[int]:
    # Whoever writes "<|endoftext|>" writes text: it must not end the answer.
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def decode_response(tokenizer, response) -> str:
    """The text of a response up to its EOS. A padding token in the middle stays visible."""
    ids = response.tolist() if isinstance(response, Tensor) else list(response)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids.pop()
    return tokenizer.decode(ids).strip()


def encode_rows(
    rows, tokenizer, max_prompt_tokens: int, max_response_tokens: int, answers=()
) -> tuple[list[Encoded], int]:
    """Tokenises rows and drops what is too long.

    rows: dicts with `instruction`, `history` and the columns named in `answers` (a text, or a list
        of texts)
    returns: the encoded rows that fit, and how many were dropped
    Raises ValueError if nothing is left.
    """
    kept = []
    for number, row in enumerate(rows):
        columns = ([row[c]] if isinstance(row[c], str) else row[c] for c in answers)
        responses = [encode_response(tokenizer, text) for texts in columns for text in texts]
        prompt = encode_prompt(tokenizer, row["instruction"], row["history"])
        longest = max(map(len, responses), default=0)
        if len(prompt) <= max_prompt_tokens and longest <= max_response_tokens:
            kept.append(Encoded(number, prompt, responses))
    if not kept:
        raise ValueError(
            f"no row fits into {max_prompt_tokens=} and {max_response_tokens=}; "
            "raise the limits (the model's context must hold both)"
        )
    return kept, len(rows) - len(kept)


def check_context(model, prompt_tokens: int, response_tokens: int = 0) -> None:
    """Raises ValueError if a prompt and its response, or a row as a whole, exceed the positions.

    A model whose config has no limit, and a rule, which has no config, take any length.
    """
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    wanted = prompt_tokens + response_tokens
    if context is not None and wanted > context:
        raise ValueError(
            f"{wanted} tokens of prompt and response do not fit the context of {context} tokens of "
            f"{type(model).__name__}; lower max_prompt_tokens or max_response_tokens, or cut texts"
        )


def left_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Queries, padded on the left: ids (B, Q) and mask (B, Q). The mask comes from the lengths."""
    ids, mask = right_pad([sequence[::-1] for sequence in sequences], pad_id)
    return ids.flip(1), mask.flip(1)


def right_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Responses, padded on the right: ids (B, R) and mask (B, R), which comes from the lengths."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [pad_id] * (longest - len(sequence)) for sequence in sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, torch.arange(longest) < lengths[:, None]


def join_query_response(
    prompts: list[list[int]], responses: list[list[int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[query | response] with the paddings of the contract.

    returns: tokens (B, T), attention_mask (B, T), response mask (B, R)
    """
    query, query_mask = left_pad(prompts, pad_id)  # (B, Q)
    response, mask = right_pad(responses, pad_id)  # (B, R)
    return torch.cat([query, response], 1), torch.cat([query_mask, mask], 1), mask


@dataclass(frozen=True)
class Samples(Rows):
    """B answers with their prompts. What it can do as a batch is in the engine's Rows."""

    tokens: Tensor  # (B, T) query, left-padded, and response, right-padded
    attention_mask: Tensor  # (B, T) bool, its response part equals mask
    response: Tensor  # (B, R)
    mask: Tensor  # (B, R) bool, True up to and with the first EOS


def answered(prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> Samples:
    """Token lists as a batch, one response to each prompt."""
    tokens, attention_mask, mask = join_query_response(prompts, responses, pad_id)
    return Samples(tokens, attention_mask, tokens[:, -mask.shape[1] :], mask)


def chunks(items, size: int) -> list:
    """Consecutive chunks of `size` items, the last one perhaps smaller; of lists and tensors."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: every index once, shuffled, rows of similar length together.

    The order depends on (seed, epoch) alone, so a resumed run sees the batches it would have seen.
    Shuffled blocks of 16 batches are sorted by length, which saves padding and keeps the batches
    random enough. The last, smaller batch is dropped, unless it is the only one.
    """
    rng = random.Random(f"{seed}/{epoch}")
    if not lengths:
        raise ValueError("there are no rows to make batches of")
    order = rng.sample(range(len(lengths)), len(lengths))
    order = order[: len(order) // batch_size * batch_size] or order
    blocks = [sorted(block, key=lengths.__getitem__) for block in chunks(order, 16 * batch_size)]
    batches = [batch for block in blocks for batch in chunks(block, batch_size)]
    return rng.sample(batches, len(batches))


def batch_plan(lengths: list[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The batch of every step of a training, through as many epochs as `steps` takes."""
    plan = []
    while len(plan) < steps:
        epoch = len(plan) // max(1, len(lengths) // batch_size)
        plan += epoch_batches(lengths, batch_size, seed, epoch)
    return plan[:steps]
