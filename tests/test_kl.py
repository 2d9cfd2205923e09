"""KL estimators against torch.distributions and exact enumeration over a small softmax."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from minippo.kl import KL_ESTIMATORS, adapt_kl_coef, kl_abs, kl_full, kl_k1, kl_k2, kl_k3

V = 7
SAMPLED = {"kl": kl_k1, "abs": kl_abs, "mse": kl_k2, "k3": kl_k3}


def two_policies(seed: int = 0, distance: float = 1.0):
    """Log-softmaxed rows of policy and reference, (V,), in float64."""
    generator = torch.Generator().manual_seed(seed)
    ref_logits = torch.randn(V, generator=generator, dtype=torch.float64)
    logits = ref_logits + distance * torch.randn(V, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), ref_logits.log_softmax(-1)


def expectation(estimator, logprobs, ref_logprobs):
    """Σ_a π(a) estimator(a): exact, no sampling."""
    return (logprobs.exp() * estimator(logprobs, ref_logprobs)).sum()


def exact_kl(logprobs, ref_logprobs):
    return kl_divergence(Categorical(logits=logprobs), Categorical(logits=ref_logprobs))


def test_the_table_has_the_five_names():
    assert KL_ESTIMATORS == SAMPLED | {"full": kl_full}


def test_estimators_worked_by_hand():
    # π(a) = 1/2, π_ref(a) = 1/4: log-ratio ln 2 = 0.693147, ρ = π_ref / π = 1/2
    logprobs, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    expected = {"kl": 0.693147, "abs": 0.693147, "mse": 0.240227, "k3": 0.5 - 1 + 0.693147}
    for name, value in expected.items():
        assert KL_ESTIMATORS[name](logprobs, ref).item() == pytest.approx(value, abs=1e-6)
    # The other way round: log-ratio -ln 2, ρ = 2
    expected = {"kl": -0.693147, "abs": 0.693147, "mse": 0.240227, "k3": 2 - 1 - 0.693147}
    for name, value in expected.items():
        assert KL_ESTIMATORS[name](ref, logprobs).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator, seed):
    logprobs, ref = two_policies(seed)
    torch.testing.assert_close(expectation(estimator, logprobs, ref), exact_kl(logprobs, ref))


def test_k3_with_its_arguments_swapped_is_biased():
    logprobs, ref = two_policies()
    swapped = expectation(lambda p, q: kl_k3(q, p), logprobs, ref)
    exact = exact_kl(logprobs, ref)
    assert abs(swapped - exact) > 0.2 * exact


def test_the_mean_of_k2_is_half_the_second_moment_and_not_the_kl():
    logprobs, ref = two_policies()
    p, q = logprobs.exp().tolist(), ref.exp().tolist()
    log = torch.tensor(p, dtype=torch.float64).log() - torch.tensor(q, dtype=torch.float64).log()
    second_moment = sum(weight * value**2 for weight, value in zip(p, log.tolist()))
    mean = expectation(kl_k2, logprobs, ref)
    assert mean.item() == pytest.approx(second_moment / 2)
    assert abs(mean - exact_kl(logprobs, ref)) > 0.01


def test_k2_is_nearly_unbiased_close_by():
    # The bias is of third order in the distance, the KL of second: their ratio falls linearly.
    ratios = []
    for distance in (1e-1, 1e-2, 1e-3):
        logprobs, ref = two_policies(distance=distance)
        ratio = expectation(kl_k2, logprobs, ref) / exact_kl(logprobs, ref)
        ratios.append(abs(ratio.item() - 1))
    assert ratios[1] < 0.2 * ratios[0] and ratios[2] < 0.2 * ratios[1]


def test_abs_overstates_the_kl():
    logprobs, ref = two_policies()
    assert expectation(kl_abs, logprobs, ref) > exact_kl(logprobs, ref) + 0.1


def test_k1_can_be_negative_and_k3_cannot():
    logprobs, ref = two_policies()
    assert kl_k1(logprobs, ref).min() < 0
    assert kl_k3(logprobs, ref).min() >= 0 and kl_k2(logprobs, ref).min() >= 0


def test_k3_and_k2_vary_less_than_k1_close_by():
    logprobs, ref = two_policies(distance=0.1)

    def variance(estimator):
        second = expectation(lambda p, q: estimator(p, q).square(), logprobs, ref)
        return second - expectation(estimator, logprobs, ref).square()

    assert variance(kl_k3) < 0.1 * variance(kl_k1) and variance(kl_k2) < 0.1 * variance(kl_k1)


def test_k3_does_not_cancel_in_float32():
    # k3 = d²/2 to first order; exp(d) - 1 - d would be off by 1e-7 / 5e-9 = 20 times
    difference = torch.tensor([[1e-4]])
    got = kl_k3(torch.zeros(1, 1), difference)
    assert got.item() == pytest.approx(5.00017e-9, rel=1e-2)


@pytest.mark.parametrize("name", list(SAMPLED))
def test_estimators_are_0_where_the_policies_agree(name):
    logprobs, _ = two_policies()
    assert (KL_ESTIMATORS[name](logprobs, logprobs) == 0).all()


def test_kl_full_equals_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 3, 5, V, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits))
    got = kl_full(logits.log_softmax(-1), ref_logits.log_softmax(-1))
    assert got.shape == (3, 5)
    torch.testing.assert_close(got, expected)
    reverse = kl_full(ref_logits.log_softmax(-1), logits.log_softmax(-1))
    assert (reverse - expected).abs().min() > 1e-3  # the slip: weights of the reference


@pytest.mark.parametrize("ref, expected", [
    ((0.5, 0.5, 0.0), 0.0),       # both exclude the token: 0 log (0 / 0) = 0
    ((0.25, 0.25, 0.5), 0.693147),  # only the policy does: 2 * 1/2 ln(2) + 0 log (0 / 0.5)
])
def test_kl_full_takes_0_log_0_as_0(ref, expected):
    logprobs = torch.tensor([[[0.5, 0.5, 0.0]]]).log().requires_grad_()
    kl = kl_full(logprobs, torch.tensor([[ref]]).log())
    assert kl.item() == pytest.approx(expected, abs=1e-6)
    kl.sum().backward()
    assert logprobs.grad.isfinite().all()


def test_kl_full_is_infinite_where_only_the_reference_excludes():
    logprobs, ref = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[1.0, 0.0]]]).log()
    assert kl_full(logprobs, ref).item() == float("inf")


def test_gradient_of_kl_full_is_the_gradient_of_the_kl():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 1, 1, V, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    kl_full(ours.log_softmax(-1), ref_logits.log_softmax(-1)).sum().backward()
    kl_divergence(Categorical(logits=theirs), Categorical(logits=ref_logits)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_as_a_loss_k2_follows_the_kl_k1_nothing_and_k3_the_reverse_kl():
    _, ref = two_policies()
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def gradient(loss):
        leaf = logits.clone().requires_grad_()
        loss(leaf.log_softmax(-1)).backward()
        return leaf.grad

    def expected_loss(estimator):  # the samples are data: no gradient through their weights
        return gradient(lambda lp: (lp.detach().exp() * estimator(lp, ref)).sum())

    torch.testing.assert_close(expected_loss(kl_k2), gradient(lambda lp: exact_kl(lp, ref)))
    torch.testing.assert_close(expected_loss(kl_k3), gradient(lambda lp: exact_kl(ref, lp)))
    torch.testing.assert_close(expected_loss(kl_k1), torch.zeros(V, dtype=torch.float64))


@pytest.mark.parametrize("name", list(KL_ESTIMATORS))
def test_estimators_pass_gradcheck(name):
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: KL_ESTIMATORS[name](x[0].log_softmax(-1), x[1].log_softmax(-1)), pair
    )


@pytest.mark.parametrize("name", list(KL_ESTIMATORS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_estimators_keep_the_dtype(name, dtype):
    logprobs, ref = (x.expand(2, 3, V).to(dtype) for x in two_policies())
    got = KL_ESTIMATORS[name](logprobs, ref)
    assert got.dtype == dtype and got.isfinite().all()


@pytest.mark.parametrize("kl, factor", [
    (6.0, 1.0),                # on target: unchanged
    (6.6, 1 + 0.1 * 0.0512),   # 10% above: e = 0.1
    (5.4, 1 - 0.1 * 0.0512),
    (60.0, 1 + 0.2 * 0.0512),  # far above: e is clipped to 0.2
    (0.0, 1 - 0.2 * 0.0512),
    (-3.0, 1 - 0.2 * 0.0512),  # an estimate can be negative
])
def test_adapt_kl_coef_worked_by_hand(kl, factor):
    # batch / horizon = 512 / 10,000 = 0.0512
    arguments = {"target_kl": 6.0, "horizon": 10_000.0, "batch_size": 512}
    assert adapt_kl_coef(0.15, kl, **arguments) == pytest.approx(0.15 * factor, rel=1e-12)
    tensors = adapt_kl_coef(torch.tensor(0.15), torch.tensor(kl), **arguments)
    assert tensors.shape == () and tensors.item() == pytest.approx(0.15 * factor, rel=1e-6)


def test_adapt_kl_coef_gives_floats_for_floats_and_lets_nan_through():
    assert isinstance(adapt_kl_coef(0.1, 7.0, 6.0, 10_000.0, 64), float)
    assert math.isnan(adapt_kl_coef(0.1, math.nan, 6.0, 10_000.0, 64))
