"""One phase of acting: sample answers, score them, turn the scores into advantages per token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minippo.advantages import gae, simple_advantages
from minippo.batching import Samples, left_pad
from minippo.config import PPOConfig
from minippo.engine.look import (
    answer_scores,
    response_logprobs,
    response_logprobs_and_entropy,
    response_logprobs_and_kl,
    response_values,
)
from minippo.engine.packing import to_device_of
from minippo.generation import generate
from minippo.kl import KL_ESTIMATORS
from minippo.masking import masked_mean, masked_var, masked_whiten, response_mask
from minippo.rewards import penalize_missing_eos, per_token_rewards, standardize_scores


@dataclass(frozen=True)
class Rollout(Samples):
    """What PPO learns from: B answers, and per token what the models thought of them at the time.

    Beside them the tokens, attention_mask, response and mask of Samples; every (B, R) below is 0
    where mask is False.
    """

    logprobs: Tensor  # (B, R) log pi of the policy that sampled
    ref_logprobs: Tensor  # (B, R) log pi of the reference
    values: Tensor  # (B, R) V(query, response[:t]), before token t
    kl: Tensor  # (B, R) estimate of KL(policy, ref) that the reward is charged for
    entropy: Tensor  # (B, R) of the policy's next-token distribution
    raw_scores: Tensor  # (B,) what score_fn returned
    scores: Tensor  # (B,) standardised, minus the missing-EOS penalty
    rewards: Tensor  # (B, R) -kl_coef * kl, and the score at the last token that counts
    advantages: Tensor  # (B, R) whitened, if so configured
    returns: Tensor  # (B, R) the critic's targets: unwhitened advantages + values, or R(x, y)

    def minibatches(self, size: int, generator: torch.Generator):
        """Shuffled minibatches of `size` rows, each row once."""
        order = torch.randperm(len(self.tokens), generator=generator)
        return (self.rows(indices) for indices in order.split(size))


@torch.no_grad()
def collect_rollout(
    policy, ref_policy, value_model, score_fn, prompts: list[list[int]], tokenizer,
    config: PPOConfig, *, kl_coef: float | None = None,
    score_stats: tuple[float, float] = (0.0, 1.0), seed: int = 0, step: int = 0, rows=None,
) -> Rollout:  # fmt: skip
    """Samples one answer to each prompt and computes everything PPO needs of it.

    score_fn: (tokens (B, T), attention_mask (B, T), query_length) -> scores (B,); it sees
        config.micro_batch_size answers at once, in order of their lengths (what
        comes back is in the order of the prompts); query_length is Q, padding counted
    kl_coef: the coefficient in force (config.kl_coef if None)
    score_stats: mean and std of scores on reference samples
    rows: global numbers of the prompts, which key the sampling
    Raises ValueError if score_fn returns anything but one score per answer.
    """
    # 1. Sample.
    samples = sample(policy, prompts, tokenizer, config, seed, step, rows)
    mask, response, eos_id = samples.mask, samples.response, tokenizer.eos_token_id
    # 2. What the models say, by the pass that training makes too, not by the sampler's: so the
    # ratio is 1, up to rounding, in the first minibatch.
    logprobs, entropy = response_logprobs_and_entropy(policy, samples, config.temperature)  # (B, R)
    ref_logprobs = response_logprobs(ref_policy, samples, config.temperature)  # (B, R)
    values = response_values(value_model, samples)  # (B, R)
    kl = charged_kl(policy, ref_policy, samples, logprobs, ref_logprobs, config)  # (B, R)
    # 3. Score the whole answers: standardise first, then the penalty for not ending.
    raw_scores = answer_scores(score_fn, samples).to(values.dtype)  # (B,)
    scores = standardize_scores(raw_scores, *score_stats)  # (B,)
    scores = penalize_missing_eos(scores, mask, response, eos_id, config.missing_eos_penalty)
    # 4. Rewards per token: the KL penalty at each, the score at the last that counts.
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    rewards = per_token_rewards(scores, kl, mask, kl_coef)  # (B, R)
    # 5. Advantages and returns; whitening comes after the returns.
    advantages, returns = estimate_advantages(rewards, values, mask, config)  # (B, R)
    if config.whiten_advantages and samples.token_count > 1:  # one has no variance
        advantages = masked_whiten(advantages, mask)
    return samples.with_columns(
        Rollout, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, kl=kl,
        entropy=entropy, raw_scores=raw_scores, scores=scores, rewards=rewards,
        advantages=advantages, returns=returns,
    )  # fmt: skip


def sample(policy, prompts, tokenizer, config: PPOConfig, seed=0, step=0, rows=None) -> Samples:
    """One sampled answer to each prompt. The mask comes from the EOS, never from token != pad."""
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    query, query_mask = to_device_of(policy, *left_pad(prompts, pad_id))  # (B, Q)
    response = generate(
        policy, query, query_mask, config.max_response_tokens, eos_id, pad_id, seed=seed, step=step,
        rows=rows, temperature=config.temperature,
    )  # (B, R)  # fmt: skip
    mask = response_mask(response, eos_id)  # (B, R), True up to and with the EOS
    tokens, attention_mask = torch.cat([query, response], 1), torch.cat([query_mask, mask], 1)
    samples = Samples(tokens, attention_mask, response, mask)
    return samples.with_chunk_size(config.micro_batch_size)  # rows that a model will see at once


def charged_kl(policy, ref_policy, samples: Samples, logprobs, ref_logprobs, config: PPOConfig):
    """The KL(policy, ref) that rewards are charged for, by the configured estimator: (B, R)."""
    if config.kl_estimator == "full":  # needs whole distributions, which are not kept: read again
        return response_logprobs_and_kl(policy, ref_policy, samples, config.temperature)[1]
    return KL_ESTIMATORS[config.kl_estimator](logprobs, ref_logprobs)


def estimate_advantages(rewards, values, mask, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns by the configured way; all (B, R).

    "gae" is per token. "simple" is the notes' R(x, y) - V(x): the whole reward of the answer, KL
    penalties counted in, minus the value at the prompt, the same for each of its tokens; the
    critic's target is R.
    """
    if config.advantage == "gae":
        return gae(rewards, values, mask, config.gamma, config.lam)
    total = rewards.sum(1)  # (B,) R(x, y)
    advantages = simple_advantages(total, values[:, 0])  # (B,)
    return advantages[:, None] * mask, total[:, None] * mask


def rollout_metrics(rollout: Rollout, eos_id: int) -> dict[str, Tensor]:
    """What a rollout says about the policy; device scalars under the log keys of the course."""
    mask, lengths = rollout.mask, rollout.mask.sum(1)
    kl = (rollout.logprobs - rollout.ref_logprobs).masked_fill(~mask, 0)  # k1, whatever is charged
    # Their ratio is that of the unbiased variances; with a single token both are 0, the result 1.
    error = masked_var(rollout.returns - rollout.values, mask, unbiased=False)
    spread = masked_var(rollout.returns, mask, unbiased=False)
    ended = (rollout.response == eos_id).masked_fill(~mask, False).any(1)
    return {
        "objective/scores": rollout.scores.mean(),
        "objective/raw_scores": rollout.raw_scores.mean(),
        "objective/rewards": rollout.rewards.sum(1).mean(),
        "objective/kl_per_sequence": kl.sum(1).mean(),
        "objective/kl_per_token": masked_mean(kl, mask),
        "objective/entropy": masked_mean(rollout.entropy, mask),
        "objective/response_tokens": lengths.to(kl).mean(),
        "objective/eos_rate": ended.to(kl).mean(),
        "value/explained_variance": 1 - error / spread.clamp(min=1e-8),
    }
