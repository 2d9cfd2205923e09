"""Critic warm-up: before PPO begins the critic learns the mean reward of a prompt's answers (the notes, 2.3)."""

import torch
from torch import Tensor

from minippo.batching import Encoded, epoch_batches
from minippo.config import ValueConfig
from minippo.masking import masked_mean
from minippo.models import ValueModel, autocast
from minippo.optim import Hooks, adamw, finite_metrics, optimizer_step, set_learning_rate
from minippo.sft import join


def warmup_loss(value_model, rows: list[Encoded], targets: Tensor, pad_id: int) -> Tensor:
    """Half the squared error between V at every response token and the prompt's mean reward, token mean.

    rows: B prompts with one answer each, targets: (B,) -> ()
    Every token, not the prompt alone: PPO asks for V at each of them, and the mean is the best guess there is.
    """
    device = targets.device
    tokens, attention_mask, mask = join([r.prompt for r in rows], [r.responses[0] for r in rows], pad_id, device)
    with autocast(device):
        values = value_model(tokens, attention_mask, mask.shape[1]).float()
    return 0.5 * masked_mean((values - targets[:, None]).square(), mask)


def train_value_model(
    value_model: ValueModel,
    rows: list[Encoded],
    targets: list[float],
    config: ValueConfig,
    pad_id: int,
    seed: int = 0,
    hooks=None,
) -> list[dict[str, float]]:
    """Trains the critic in place on the mean reward `targets` of each row's prompt; returns each step's metrics."""
    hooks, history = hooks or Hooks(), []
    optimizer = adamw({"value": value_model}, {"value": config.lr})
    lengths = [len(row.prompt) + len(row.responses[0]) for row in rows]
    plan = [b for e in range(config.epochs) for b in epoch_batches(lengths, config.batch_size, seed, e)]
    device = next(value_model.parameters()).device
    first = hooks.start("value", len(plan), {"value": value_model, "optimizer": optimizer})
    for step in range(first, len(plan)):
        set_learning_rate(optimizer, step, len(plan), config.warmup_steps)
        batch, wanted = [rows[i] for i in plan[step]], [targets[i] for i in plan[step]]
        loss = warmup_loss(value_model, batch, torch.tensor(wanted, device=device), pad_id)
        loss.backward()
        norms = optimizer_step(optimizer, config.max_grad_norm)
        history.append(finite_metrics("value", step, {"loss/value": loss, **norms}))
        hooks.step("value", step, history[-1])
    return history


@torch.no_grad()
def prompt_explained_variance(value_model, rows: list[Encoded], targets: list[float], pad_id: int) -> float:
    """1 - mean squared error / variance of V(x) at the prompt, on held-out prompts: 1 is perfect, 0 is the mean."""
    device = next(value_model.parameters()).device
    tokens, attention_mask, mask = join([r.prompt for r in rows], [r.responses[0] for r in rows], pad_id, device)
    values = value_model(tokens, attention_mask, mask.shape[1])[:, 0].float().cpu()
    wanted = torch.tensor(targets)
    return float(1 - (values - wanted).square().mean() / wanted.var(unbiased=False))
