"""Supervised fine-tuning: next-token loss on the demonstrated answers, and only on them."""

from torch import Tensor

from minippo.batching import Encoded, Samples, answered
from minippo.config import SFTConfig
from minippo.engine.gradients import accumulate
from minippo.engine.look import response_logprobs
from minippo.masking import masked_mean
from minippo.optim import training_loop


def sft_loss(policy, batch: Samples) -> Tensor:
    """`lm_loss` over the response tokens: the query is read, not learned.

    returns: (), -mean log pi over the tokens that count
    """
    logprobs = response_logprobs(policy, batch)  # (B, R)
    return -masked_mean(logprobs, batch.mask)


def train_sft(
    policy, rows: list[Encoded], config: SFTConfig, *, pad_id: int, seed=0, hooks=None
) -> list[dict[str, float]]:
    """Trains the policy in place on (prompt, answer) rows; returns the metrics of each step.

    Raises ValueError if a row is longer than the model's context.
    """

    def loss_of(batch):
        loss = sft_loss(policy, batch)
        return loss, {"loss/lm": loss}

    def gradients(indices):
        chosen = [rows[i] for i in indices]
        batch = answered([row.prompt for row in chosen], [r.responses[0] for r in chosen], pad_id)
        return accumulate(loss_of, batch.to_device_of(policy), config.micro_batch_size)

    models, lengths = {"policy": policy}, [row.length for row in rows]
    return training_loop("sft", models, lengths, gradients, config, seed=seed, hooks=hooks)
