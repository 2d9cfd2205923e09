"""The reward model's training on rankings of K answers, each answer read once."""

import torch
from torch import Tensor

from minippo.batching import Encoded, left_pad, right_pad
from minippo.config import RewardConfig
from minippo.devices import to_device
from minippo.distributed import gather_dict, in_lockstep, own_rows, world
from minippo.losses import preference_loss, ranking_loss
from minippo.models import RewardModel
from minippo.optim import training_loop
from minippo.preferences import ranked_batches


def score_responses(reward_model, rows: list[Encoded], pad_id: int) -> Tensor:
    """Scores (B, K) of K responses to each of B prompts, each read once.

    The K(K-1)/2 pairs of a prompt are differences of K scores: K forwards, not K(K-1).
    """
    if len({len(row.responses) for row in rows}) > 1:
        raise ValueError("rows of different K share a batch; batch rows of equal K together")
    device = next(reward_model.parameters()).device
    queries = left_pad([row.prompt for row in rows], pad_id)
    responses = right_pad([response for row in rows for response in row.responses], pad_id)
    return reward_model.score_candidates(*to_device((*queries, *responses), device))


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
    """Trains in place on rows whose responses are ordered best first; K may differ.

    margins: the score gap of each row's two responses, for the loss with a margin
    returns: the metrics of each step
    Raises ValueError if a row is longer than the model's context.
    """

    def gradients(indices):
        sums = {"loss/reward": 0.0, "reward/accuracy": 0.0}
        own = indices[own_rows(len(indices))]
        sizes = [len(rows[i].responses) for i in own]
        for places, counts in in_lockstep(ranked_batches(sizes, config.micro_batch_size)):
            piece = [own[place] for place in places]
            scores = score_responses(reward_model, [rows[i] for i in piece], pad_id)
            gaps = None
            if margins:
                (gaps,) = to_device([torch.tensor([margins[i] for i in piece])], scores.device)
            share = counts * len(piece) / len(indices)
            loss = reward_loss(scores, gaps) * share
            loss.backward()
            sums["loss/reward"] += loss.detach()
            sums["reward/accuracy"] += pair_accuracy(scores.detach()) * share
        return sums

    models, lengths = {"reward": reward_model}, [row.length for row in rows]
    return training_loop("reward", models, lengths, gradients, config, seed, hooks)


def pair_accuracy(scores: Tensor) -> Tensor:
    """Share of the pairs of (B, K) scores, best first, in the right order; a tie is wrong. ()."""
    size, device = scores.shape[1], scores.device
    better, worse = torch.triu_indices(size, size, offset=1, device=device)
    return (scores[:, better] > scores[:, worse]).to(torch.get_default_dtype()).mean()


@torch.no_grad()
def score_all(
    reward_model, rows: list[Encoded], pad_id: int, batch_size: int = 128, on_batch=None
) -> list[list[float]]:
    """Scores of every response of every row; rows of similar length share a batch.

    batch_size: responses in the model at once
    on_batch: called with the number of rows done
    """
    scores: dict[int, list[float]] = {}
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)[own_rows(len(rows))]
    sizes = [len(rows[i].responses) for i in order]
    parts = ranked_batches(sizes, max(1, batch_size // max(sizes, default=1)))
    for places, _ in in_lockstep(parts):
        piece = [order[place] for place in places]
        batch = score_responses(reward_model, [rows[i] for i in piece], pad_id)
        for row, values in zip(piece, batch.tolist(), strict=True):
            scores[row] = values
        if on_batch:
            on_batch(len(piece) * world())
    scores = gather_dict(scores)
    return [scores[row] for row in range(len(rows))]


def standardise_on(reward_model: RewardModel, scores: list[list[float]]) -> None:
    """Remembers mean and std of the scores of reference samples: Bradley-Terry leaves both open.

    Raises ValueError if the scores do not differ, or are not finite: nothing could be divided by.
    """
    flat = torch.tensor([value for row in scores for value in row])
    low, high = float(flat.min()), float(flat.max())
    if not 0 < high - low < float("inf"):
        message = f"{len(flat)} reference scores from {low} to {high} give no standard deviation"
        raise ValueError(f"{message}; take more samples, or a reward model that tells them apart")
    reward_model.mean, reward_model.std = float(flat.mean()), float(flat.std())
