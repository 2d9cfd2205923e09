"""Every loss of the pipeline: language model, reward model, policy, critic, and their sum.

All are to be minimised. Token losses are means over all tokens that count in the batch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minippo.kl import kl_k3
from minippo.logprobs import gather_logprobs
from minippo.masking import masked_mean


def _fill_masked(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors with 0 where mask is False: before any arithmetic, see masking.py."""
    return [x.masked_fill(~mask, 0) for x in tensors]


def lm_loss(logits: Tensor, tokens: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, over the tokens that count.

    L = −Σ_t m_{t+1} log p(tokens_{t+1} | tokens_{≤t}) / Σ_t m_{t+1}

    logits:    (B, T, V)    position t predicts tokens[:, t + 1]; the shift is made in here
    tokens:    (B, T) int   any id may stand where loss_mask is False
    loss_mask: (B, T) bool  True for the tokens to be learned; shifted together with the tokens
    returns: ()
    Source: Radford et al. 2018 (GPT) eq. 1, as token mean. The shift lies inside, as in the Hugging
        Face models, so that no caller shifts twice; a mask and not the label −100, so that ids stay
        ids.
    """
    mask = loss_mask[:, 1:]
    logits = logits[:, :-1].masked_fill(~mask.unsqueeze(-1), 0)
    tokens = tokens[:, 1:].masked_fill(~mask, 0)
    return -masked_mean(gather_logprobs(logits, tokens), mask)


def preference_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss of pairs: the chosen answer should score higher.

    L = −mean log σ(s_chosen − s_rejected − margin)

    chosen_scores:   (B,)  score of the better answer of each pair
    rejected_scores: (B,)  score of the worse answer
    margin:          (B,)  how much better at least; None means 0
    returns: ()
    Source: Ouyang et al. 2022, arXiv:2203.02155 eq. 1 for K = 2; margin: Llama 2, arXiv:2307.09288
        eq. 2. logsigmoid, as in TRL: log(sigmoid(x)), as in trlX's example, is −inf for a large
        wrong gap. One score per answer, not one per token as in trlX's example and DeepSpeed-Chat.
    """
    gap = chosen_scores - rejected_scores
    gap = gap if margin is None else gap - margin
    return -F.logsigmoid(gap).mean()


def ranking_loss(scores: Tensor) -> Tensor:
    """Bradley-Terry loss of all pairs of K ranked answers, from K scores.

    L = −mean over prompts of 1/C(K,2) Σ_{i<j} log σ(s_i − s_j),   s_1 the best

    scores:  (B, K)  scores of the K answers to a prompt, ordered best first; K >= 2
    returns: ()
    Source: Ouyang et al. 2022, arXiv:2203.02155 eq. 1: all pairs of a prompt in one batch, the
        factor 1/C(K,2) once. minChatGPT divides by it twice; lm-human-preferences takes the
        cross-entropy of the best of 4 instead.
    """
    count = scores.shape[1]
    better, worse = torch.triu_indices(count, count, offset=1, device=scores.device)
    return -F.logsigmoid(scores[:, better] - scores[:, worse]).mean()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, as a loss: the objective with its sign turned.

    L = mean max(−Â_t ρ_t, −Â_t clip(ρ_t, 1 − ε, 1 + ε)),   ρ_t = exp(log π(a_t) − log π_old(a_t))

    logprobs:     (B, R)       log π of the sampled tokens now, with gradient
    old_logprobs: (B, R)       the same at the time of the rollout
    advantages:   (B, R)       Â
    mask:         (B, R) bool  True where the token counts
    clip_range:   float        ε
    returns: loss (), stats {"approx_kl": (), "clip_frac": (), "ratio": ()}; the stats are detached
    Source: PPO, arXiv:1707.06347 eq. 7 (the paper maximises). All stats are masked means; TRL's
        later trainer averages approx_kl and ratio over padding too, trlX approx_kl. approx_kl is k3
        of KL(old, new): the tokens were sampled from old. TRL has k2 there, verl and OpenRLHF k1.
        No dual clip (verl) and no clamp of log ρ to ±20 (verl, OpenRLHF).
    """
    logprobs, old_logprobs, advantages = _fill_masked(mask, logprobs, old_logprobs, advantages)
    ratio = (logprobs - old_logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    stats = {
        "approx_kl": masked_mean(kl_k3(old_logprobs, logprobs), mask).detach(),
        "clip_frac": masked_mean((clipped > unclipped).to(ratio.dtype), mask).detach(),
        "ratio": masked_mean(ratio, mask).detach(),
    }
    return masked_mean(torch.maximum(unclipped, clipped), mask), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic, clipped to stay near its old values.

    L = ½ mean max((V_t − G_t)², (clip(V_t, V_old ± ε) − G_t)²)

    values:     (B, R)       V now, with gradient
    old_values: (B, R)       V at the time of the rollout
    returns:    (B, R)       G: advantage + old value, before any whitening; fixed
    mask:       (B, R) bool  True where the token counts
    clip_range: float        ε; inf turns clipping off
    returns: loss (), stats {"clip_frac": (), "error": ()}; error is the masked mean of (V − G)²,
        unclipped; the stats are detached
    Source: OpenAI baselines ppo2, then lm-human-preferences and TRL; not in the PPO paper, whose
        eq. 9 has the plain square. The factor 1/2 as in all three; early versions of verl lack it.
    """
    values, old_values, returns = _fill_masked(mask, values, old_values, returns)
    # Clamping V itself keeps it bit for bit inside the range, so rounding never counts as clipped.
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    stats = {
        "clip_frac": masked_mean((clipped_error > error).to(error.dtype), mask).detach(),
        "error": masked_mean(error, mask).detach(),
    }
    return 0.5 * masked_mean(torch.maximum(error, clipped_error), mask), stats


def ppo_objective(
    policy_loss: Tensor,
    value_loss: Tensor,
    kl_loss: Tensor,
    vf_coef: float,
    kl_loss_coef: float,
) -> Tensor:
    """The whole PPO loss: policy, critic and, if wanted, a KL term.

    L = L_policy + c₁ L_value + c₂ L_KL

    policy_loss:  ()     from policy_loss
    value_loss:   ()     from value_loss
    kl_loss:      ()     masked mean of a KL estimate, policy vs reference, with gradient
    vf_coef:      float  c₁
    kl_loss_coef: float  c₂; 0 when the KL is in the reward only
    returns: ()
    Source: PPO, arXiv:1707.06347 eq. 9 with its signs turned. Its eq. 8 has a KL term too, of old
        and new policy; ours is of policy and reference. No entropy bonus: lm-human-preferences and
        TRL have none either. Peers put the KL in the reward; OpenRLHF and verl offer it as a loss
        as well, with a plus sign: it is to be minimised.
    """
    return policy_loss + vf_coef * value_loss + kl_loss_coef * kl_loss
