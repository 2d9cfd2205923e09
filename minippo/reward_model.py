"""The reward model's training: rankings of K answers, all pairs of a prompt in one batch, each answer read once."""

import torch
from torch import Tensor

from minippo.batching import Encoded, check_context, epoch_batches
from minippo.config import RewardConfig
from minippo.losses import preference_loss, ranking_loss
from minippo.models import RewardModel, autocast
from minippo.optim import Hooks, adamw, finite_metrics, optimizer_step, set_learning_rate
from minippo.sft import join


def score_responses(reward_model, rows: list[Encoded], pad_id: int) -> Tensor:
    """Scores (B, K) of K responses to each of B prompts, each read once: K forwards, not K(K-1)."""
    device = next(reward_model.parameters()).device
    prompts = [row.prompt for row in rows for _ in row.responses]
    responses = [response for row in rows for response in row.responses]
    tokens, attention_mask, _ = join(prompts, responses, pad_id, device)
    with autocast(tokens.device):
        scores = reward_model(tokens, attention_mask).float()
    return scores.view(len(rows), -1)


def reward_loss(scores: Tensor, margins: Tensor | None = None) -> Tensor:
    """ranking_loss of (B, K) scores, best first; with margins (B,), K = 2, the pairwise loss with a margin."""
    return ranking_loss(scores) if margins is None else preference_loss(scores[:, 0], scores[:, 1], margins)


def train_reward_model(
    reward_model: RewardModel,
    rows: list[Encoded],
    config: RewardConfig,
    pad_id: int,
    margins: list[float] | None = None,
    seed: int = 0,
    hooks=None,
) -> list[dict[str, float]]:
    """Trains in place on rows whose responses are ordered best first; returns the metrics of each step."""
    check_context(reward_model, config.max_prompt_tokens, config.max_response_tokens)
    hooks, history = hooks or Hooks(), []
    optimizer = adamw({"reward": reward_model}, {"reward": config.lr})
    lengths = [len(row.prompt) + max(map(len, row.responses)) for row in rows]
    plan = [b for e in range(config.epochs) for b in epoch_batches(lengths, config.batch_size, seed, e)]
    first = hooks.start("reward", len(plan), {"reward": reward_model, "optimizer": optimizer})
    for step in range(first, len(plan)):
        set_learning_rate(optimizer, step, len(plan), config.warmup_steps)
        sums = {"loss/reward": 0.0, "reward/accuracy": 0.0}
        for start in range(0, len(plan[step]), config.micro_batch_size):
            piece = plan[step][start : start + config.micro_batch_size]
            scores = score_responses(reward_model, [rows[i] for i in piece], pad_id)
            gaps = torch.tensor([margins[i] for i in piece], device=scores.device) if margins else None
            share = len(piece) / len(plan[step])
            loss = reward_loss(scores, gaps) * share
            loss.backward()
            sums["loss/reward"] += loss.detach()
            sums["reward/accuracy"] += pair_accuracy(scores.detach()) * share
        norms = optimizer_step(optimizer, config.max_grad_norm)
        history.append(finite_metrics("reward", step, {**sums, **norms}))
        hooks.step("reward", step, history[-1])
    return history


def pair_accuracy(scores: Tensor) -> Tensor:
    """Share of the pairs of (B, K) scores, best first, in the right order; a tie is wrong. Returns ()."""
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    return (scores[:, better] > scores[:, worse]).float().mean()


@torch.no_grad()
def score_all(reward_model, rows: list[Encoded], pad_id: int, batch_size: int = 64, on_batch=None) -> list[list[float]]:
    """Scores of every response of every row, in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + max(map(len, rows[i].responses)))
    scores: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(order), batch_size):
        piece = order[start : start + batch_size]
        batch = score_responses(reward_model, [rows[i] for i in piece], pad_id)
        for row, values in zip(piece, batch.tolist(), strict=True):
            scores[row] = values
        if on_batch:
            on_batch(len(piece))
    return scores


def standardise_on(reward_model: RewardModel, scores: list[list[float]]) -> None:
    """Remembers mean and std of the scores of reference samples: Bradley-Terry leaves both open."""
    flat = torch.tensor([value for row in scores for value in row])
    reward_model.mean, reward_model.std = float(flat.mean()), float(flat.std())
