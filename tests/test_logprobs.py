"""The shift and the gather against torch.distributions and F.cross_entropy."""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F

from minippo.logprobs import entropy_from_logits, gather_logprobs, response_window

B, R, V, Q, T = 2, 5, 7, 11, 16


def random_logits(dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, R, V, generator=generator, dtype=dtype)
    return logits, torch.randint(0, V, (B, R), generator=generator)


def test_response_window_starts_at_the_last_query_token():
    positions = torch.arange(T).expand(B, T)
    window = response_window(positions, R)
    assert window.tolist() == [[10, 11, 12, 13, 14]] * B  # token 15 predicts nothing we sampled
    assert torch.equal(window, positions[:, Q - 1 : T - 1])


def test_response_window_predicts_exactly_the_response():
    # A "model" that knows the next token: its window must name the response.
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    logits = F.one_hot(tokens.roll(-1, dims=1), V)
    assert torch.equal(response_window(logits, R).argmax(-1), tokens[:, Q:])
    assert not torch.equal(logits[:, Q:].argmax(-1), tokens[:, Q:])  # the slip: no shift


@pytest.mark.parametrize("response_length", [1, R, T - 1])
def test_response_window_keeps_further_axes(response_length):
    x = torch.randn(B, T, 3, 4)
    assert response_window(x, response_length).shape == (B, response_length, 3, 4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 2.0])
def test_gather_logprobs_equals_categorical(temperature):
    logits, tokens = random_logits()
    expected = Categorical(logits=logits / temperature).log_prob(tokens)
    torch.testing.assert_close(gather_logprobs(logits, tokens, temperature), expected)


def test_gather_logprobs_equals_cross_entropy_with_the_sign_turned():
    logits, tokens = random_logits()
    expected = -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(gather_logprobs(logits, tokens), expected)


def test_gather_logprobs_equals_plain_floats():
    logits, tokens = random_logits()
    got = gather_logprobs(logits, tokens, 0.7)
    for b in range(B):
        for t in range(R):
            z = [value / 0.7 for value in logits[b, t].tolist()]
            expected = z[tokens[b, t]] - math.log(sum(math.exp(value) for value in z))
            assert got[b, t].item() == pytest.approx(expected, rel=1e-12)


def test_gather_logprobs_of_all_tokens_sums_to_one():
    logits, tokens = random_logits()
    total = sum(gather_logprobs(logits, torch.full_like(tokens, v), 0.7).exp() for v in range(V))
    torch.testing.assert_close(total, torch.ones_like(total))


def test_gather_logprobs_forgets_a_shift_of_the_logits():
    logits, tokens = random_logits()
    shifted = gather_logprobs(logits + 100, tokens)
    torch.testing.assert_close(shifted, gather_logprobs(logits, tokens))


def test_gather_logprobs_survives_huge_logits():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]])
    assert gather_logprobs(logits, torch.tensor([[0]])).item() == 0.0
    assert gather_logprobs(logits, torch.tensor([[1]])).item() == -2e4


def test_gather_logprobs_leaves_the_logits_alone():
    logits, tokens = random_logits()
    before = logits.clone()
    gather_logprobs(logits, tokens, 0.5)
    assert torch.equal(logits, before)


def test_gradient_of_a_logprob_is_one_hot_minus_softmax_over_the_temperature():
    logits, tokens = random_logits()
    logits.requires_grad_()
    gather_logprobs(logits, tokens, 0.5).sum().backward()
    expected = (F.one_hot(tokens, V) - (logits.detach() / 0.5).softmax(-1)) / 0.5
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_entropy_equals_categorical(scale):
    logits, _ = random_logits()
    expected = Categorical(logits=logits * scale).entropy()
    torch.testing.assert_close(entropy_from_logits(logits * scale), expected)


def test_entropy_of_equal_logits_is_log_v_and_of_certainty_0():
    assert entropy_from_logits(torch.zeros(1, 1, V)).item() == pytest.approx(math.log(V))
    assert entropy_from_logits(torch.tensor([[[1e4, 0.0, 0.0]]])).item() == 0.0


def test_an_excluded_token_adds_no_entropy_and_no_nan():
    logits, _ = random_logits()
    excluded = logits.clone()
    excluded[..., 2] = -torch.inf
    excluded.requires_grad_()
    kept = logits[..., [0, 1, 3, 4, 5, 6]]
    entropy = entropy_from_logits(excluded)
    torch.testing.assert_close(entropy, Categorical(logits=kept).entropy())
    entropy.sum().backward()
    assert excluded.grad.isfinite().all() and (excluded.grad[..., 2] == 0).all()


def test_logprobs_and_entropy_pass_gradcheck():
    logits, tokens = random_logits()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: gather_logprobs(z, tokens, 0.7), logits)
    assert torch.autograd.gradcheck(entropy_from_logits, logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    logits, tokens = random_logits()
    logits = logits.to(dtype)
    for got in (gather_logprobs(logits, tokens, 0.7), entropy_from_logits(logits)):
        assert got.dtype == dtype and got.isfinite().all()


def test_nan_in_one_position_stays_there():
    logits, tokens = random_logits()
    dirty = logits.clone()
    dirty[0, 3] = torch.nan
    clean, got = gather_logprobs(logits, tokens), gather_logprobs(dirty, tokens)
    assert got.isnan().sum() == 1 and got[0, 3].isnan()
    assert torch.equal(got[1], clean[1]) and torch.equal(got[0, :3], clean[0, :3])
