"""Checks of the five losses."""

import math

import torch
from torch.nn import functional

from minippo.checks.checking import Case, Check, Mistake, spoil_masked
from minippo.checks.drawing import integers, mask_of, normal

T, F = True, False
LOG_2, LOG_3 = math.log(2), math.log(3)
NAN_TIMES_0 = "the mask was multiplied in: NaN times 0 is NaN, so fill masked positions first"
FILLED_LATE = (
    "masked positions are filled at the end only: NaN that went in there still gets into the "
    "gradient, so fill the inputs first"
)
ROWS_FIRST = (
    "each row was averaged first, then the rows: every token weighs the same, so a short row "
    "weighs less"
)


def _mean(x, mask):
    return x.masked_fill(~mask, 0).sum() / mask.sum()


def _mean_by_product(x, mask):
    return (x * mask).sum() / mask.sum()


def _unfilled(x, mask):
    return x


def _mean_of_rows(x, mask):
    return (x.masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()


def _nll(logits, tokens):
    return -logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _lm(reduce=_mean, logits_at=slice(None, -1), mask_at=slice(1, None), sign=1, per_token=_nll):
    """The language model loss with its parts to be got wrong."""

    def wrong(logits, tokens, loss_mask):
        mask = loss_mask[:, mask_at]
        logits = logits[:, logits_at].masked_fill(~mask.unsqueeze(-1), 0)
        return sign * reduce(per_token(logits, tokens[:, 1:]), mask)

    return wrong


def _spoil_logits(arguments):
    """NaN in the logits that predict a token of no account, and in the last ones."""
    logits, mask = arguments["logits"].clone(), arguments["loss_mask"]
    logits[:, :-1][~mask[:, 1:]] = torch.nan
    logits[:, -1] = torch.nan
    return arguments | {"logits": logits}


def _twice_shifted(logits, tokens, loss_mask):
    mask = loss_mask[:, 2:]
    return _mean(_nll(logits[:, :-2], tokens[:, 2:]), mask)


def _not_shifted(logits, tokens, loss_mask):
    return _mean(_nll(logits.nan_to_num(), tokens), loss_mask)


check_lm_loss = Check(
    name="lm_loss",
    module="losses",
    cases=(
        Case(  # the first position predicts the second token, with probability 3/4
            dict(logits=[[[LOG_3, 0.0], [0.0, 0.0]]], tokens=[[1, 0]], loss_mask=[[F, T]]),
            -math.log(3 / 4),
            {"logits": [[[-0.25, 0.25], [0.0, 0.0]]]},
        ),
        Case(  # nothing predicts the first token, whatever its mask says
            dict(logits=[[[0.0, LOG_3], [9.0, 0.0]]], tokens=[[1, 0]], loss_mask=[[T, T]]),
            -math.log(1 / 4),
        ),
        Case(
            dict(
                logits=[[[0.0, LOG_3], [0.0, LOG_3], [5.0, 0.0]]],
                tokens=[[0, 0, 1]],
                loss_mask=[[F, F, T]],
            ),
            -math.log(3 / 4),
        ),
        Case(  # one token of the first row and two of the second: a mean over three
            dict(
                logits=[
                    [[0.0, LOG_3], [0.0, 1.0], [0.0, 2.0]],
                    [[0.0, LOG_3], [LOG_3, 0.0], [0.0, 3.0]],
                ],
                tokens=[[0, 0, 1], [0, 1, 1]],
                loss_mask=[[F, T, F], [F, T, T]],
            ),
            -(math.log(1 / 4) + math.log(3 / 4) + math.log(1 / 4)) / 3,
        ),
    ),
    draw=lambda g: dict(
        logits=normal(g, 2, 4, 3), tokens=integers(g, 3, 2, 4), loss_mask=mask_of(g, 2, 4)
    ),
    outputs=("loss",),
    spoil=_spoil_logits,
    differentiable=("logits",),
    mistakes=(
        Mistake(
            "nothing is shifted: the logits at a position predict the next token, not the one "
            "that stands there",
            _not_shifted,
        ),
        Mistake(
            "the tokens and the mask are shifted, the logits are not: each is held against the "
            "token at its own position",
            _lm(logits_at=slice(1, None)),
        ),
        Mistake(
            "the shift was made twice: each position is held against the token after the next",
            _twice_shifted,
        ),
        Mistake(
            "the mask is not shifted together with the tokens it belongs to",
            _lm(mask_at=slice(None, -1)),
        ),
        Mistake(
            "the mask is not used: prompt and padding are learned as well",
            lambda logits, tokens, loss_mask: _nll(logits[:, :-1], tokens[:, 1:]).mean(),
        ),
        Mistake(
            "the minus is missing: this is the log-likelihood, and would be minimised",
            _lm(sign=-1),
        ),
        Mistake("it is the sum and not the mean", _lm(lambda x, mask: (x * mask).sum())),
        Mistake(ROWS_FIRST, _lm(_mean_of_rows)),
        Mistake(
            "the sum was divided by all positions and not by the tokens that count",
            _lm(lambda x, mask: x.masked_fill(~mask, 0).mean()),
        ),
        Mistake(
            "masked logits were filled with 0 and averaged as if they counted: each adds log V; "
            "divide the sum over the tokens that count by their number",
            _lm(lambda x, mask: x.mean()),
        ),
        Mistake(
            "an axis of length 1 is left over from gather: (B, T, 1) and a mask (B, T) spread over "
            "each other",
            _lm(per_token=lambda z, t: -z.log_softmax(-1).gather(-1, t.unsqueeze(-1))),
        ),
        Mistake(
            "the logits were not normalised: a log-probability needs the softmax",
            _lm(per_token=lambda z, t: -z.gather(-1, t.unsqueeze(-1)).squeeze(-1)),
        ),
        Mistake(
            NAN_TIMES_0,
            lambda logits, tokens, loss_mask: _mean_by_product(
                _nll(logits[:, :-1], tokens[:, 1:]), loss_mask[:, 1:]
            ),
        ),
        Mistake(
            FILLED_LATE,
            lambda logits, tokens, loss_mask: _mean(
                _nll(logits[:, :-1], tokens[:, 1:]), loss_mask[:, 1:]
            ),
        ),
        Mistake(
            "the loss is detached: there is nothing to learn from",
            lambda *args: _lm()(*args).detach(),
        ),
    ),
)


def _softplus(x):
    """log(1 + exp(x)) of a number: the loss of a pair with the gap -x."""
    return math.log1p(math.exp(x))


def _with_epsilon(mistake, *sizes):
    """The mistake of a small number inside the logarithm, for several small numbers."""
    return tuple(
        Mistake(
            f"{eps:g} was added inside the logarithm: a large wrong gap then costs no more than "
            f"{-math.log(eps):.0f} and has no gradient; there is one function for both",
            mistake(lambda gap, eps=eps: (gap.sigmoid() + eps).log()),
        )
        for eps in sizes
    )


def _preference(loss, margin_sign=-1):
    """The pairwise loss with another function of the gap."""

    def wrong(chosen, rejected, margin=None):
        gap = chosen - rejected + (0 if margin is None else margin_sign * margin)
        return loss(gap)

    return wrong


check_preference_loss = Check(
    name="preference_loss",
    module="losses",
    cases=(
        Case(
            dict(chosen_scores=[0.0], rejected_scores=[0.0]),
            LOG_2,
            {"chosen_scores": [-0.5], "rejected_scores": [0.5]},
        ),
        Case(dict(chosen_scores=[2.0], rejected_scores=[0.0]), _softplus(-2)),
        Case(dict(chosen_scores=[-200.0], rejected_scores=[0.0]), 200.0, edge=True),
        Case(
            dict(chosen_scores=[3.0], rejected_scores=[1.0], margin=[1.0]),
            _softplus(-1),  # a gap of 2, of which 1 is asked for
        ),
        Case(
            dict(chosen_scores=[2.0, 0.0], rejected_scores=[1.0, 3.0]),
            (_softplus(-1) + _softplus(3)) / 2,
        ),
    ),
    draw=lambda g: dict(
        chosen_scores=normal(g, 3), rejected_scores=normal(g, 3), margin=normal(g, 3).abs()
    ),
    outputs=("loss",),
    differentiable=("chosen_scores", "rejected_scores"),
    mistakes=(
        Mistake(
            "the gap is the wrong way round: the chosen answer has to score higher",
            lambda chosen, rejected, margin=None: (
                -functional.logsigmoid(rejected - chosen - (0 if margin is None else margin)).mean()
            ),
        ),
        Mistake(
            "the minus is missing: the likelihood of the right order is to be made large",
            _preference(lambda gap: functional.logsigmoid(gap).mean()),
        ),
        Mistake(
            "the logarithm of a sigmoid, or of 1 + exp, was taken: it is infinite for a large "
            "wrong gap; there is one function for both",
            _preference(lambda gap: -gap.sigmoid().log().mean()),
        ),
        *_with_epsilon(
            lambda log: _preference(lambda gap: -log(gap).mean()), 1e-6, 1e-8, 1e-10, 1e-12
        ),
        Mistake(
            "the logarithm is missing: this is the probability of the right order",
            _preference(lambda gap: -gap.sigmoid().mean()),
        ),
        Mistake(
            "this is the probability of the wrong order: the loss is minus the logarithm of the "
            "right one's",
            _preference(lambda gap: (-gap).sigmoid().mean()),
        ),
        Mistake(
            "the margin was added: it asks for a larger gap, so it is taken off",
            _preference(lambda gap: -functional.logsigmoid(gap).mean(), margin_sign=1),
        ),
        Mistake(
            "the margin is ignored",
            _preference(lambda gap: -functional.logsigmoid(gap).mean(), margin_sign=0),
        ),
        Mistake(
            "it is the sum and not the mean over pairs",
            _preference(lambda gap: -functional.logsigmoid(gap).sum()),
        ),
        Mistake(
            "this is a hinge loss: Bradley-Terry takes the logarithm of a sigmoid",
            _preference(lambda gap: (1 - gap).clamp(min=0).mean()),
        ),
        Mistake(
            "there is one loss per pair left: take their mean",
            _preference(lambda gap: -functional.logsigmoid(gap)),
        ),
        Mistake(
            "the scores were averaged before the loss: each pair has a loss of its own",
            _preference(lambda gap: -functional.logsigmoid(gap.mean())),
        ),
    ),
)


def _ranking(pick, reduce=torch.mean, loss=functional.logsigmoid):
    """The ranking loss over other pairs; pick(K) gives the places of the better and the worse."""

    def wrong(scores):
        better, worse = pick(scores.shape[1])
        return -reduce(loss(scores[:, better] - scores[:, worse]))

    return wrong


def _all_pairs(count):
    return torch.triu_indices(count, count, offset=1)


def _both_orders(count):
    return (~torch.eye(count, dtype=torch.bool)).nonzero().unbind(1)


def _everyone(count):
    return torch.cartesian_prod(torch.arange(count), torch.arange(count)).T


def _neighbours(count):
    return torch.arange(count - 1), torch.arange(1, count)


def _best_and_others(count):
    return torch.zeros(count - 1, dtype=torch.long), torch.arange(1, count)


def _divided_twice(scores):
    count = scores.shape[1]
    return _ranking(_all_pairs)(scores) / (count * (count - 1) / 2)


def _plackett_luce(scores):
    tails = scores.flip(1).logcumsumexp(1).flip(1)
    return (tails - scores).sum(1).mean()


check_ranking_loss = Check(
    name="ranking_loss",
    module="losses",
    cases=(
        Case(dict(scores=[[1.0, 0.0]]), _softplus(-1)),
        Case(dict(scores=[[0.0, 0.0, 0.0]]), LOG_2, {"scores": [[-1 / 3, 0.0, 1 / 3]]}),
        Case(dict(scores=[[2.0, 1.0, 0.0]]), (2 * _softplus(-1) + _softplus(-2)) / 3),
        Case(  # gaps 1, 3, 2 and -1, 1, 2
            dict(scores=[[3.0, 2.0, 0.0], [1.0, 2.0, 0.0]]),
            (3 * 0 + _softplus(-1) + _softplus(-3) + _softplus(-2)) / 6
            + (_softplus(1) + _softplus(-1) + _softplus(-2)) / 6,
        ),
        Case(dict(scores=[[-200.0, 0.0]]), 200.0, edge=True),
    ),
    draw=lambda g: dict(scores=normal(g, 2, 4)),
    outputs=("loss",),
    differentiable=("scores",),
    mistakes=(
        Mistake("it was divided by the number of pairs twice", _divided_twice),
        Mistake(
            "each answer was compared with itself too: those pairs add log 2 each",
            _ranking(lambda count: torch.triu_indices(count, count)),
        ),
        Mistake(
            "each pair was taken in both orders: only the better before the worse is right",
            _ranking(_both_orders),
        ),
        Mistake(
            "the mean runs over all K x K differences: those in the other order and those of an "
            "answer with itself are no pairs",
            _ranking(_everyone),
        ),
        Mistake(
            "answers to different prompts were compared: a ranking is that of one prompt",
            lambda scores: _ranking(_all_pairs)(scores.reshape(1, -1)),
        ),
        Mistake(
            "only neighbours in the ranking were compared: all pairs count", _ranking(_neighbours)
        ),
        Mistake(
            "only the best answer was compared with the others: all pairs count",
            _ranking(_best_and_others),
        ),
        Mistake(
            "the order is turned: the scores come best first",
            _ranking(lambda count: _all_pairs(count).flip(0)),
        ),
        Mistake("the pairs were added up: take their mean", _ranking(_all_pairs, torch.sum)),
        Mistake(
            "the pairs of a prompt were added up: take the mean over all of them",
            _ranking(_all_pairs, lambda x: x.sum(1).mean()),
        ),
        Mistake(
            "this is the cross-entropy of the best answer among K: here every pair counts",
            lambda scores: -scores.log_softmax(1)[:, 0].mean(),
        ),
        Mistake(
            "this is the likelihood of the whole ranking (Plackett-Luce): here every pair counts "
            "by itself",
            _plackett_luce,
        ),
        Mistake(
            "the logarithm is missing: these are probabilities",
            _ranking(_all_pairs, loss=torch.sigmoid),
        ),
        Mistake(
            "the minus is missing: the likelihood of the right order is to be made large",
            _ranking(_all_pairs, lambda x: -x.mean()),
        ),
        Mistake(
            "the logarithm of a sigmoid was taken: it is infinite for a large wrong gap",
            _ranking(_all_pairs, loss=lambda gap: gap.sigmoid().log()),
        ),
        *_with_epsilon(lambda log: _ranking(_all_pairs, loss=log), 1e-6, 1e-8, 1e-10, 1e-12),
    ),
)


def _ratio(new, old):
    return (new - old).exp()


def _k3(log_ratio):
    return torch.expm1(log_ratio) - log_ratio


def _clipped_ratio(advantages, ratio, eps):
    return -advantages * ratio.clamp(1 - eps, 1 + eps)


def _policy(
    ratio_of=_ratio,
    clip=_clipped_ratio,
    combine=torch.maximum,
    reduce=_mean,
    mean=_mean,  # of the stats
    fill=lambda x, mask: x.masked_fill(~mask, 0),
    stat=torch.Tensor.detach,
    **other_stats,
):
    """The policy loss with its parts to be got wrong."""

    def wrong(logprobs, old_logprobs, advantages, mask, clip_range):
        new, old, good = (fill(x, mask) for x in (logprobs, old_logprobs, advantages))
        ratio = ratio_of(new, old)
        unclipped, clipped = -good * ratio, clip(good, ratio, clip_range)
        is_clipped = (clipped > unclipped).to(ratio.dtype)
        stats = {
            "approx_kl": stat(mean(_k3(new - old), mask)),
            "clip_frac": stat(mean(is_clipped, mask)),
            "ratio": stat(mean(ratio, mask)),
        }
        is_kept = (clipped >= unclipped).to(ratio.dtype)
        parts = dict(
            new=new, old=old, ratio=ratio, is_clipped=is_clipped, is_kept=is_kept, mask=mask
        )
        stats |= {name: make(parts).detach() for name, make in other_stats.items()}
        return reduce(combine(unclipped, clipped), mask), stats

    return wrong


def _policy_case(log_ratios, advantages, mask, loss, stats, gradient=None):
    """A case with old log-probabilities of -1 and clip_range 0.2."""
    old = [[-1.0] * len(row) for row in log_ratios]
    arguments = dict(
        logprobs=[[x - 1.0 for x in row] for row in log_ratios],
        old_logprobs=old,
        advantages=advantages,
        mask=mask,
        clip_range=0.2,
    )
    names = "approx_kl", "clip_frac", "ratio"
    expected = loss, dict(zip(names, stats, strict=True))
    return Case(arguments, expected, {} if gradient is None else {"logprobs": gradient})


check_policy_loss = Check(
    name="policy_loss",
    module="losses",
    cases=(
        # ratio 1: the mean of -A
        _policy_case([[0.0, 0.0]], [[1.0, -2.0]], [[T, T]], 0.5, (0, 0, 1), [[-0.5, 1.0]]),
        # ratio 2, wanted more: clipped at 1.2, no gradient
        _policy_case([[LOG_2]], [[1.0]], [[T]], -1.2, (1 - LOG_2, 1, 2), [[0.0]]),
        # ratio 2, wanted less: not clipped
        _policy_case([[LOG_2]], [[-1.0]], [[T]], 2.0, (1 - LOG_2, 0, 2), [[2.0]]),
        # ratio 1/2, wanted more: not clipped
        _policy_case([[-LOG_2]], [[1.0]], [[T]], -0.5, (LOG_2 - 0.5, 0, 0.5), [[-0.5]]),
        # ratio 1/2, wanted less: clipped at 0.8
        _policy_case([[-LOG_2]], [[-1.0]], [[T]], 0.8, (LOG_2 - 0.5, 1, 0.5), [[0.0]]),
        # ratio 1.1 lies inside
        _policy_case(
            [[math.log(1.1)]], [[3.0]], [[T]], -3.3, (0.1 - math.log(1.1), 0, 1.1), [[-3.3]]
        ),
        # three tokens count: losses -1, 0.8 and -1.2
        _policy_case(
            [[0.0, 5.0], [-LOG_2, LOG_2]],
            [[1.0, 7.0], [-1.0, 1.0]],
            [[T, F], [T, T]],
            (-1 + 0.8 - 1.2) / 3,
            ((0 + LOG_2 - 0.5 + 1 - LOG_2) / 3, 2 / 3, 3.5 / 3),
            [[-1 / 3, 0.0], [0.0, 0.0]],
        ),
    ),
    draw=lambda g: dict(
        logprobs=normal(g, 2, 3) * 0.4 - 1,
        old_logprobs=normal(g, 2, 3) * 0.4 - 1,
        advantages=normal(g, 2, 3),
        mask=mask_of(g, 2, 3),
        clip_range=0.2,
    ),
    outputs=("loss", "stats"),
    spoil=spoil_masked("logprobs", "old_logprobs", "advantages"),
    differentiable=("logprobs",),
    mistakes=(
        Mistake(
            "the sign is turned: the paper maximises its objective, a loss is minimised",
            _policy(reduce=lambda x, mask: -_mean(x, mask)),
        ),
        Mistake(
            "the larger of the two objectives was kept: clipping has to make the objective "
            "smaller, so the loss larger",
            _policy(combine=torch.minimum),
        ),
        Mistake(
            "only the clipped ratio is used: where the policy went the wrong way there is no "
            "gradient to bring it back",
            _policy(combine=lambda unclipped, clipped: clipped),
        ),
        Mistake("nothing is clipped", _policy(combine=lambda unclipped, clipped: unclipped)),
        Mistake(
            "the minus is missing and the maximum stayed: the objective is the smaller of the two "
            "terms, the loss the larger of their negatives",
            _policy(combine=lambda unclipped, clipped: torch.maximum(-unclipped, -clipped)),
        ),
        Mistake(
            "the ratio is that of whole answers: each token has a ratio of its own",
            _policy(ratio_of=lambda new, old: _ratio(new, old).prod(1, True).expand_as(new)),
        ),
        Mistake(
            "the ratio is clipped above only: it has a lower end as well, for bad tokens",
            _policy(clip=lambda a, ratio, eps: -a * ratio.clamp(max=1 + eps)),
        ),
        Mistake(
            "the ratio was clipped between -epsilon and epsilon: the range lies around 1",
            _policy(clip=lambda a, ratio, eps: -a * ratio.clamp(-eps, eps)),
        ),
        Mistake(
            "the second term has the ratio in place of the advantage",
            _policy(clip=lambda a, ratio, eps: -ratio * ratio.clamp(1 - eps, 1 + eps)),
        ),
        Mistake(
            "the ratio is the difference of the log-probabilities: it is the exponential of that",
            _policy(ratio_of=lambda new, old: new - old),
        ),
        Mistake(
            "the ratio is old over new: it is new over old",
            _policy(ratio_of=lambda new, old: _ratio(old, new)),
        ),
        Mistake(
            "the ratio was made of two logarithms by dividing them",
            _policy(ratio_of=lambda new, old: new / old),
        ),
        Mistake("the loss was averaged over padding too", _policy(reduce=lambda x, mask: x.mean())),
        Mistake(ROWS_FIRST, _policy(reduce=_mean_of_rows)),
        Mistake(
            "the loss is a sum over tokens and not a mean", _policy(reduce=lambda x, mask: x.sum())
        ),
        Mistake(
            NAN_TIMES_0, _policy(fill=_unfilled, reduce=_mean_by_product, mean=_mean_by_product)
        ),
        Mistake(FILLED_LATE, _policy(fill=_unfilled)),
        Mistake(
            "approx_kl is that of new against old: the tokens were sampled from the old policy",
            _policy(approx_kl=lambda p: _mean(_k3(p["old"] - p["new"]), p["mask"])),
        ),
        Mistake(
            "approx_kl is the mean log-ratio, k1: that may be negative; here it is k3",
            _policy(approx_kl=lambda p: _mean(p["old"] - p["new"], p["mask"])),
        ),
        Mistake(
            "approx_kl is half the squared log-ratio, k2: here it is k3",
            _policy(approx_kl=lambda p: _mean((p["old"] - p["new"]).square() / 2, p["mask"])),
        ),
        Mistake(
            "clip_frac was averaged over padding too",
            _policy(clip_frac=lambda p: p["is_clipped"].mean()),
        ),
        Mistake(
            "clip_frac counts every ratio outside the range, also where the clip changes nothing",
            _policy(clip_frac=lambda p: _mean(((p["ratio"] - 1).abs() > 0.2).float(), p["mask"])),
        ),
        Mistake(
            "clip_frac counts also where the clipped loss equals the other one: there nothing is "
            "clipped",
            _policy(clip_frac=lambda p: _mean(p["is_kept"], p["mask"])),
        ),
        Mistake(
            "clip_frac counts every ratio above the range and none below",
            _policy(clip_frac=lambda p: _mean((p["ratio"] > 1.2).float(), p["mask"])),
        ),
        Mistake(
            "ratio was averaged over padding too, where it is 1",
            _policy(ratio=lambda p: p["ratio"].mean()),
        ),
        Mistake(
            "the stats still carry a gradient: they are only looked at, so detach them",
            _policy(stat=lambda x: x),
        ),
        Mistake(
            "the ratio is detached: the policy gets no gradient",
            _policy(ratio_of=lambda new, old: _ratio(new, old).detach()),
        ),
    ),
)


def _larger_error(values, clipped, returns):
    return torch.maximum((values - returns).square(), (clipped - returns).square())


def _clip_to_old(values, old, returns, eps):
    return values.clamp(old - eps, old + eps)


def _value(
    factor=0.5,
    clip=_clip_to_old,
    combine=_larger_error,
    reduce=_mean,
    mean=_mean,  # of the stats
    fill=lambda x, mask: x.masked_fill(~mask, 0),
    stat=torch.Tensor.detach,
    **other_stats,
):
    """The value loss with its parts to be got wrong."""

    def wrong(values, old_values, returns, mask, clip_range):
        new, old, target = (fill(x, mask) for x in (values, old_values, returns))
        right = _clip_to_old(new, old, target, clip_range)
        error, clipped_error = (new - target).square(), (right - target).square()
        is_clipped = (clipped_error > error).to(error.dtype)
        stats = {"clip_frac": stat(mean(is_clipped, mask)), "error": stat(mean(error, mask))}
        parts = dict(error=error, clipped_error=clipped_error, is_clipped=is_clipped, mask=mask)
        parts |= dict(new=new, old=old, eps=clip_range)
        stats |= {name: make(parts).detach() for name, make in other_stats.items()}
        clipped = clip(new, old, target, clip_range)
        return factor * reduce(combine(new, clipped, target), mask), stats

    return wrong


def _value_case(values, old, returns, mask, loss, stats, gradient=None, clip_range=0.2):
    arguments = dict(
        values=values, old_values=old, returns=returns, mask=mask, clip_range=clip_range
    )
    expected = loss, {"clip_frac": stats[0], "error": stats[1]}
    return Case(arguments, expected, {} if gradient is None else {"values": gradient})


check_value_loss = Check(
    name="value_loss",
    module="losses",
    cases=(
        # not moved: half the squared error
        _value_case([[1.0]], [[1.0]], [[3.0]], [[T]], 2.0, (0, 4), [[-2.0]]),
        # moved towards the target: held at 1.2, with an error of 1.8 and no gradient
        _value_case([[2.0]], [[1.0]], [[3.0]], [[T]], 1.62, (1, 1), [[0.0]]),
        # moved away from the target: its own error counts
        _value_case([[2.0]], [[1.0]], [[0.0]], [[T]], 2.0, (0, 4), [[2.0]]),
        # moved down, towards the target: held at 0.8
        _value_case([[0.0]], [[1.0]], [[-1.0]], [[T]], 1.62, (1, 1), [[0.0]]),
        # no clipping at all
        _value_case([[2.0]], [[1.0]], [[3.0]], [[T]], 0.5, (0, 1), [[-1.0]], math.inf),
        # three tokens count: squared errors 4, 3.24 and 1
        _value_case(
            [[1.0, 5.0], [2.0, 1.0]],
            [[1.0, 1.0], [1.0, 1.0]],
            [[3.0, 9.0], [3.0, 0.0]],
            [[T, F], [T, T]],
            (4 + 3.24 + 1) / 6,
            (1 / 3, 2.0),
            [[-2 / 3, 0.0], [0.0, 1 / 3]],
        ),
    ),
    draw=lambda g: dict(
        values=normal(g, 2, 3),
        old_values=normal(g, 2, 3),
        returns=normal(g, 2, 3),
        mask=mask_of(g, 2, 3),
        clip_range=0.3,
    ),
    outputs=("loss", "stats"),
    spoil=spoil_masked("values", "old_values", "returns"),
    differentiable=("values",),
    mistakes=(
        Mistake("the factor 1/2 is missing", _value(factor=1.0)),
        Mistake("the sign is turned: the error is to be made small", _value(factor=-0.5)),
        Mistake(
            "the smaller error was kept: the larger one counts, so that clipping never pays",
            _value(
                combine=lambda v, c, r: torch.minimum((v - r).square(), (c - r).square()),
            ),
        ),
        Mistake(
            "the maximum was taken before the square: errors may be negative",
            _value(combine=lambda v, c, r: torch.maximum(v - r, c - r).square()),
        ),
        Mistake(
            "nothing is clipped, or it is clipped around the return: the range lies around the old "
            "value; around the return it only makes the error smaller, and the larger one counts",
            _value(combine=lambda v, c, r: (v - r).square()),
        ),
        Mistake(
            "only the clipped value is used: the larger of the two errors counts",
            _value(combine=lambda v, c, r: (c - r).square()),
        ),
        Mistake(
            "the value was clipped between -epsilon and epsilon: the range lies around the old "
            "value",
            _value(clip=lambda v, old, r, eps: v.clamp(-eps, eps)),
        ),
        Mistake(
            "the value is detached: the critic gets no gradient",
            lambda values, *others: _value()(values.detach(), *others),
        ),
        Mistake("the loss was averaged over padding too", _value(reduce=lambda x, mask: x.mean())),
        Mistake(ROWS_FIRST, _value(reduce=_mean_of_rows)),
        Mistake(
            "the absolute error stands where the square belongs",
            _value(combine=lambda v, c, r: torch.maximum((v - r).abs(), (c - r).abs())),
        ),
        Mistake(
            NAN_TIMES_0, _value(fill=_unfilled, reduce=_mean_by_product, mean=_mean_by_product)
        ),
        Mistake(FILLED_LATE, _value(fill=_unfilled)),
        Mistake(
            "error is that of the clipped values: it is the plain squared error",
            _value(error=lambda p: _mean(torch.maximum(p["error"], p["clipped_error"]), p["mask"])),
        ),
        Mistake(
            "error is halved: the 1/2 belongs to the loss alone",
            _value(error=lambda p: 0.5 * _mean(p["error"], p["mask"])),
        ),
        Mistake("error was averaged over padding too", _value(error=lambda p: p["error"].mean())),
        Mistake(
            "clip_frac was averaged over padding too",
            _value(clip_frac=lambda p: p["is_clipped"].mean()),
        ),
        Mistake(
            "clip_frac counts also where both errors are equal: there nothing is clipped",
            _value(
                clip_frac=lambda p: _mean((p["clipped_error"] >= p["error"]).float(), p["mask"])
            ),
        ),
        Mistake(
            "clip_frac counts every value that left the range, also where the clip changes nothing",
            _value(
                clip_frac=lambda p: _mean(
                    ((p["new"] - p["old"]).abs() > p["eps"]).float(), p["mask"]
                )
            ),
        ),
        Mistake(
            "the stats still carry a gradient: they are only looked at, so detach them",
            _value(stat=lambda x: x),
        ),
    ),
)
