"""From one score per sequence to one reward per token."""

import torch
from torch import Tensor


def _last_counted(mask: Tensor) -> Tensor:
    """True at the last True of each row, nowhere in an empty row: (B, R) -> (B, R)."""
    counted_from_here_on = mask.flip(1).cumsum(dim=1).flip(1)
    return mask & (counted_from_here_on == 1)


def per_token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """KL penalty at every token, the score added at the last token that counts.

    r_t = −β kl_t + 1[t is the last token that counts] · score

    scores:  (B,)         one score per sequence
    kl:      (B, R)       estimate of KL(policy, ref) per token
    mask:    (B, R) bool  True where the token counts; it may have holes
    kl_coef: ()           β: a float or a 0-d tensor
    returns: (B, R), 0 where mask is False
    Source: Ziegler et al. 2019, arXiv:1909.08593 section 2; Ouyang et al. 2022, arXiv:2203.02155.
        The score stands on the last real token, as in early TRL, OpenRLHF and verl; TRL's later
        trainer puts it on the first pad after EOS and needs a second mask for that; trlX and
        DeepSpeed-Chat put it past the EOS too where pad is a token of its own.
    """
    penalty = kl_coef * kl.masked_fill(~mask, 0)
    return torch.where(_last_counted(mask), scores.unsqueeze(1), 0) - penalty


def penalize_missing_eos(
    scores: Tensor, mask: Tensor, response: Tensor, eos_id: int | Tensor, penalty: float
) -> Tensor:
    """Take a penalty off the score of every response that does not end in EOS.

    score' = score − penalty · 1[the last token that counts is not EOS]

    scores:   (B,)         one score per sequence, already standardised
    mask:     (B, R) bool  True where the token counts; it may have holes
    response: (B, R) int   sampled tokens
    eos_id:   () int       the end-of-sequence token: an int or a 0-d tensor
    penalty:  float        a positive number, in units of the scores
    returns: (B,)
    Source: TRL's later trainer subtracts, lm-human-preferences and its reproductions *replace* the
        score by −1. We subtract: to be replaced can be a gain for a bad answer, and it hides how
        good the text is.
    """
    ends_in_eos = (_last_counted(mask) & (response == eos_id)).any(dim=1)
    return torch.where(ends_in_eos, scores, scores - penalty)


def standardize_scores(scores: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    """Put scores on the scale of the reference samples: mean 0, standard deviation 1.

    score' = (score − μ) / σ

    scores: (B,)  raw scores of the reward model
    mean:   ()    μ of the scores of samples of the reference policy
    std:    ()    σ of the same scores
    returns: (B,)
    Source: Ziegler et al. 2019, arXiv:1909.08593 section 2, on samples of the reference. It has to
        be chosen: Bradley-Terry fixes scores only up to a constant. OpenRLHF takes the mean and std
        of its evaluation pairs, DeepSpeed-Chat clips instead.
    """
    return (scores - mean) / std


def prompt_values(scores: Tensor) -> Tensor:
    """Mean score of the answers to each prompt: the target of the critic's warm-up.

    V̂(x) = (1/K) Σ_k score(x, y_k)

    scores:  (B, K)  scores of K answers to the same prompt
    returns: (B,)
    Source: the definition of a state's value, V(x) = E_y R(x, y) (Sutton and Barto 2018, section
        3.5). Peers start the critic from the reward model and let PPO do the rest. It is the value
        at the prompt alone: the values of later tokens come with the training.
    """
    return scores.mean(dim=1)
