"""Checks of the masked reductions and of the mask itself."""

import math

import torch

from minippo.checks.checking import Case, Check, Mistake, spoil_masked
from minippo.checks.drawing import integers, mask_of, normal
from minippo.masking import masked_mean, masked_var

T, F = True, False


def _filled(x, mask):
    return x.masked_fill(~mask, 0)


def _mean(x, mask, dim=None):
    return masked_mean(x, mask, dim)


check_masked_mean = Check(
    name="masked_mean",
    module="masking",
    cases=(
        Case(dict(x=[[5.0]], mask=[[T]]), 5.0),
        Case(dict(x=[[1.0, 2.0, 6.0]], mask=[[T, T, F]]), 1.5, {"x": [[0.5, 0.5, 0.0]]}),
        Case(dict(x=[[1.0, 2.0]], mask=[[F, F]]), math.nan, edge=True),  # 0 / 0, not hidden
        Case(dict(x=[[math.nan, 2.0]], mask=[[T, T]]), math.nan, edge=True),  # nor is this NaN
        Case(dict(x=[[1.0, 2.0, 6.0], [4.0, 8.0, 0.0]], mask=[[T, T, F], [T, F, F]]), 7 / 3),
        Case(
            dict(x=[[1.0, 2.0, 6.0], [4.0, 8.0, 0.0]], mask=[[T, T, F], [T, F, F]], dim=1),
            [1.5, 4.0],
        ),
        Case(dict(x=[[1.0, 2.0], [4.0, 8.0]], mask=[[T, T], [T, F]], dim=0), [2.5, 2.0]),
    ),
    draw=lambda g: dict(x=normal(g, 2, 4), mask=mask_of(g, 2, 4)),
    spoil=spoil_masked("x"),
    differentiable=("x",),
    mistakes=(
        Mistake(
            "the sum was divided by all positions, the padding too, and not by those that count",
            lambda x, mask, dim=None: _filled(x, mask).mean(dim),
        ),
        Mistake(
            "the mask is not used at all",
            lambda x, mask, dim=None: x.mean(dim),
        ),
        Mistake(
            "the mean was taken where the mask is False; here True means that a token counts",
            lambda x, mask, dim=None: _mean(x, ~mask, dim),
        ),
        Mistake(
            "each row was averaged first, then the rows: a short row must not weigh as much as a "
            "long one",
            lambda x, mask, dim=None: (
                _mean(x, mask, 1).mean() if dim is None else _mean(x, mask, dim)
            ),
        ),
        Mistake(
            "dim is ignored and everything is averaged",
            lambda x, mask, dim=None: _mean(x, mask),
        ),
        Mistake(
            "an empty mask gives 0, through a small number in the denominator or a clamp; a mean "
            "over nothing is NaN, and has to be seen",
            lambda x, mask, dim=None: _filled(x, mask).sum(dim) / mask.sum(dim).clamp(min=1),
        ),
        Mistake(
            "even NaN at a token that counts was made 0: it has to be seen there, only "
            "masked positions are filled",
            lambda x, mask, dim=None: (x.nan_to_num() * mask).sum(dim) / mask.sum(dim),
        ),
        Mistake(
            "x was multiplied by the mask: NaN times 0 is NaN, so fill masked positions instead",
            lambda x, mask, dim=None: (x * mask).sum(dim) / mask.sum(dim),
        ),
        Mistake(
            "the sum is not divided by the number of tokens that count",
            lambda x, mask, dim=None: _filled(x, mask).sum(dim),
        ),
    ),
)


def _whiten(x, mask, unbiased=True, keep_mean=False, scale=lambda var: (var + 1e-8).sqrt()):
    """Whitening with its parts to be got wrong."""
    x = _filled(x, mask)
    mean, scale = _mean(x, mask), scale(masked_var(x, mask, unbiased))
    return _filled((x - mean) / scale + (mean if keep_mean else 0), mask)


def _whiten_by_row(x, mask, unbiased=True):
    rows = [_whiten(a[None], b[None], unbiased) for a, b in zip(x, mask, strict=True)]
    return torch.cat(rows)


def _whiten_with_padding(x, mask, unbiased=True):
    x = _filled(x, mask)
    return _filled((x - x.mean()) / (x.var(unbiased=unbiased) + 1e-8).sqrt(), mask)


def _row_means(x, mask):
    return _mean(x, mask, 1).unsqueeze(1)


def _padded_mean(x, mask):
    return _filled(x, mask).mean()


def _shifted_by(mean, x, mask, unbiased):
    """Whitening with another mean and the right variance."""
    return _filled((x - mean(x, mask)) / (masked_var(x, mask, unbiased) + 1e-8).sqrt(), mask)


def _whiten_unfilled(x, mask, unbiased=True):
    x = _filled(x, mask)
    return (x - _mean(x, mask)) / (masked_var(x, mask, unbiased) + 1e-8).sqrt()


def _whiten_without_mask(x, mask, unbiased=True):
    return (x - x.mean()) / (x.var(unbiased=unbiased) + 1e-8).sqrt()


def _filled_nowhere(x, mask, unbiased=True):
    return (x - _mean(x, mask)) / (masked_var(x, mask, unbiased) + 1e-8).sqrt()


def _filled_once(x, mask, unbiased=True):
    """The fill before the mean is there, the one after it is not."""
    centred = _filled(x, mask) - _mean(x, mask)
    count = mask.sum()
    variance = centred.square().sum() / (count - 1 if unbiased else count)
    return centred / (variance + 1e-8).sqrt()


check_masked_whiten = Check(
    name="masked_whiten",
    module="masking",
    cases=(
        Case(dict(x=[[5.0, 5.0]], mask=[[T, T]]), [[0.0, 0.0]], edge=True),  # not divided by 0
        Case(  # a variance as small as what is added to it: 1e-4 / sqrt(1e-8 + 1e-8)
            dict(x=[[-1e-4, 1e-4]], mask=[[T, T]], unbiased=False),
            [[-math.sqrt(0.5), math.sqrt(0.5)]],
            edge=True,
        ),
        Case(dict(x=[[1.0, 3.0]], mask=[[T, T]], unbiased=False), [[-1.0, 1.0]]),
        Case(dict(x=[[1.0, 2.0, 3.0]], mask=[[T, T, T]]), [[-1.0, 0.0, 1.0]]),
        Case(  # mean 2, variance (1 + 1) / 1
            dict(x=[[1.0, 3.0, 7.0]], mask=[[T, T, F]]),
            [[-math.sqrt(0.5), math.sqrt(0.5), 0.0]],
        ),
        Case(  # mean 2, variance (4 + 0 + 4) / 2
            dict(x=[[0.0, 2.0], [4.0, 6.0]], mask=[[T, T], [T, F]]),
            [[-1.0, 0.0], [1.0, 0.0]],
        ),
    ),
    draw=lambda g: dict(x=normal(g, 2, 4) + 1, mask=mask_of(g, 2, 4)),
    spoil=spoil_masked("x"),
    mistakes=(
        Mistake(
            "the mean is added back at the end: whitened numbers have mean 0",
            lambda x, mask, unbiased=True: _whiten(x, mask, unbiased, keep_mean=True),
        ),
        Mistake(
            "the variance is always divided by n: with unbiased=True it is n - 1",
            lambda x, mask, unbiased=True: _whiten(x, mask, False),
        ),
        Mistake(
            "the variance is always divided by n - 1: with unbiased=False it is n",
            lambda x, mask, unbiased=True: _whiten(x, mask, True),
        ),
        Mistake("each row was whitened by itself: all rows share one mean", _whiten_by_row),
        Mistake(
            "the mean of each row was taken off: all rows share one mean",
            lambda x, mask, unbiased=True: _shifted_by(_row_means, x, mask, unbiased),
        ),
        Mistake("the padding was counted into mean and variance", _whiten_with_padding),
        Mistake(
            "the padding was counted into the mean",
            lambda x, mask, unbiased=True: _shifted_by(_padded_mean, x, mask, unbiased),
        ),
        Mistake(
            "the padding was counted into the variance",
            lambda x, mask, unbiased=True: _filled(
                (x - _mean(x, mask)) / (_filled(x, mask).var(unbiased=unbiased) + 1e-8).sqrt(), mask
            ),
        ),
        Mistake("masked positions are not set back to 0 at the end", _whiten_unfilled),
        Mistake(
            "it divides by the variance and not by its square root",
            lambda x, mask, unbiased=True: _whiten(x, mask, unbiased, scale=lambda var: var + 1e-8),
        ),
        Mistake(
            "nothing small is added to the variance: equal numbers give 0 / 0",
            lambda x, mask, unbiased=True: _whiten(x, mask, unbiased, scale=torch.sqrt),
        ),
        Mistake(
            "the small number was added to the root: it is added to the variance, under the root",
            lambda x, mask, unbiased=True: _whiten(
                x, mask, unbiased, scale=lambda var: var.sqrt() + 1e-8
            ),
        ),
        Mistake(
            "the small number is larger than 1e-8: small advantages would shrink",
            lambda x, mask, unbiased=True: _whiten(
                x, mask, unbiased, scale=lambda var: (var + 1e-4).sqrt()
            ),
        ),
        Mistake("the mask is not used at all", _whiten_without_mask),
        Mistake(
            "masked positions are filled neither before nor after: what stands there comes out",
            _filled_nowhere,
        ),
        Mistake(
            "after the mean is taken off, masked positions hold minus the mean, and that got into "
            "the variance: fill again before you square",
            _filled_once,
        ),
        Mistake(
            "after the mean is taken off, masked positions hold minus the mean: filling them at "
            "the end is too late for the variance",
            lambda x, mask, unbiased=True: _filled(_filled_once(x, mask, unbiased), mask),
        ),
        Mistake(
            "x is scaled but not shifted: the mean has to be taken off",
            lambda x, mask, unbiased=True: (
                _filled(x, mask) / (masked_var(x, mask, unbiased) + 1e-8).sqrt()
            ),
        ),
    ),
)


def _before_the_end(response, eos_id):
    is_eos = (response == eos_id).long()
    return is_eos, is_eos.cumsum(dim=1) - is_eos


def _until_last_eos(response, eos_id):
    is_eos, _ = _before_the_end(response, eos_id)
    left = is_eos.flip(1).cumsum(dim=1).flip(1)
    return (left > 0) | (is_eos.sum(dim=1, keepdim=True) == 0)


def _one_pad_too_many(response, eos_id):
    _, passed = _before_the_end(response, eos_id)
    return passed.cumsum(dim=1) <= 1


def _until_argmax(response, eos_id):
    end = (response == eos_id).long().argmax(dim=1, keepdim=True)
    return torch.arange(response.shape[1]) <= end


def _along_the_batch(response, eos_id):
    is_eos = (response == eos_id).long()
    return is_eos.cumsum(dim=0) - is_eos == 0


check_response_mask = Check(
    name="response_mask",
    module="masking",
    cases=(
        Case(dict(response=[[5, 6]], eos_id=2), [[T, T]]),
        Case(dict(response=[[5, 2, 7]], eos_id=2), [[T, T, F]]),
        Case(dict(response=[[2, 5, 2]], eos_id=2), [[T, F, F]]),
        Case(dict(response=[[5, 2, 2, 9]], eos_id=2), [[T, T, F, F]]),  # the pad is EOS too
        Case(dict(response=[[5, 6, 7, 1], [1, 1, 5, 1]], eos_id=1), [[T, T, T, T], [T, F, F, F]]),
        Case(dict(response=[[0, 3, 0], [3, 0, 0]], eos_id=3), [[T, T, F], [T, F, F]]),
    ),
    draw=lambda g: dict(response=integers(g, 4, 3, 5), eos_id=2),
    mistakes=(
        Mistake(
            "the EOS itself is left out: it is a token that the policy chose, and counts",
            lambda response, eos_id: (response == eos_id).cumsum(dim=1) == 0,
        ),
        Mistake("one position after the EOS is let in", _one_pad_too_many),
        Mistake(
            "all up to a second EOS is let in: the count of EOS tokens stays at 1 after the first",
            lambda response, eos_id: (response == eos_id).cumsum(dim=1) <= 1,
        ),
        Mistake(
            "of a row without EOS only the first token counts: argmax gives 0 where it finds "
            "nothing; all of the row counts",
            _until_argmax,
        ),
        Mistake("the count runs over the batch and not along the row", _along_the_batch),
        Mistake(
            "every token that is not EOS counts, also those after the first EOS",
            lambda response, eos_id: response != eos_id,
        ),
        Mistake(
            "the padding was found by its id, with the EOS kept wherever it stands: what follows "
            "the first EOS does not count, whatever it is",
            lambda response, eos_id: (response != 0) | (response == eos_id),
        ),
        Mistake("the row ends at its last EOS and not at its first", _until_last_eos),
        Mistake(
            "the mask is turned round: True means that a token counts",
            lambda response, eos_id: _before_the_end(response, eos_id)[1] > 0,
        ),
        Mistake(
            "a row without EOS counts nowhere: it was cut at the limit, and all of it counts",
            lambda response, eos_id: (
                (_before_the_end(response, eos_id)[1] == 0)
                & (response == eos_id).any(dim=1, keepdim=True)
            ),
        ),
    ),
)
