"""One phase of acting: sample answers, score them, turn the scores into advantages per token."""

from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from minippo.advantages import gae, simple_advantages
from minippo.batching import left_pad, pieces
from minippo.config import PPOConfig
from minippo.generation import generate
from minippo.kl import KL_ESTIMATORS
from minippo.logprobs import entropy_from_logits, gather_logprobs
from minippo.masking import masked_mean, masked_var, masked_whiten, response_mask
from minippo.models import response_logits
from minippo.rewards import penalize_missing_eos, per_token_rewards, standardize_scores


@dataclass(frozen=True)
class Rollout:
    """What PPO learns from: B answers, and per token what the models thought of them at the time.

    Everything (B, R) is 0 where mask is False.
    """

    tokens: Tensor  # (B, T) query, left-padded, and response, right-padded
    attention_mask: Tensor  # (B, T) bool, its response part equals mask
    response: Tensor  # (B, R)
    mask: Tensor  # (B, R) bool, True up to and with the first EOS
    logprobs: Tensor  # (B, R) log pi of the policy that sampled
    ref_logprobs: Tensor  # (B, R) log pi of the reference
    values: Tensor  # (B, R) V(query, response[:t]), before token t
    kl: Tensor  # (B, R) estimate of KL(policy, ref) that the reward is charged for
    entropy: Tensor  # (B, R) of the policy's next-token distribution
    raw_scores: Tensor  # (B,) what score_fn returned
    scores: Tensor  # (B,) standardised, minus the missing-EOS penalty
    rewards: Tensor  # (B, R) -kl_coef * kl, and the score at the last token that counts
    advantages: Tensor  # (B, R) whitened, if so configured
    returns: Tensor  # (B, R) what the values should have been

    def rows(self, indices: Tensor) -> "Rollout":
        """The same rollout with these rows only."""
        return replace(self, **{f.name: getattr(self, f.name)[indices] for f in fields(self)})

    def minibatches(self, size: int, generator: torch.Generator):
        """Shuffled minibatches of `size` rows, each row once."""
        order = torch.randperm(len(self.tokens), generator=generator).to(self.tokens.device)
        return (self.rows(indices) for indices in pieces(order, size))

    def micro_batches(self, size: int):
        """Consecutive pieces of `size` rows, each with its share of the tokens.

        Token means weighted by these shares add up to the mean over the whole.
        """
        total = self.mask.sum()
        for start in range(0, len(self.tokens), size):
            part = self.rows(slice(start, start + size))
            yield part, part.mask.sum() / total


@torch.no_grad()
def collect_rollout(
    policy, ref_policy, value_model, score_fn, prompts: list[list[int]], tokenizer,
    config: PPOConfig, *, kl_coef: float | None = None,
    score_stats: tuple[float, float] = (0.0, 1.0), seed: int = 0, step: int = 0, rows=None,
) -> Rollout:  # fmt: skip
    """Samples one answer to each prompt and computes everything PPO needs of it.

    score_fn: (tokens (B, T), attention_mask (B, T), query_length) -> scores (B,); it sees
        config.micro_batch_size answers at once
    kl_coef: the coefficient in force (config.kl_coef if None)
    score_stats: mean and std of scores on reference samples
    rows: global numbers of the prompts, which key the sampling
    Raises ValueError if score_fn returns anything but one score per answer.
    """
    # 1. Sample. The mask comes from the position of EOS, never from token != pad.
    samples = _sample(policy, prompts, tokenizer, config, seed, step, rows)
    tokens, attention_mask, response, mask = samples
    # 2. The models' views, from the forward pass that training uses too: the first ratio is 1.
    view = partial(_model_views, policy, ref_policy, value_model, config)
    parts = [tensor.split(config.micro_batch_size) for tensor in samples]
    views = map(view, *parts)
    logprobs, ref_logprobs, values, kl, entropy = map(torch.cat, zip(*views, strict=True))
    # 3. Score the whole answers: standardise first, then the penalty for not ending.
    query_length, eos_id = tokens.shape[1] - response.shape[1], tokenizer.eos_token_id
    score = partial(_checked_scores, score_fn, query_length)
    raw_scores = torch.cat(list(map(score, *parts[:2])))
    scores = standardize_scores(raw_scores, *score_stats)
    scores = penalize_missing_eos(scores, mask, response, eos_id, config.missing_eos_penalty)
    # 4. Rewards per token: the KL penalty at each, the score at the last that counts.
    rewards = per_token_rewards(scores, kl, mask, config.kl_coef if kl_coef is None else kl_coef)
    # 5. Advantages and returns; whitening comes after the returns.
    advantages, returns = estimate_advantages(rewards, values, mask, config)
    if config.whiten_advantages and mask.sum() > 1:  # a single token has no variance
        advantages = masked_whiten(advantages, mask)
    return Rollout(
        *samples, logprobs, ref_logprobs, values, kl, entropy,
        raw_scores, scores, rewards, advantages, returns,
    )  # fmt: skip


def _sample(policy, prompts, tokenizer, config: PPOConfig, seed: int, step: int, rows):
    """tokens (B, T), attention_mask (B, T), response (B, R), mask (B, R)."""
    device, eos_id = next(policy.parameters()).device, tokenizer.eos_token_id
    query, query_mask = (x.to(device) for x in left_pad(prompts, tokenizer.pad_token_id))
    limits = (config.max_response_tokens, eos_id, tokenizer.pad_token_id)
    response = generate(policy, query, query_mask, *limits, seed, step, rows, config.temperature)
    mask = response_mask(response, eos_id)
    return torch.cat([query, response], 1), torch.cat([query_mask, mask], 1), response, mask


def _model_views(policy, ref_policy, value_model, config, tokens, attention_mask, response, mask):
    """logprobs, ref_logprobs, values, kl, entropy; each (B, R), 0 where masked."""
    length, heat = response.shape[1], config.temperature
    logits = response_logits(policy, tokens, attention_mask, length)
    ref_logits = response_logits(ref_policy, tokens, attention_mask, length)
    values = value_model(tokens, attention_mask, length)
    logprobs = gather_logprobs(logits, response, heat)
    ref_logprobs = gather_logprobs(ref_logits, response, heat)
    pair = (logprobs, ref_logprobs)
    if config.kl_estimator == "full":
        pair = tuple(torch.log_softmax(x / heat, -1) for x in (logits, ref_logits))
    kl = KL_ESTIMATORS[config.kl_estimator](*pair)
    views = (logprobs, ref_logprobs, values, kl, entropy_from_logits(logits / heat))
    return tuple(view.masked_fill(~mask, 0) for view in views)


def _checked_scores(score_fn, query_length: int, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    scores, count = score_fn(tokens, attention_mask, query_length), len(tokens)
    got = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
    if got != (count,):
        message = f"score_fn must return one score per answer, a tensor of shape ({count},)"
        raise ValueError(f"{message}; got {got}")
    return scores.to(tokens.device, torch.float32)  # a rule may have worked on the CPU


def estimate_advantages(rewards, values, mask, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns by the configured way; all (B, R).

    "gae" is per token. "simple" is the notes' R(x, y) - V(x): the whole reward of the answer, KL
    penalties counted in, minus the value at the prompt, the same for each of its tokens; the
    critic's target is R.
    """
    if config.advantage == "gae":
        return gae(rewards, values, mask, config.gamma, config.lam)
    total = rewards.sum(1)  # R(x, y)
    advantages = simple_advantages(total, values[:, 0])
    return advantages[:, None] * mask, total[:, None] * mask


def rollout_metrics(rollout: Rollout, eos_id: int) -> dict[str, Tensor]:
    """What a rollout says about the policy; device scalars under the log keys of the course."""
    mask, lengths = rollout.mask, rollout.mask.sum(1)
    kl = (rollout.logprobs - rollout.ref_logprobs).masked_fill(~mask, 0)  # k1, whatever is charged
    # Their ratio is that of the unbiased variances, and is defined for a single token: 1.
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
        "objective/response_tokens": lengths.float().mean(),
        "objective/eos_rate": ended.float().mean(),
        "value/explained_variance": 1 - error / spread.clamp(min=1e-8),
    }
