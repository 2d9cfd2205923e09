"""One phase of acting: sample answers, score them, turn the scores into advantages per token."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from minippo.advantages import gae, simple_advantages
from minippo.batching import left_pad, pieces
from minippo.config import PPOConfig
from minippo.devices import to_device
from minippo.distributed import gather_rows, in_lockstep, own_rows
from minippo.generation import generate
from minippo.kl import KL_ESTIMATORS
from minippo.logprobs import entropy_from_logits, gather_logprobs
from minippo.masking import masked_mean, masked_var, masked_whiten, response_mask
from minippo.models import Packed, counted_logits, counted_values, pack, row_lengths
from minippo.rewards import penalize_missing_eos, per_token_rewards, standardize_scores


@dataclass(frozen=True)
class Samples:
    """B sampled answers with their prompts."""

    tokens: Tensor  # (B, T) query, left-padded, and response, right-padded
    attention_mask: Tensor  # (B, T) bool, its response part equals mask
    response: Tensor  # (B, R)
    mask: Tensor  # (B, R) bool, True up to and with the first EOS

    @cached_property
    def lengths(self) -> Tensor:
        """(B, 2) on the CPU: tokens of each row, and those of its response that count.

        The device is asked once per rollout; parts of it take theirs along (see `rows`).
        """
        return row_lengths(self.attention_mask, self.mask)

    def rows(self, indices):
        """The same with these rows only; indices are on the CPU, where the lengths are."""
        indices = torch.arange(len(self.tokens))[indices]
        (there,) = to_device([indices], self.tokens.device)
        part = replace(self, **{f.name: getattr(self, f.name)[there] for f in fields(self)})
        return _of_lengths(self.lengths[indices], part)

    def by_length(self, size: int) -> list[tuple[Tensor, bool]]:
        """This process's rows in pieces of `size`, similar lengths together: least padding.

        returns: (indices, counts), see `in_lockstep`
        """
        order = self.lengths[:, 0].argsort(stable=True)
        return in_lockstep(pieces(order[own_rows(len(order))], size))

    def parts(self, size: int) -> tuple[list["Samples"], Tensor]:
        """This process's rows in pieces of `size`, and the place of each of them in the whole."""
        places = [indices for indices, _ in self.by_length(size)]
        (rows,) = to_device([torch.cat(places)], self.tokens.device)
        return [self.rows(indices) for indices in places], rows

    @cached_property
    def packed(self) -> Packed:
        """The rows as the models read them."""
        return pack(self.tokens, self.attention_mask, self.mask, self.lengths)


@dataclass(frozen=True)
class Rollout(Samples):
    """What PPO learns from: B answers, and per token what the models thought of them at the time.

    Everything (B, R) is 0 where mask is False.
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
    returns: Tensor  # (B, R) what the values should have been

    def minibatches(self, size: int, generator: torch.Generator):
        """Shuffled minibatches of `size` rows, each row once."""
        order = torch.randperm(len(self.tokens), generator=generator)
        return (self.rows(indices) for indices in pieces(order, size))

    def micro_batches(self, size: int):
        """Pieces of `size` rows of similar length, each with its share of the tokens.

        Token means weighted by these shares add up to the mean over the whole, whichever rows
        stand together, in whichever process.
        """
        total = int(self.lengths[:, 1].sum())
        for indices, counts in self.by_length(size):
            part = self.rows(indices)
            yield part, counts * int(part.lengths[:, 1].sum()) / total


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
    mask = samples.mask
    # 2. The models' views, from the forward pass that training uses too: the first ratio is 1.
    parts, own = samples.parts(config.micro_batch_size)
    views = [_model_views(policy, ref_policy, value_model, config, part) for part in parts]
    views = [gather_rows(torch.cat(view), own, len(mask)) for view in zip(*views, strict=True)]
    _, _, values, kl, _ = views
    # 3. Score the whole answers: standardise first, then the penalty for not ending.
    raw_scores = torch.cat([_checked_scores(score_fn, part) for part in parts])
    raw_scores = gather_rows(raw_scores.to(values.dtype), own, len(mask))
    scores, eos_id = standardize_scores(raw_scores, *score_stats), tokenizer.eos_token_id
    penalty = config.missing_eos_penalty
    scores = penalize_missing_eos(scores, mask, samples.response, eos_id, penalty)
    # 4. Rewards per token: the KL penalty at each, the score at the last that counts.
    rewards = per_token_rewards(scores, kl, mask, config.kl_coef if kl_coef is None else kl_coef)
    # 5. Advantages and returns; whitening comes after the returns.
    advantages, returns = estimate_advantages(rewards, values, mask, config)
    if config.whiten_advantages and samples.lengths[:, 1].sum() > 1:  # one has no variance
        advantages = masked_whiten(advantages, mask)
    return _of_lengths(samples.lengths, Rollout(
        samples.tokens, samples.attention_mask, samples.response, mask, *views,
        raw_scores, scores, rewards, advantages, returns,
    ))  # fmt: skip


def _of_lengths(lengths: Tensor, samples: Samples):
    """The samples, their lengths known: the device need not be asked again."""
    vars(samples)["lengths"] = lengths
    return samples


def _sample(policy, prompts, tokenizer, config: PPOConfig, seed: int, step: int, rows) -> Samples:
    device, eos_id = next(policy.parameters()).device, tokenizer.eos_token_id
    query, query_mask = to_device(left_pad(prompts, tokenizer.pad_token_id), device)
    limits = (config.max_response_tokens, eos_id, tokenizer.pad_token_id)
    own = own_rows(len(prompts))
    rows = list(range(len(prompts)) if rows is None else rows)[own]
    places, heat = (query[own], query_mask[own]), config.temperature
    response = generate(policy, *places, *limits, seed, step, rows, heat)
    response = gather_rows(response, own, len(prompts))
    mask = response_mask(response, eos_id)
    tokens, attention_mask = torch.cat([query, response], 1), torch.cat([query_mask, mask], 1)
    return Samples(tokens, attention_mask, response, mask)


def _model_views(policy, ref_policy, value_model, config: PPOConfig, samples: Samples):
    """logprobs, ref_logprobs, values, kl, entropy; each (B, R), 0 where masked."""
    packed, heat = samples.packed, config.temperature
    logits, ref_logits = counted_logits(policy, packed), counted_logits(ref_policy, packed)
    logprobs = gather_logprobs(logits, packed.targets, heat)
    ref_logprobs = gather_logprobs(ref_logits, packed.targets, heat)
    pair = (logprobs, ref_logprobs)
    if config.kl_estimator == "full":
        pair = tuple(torch.log_softmax(x / heat, -1) for x in (logits, ref_logits))
    kl, entropy = KL_ESTIMATORS[config.kl_estimator](*pair), entropy_from_logits(logits / heat)
    views = (logprobs, ref_logprobs, counted_values(value_model, packed), kl, entropy)
    return tuple(map(packed.spread, views))


def _checked_scores(score_fn, samples: Samples) -> Tensor:
    tokens, count = samples.tokens, len(samples.tokens)
    query_length = tokens.shape[1] - samples.response.shape[1]
    scores = score_fn(tokens, samples.attention_mask, query_length)
    got = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
    if got != (count,):
        message = f"score_fn must return one score per answer, a tensor of shape ({count},)"
        raise ValueError(f"{message}; got {got}")
    return scores.to(tokens.device)  # a rule may have worked on the CPU


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
        "objective/response_tokens": lengths.to(kl).mean(),
        "objective/eos_rate": ended.to(kl).mean(),
        "value/explained_variance": 1 - error / spread.clamp(min=1e-8),
    }
