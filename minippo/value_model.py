"""Critic warm-up: before PPO, learn the mean reward of a prompt's answers (the notes, 2.3)."""

import torch
from torch import Tensor

from minippo.batching import Encoded
from minippo.config import ValueConfig
from minippo.devices import to_device
from minippo.distributed import own_rows
from minippo.masking import masked_mean
from minippo.models import ValueModel, counted_values, pack
from minippo.optim import training_loop
from minippo.sft import join


def _values(value_model, rows: list[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """values and mask, both (B, R), along the first answer of each row."""
    device = next(value_model.parameters()).device
    prompts, responses = [row.prompt for row in rows], [row.responses[0] for row in rows]
    tokens, attention_mask, mask = join(prompts, responses, pad_id)
    packed = pack(tokens, attention_mask, mask).to(device)
    return packed.spread(counted_values(value_model, packed)), *to_device([mask], device)


def warmup_loss(value_model, rows: list[Encoded], targets: Tensor, pad_id: int) -> Tensor:
    """Half the squared error between V at every response token and the prompt's mean reward.

    Every token, not the prompt alone: PPO asks for V at each, and the mean is the best guess there.
    rows: B prompts with one answer each
    targets: (B,)
    returns: (), the token mean
    """
    values, mask = _values(value_model, rows, pad_id)
    return 0.5 * masked_mean((values - targets[:, None]).square(), mask)


def train_value_model(
    value_model: ValueModel, rows: list[Encoded], targets: list[float], config: ValueConfig,
    pad_id: int, seed: int = 0, hooks=None,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains the critic in place; returns the metrics of each step.

    rows: prompts with one answer each
    targets: the mean reward of each row's prompt
    Raises ValueError if a row is longer than the model's context.
    """
    device = next(value_model.parameters()).device
    counted = [len(row.responses[0]) for row in rows]

    def gradients(indices):
        own = indices[own_rows(len(indices))]
        (wanted,) = to_device([torch.tensor([targets[i] for i in own])], device)
        share = sum(counted[i] for i in own) / sum(counted[i] for i in indices)
        loss = warmup_loss(value_model, [rows[i] for i in own], wanted, pad_id) * share
        loss.backward()
        return {"loss/value": loss}

    models, lengths = {"value": value_model}, [row.length for row in rows]
    return training_loop("value", models, lengths, gradients, config, seed, hooks)


@torch.no_grad()
def prompt_explained_variance(
    value_model, rows: list[Encoded], targets: list[float], pad_id: int
) -> float:
    """1 - mean squared error / variance of V(x) on held-out prompts: 1 is perfect, 0 the mean.

    Raises ValueError if the targets do not differ: there is nothing to explain.
    """
    if len(set(targets)) < 2:
        message = f"the mean rewards of {len(targets)} held-out prompts do not differ"
        raise ValueError(f"{message}, so no variance is there to explain; hold out more prompts")
    values, _ = _values(value_model, rows, pad_id)
    wanted = torch.tensor(targets)
    errors = values[:, 0].cpu() - wanted
    return float(1 - errors.square().mean() / wanted.var(unbiased=False))
