"""The reward model's training on rankings of K answers, each answer read once."""

import torch
from torch import Tensor

from minippo.batching import Encoded, left_pad, right_pad
from minippo.config import RewardConfig
from minippo.engine.gradients import accumulate_rows
from minippo.engine.look import shared
from minippo.engine.packing import to_device_of
from minippo.losses import preference_loss, ranking_loss
from minippo.models import RewardModel
from minippo.optim import training_loop
from minippo.preferences import ranked_batches


def score_responses(reward_model, rows: list[Encoded], pad_id: int) -> Tensor:
    """Scores (B, K) of K responses to each of B prompts, each read once.

    The K(K-1)/2 pairs of a prompt are differences of K scores: K forwards, not K(K-1).
    """
    return reward_model.score_candidates(*to_device_of(reward_model, *candidates(rows, pad_id)))


def candidates(rows: list[Encoded], pad_id: int) -> list[Tensor]:
    """Rows of equal K as tensors: query and its mask (B, Q), responses and their mask (B, K, R)."""
    if len({len(row.responses) for row in rows}) > 1:
        raise ValueError("rows of different K share a batch; batch rows of equal K together")
    queries = left_pad([row.prompt for row in rows], pad_id)  # (B, Q)
    responses = right_pad([x for row in rows for x in row.responses], pad_id)  # (B * K, R)
    return [*queries, *(x.unflatten(0, (len(rows), -1)) for x in responses)]  # (B, K, R)


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
    reward_model: RewardModel, rows: list[Encoded], config: RewardConfig, *, pad_id: int,
    margins: list[float] | None = None, seed=0, hooks=None,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains in place on rows whose responses are ordered best first; K may differ.

    margins: the score gap of each row's two responses, for the loss with a margin
    returns: the metrics of each step
    Raises ValueError if a row is longer than the model's context.
    """

    def loss_of(indices):
        scores = score_responses(reward_model, [rows[i] for i in indices], pad_id)  # (B, K)
        gaps = [torch.tensor([margins[i] for i in indices])] if margins else []  # (B,)
        loss = reward_loss(scores, *to_device_of(reward_model, *gaps))
        return loss, {"loss/reward": loss, "reward/accuracy": pair_accuracy(scores.detach())}

    def gradients(indices):
        return accumulate_rows(loss_of, indices, equal_k(rows, config.micro_batch_size))

    models, lengths = {"reward": reward_model}, [row.length for row in rows]
    return training_loop("reward", models, lengths, gradients, config, seed=seed, hooks=hooks)


def pair_accuracy(scores: Tensor) -> Tensor:
    """Share of the pairs of (B, K) scores, best first, in the right order; a tie is wrong. ()."""
    size, device = scores.shape[1], scores.device
    better, worse = torch.triu_indices(size, size, offset=1, device=device)
    return (scores[:, better] > scores[:, worse]).to(torch.get_default_dtype()).mean()


def equal_k(rows: list[Encoded], size: int):
    """A function that cuts indices of rows into batches of `size` rows of equal K."""

    def cut(indices: list[int]) -> list[list[int]]:
        batches = ranked_batches([len(rows[i].responses) for i in indices], size)
        return [[indices[i] for i in batch] for batch in batches]

    return cut


@torch.no_grad()
def score_all(
    reward_model, rows: list[Encoded], pad_id: int, batch_size: int = 128, on_batch=None
) -> list[list[float]]:
    """Scores of every response of every row; rows of similar length share a batch.

    batch_size: responses in the model at once, of all processes together
    on_batch: called with the number of rows done
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    most = max((len(row.responses) for row in rows), default=1)
    scores: dict[int, list[float]] = {}
    for batch in equal_k(rows, max(1, batch_size // most))(order):
        padded = candidates([rows[i] for i in batch], pad_id)
        found = shared(reward_model, reward_model.score_candidates, *padded)  # (B, K)
        scores |= zip(batch, found.tolist(), strict=True)
        if on_batch:
            on_batch(len(batch))
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
