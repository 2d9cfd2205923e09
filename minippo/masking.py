"""Masked reductions: means, variances and whitening over the tokens that count.

There is one kind of mask: bool, True where a token counts. Every function fills masked positions
with 0 *before* it computes anything. Multiplying by the mask afterwards would not do: NaN * 0 is
NaN, in the value and again in the gradient.
"""

from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the positions that count.

    mean = Σ_t m_t x_t / Σ_t m_t

    x:    (B, R)       any values; what stands at masked positions is never read
    mask: (B, R) bool  True where the token counts
    dim:  int or None  the axis to reduce; None reduces all of them
    returns: (); (B,) with dim=1; NaN where nothing counts
    Source: the token mean of TRL's `masked_mean`, which multiplies by the mask and so lets a masked
        NaN through. verl adds 1e-8 to the count, which turns an empty mask into a silent 0; we let
        it be NaN and refuse empty masks where batches are made.
    """
    return x.masked_fill(~mask, 0).sum(dim) / mask.sum(dim)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the positions that count.

    var = Σ_t m_t (x_t − mean)² / n,   times n / (n − 1) if unbiased,   n = Σ_t m_t

    x:        (B, R)       any values; what stands at masked positions is never read
    mask:     (B, R) bool  True where the token counts
    unbiased: bool         divide by n − 1 (Bessel) instead of n
    returns: (); NaN where fewer than two tokens count and unbiased is True
    Source: Bessel's correction as in TRL and verl; lm-human-preferences and OpenRLHF divide by n.
        We take n − 1 by default, as torch.var does, and keep the other side behind the flag.
    """
    count = mask.sum()
    x = x.masked_fill(~mask, 0)
    biased = masked_mean((x - masked_mean(x, mask)).square(), mask)
    return biased * count / (count - 1) if unbiased else biased


def masked_whiten(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the positions that count.

    z_t = (x_t − mean) / √(var + 1e-8)

    x:        (B, R)       any values; what stands at masked positions is never read
    mask:     (B, R) bool  True where the token counts
    unbiased: bool         which variance, see masked_var
    returns: (B, R), 0 where mask is False
    Source: Huang et al. 2022, "The 37 Implementation Details of PPO", detail 7 of its core list. We
        whiten over the mask of the whole rollout, as TRL does; lm-human-preferences and trlX whiten
        each minibatch, trlX with its padding. The mean is always taken off: torchtune adds it back
        by default, which leaves advantages their mean.
    """
    x = x.masked_fill(~mask, 0)
    whitened = (x - masked_mean(x, mask)) / (masked_var(x, mask, unbiased) + 1e-8).sqrt()
    return whitened.masked_fill(~mask, 0)


def response_mask(response: Tensor, eos_id: int | Tensor) -> Tensor:
    """True for every response token up to and with the first EOS.

    m_t = 1 if no EOS stands before t, else 0

    response: (B, R) int  sampled tokens; anything may follow the first EOS
    eos_id:   () int      the end-of-sequence token: an int or a 0-d tensor
    returns: (B, R) bool; all True in a row without EOS
    Source: verl's `get_response_mask`; lm-human-preferences cuts at its stop token by the same
        count. A mask made from `token != pad`, as in trlX and DeepSpeed-Chat, drops the EOS itself
        wherever pad and EOS are one token, and then nobody learns to stop.
    """
    is_eos = (response == eos_id).long()
    return is_eos.cumsum(dim=1) - is_eos == 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding changes nothing.

    p_t = max(0, Σ_{s≤t} m_s − 1)

    attention_mask: (B, T) bool  True where a token is real; 0 and 1 are taken too
    returns: (B, T) int
    Source: the same sum in TRL and in transformers' `generate`. What stands at padding, which no
        token sees, differs: 0 here, the number of real tokens before it in TRL, 1 in `generate`.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
