"""The losses against F.cross_entropy, loops over floats, and gradients known by other means."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from minippo.losses import (
    lm_loss,
    policy_loss,
    ppo_objective,
    preference_loss,
    ranking_loss,
    value_loss,
)

NAN, INF = float("nan"), float("inf")
B, R, V, T = 3, 5, 7, 8
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def counted(*tensors: torch.Tensor):
    """The tokens that count, as tuples of Python floats."""
    return list(zip(*(x[MASK].tolist() for x in tensors)))


# --- language model --------------------------------------------------------------------------


def lm_case():
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    loss_mask = torch.arange(T) < torch.tensor([[8], [5], [3]])
    loss_mask[0, 3] = False
    return randn(B, T, V), tokens, loss_mask


def test_lm_loss_equals_cross_entropy_with_ignored_labels():
    logits, tokens, loss_mask = lm_case()
    labels = tokens.masked_fill(~loss_mask, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100)
    torch.testing.assert_close(lm_loss(logits, tokens, loss_mask), expected)
    unshifted = F.cross_entropy(logits.transpose(1, 2), tokens.masked_fill(~loss_mask, -100))
    assert (unshifted - expected).abs() > 1e-2  # the slip: no shift


def test_lm_loss_of_a_model_that_knows_the_next_token_is_0_and_of_none_log_v():
    _, tokens, loss_mask = lm_case()
    knows = 1e3 * F.one_hot(tokens.roll(-1, dims=1), V).double()
    assert lm_loss(knows, tokens, loss_mask).item() == 0
    uniform = torch.zeros(B, T, V, dtype=torch.float64)
    assert lm_loss(uniform, tokens, loss_mask).item() == pytest.approx(math.log(V))


def test_lm_loss_gradient_is_softmax_minus_one_hot_at_the_predicting_positions():
    logits, tokens, loss_mask = lm_case()
    logits.requires_grad_()
    lm_loss(logits, tokens, loss_mask).backward()
    predicting = F.pad(loss_mask[:, 1:], (0, 1))  # token t + 1 counts; the last predicts nothing
    expected = logits.detach().softmax(-1) - F.one_hot(tokens.roll(-1, dims=1), V)
    expected = expected * predicting.unsqueeze(-1) / predicting.sum()
    torch.testing.assert_close(logits.grad, expected)


def test_lm_loss_never_reads_masked_logits_or_ids():
    logits, tokens, loss_mask = lm_case()
    predicting = F.pad(loss_mask[:, 1:], (0, 1))
    dirty = logits.masked_fill(~predicting.unsqueeze(-1), NAN).requires_grad_()
    ids = tokens.masked_fill(~loss_mask, -100)
    loss = lm_loss(dirty, ids, loss_mask)
    torch.testing.assert_close(loss.detach(), lm_loss(logits, tokens, loss_mask), rtol=0, atol=0)
    loss.backward()
    assert dirty.grad.isfinite().all() and (dirty.grad[~predicting] == 0).all()


def test_lm_loss_forgets_whether_the_first_token_counts():
    logits, tokens, loss_mask = lm_case()
    other = loss_mask.clone()
    other[:, 0] = ~other[:, 0]
    assert torch.equal(lm_loss(logits, tokens, other), lm_loss(logits, tokens, loss_mask))


# --- reward model ----------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [None, [0.5, 0.0, 2.0]])
def test_preference_loss_equals_log_1_plus_exp_in_floats(margin):
    chosen, rejected = randn(2, 3).unbind()
    gaps = [c - r for c, r in zip(chosen.tolist(), rejected.tolist())]
    gaps = [gap - m for gap, m in zip(gaps, margin or [0, 0, 0])]
    expected = sum(math.log(1 + math.exp(-gap)) for gap in gaps) / 3
    margin = None if margin is None else torch.tensor(margin, dtype=torch.float64)
    assert preference_loss(chosen, rejected, margin).item() == pytest.approx(expected, rel=1e-12)


def test_preference_loss_of_equal_scores_is_log_2():
    assert preference_loss(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(math.log(2))


def test_preference_loss_sees_differences_only():
    chosen, rejected = randn(2, 3).unbind()
    shifted = preference_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(shifted, preference_loss(chosen, rejected))


def test_preference_loss_pushes_the_chosen_up_by_the_doubt():
    # dL/ds_chosen = -σ(-gap) / B: the probability the model gives to the wrong order
    chosen, rejected = (x.requires_grad_() for x in randn(2, 3).unbind())
    preference_loss(chosen, rejected).backward()
    doubt = torch.sigmoid(rejected - chosen).detach()
    torch.testing.assert_close(chosen.grad, -doubt / 3)
    torch.testing.assert_close(rejected.grad, doubt / 3)


def test_a_margin_asks_for_a_wider_gap():
    chosen, rejected = torch.tensor([2.0]), torch.tensor([0.0])
    with_margin = preference_loss(chosen, rejected, torch.tensor([1.0]))
    torch.testing.assert_close(with_margin, preference_loss(torch.tensor([1.0]), rejected))


def test_preference_loss_stays_finite_for_a_large_wrong_gap():
    chosen = torch.tensor([-1e4]).requires_grad_()
    loss = preference_loss(chosen, torch.tensor([1e4]))
    loss.backward()
    assert loss.item() == 2e4 and chosen.grad.item() == -1
    assert preference_loss(torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_ranking_loss_is_the_mean_over_all_pairs_and_prompts(count):
    scores = randn(B, count)
    losses = [
        math.log(1 + math.exp(worse - better))
        for row in scores.tolist()
        for better, worse in itertools.combinations(row, 2)
    ]
    assert len(losses) == B * count * (count - 1) // 2
    assert ranking_loss(scores).item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_ranking_loss_of_two_answers_is_the_preference_loss():
    scores = randn(B, 2)
    torch.testing.assert_close(ranking_loss(scores), preference_loss(scores[:, 0], scores[:, 1]))


def test_ranking_loss_works_where_the_scores_are_whatever_the_default_device():
    scores = randn(4, 3)
    expected = ranking_loss(scores)
    with torch.device("meta"):  # new tensors go to another device unless they are told
        torch.testing.assert_close(ranking_loss(scores), expected)


def test_ranking_loss_wants_the_best_first():
    ordered = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    losses = [ranking_loss(ordered[:, list(p)]).item() for p in itertools.permutations(range(4))]
    assert min(losses) == losses[0] and max(losses) == losses[-1]


def test_ranking_loss_of_untied_prompts_is_the_mean_of_their_losses():
    scores = randn(B, 4)
    alone = torch.stack([ranking_loss(row.unsqueeze(0)) for row in scores])
    torch.testing.assert_close(ranking_loss(scores), alone.mean())


# --- policy ----------------------------------------------------------------------------------


def policy_case():
    old = -randn(B, R, seed=1).abs()
    return old + 0.3 * randn(B, R, seed=2), old, randn(B, R, seed=3)


@pytest.mark.parametrize("clip_range", [0.1, 0.2, INF])
def test_policy_loss_and_stats_equal_a_loop_over_floats(clip_range):
    case = policy_case()
    loss, stats = policy_loss(*case, MASK, clip_range)
    losses, kls, clips, ratios = [], [], [], []
    for new, old, advantage in counted(*case):
        ratio = math.exp(new - old)
        bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
        losses.append(-min(advantage * ratio, advantage * bounded))
        kls.append(ratio - 1 - (new - old))
        clips.append(advantage * bounded < advantage * ratio)
        ratios.append(ratio)
    expected = {"approx_kl": kls, "clip_frac": clips, "ratio": ratios}
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)
    assert stats.keys() == expected.keys()
    for name, terms in expected.items():
        assert stats[name].item() == pytest.approx(sum(terms) / len(terms), rel=1e-10)


# One token, A = ±1, eps = 0.2. With L = -A ρ the gradient dL/dlogπ is -A ρ, or 0 if clipped.
@pytest.mark.parametrize("advantage, ratio, clipped", [
    (1.0, 0.7, False),   # good token became rarer: pull it back up, no clip
    (1.0, 1.1, False),   # inside
    (1.0, 1.3, True),    # good and already frequent enough: stop
    (-1.0, 0.7, True),   # bad and already rare enough: stop
    (-1.0, 0.9, False),  # inside
    (-1.0, 1.3, False),  # bad token became more frequent: push it down, no clip
])
def test_the_clip_stops_the_gradient_only_on_the_side_it_pushes_to(advantage, ratio, clipped):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = policy_loss(logprobs, old, torch.full_like(old, advantage), mask, 0.2)
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(0 if clipped else -advantage * ratio, rel=1e-12)
    assert stats["clip_frac"].item() == clipped


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
    _, old, advantages = policy_case()
    new = old.clone().requires_grad_()
    loss, stats = policy_loss(new, old, advantages, MASK, 0.2)
    loss.backward()
    reinforce = old.clone().requires_grad_()
    (-(advantages * reinforce)[MASK].mean()).backward()
    torch.testing.assert_close(new.grad, reinforce.grad)
    assert [stats[name].item() for name in ("ratio", "approx_kl", "clip_frac")] == [1, 0, 0]


def test_without_clipping_it_is_the_plain_surrogate():
    new, old, advantages = policy_case()
    surrogate = -(advantages * (new - old).exp())[MASK].mean()
    torch.testing.assert_close(policy_loss(new, old, advantages, MASK, INF)[0], surrogate)


def test_clipping_never_lowers_the_loss():
    case = policy_case()
    losses = [policy_loss(*case, MASK, clip_range)[0].item() for clip_range in (INF, 0.4, 0.2, 0.1)]
    assert losses == sorted(losses)


def test_one_gradient_step_makes_good_tokens_likelier():
    logits = randn(V).requires_grad_()
    logprob = logits.log_softmax(-1)[2].view(1, 1)
    one, mask = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    policy_loss(logprob, logprob.detach(), one, mask, 0.2)[0].backward()
    after = (logits - 0.1 * logits.grad).log_softmax(-1)[2]
    assert after > logprob.item()


def test_expected_approx_kl_is_the_exact_kl_of_old_and_new():
    # All tokens of a vocabulary stand in a row; each probability is a multiple of 1/8, so
    # repeating a token 8 p times gives the exact expectation under the old policy.
    old = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    new = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64)
    tokens = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    _, stats = policy_loss(
        new.log()[tokens], old.log()[tokens], torch.zeros(1, 8).double(), everything, 0.2
    )
    exact = sum(p * math.log(p / q) for p, q in zip(old.tolist(), new.tolist()))
    assert stats["approx_kl"].item() == pytest.approx(exact, rel=1e-12)


# --- critic ----------------------------------------------------------------------------------


def value_case():
    old = randn(B, R, seed=1)
    return old + 0.3 * randn(B, R, seed=2), old, old + randn(B, R, seed=3)


@pytest.mark.parametrize("clip_range", [0.1, 0.2, INF])
def test_value_loss_and_stats_equal_a_loop_over_floats(clip_range):
    case = value_case()
    loss, stats = value_loss(*case, MASK, clip_range)
    losses, errors, clips = [], [], []
    for value, old, target in counted(*case):
        bounded = min(max(value, old - clip_range), old + clip_range)
        errors.append((value - target) ** 2)
        losses.append(0.5 * max(errors[-1], (bounded - target) ** 2))
        clips.append((bounded - target) ** 2 > errors[-1])
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert stats.keys() == {"clip_frac", "error"}
    assert stats["error"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    assert stats["clip_frac"].item() == pytest.approx(sum(clips) / len(clips), rel=1e-12)


# Old value 0, eps 0.2: value, return, expected gradient (V - R, or 0 where the clipped error wins).
@pytest.mark.parametrize("value, target, gradient", [
    (0.5, 1.0, 0.0),     # moved past the range towards the return: stop
    (-0.5, -1.0, 0.0),
    (0.5, -1.0, 1.5),    # moved away from the return: pull back, no clip
    (-0.5, 1.0, -1.5),
    (0.1, 1.0, -0.9),    # inside
    (-0.1, 1.0, -1.1),
    (0.5, 0.45, 0.0),    # beyond the range, the return between: clipped error is the larger
])
def test_value_clip_gradient_by_hand(value, target, gradient):
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = value_loss(values, old, torch.full_like(old, target), mask, 0.2)
    loss.backward()
    assert values.grad.item() == pytest.approx(gradient, rel=1e-12)
    assert stats["clip_frac"].item() == (gradient == 0)


def test_value_loss_without_clipping_is_half_the_mean_squared_error():
    values, old, returns = value_case()
    expected = 0.5 * F.mse_loss(values[MASK], returns[MASK])
    loss, stats = value_loss(values, old, returns, MASK, INF)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats["error"], 2 * loss)


def test_rounding_inside_the_range_never_counts_as_clipped():
    # |V - V_old| < 0.2; V_old + (V - V_old), rounded twice, would often miss V by one bit
    old, values = (0.1 * randn(64, 64, seed=seed).float().tanh() for seed in (1, 2))
    assert (old + (values - old) != values).any()
    everything = torch.ones_like(old, dtype=torch.bool)
    _, stats = value_loss(values, old, randn(64, 64, seed=3).float(), everything, 0.2)
    assert stats["clip_frac"].item() == 0


# --- both token losses -----------------------------------------------------------------------

TOKEN_LOSSES = pytest.mark.parametrize(
    "loss_function, case", [(policy_loss, policy_case), (value_loss, value_case)]
)


@TOKEN_LOSSES
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_garbage_at_masked_positions_reaches_neither_value_nor_gradient(
    loss_function, case, garbage, which
):
    def run(fill):
        inputs = [x.masked_fill(~MASK, fill) if i in which else x for i, x in enumerate(case())]
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss, stats = loss_function(*leaves, MASK, 0.2)
        loss.backward()
        assert all((leaf.grad[~MASK] == 0).all() for leaf in leaves)
        return [loss.detach(), *(leaf.grad for leaf in leaves), *stats.values()]

    for clean, dirty in zip(run(0.0), run(garbage)):
        assert torch.equal(clean, dirty)


@TOKEN_LOSSES
def test_a_wider_padding_changes_nothing(loss_function, case):
    loss, stats = loss_function(*case(), MASK, 0.2)
    padded = [F.pad(x, (0, 4), value=5.0) for x in case()]
    wider, wider_stats = loss_function(*padded, F.pad(MASK, (0, 4)), 0.2)
    torch.testing.assert_close(wider, loss)
    torch.testing.assert_close(wider_stats, stats)


@TOKEN_LOSSES
def test_the_loss_is_a_mean_over_tokens_not_over_rows(loss_function, case):
    loss, _ = loss_function(*case(), MASK, 0.2)
    rows = [
        loss_function(*(x[b : b + 1] for x in case()), MASK[b : b + 1], 0.2)[0] for b in range(B)
    ]
    counts = MASK.sum(1)
    weighted = sum(row * n for row, n in zip(rows, counts)) / counts.sum()
    torch.testing.assert_close(loss, weighted)
    assert (loss - sum(rows) / B).abs() > 1e-3  # the slip: mean of row means


@TOKEN_LOSSES
def test_the_stats_are_detached_scalars(loss_function, case):
    inputs = [x.requires_grad_() for x in case()]
    loss, stats = loss_function(*inputs, MASK, 0.2)
    assert loss.requires_grad and loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in stats.values())


@TOKEN_LOSSES
@DTYPES
def test_token_losses_keep_the_dtype(loss_function, case, dtype):
    loss, stats = loss_function(*(x.to(dtype) for x in case()), MASK, 0.2)
    assert [value.dtype for value in (loss, *stats.values())] == [dtype] * (1 + len(stats))
    assert loss.isfinite()


@TOKEN_LOSSES
def test_token_losses_leave_their_inputs_alone(loss_function, case):
    inputs, before = case(), case()
    loss_function(*inputs, MASK, 0.2)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@TOKEN_LOSSES
def test_token_losses_pass_gradcheck(loss_function, case):
    new, *fixed = case()
    new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_function(x, *fixed, MASK, 0.2)[0], new)


@DTYPES
def test_the_other_losses_keep_the_dtype(dtype):
    logits, tokens, loss_mask = lm_case()
    scores = randn(B, 4).to(dtype)
    losses = [
        lm_loss(logits.to(dtype), tokens, loss_mask),
        preference_loss(scores[:, 0], scores[:, 1], scores[:, 2]),
        ranking_loss(scores),
        ppo_objective(*randn(3).to(dtype), 0.1, 0.05),
    ]
    assert [loss.dtype for loss in losses] == [dtype] * 4


def test_the_other_losses_pass_gradcheck():
    _, tokens, loss_mask = lm_case()
    pairs, scores = randn(2, 3).requires_grad_(), randn(2, 4).requires_grad_()
    logits = randn(B, T, V).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: lm_loss(x, tokens, loss_mask), logits)
    assert check(lambda x: preference_loss(x[0], x[1]), pairs)
    assert check(ranking_loss, scores)


# --- the sum ---------------------------------------------------------------------------------


def test_ppo_objective_adds_the_critic_and_the_kl_with_plus_signs():
    # 2 + 0.1 * 3 + 0.05 * 4 = 2.5
    parts = [torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 4.0)]
    total = ppo_objective(*parts, vf_coef=0.1, kl_loss_coef=0.05)
    total.backward()
    assert total.item() == pytest.approx(2.5)
    assert [part.grad.item() for part in parts] == pytest.approx([1.0, 0.1, 0.05])
