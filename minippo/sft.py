"""Supervised fine-tuning: next-token loss on the demonstrated answers, and only on them."""

import torch

from minippo.batching import Encoded, batch_plan, check_context, left_pad, right_pad
from minippo.config import SFTConfig
from minippo.losses import lm_loss
from minippo.models import autocast, position_ids
from minippo.optim import Hooks, adamw, finite_metrics, optimizer_step, set_learning_rate


def join(prompts: list[list[int]], responses: list[list[int]], pad_id: int, device=None):
    """[query | response] with the paddings of the contract.

    returns: tokens (B, T), attention_mask (B, T), response mask (B, R)
    """
    query, query_mask = left_pad(prompts, pad_id)
    response, mask = right_pad(responses, pad_id)
    joined = torch.cat([query, response], 1), torch.cat([query_mask, mask], 1), mask
    return tuple(x.to(device, non_blocking=True) for x in joined)


def sft_loss(policy, tokens, attention_mask, mask):
    """lm_loss over the response tokens; the query is read, not learned.

    tokens, attention_mask: (B, T), mask: (B, R) -> ()
    """
    kept = mask.shape[1] + 1  # the response and the token before it, which predicts its first token
    with autocast(tokens.device):
        logits = policy(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
            logits_to_keep=kept,
        ).logits.float()
    loss_mask = torch.nn.functional.pad(mask, (1, 0), value=False)
    return lm_loss(logits, tokens[:, -kept:], loss_mask)


def train_sft(policy, rows: list[Encoded], config: SFTConfig, pad_id: int, seed=0, hooks=None):
    """Trains the policy in place on (prompt, answer) rows; returns the metrics of each step."""
    check_context(policy, config.max_prompt_tokens, config.max_response_tokens)
    hooks, history = hooks or Hooks(), []
    optimizer = adamw({"policy": policy}, {"policy": config.lr})
    lengths = [len(row.prompt) + len(row.responses[0]) for row in rows]
    plan = batch_plan(lengths, config.batch_size, config.steps, seed)
    first = hooks.start("sft", config.steps, {"policy": policy, "optimizer": optimizer})
    for step in range(first, config.steps):
        set_learning_rate(optimizer, step, config.steps, config.warmup_steps)
        batch = [rows[i] for i in plan[step]]
        loss = accumulate_sft(policy, batch, config.micro_batch_size, pad_id)
        norms = optimizer_step(optimizer, config.max_grad_norm)
        history.append(finite_metrics("sft", step, {"loss/lm": loss, **norms}))
        hooks.step("sft", step, history[-1])
    return history


def accumulate_sft(policy, batch: list[Encoded], micro_batch_size: int, pad_id: int):
    """Gradients of the token mean over the whole batch, computed in micro-batches; returns the loss."""
    device = next(policy.parameters()).device
    total, loss = sum(len(row.responses[0]) for row in batch), 0.0
    for start in range(0, len(batch), micro_batch_size):
        piece = batch[start : start + micro_batch_size]
        tensors = join([r.prompt for r in piece], [r.responses[0] for r in piece], pad_id, device)
        share = sum(len(r.responses[0]) for r in piece) / total
        part = sft_loss(policy, *tensors) * share
        part.backward()
        loss = loss + part.detach()
    return loss
