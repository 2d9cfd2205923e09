"""From logits to the log-probabilities of tokens, and the one shift between the two.

`logits[:, t]` predicts `tokens[:, t + 1]`. The shift lives in `response_window` (and, for training
on plain text, in `lm_loss`), nowhere else.
"""

import torch
from torch import Tensor


def response_window(x: Tensor, response_length: int) -> Tensor:
    """The positions of [query | response] that predict the response tokens.

    window = x[:, Q−1 : T−1],   T = Q + R: from the last query token to the last but one token

    x: (B, T, ...)        model outputs over all tokens: logits, values, hidden states
    response_length: int  R, the width of the response
    returns: (B, R, ...), entry t is the output that saw query and response[:t]
    Source: the slice [Q−1 : −1] of lm-human-preferences and of TRL's later trainer. With it
        values[:, t] is the state *before* response token t, so log-probabilities, values and
        rewards share one index and one mask.
    """
    last = x.shape[1] - 1
    return x[:, last - response_length : last]


def gather_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each given token under its logits.

    log π(a_t) = z_t[a_t] / τ − log Σ_v exp(z_t[v] / τ)

    logits: (B, R, V)    z, where position t already predicts tokens[:, t]
    tokens: (B, R) int   a, the sampled tokens
    temperature: float   τ, the one the tokens were sampled with
    returns: (B, R)
    Source: lm-human-preferences. It and TRL's later trainer divide by τ in rollout, update and
        reference alike, and so do we; early TRL, trlX and DeepSpeed-Chat never divide, which is
        right at τ = 1 only. The division makes a new tensor: `/=`, as in TRL, changes the model's
        own output.
    """
    # Divided only if it changes something: a division copies all the logits.
    scaled = logits if temperature == 1.0 else logits / temperature
    logprobs_all = torch.log_softmax(scaled, dim=-1)
    return logprobs_all.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution, in nats.

    H = −Σ_v p_v log p_v,   p = softmax(z),   with 0 log 0 = 0

    logits: (B, R, V)  z; −inf for a token that is excluded (divide by the temperature first)
    returns: (B, R), between 0 and log V
    Source: Shannon 1948; the entropy bonus S of PPO, arXiv:1707.06347 eq. 9. The exact sum over the
        vocabulary, not the sampled Σ_t −log π(a_t) that TRL logs as objective/entropy. TRL's exact
        one is logsumexp(z) − Σ p z, which is NaN where a logit is −inf.
    """
    logprobs_all = torch.log_softmax(logits, dim=-1)
    finite = logprobs_all.masked_fill(logprobs_all == -torch.inf, 0)
    return -(logprobs_all.exp() * finite).sum(dim=-1)
