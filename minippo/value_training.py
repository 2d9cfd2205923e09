"""Critic warm-up: before PPO, learn the mean reward of a prompt's answers (the notes, 2.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minippo.batching import Encoded, Samples, answered
from minippo.config import ValueConfig
from minippo.engine.gradients import accumulate
from minippo.engine.look import response_values
from minippo.masking import masked_mean
from minippo.models import ValueModel
from minippo.optim import training_loop


@dataclass(frozen=True)
class Judged(Samples):
    """One answer to each prompt, and what answers to that prompt are worth."""

    targets: Tensor  # (B,) the mean reward of the prompt's answers


def judged(rows: list[Encoded], targets: list[float], pad_id: int) -> Judged:
    """The first answer of each row with the target of its prompt."""
    batch = answered([row.prompt for row in rows], [row.responses[0] for row in rows], pad_id)
    return batch.with_columns(Judged, targets=torch.tensor(targets))


def warmup_loss(value_model, batch: Judged) -> Tensor:
    """Half the squared error between V at every response token and the prompt's mean reward.

    Every token, not the prompt alone: PPO asks for V at each, and the mean is the best guess there.
    returns: (), the token mean
    """
    values = response_values(value_model, batch)  # (B, R)
    errors = values - batch.targets[:, None]  # (B, R)
    return 0.5 * masked_mean(errors.square(), batch.mask)


def train_value_model(
    value_model: ValueModel, rows: list[Encoded], targets: list[float], config: ValueConfig, *,
    pad_id: int, seed=0, hooks=None,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains the critic in place; returns the metrics of each step.

    rows: prompts with one answer each
    targets: the mean reward of each row's prompt
    Raises ValueError if a row is longer than the model's context.
    """

    def loss_of(batch):
        loss = warmup_loss(value_model, batch)
        return loss, {"loss/value": loss}

    def gradients(indices):
        batch = judged([rows[i] for i in indices], [targets[i] for i in indices], pad_id)
        return accumulate(loss_of, batch.to_device_of(value_model), config.batch_size)

    models, lengths = {"value": value_model}, [row.length for row in rows]
    return training_loop("value", models, lengths, gradients, config, seed=seed, hooks=hooks)


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
    batch = judged(rows, targets, pad_id).to_device_of(value_model)
    errors = response_values(value_model, batch)[:, 0] - batch.targets  # (B,)
    return float(1 - errors.square().mean() / batch.targets.var(unbiased=False))
