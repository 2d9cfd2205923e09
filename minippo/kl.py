"""How far the policy is from the reference: five estimators and the adaptive coefficient.

The estimators work token by token and take no mask: fill masked log-probabilities with 0 before
(both then agree, and the estimate is 0 there) and reduce with `masked_mean` after. Which one
optimises what depends on where it stands: k1 belongs in the reward, k2 or the full sum in a loss.
"""

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The log-ratio at the sampled token: unbiased for KL(policy, ref), may be < 0.

    k1 = log π(a) − log π_ref(a),   a ~ π,   E[k1] = KL(π, π_ref)

    logprobs:     (B, R)  log π of the sampled token
    ref_logprobs: (B, R)  log π_ref of the same token
    returns: (B, R)
    Source: Ziegler et al. 2019, arXiv:1909.08593 section 2; "k1" after Schulman 2020,
        joschu.net/blog/kl-approx.html; "kl" in early TRL. OpenRLHF clamps it to ±10, which breaks
        the expectation; we clamp nothing.
    """
    return logprobs - ref_logprobs


def kl_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The absolute log-ratio at the sampled token: estimates no divergence.

    abs = |log π(a) − log π_ref(a)|

    logprobs:     (B, R)  log π of the sampled token
    ref_logprobs: (B, R)  log π_ref of the same token
    returns: (B, R), never negative
    Source: the penalty "abs" of early TRL and verl. It overstates the KL: E|k1| ≥ |E k1|.
    """
    return (logprobs - ref_logprobs).abs()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio: low variance, biased as a value.

    k2 = ½ (log π(a) − log π_ref(a))²

    logprobs:     (B, R)  log π of the sampled token
    ref_logprobs: (B, R)  log π_ref of the same token
    returns: (B, R), never negative
    Source: Schulman 2020, joschu.net/blog/kl-approx.html; "mse" in early TRL and verl. As a loss on
        samples of π its expected gradient is that of KL(π, π_ref).
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The log-ratio plus a control variate: unbiased as a value and never negative.

    k3 = (ρ − 1) − log ρ,   log ρ = log π_ref(a) − log π(a),   a ~ π,   E[k3] = KL(π, π_ref)

    logprobs:     (B, R)  log π of the sampled token, sampled from π
    ref_logprobs: (B, R)  log π_ref of the same token
    returns: (B, R), never negative
    Source: Schulman 2020, joschu.net/blog/kl-approx.html. The direction matters: samples come from
        the first argument; trlX turns ρ round in its rollouts. expm1, because exp(x) − 1 cancels in
        float32 where the two policies nearly agree; peers subtract the 1. verl and OpenRLHF
        clamp the log-ratio and the result; we do not.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def kl_full(logprobs_all: Tensor, ref_logprobs_all: Tensor) -> Tensor:
    """The exact KL(policy, ref) of the next-token distributions.

    KL(π, π_ref) = Σ_v π(v) (log π(v) − log π_ref(v)),   with 0 log 0 = 0

    logprobs_all:     (B, R, V)  log π of every token: log-softmaxed, not logits
    ref_logprobs_all: (B, R, V)  log π_ref of every token
    returns: (B, R), never negative; inf where π allows a token that π_ref excludes
    Source: Kullback and Leibler 1951; the penalty "full" of early TRL, there through F.kl_div, of
        which the arguments stand in the opposite order; verl names it and raises. The weights are
        π, not π_ref.
    """
    excluded = logprobs_all == -torch.inf
    policy, ref = (x.masked_fill(excluded, 0) for x in (logprobs_all, ref_logprobs_all))
    return (logprobs_all.exp() * (policy - ref)).sum(dim=-1)


KL_ESTIMATORS = {"kl": kl_k1, "abs": kl_abs, "mse": kl_k2, "k3": kl_k3, "full": kl_full}


def adapt_kl_coef(
    kl_coef: float | Tensor,
    kl_per_sequence: float | Tensor,
    target_kl: float,
    horizon: float,
    batch_size: int,
) -> float | Tensor:
    """Next KL coefficient: up when the KL is above its target, down when below.

    e = clip(KL / target − 1, −0.2, 0.2),   β' = β (1 + e · B / horizon)

    kl_coef:         ()     β, used for the rollout just done
    kl_per_sequence: ()     mean over sequences of the KL *summed* over their tokens
    target_kl:       float  in nats per sequence
    horizon:         float  in sequences: how slowly β moves
    batch_size:      int    sequences in the rollout, over all processes
    returns: (); a float if both () arguments are floats
    Source: Ziegler et al. 2019, arXiv:1909.08593 section 2.2, where the step is a constant 0.1; the
        step B / horizon is that of lm-human-preferences and early TRL. KL per sequence, as there;
        verl and OpenRLHF feed the mean per token, so verl's target (0.1) is in another unit.
    """
    error = kl_per_sequence / target_kl - 1
    clipped = error.clamp(-0.2, 0.2) if torch.is_tensor(error) else min(max(error, -0.2), 0.2)
    return kl_coef * (1 + clipped * batch_size / horizon)
