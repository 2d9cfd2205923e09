"""How much better than expected: one number per answer, or one per token."""

import torch
from torch import Tensor


def simple_advantages(scores: Tensor, values: Tensor) -> Tensor:
    """Score minus expected score: one advantage for the whole answer.

    A(x, y) = R(x, y) − V(x)

    scores:  (B,)  R(x, y), the KL penalties of its tokens counted in if they are part of the reward
    values:  (B,)  V(x), the value at the prompt
    returns: (B,)
    Source: REINFORCE with a baseline, Williams 1992; Sutton and Barto 2018, section 13.4. It is not
        GAE in general: the two agree for the first token at γ = λ = 1.
    """
    return scores - values


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the tokens that count.

    δ_t = r_t + γ V_{t+1} − V_t,   Â_t = δ_t + γλ Â_{t+1};   V and Â are 0 after the last token;
    t + 1 is the next token that counts: masked positions are stepped over as if absent

    rewards: (B, R)       per token: KL penalty, and the score at the last token
    values:  (B, R)       V(query, response[:t]), before token t
    mask:    (B, R) bool  True where the token counts; it may have holes
    gamma:   float        γ, discount; 1 for language
    lam:     float        λ: 0 is one-step TD, 1 is return minus value
    returns: advantages (B, R), returns (B, R); returns = Â + V; both 0 where mask is False
    Source: Schulman et al. 2015, arXiv:1506.02438 eq. 16; PPO, arXiv:1707.06347 eq. 11-12. Holes
        as in verl: early TRL and OpenRLHF zero values and rewards there and recurse through, which
        bootstraps from V = 0 and decays by λ once too often. V after EOS is 0, as in early TRL,
        OpenRLHF and verl; TRL's later trainer keeps a trained V(pad).
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantage = next_value = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1).masked_fill(~mask, 0)
    return advantages, advantages + values
