"""The reward model's training on rankings of K answers, each answer read once."""

import torch
from torch import Tensor

from minippo.batching import Encoded, check_context, epoch_batches, pieces
from minippo.config import RewardConfig
from minippo.losses import preference_loss, ranking_loss
from minippo.models import RewardModel, autocast
from minippo.optim import training_loop
from minippo.sft import join


def score_responses(reward_model, rows: list[Encoded], pad_id: int) -> Tensor:
    """Scores (B, K) of K responses to each of B prompts, each read once: K forwards, not K(K-1)."""
    device = next(reward_model.parameters()).device
    prompts = [row.prompt for row in rows for _ in row.responses]
    responses = [response for row in rows for response in row.responses]
    tokens, attention_mask, _ = join(prompts, responses, pad_id, device)
    with autocast(tokens.device):
        scores = reward_model(tokens, attention_mask).float()
    if len({len(r.responses) for r in rows}) > 1:
        raise ValueError("rows of different K share a batch; batch rows of equal K together")
    return scores.view(len(rows), -1)


def reward_loss(scores: Tensor, margins: Tensor | None = None) -> Tensor:
    """ranking_loss of (B, K) scores, best first; with margins (B,), K = 2, the loss with a margin.

    returns: ()
    """
    if margins is None:
        return ranking_loss(scores)
    if scores.shape[1] != 2:
        raise ValueError("a margin belongs to a pair; margins need rows of two responses")
    return preference_loss(scores[:, 0], scores[:, 1], margins)


def train_reward_model(
    reward_model: RewardModel, rows: list[Encoded], config: RewardConfig, pad_id: int,
    margins: list[float] | None = None, seed: int = 0, hooks=None,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains in place on rows whose responses are ordered best first.

    margins: the score gap of each row's two responses, for the loss with a margin
    returns: the metrics of each step
    """
    check_context(reward_model, config.max_prompt_tokens, config.max_response_tokens)

    def gradients(indices):
        sums = {"loss/reward": 0.0, "reward/accuracy": 0.0}
        for piece in pieces(indices, config.micro_batch_size):
            scores = score_responses(reward_model, [rows[i] for i in piece], pad_id)
            gaps = scores.new_tensor([margins[i] for i in piece]) if margins else None
            share = len(piece) / len(indices)
            loss = reward_loss(scores, gaps) * share
            loss.backward()
            sums["loss/reward"] += loss.detach()
            sums["reward/accuracy"] += pair_accuracy(scores.detach()) * share
        return sums

    lengths, epochs = [row.length for row in rows], range(config.epochs)
    plan = [b for e in epochs for b in epoch_batches(lengths, config.batch_size, seed, e)]
    return training_loop("reward", {"reward": reward_model}, plan, gradients, config, hooks)


def pair_accuracy(scores: Tensor) -> Tensor:
    """Share of the pairs of (B, K) scores, best first, in the right order; a tie is wrong. ()."""
    size, device = scores.shape[1], scores.device
    better, worse = torch.triu_indices(size, size, offset=1, device=device)
    return (scores[:, better] > scores[:, worse]).float().mean()


@torch.no_grad()
def score_all(
    reward_model, rows: list[Encoded], pad_id: int, batch_size: int = 64, on_batch=None
) -> list[list[float]]:
    """Scores of every response of every row; rows of similar length share a batch.

    on_batch: called with the number of rows done
    """
    scores: list[list[float]] = [[] for _ in rows]
    for piece in pieces(sorted(range(len(rows)), key=lambda i: rows[i].length), batch_size):
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
