"""Supervised fine-tuning: next-token loss on the demonstrated answers, and only on them."""

import torch

from minippo.batching import Encoded, left_pad, pieces, right_pad
from minippo.config import SFTConfig
from minippo.devices import to_device
from minippo.distributed import in_lockstep, own_rows
from minippo.logprobs import gather_logprobs
from minippo.models import counted_logits, pack
from minippo.optim import training_loop


def join(prompts: list[list[int]], responses: list[list[int]], pad_id: int, device=None):
    """[query | response] with the paddings of the contract.

    returns: tokens (B, T), attention_mask (B, T), response mask (B, R)
    """
    query, query_mask = left_pad(prompts, pad_id)
    response, mask = right_pad(responses, pad_id)
    joined = torch.cat([query, response], 1), torch.cat([query_mask, mask], 1), mask
    return to_device(joined, device)


def sft_loss(policy, tokens, attention_mask, mask):
    """lm_loss over the response tokens; the query is read, not learned.

    tokens, attention_mask: (B, T)
    mask: (B, R)
    returns: (), -mean log pi over the tokens that count
    """
    packed = pack(tokens, attention_mask, mask).to(next(policy.parameters()).device)
    return -gather_logprobs(counted_logits(policy, packed), packed.targets).mean()


def train_sft(policy, rows: list[Encoded], config: SFTConfig, pad_id: int, seed=0, hooks=None):
    """Trains the policy in place on (prompt, answer) rows; returns the metrics of each step.

    Raises ValueError if a row is longer than the model's context.
    """

    def gradients(indices):
        batch = [rows[i] for i in indices]
        return {"loss/lm": accumulate_sft(policy, batch, config.micro_batch_size, pad_id)}

    lengths = [row.length for row in rows]
    return training_loop("sft", {"policy": policy}, lengths, gradients, config, seed, hooks)


def accumulate_sft(policy, batch: list[Encoded], micro_batch_size: int, pad_id: int):
    """Gradients of the token mean over the whole batch, in micro-batches; returns the loss ().

    Of several processes each leaves its share: they add up to the mean.
    """
    total, loss = sum(len(row.responses[0]) for row in batch), 0.0
    own = sorted(batch, key=lambda row: row.length)[own_rows(len(batch))]
    for piece, counts in in_lockstep(pieces(own, micro_batch_size)):
        tensors = join([r.prompt for r in piece], [r.responses[0] for r in piece], pad_id)
        share = counts * sum(len(r.responses[0]) for r in piece) / total
        part = sft_loss(policy, *tensors) * share
        part.backward()
        loss = loss + part.detach()
    return loss
