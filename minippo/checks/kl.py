"""Checks of the KL estimators and of the adaptive coefficient."""

import math

import torch
from torch.nn import functional

from minippo.checks.checking import Case, Check, Mistake
from minippo.checks.drawing import logprobs_of

LOG_2 = math.log(2)
HALF, QUARTER = math.log(1 / 2), math.log(1 / 4)
NEAR = 2.0**-12  # -1 - NEAR has no rounding in float32


def _drawn(g):
    return dict(logprobs=logprobs_of(g, 2, 3), ref_logprobs=logprobs_of(g, 2, 3))


def _cases(twice, half, twice_gradient, far, more=()):
    """The same four inputs for every estimator: where the policies agree, where the policy is
    twice and half as sure as the reference, and where the reference nearly excludes the token."""
    return (
        Case(dict(logprobs=[[-1.0]], ref_logprobs=[[-1.0]]), [[0.0]]),
        Case(
            dict(logprobs=[[HALF]], ref_logprobs=[[QUARTER]]),
            [[twice]],
            {"logprobs": [[twice_gradient]]},
        ),
        Case(dict(logprobs=[[QUARTER]], ref_logprobs=[[HALF]]), [[half]]),
        Case(dict(logprobs=[[-1.0]], ref_logprobs=[[-16.0]]), [[far]], edge=True),
        Case(
            dict(logprobs=[[HALF, QUARTER]], ref_logprobs=[[QUARTER, HALF]]),
            [[twice, half]],
        ),
        *more,
    )


REVERSED = "the policy and the reference are the wrong way round: the samples come from the policy"
CLAMPED = "the result is clamped: that breaks the estimate just where the policies differ most"
ONE_NUMBER = "it was averaged over the tokens already: one number per token is wanted"

check_kl_k1 = Check(
    name="kl_k1",
    module="kl",
    cases=_cases(LOG_2, -LOG_2, 1.0, 15.0),
    draw=_drawn,
    differentiable=("logprobs",),
    mistakes=(
        Mistake(REVERSED, lambda logprobs, ref_logprobs: ref_logprobs - logprobs),
        Mistake(
            "the absolute value was taken: a single token may have a negative k1, and the mean "
            "is right only with it",
            lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).abs(),
        ),
        Mistake(CLAMPED, lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).clamp(-10, 10)),
        Mistake(
            "it was weighted with the probability: the token is a sample already, so its "
            "probability is in the mean over tokens",
            lambda logprobs, ref_logprobs: logprobs.exp() * (logprobs - ref_logprobs),
        ),
        Mistake(
            "this is the ratio of the probabilities and not its logarithm",
            lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).exp(),
        ),
        Mistake(
            "the logarithms were divided by each other: the logarithm of a ratio is a difference",
            lambda logprobs, ref_logprobs: logprobs / ref_logprobs,
        ),
        Mistake(ONE_NUMBER, lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).mean()),
    ),
)

check_kl_k2 = Check(
    name="kl_k2",
    module="kl",
    cases=_cases(LOG_2**2 / 2, LOG_2**2 / 2, LOG_2, 112.5),
    draw=_drawn,
    differentiable=("logprobs",),
    mistakes=(
        Mistake(
            "the factor 1/2 is missing",
            lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).square(),
        ),
        Mistake(
            "the 1/2 was squared too: it stands before the square",
            lambda logprobs, ref_logprobs: (0.5 * (logprobs - ref_logprobs)).square(),
        ),
        Mistake(
            "the log-ratio is halved but not squared",
            lambda logprobs, ref_logprobs: 0.5 * (logprobs - ref_logprobs),
        ),
        Mistake(
            "the absolute value stands where the square belongs",
            lambda logprobs, ref_logprobs: 0.5 * (logprobs - ref_logprobs).abs(),
        ),
        Mistake(
            "probabilities were subtracted and not their logarithms",
            lambda logprobs, ref_logprobs: 0.5 * (logprobs.exp() - ref_logprobs.exp()).square(),
        ),
        Mistake(
            CLAMPED,
            lambda logprobs, ref_logprobs: (0.5 * (logprobs - ref_logprobs).square()).clamp(max=10),
        ),
        Mistake(
            ONE_NUMBER,
            lambda logprobs, ref_logprobs: (0.5 * (logprobs - ref_logprobs).square()).mean(),
        ),
        Mistake(
            "something is detached: k2 is used as a loss, and its gradient is all that counts",
            lambda logprobs, ref_logprobs: 0.5 * (logprobs - ref_logprobs).detach().square(),
        ),
    ),
)


def _k3(log_ratio):
    return torch.expm1(log_ratio) - log_ratio


check_kl_k3 = Check(
    name="kl_k3",
    module="kl",
    cases=_cases(
        LOG_2 - 1 / 2,
        1 - LOG_2,
        1 / 2,  # 1 - rho
        math.expm1(-15) + 15,
        [
            Case(
                dict(logprobs=[[-16.0]], ref_logprobs=[[-1.0]]),
                [[math.expm1(15) - 15]],
                edge=True,
            ),
            Case(  # nearly the same policy: rho - 1 needs more digits than float32 has
                dict(logprobs=[[-1.0] * 3], ref_logprobs=[[-1.0 - NEAR] * 3]),
                [[math.expm1(-NEAR) + NEAR] * 3],
                rtol=2e-3,
                atol=0.0,
                edge=True,
            ),
        ],
    ),
    draw=_drawn,
    differentiable=("logprobs",),
    mistakes=(
        Mistake(
            "the ratio is the wrong way round: with samples from the policy it is reference over "
            "policy",
            lambda logprobs, ref_logprobs: _k3(logprobs - ref_logprobs),
        ),
        Mistake(
            "1 was subtracted from an exponential that is nearly 1, and the digits cancel: there "
            "is a function for exp(x) - 1",
            lambda logprobs, ref_logprobs: (
                (ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs)
            ),
        ),
        Mistake(
            "the log-ratio was added and not subtracted",
            lambda logprobs, ref_logprobs: (
                torch.expm1(ref_logprobs - logprobs) + (ref_logprobs - logprobs)
            ),
        ),
        Mistake(
            "the log-ratio is not subtracted at all",
            lambda logprobs, ref_logprobs: torch.expm1(ref_logprobs - logprobs),
        ),
        Mistake(
            "the 1 is not subtracted: the estimate has to be 0 where the policies agree",
            lambda logprobs, ref_logprobs: (
                (ref_logprobs - logprobs).exp() - (ref_logprobs - logprobs)
            ),
        ),
        Mistake(
            "the ratio was put in where its logarithm belongs, and exponentiated once more",
            lambda logprobs, ref_logprobs: _k3((ref_logprobs - logprobs).exp()),
        ),
        Mistake(CLAMPED, lambda logprobs, ref_logprobs: _k3(ref_logprobs - logprobs).clamp(max=10)),
        Mistake(ONE_NUMBER, lambda logprobs, ref_logprobs: _k3(ref_logprobs - logprobs).mean()),
    ),
)


def _full(policy, ref, weights=None):
    weights = (policy if weights is None else weights).exp()
    excluded = policy == -torch.inf
    return weights * (policy.masked_fill(excluded, 0) - ref.masked_fill(excluded, 0))


check_kl_full = Check(
    name="kl_full",
    module="kl",
    cases=(
        Case(
            dict(logprobs_all=[[[HALF, HALF]]], ref_logprobs_all=[[[HALF, HALF]]]),
            [[0.0]],
        ),
        Case(
            dict(
                logprobs_all=[[[HALF, HALF]]],
                ref_logprobs_all=[[[QUARTER, math.log(3 / 4)]]],
            ),
            [[0.5 * math.log(2) + 0.5 * math.log(2 / 3)]],
        ),
        Case(  # certain of a token that the reference gives 1/2: 1 log 2 + 0 log 0
            dict(logprobs_all=[[[0.0, -math.inf]]], ref_logprobs_all=[[[HALF, HALF]]]),
            [[LOG_2]],
            {"logprobs_all": [[[LOG_2 + 1, 0.0]]]},
            edge=True,
        ),
        Case(
            dict(
                logprobs_all=[[[HALF, QUARTER, QUARTER], [QUARTER, HALF, QUARTER]]],
                ref_logprobs_all=[[[QUARTER, HALF, QUARTER], [QUARTER, HALF, QUARTER]]],
            ),
            [[0.25 * LOG_2, 0.0]],
        ),
    ),
    draw=lambda g: dict(
        logprobs_all=logprobs_of(g, 1, 2, 3), ref_logprobs_all=logprobs_of(g, 1, 2, 3)
    ),
    differentiable=("logprobs_all",),
    mistakes=(
        Mistake(
            "the log-ratio was weighted with the reference's probabilities: KL(policy, ref) is a "
            "mean under the policy",
            lambda logprobs_all, ref_logprobs_all: -_full(ref_logprobs_all, logprobs_all).sum(-1),
        ),
        Mistake(
            "this is KL(ref, policy): the two are the wrong way round",
            lambda logprobs_all, ref_logprobs_all: _full(ref_logprobs_all, logprobs_all).sum(-1),
        ),
        Mistake(
            "the sign is turned: a KL is never negative",
            lambda logprobs_all, ref_logprobs_all: -_full(logprobs_all, ref_logprobs_all).sum(-1),
        ),
        Mistake(
            "the log-ratios were weighted with log-probabilities: exp makes probabilities of them",
            lambda logprobs_all, ref_logprobs_all: (
                logprobs_all * (logprobs_all - ref_logprobs_all)
            ).sum(-1),
        ),
        Mistake(
            "the weights are detached: the policy moves its probabilities as well as the "
            "log-ratios, so the gradient goes through both",
            lambda logprobs_all, ref_logprobs_all: _full(
                logprobs_all, ref_logprobs_all, weights=logprobs_all.detach()
            ).sum(-1),
        ),
        Mistake(
            "the NaN was replaced after it had come up: the value is right then, its gradient "
            "NaN all the same; fill before you multiply",
            lambda logprobs_all, ref_logprobs_all: (
                (logprobs_all.exp() * (logprobs_all - ref_logprobs_all)).nan_to_num().sum(-1)
            ),
        ),
        Mistake(
            "a token that the policy excludes gives 0 times -inf, which is NaN; 0 log 0 is 0",
            lambda logprobs_all, ref_logprobs_all: (
                logprobs_all.exp() * (logprobs_all - ref_logprobs_all)
            ).sum(-1),
        ),
        Mistake(
            "the mean over the vocabulary was taken: an expectation is the weighted sum",
            lambda logprobs_all, ref_logprobs_all: _full(logprobs_all, ref_logprobs_all).mean(-1),
        ),
        Mistake(
            "the log-ratios are not weighted with the probabilities",
            lambda logprobs_all, ref_logprobs_all: (logprobs_all - ref_logprobs_all).sum(-1),
        ),
        Mistake(
            "the function F.kl_div was called without log_target=True: it takes the logarithm of "
            "what is one already",
            lambda logprobs_all, ref_logprobs_all: functional.kl_div(
                ref_logprobs_all, logprobs_all, reduction="none"
            ).sum(-1),
        ),
        Mistake(
            "it was summed over all positions: one number per position is wanted",
            lambda logprobs_all, ref_logprobs_all: _full(logprobs_all, ref_logprobs_all).sum(),
        ),
    ),
)


def _clip(x, low=-0.2, high=0.2):
    return min(max(x, low), high)


def _controller(kl_per_sequence, target_kl, **numbers):
    names = "kl_coef", "kl_per_sequence", "target_kl", "horizon", "batch_size"
    given = dict(kl_coef=0.2, horizon=1000.0, batch_size=100) | numbers
    given |= dict(kl_per_sequence=kl_per_sequence, target_kl=target_kl)
    return {name: given[name] for name in names}


check_adapt_kl_coef = Check(
    name="adapt_kl_coef",
    module="kl",
    cases=(
        Case(_controller(6.0, 6.0), 0.2),
        Case(_controller(6.6, 6.0), 0.202),  # 10% above: 1 + 0.1 * 0.1
        Case(_controller(60.0, 6.0), 0.204),  # clipped at 20%
        Case(_controller(5.4, 6.0), 0.198),
        Case(_controller(0.0, 6.0), 0.196),
        Case(_controller(4.4, 4.0, batch_size=500), 0.21),
    ),
    draw=lambda g: _controller(6 + 2 * torch.rand((), generator=g).item(), 7.0, kl_coef=0.3),
    outputs=("kl_coef",),
    mistakes=(
        Mistake(
            "the sign is turned: too much KL has to make the coefficient larger",
            lambda b, kl, target, horizon, n: b * (1 - _clip(kl / target - 1) * n / horizon),
        ),
        Mistake(
            "the ratio is the wrong way round: it is the KL over its target",
            lambda b, kl, target, horizon, n: b * (1 + _clip(target / kl - 1) * n / horizon),
        ),
        Mistake(
            "the step is horizon over batch size: it is batch size over horizon",
            lambda b, kl, target, horizon, n: b * (1 + _clip(kl / target - 1) * horizon / n),
        ),
        Mistake(
            "the clip comes too late, after the error was multiplied by B / horizon: the error "
            "itself is clipped",
            lambda b, kl, target, horizon, n: b * (1 + _clip((kl / target - 1) * n / horizon)),
        ),
        Mistake(
            "min and max have changed places: the error comes out as 20%, whatever the KL is",
            lambda b, kl, target, horizon, n: b * (1 + 0.2 * n / horizon),
        ),
        Mistake(
            "min and max have changed places: the error comes out as -20%, whatever the KL is",
            lambda b, kl, target, horizon, n: b * (1 - 0.2 * n / horizon),
        ),
        Mistake(
            "the error is not clipped to 20% on either side",
            lambda b, kl, target, horizon, n: b * (1 + (kl / target - 1) * n / horizon),
        ),
        Mistake(
            "the error is clipped above only: a KL far below the target has to count -20% as well",
            lambda b, kl, target, horizon, n: b * (1 + min(kl / target - 1, 0.2) * n / horizon),
        ),
        Mistake(
            "the batch size is missing: the horizon is counted in sequences",
            lambda b, kl, target, horizon, n: b * (1 + _clip(kl / target - 1) / horizon),
        ),
        Mistake(
            "the step was added to the coefficient: it is a factor",
            lambda b, kl, target, horizon, n: b + _clip(kl / target - 1) * n / horizon,
        ),
        Mistake(
            "the error is the difference in nats: it is relative to the target",
            lambda b, kl, target, horizon, n: b * (1 + _clip(kl - target) * n / horizon),
        ),
        Mistake(
            "the ratio of KL and target was clipped without taking off the 1",
            lambda b, kl, target, horizon, n: b * (1 + _clip(kl / target) * n / horizon),
        ),
        Mistake(
            "the coefficient is never changed",
            lambda b, kl, target, horizon, n: b,
        ),
    ),
)
