"""Properties that hold for any input, looked for by hypothesis: parser, padding, masks, losses.

Where there is an oracle it is plain Python over floats, written from the definition. The examples
are the same in every run.
"""

import json
import math
import statistics
from itertools import combinations, product

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minippo.advantages import gae
from minippo.batching import left_pad, right_pad
from minippo.hh import KINDS, BadPair, format_dialogue, load_preferences, parse_dialogue, parse_pair
from minippo.kl import adapt_kl_coef, kl_abs, kl_full, kl_k1, kl_k2, kl_k3
from minippo.losses import lm_loss, policy_loss, preference_loss, ranking_loss, value_loss
from minippo.masking import masked_mean, masked_var, masked_whiten, response_mask
from minippo.preferences import group_by_prompt, ranking_to_pairs, ratings_to_pairs

# A busy machine makes examples slowly: that is no finding about the code.
SLOW = [HealthCheck.too_slow]
PROPERTY = settings(
    derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=SLOW
)
WITH_FILES = settings(PROPERTY, max_examples=15)
GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e300])

# --- what is drawn ----------------------------------------------------------------------------

sizes = st.integers(1, 5)
permutations = st.integers(2, 6).flatmap(lambda n: st.permutations(range(n)))


def numbers(bound: float = 10.0):
    """Ordinary floats, none so small that its square is 0."""
    return st.floats(-bound, bound).map(lambda x: round(x, 6))


@st.composite
def tensors(draw, count: int, element=None, rows=sizes, columns=sizes):
    """`count` float64 tensors of one shape (B, R)."""
    shape = (draw(rows), draw(columns))
    size = math.prod(shape)
    flat = st.lists(numbers() if element is None else element, min_size=size, max_size=size)
    return [torch.tensor(draw(flat), dtype=torch.float64).view(shape) for _ in range(count)]


@st.composite
def masked_tensors(draw, count: int, least: int = 1, **options):
    """`count` tensors (B, R) and a mask with any holes and at least `least` tokens that count."""
    values = draw(tensors(count, **options))
    bits = st.lists(st.booleans(), min_size=values[0].numel(), max_size=values[0].numel())
    mask = torch.tensor(draw(bits)).view(values[0].shape)
    assume(mask.sum() >= least)
    return *values, mask


# Text that is likely to hold tags, whole and broken, and everything else besides.
TAGS = ["\n\nHuman:", "\n\nAssistant:"]
spaces = st.sampled_from(["", " ", "\n", "\n\n", " \t"])
pieces = st.sampled_from([*TAGS, "\n", "\n\n", "Human", "Assistant", "Human:", ":", " ", "\t", "a"])
texts = st.lists(pieces | st.text(max_size=6), max_size=9).map("".join)
clean_texts = texts.map(str.strip).filter(lambda text: text and not any(t in text for t in TAGS))
histories = st.lists(st.tuples(clean_texts, clean_texts).map(list), max_size=3)
turns = st.tuples(spaces, clean_texts, spaces).map("".join)
dialogues = st.lists(st.tuples(turns, turns), min_size=1, max_size=3).map(
    lambda pairs: "".join(f"{TAGS[0]}{query}{TAGS[1]}{answer}" for query, answer in pairs)
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just("half \ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
raw_rows = any_json | st.dictionaries(
    st.sampled_from(["chosen", "rejected", "margin", "id"]), dialogues | any_json
)


# --- parser -----------------------------------------------------------------------------------


@PROPERTY
@given(texts | dialogues)
def test_any_text_is_a_dialogue_or_a_bad_pair(text):
    try:
        turns = parse_dialogue(text)
    except BadPair as error:
        assert error.reason in KINDS
        return
    roles = [role for role, _ in turns]
    assert roles == ["Human", "Assistant"] * (len(turns) // 2) and turns
    assert all(said and said == said.strip() and said in text for _, said in turns)


@PROPERTY
@given(raw_rows)
def test_any_object_is_a_pair_or_a_bad_pair(row):
    try:
        pair = parse_pair(row)
    except BadPair as error:
        assert error.reason in KINDS and str(error)
        return
    assert pair["chosen"] != pair["rejected"]
    for side in ("chosen", "rejected"):
        assert pair[side] == parse_dialogue(row[side])[-1][1]


@PROPERTY
@given(histories, clean_texts, clean_texts, clean_texts)
def test_what_was_formatted_is_parsed_back(history, question, chosen, rejected):
    row = {
        "chosen": format_dialogue(question, chosen, history),
        "rejected": format_dialogue(question, rejected, history),
    }
    said = [text for turn in [*history, [question, chosen]] for text in turn]
    assert [text for _, text in parse_dialogue(row["chosen"])] == said
    if chosen == rejected:
        with pytest.raises(BadPair, match="identical_answers"):
            parse_pair(row)
        return
    sides = {"chosen": chosen, "rejected": rejected}
    assert parse_pair(row) == {"instruction": question, "history": history, **sides}


@PROPERTY
@given(dialogues)
def test_formatting_what_was_parsed_changes_nothing_more(text):
    try:
        said = [words for _, words in parse_dialogue(text)]
    except BadPair:  # white space before a turn made a tag of it
        return
    *earlier, question, answer = said
    again = format_dialogue(question, answer, list(zip(earlier[::2], earlier[1::2])))
    assert [words for _, words in parse_dialogue(again)] == said


@WITH_FILES
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\r\n", codec="utf-8")) | raw_rows.map(json.dumps),
        max_size=6,
    )
)
def test_a_file_of_any_lines_is_loaded_and_every_line_counted(tmp_path_factory, lines):
    good = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    written = [json.dumps(good), *lines]  # a line feed inside a row is escaped there
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_text("\n".join(written), encoding="utf-8", newline="")
    rows, report = load_preferences(path, on_error="skip")
    assert len(rows) == report.accepted
    assert report.accepted + sum(report.refused.values()) == sum(bool(x.strip()) for x in written)


# --- padding and masks ------------------------------------------------------------------------

token_rows = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4)


@PROPERTY
@given(token_rows, st.integers(0, 3))
def test_padding_keeps_every_token_and_points_it_to_its_side(rows, pad_id):
    for pad, order in ((left_pad, 1), (right_pad, -1)):
        ids, mask = pad(rows, pad_id)
        assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
        assert [ids[b][mask[b]].tolist() for b in range(len(rows))] == rows
        assert (ids[~mask] == pad_id).all()
        assert all(row == sorted(row)[::order] for row in mask.tolist())


@PROPERTY
@given(token_rows, st.integers(0, 3), st.integers(0, 3))
def test_what_follows_the_first_eos_never_reaches_the_response_mask(rows, eos, pad_id):
    response, real = right_pad(rows, pad_id)
    mask = response_mask(response, eos)
    for row, counted, is_real in zip(rows, mask.tolist(), real.tolist()):
        length = row.index(eos) + 1 if eos in row else len(row)
        assert counted[:length] == [True] * length
        if eos in row:
            assert not any(counted[length:])
        elif pad_id != eos:  # without EOS the width of the batch ends the row
            assert all(counted) and sum(is_real) == length
    other = torch.where(mask, response, 3 - response)
    assert torch.equal(response_mask(other, eos), mask)


def z_scores(x: list) -> list:
    mean, deviation = statistics.fmean(x), math.sqrt(statistics.variance(x) + 1e-8)
    return [(value - mean) / deviation for value in x]


# Ours, and the same over the floats that count by the statistics module.
REDUCTIONS = {
    "mean": (masked_mean, lambda x: [statistics.fmean(x)]),
    "variance": (masked_var, lambda x: [statistics.variance(x)]),
    "biased variance": (lambda x, m: masked_var(x, m, False), lambda x: [statistics.pvariance(x)]),
    "whitened": (masked_whiten, z_scores),
}


@pytest.mark.parametrize("name", list(REDUCTIONS))
@PROPERTY
@given(masked_tensors(1, least=2), GARBAGE)
def test_reductions_read_the_tokens_that_count_and_no_others(name, case, garbage):
    x, mask = case
    ours, oracle = REDUCTIONS[name]
    leaf = x.masked_fill(~mask, garbage).requires_grad_()
    result = ours(leaf, mask)
    counted = result[mask] if result.ndim else result.view(1)
    assert counted.tolist() == pytest.approx(oracle(x[mask].tolist()), rel=1e-6, abs=1e-6)
    result.sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[~mask] == 0).all()
    if result.ndim:
        assert (result[~mask] == 0).all()


@PROPERTY
@given(masked_tensors(1, least=3), numbers(100.0), st.floats(0.1, 100.0), st.randoms())
def test_whitening_forgets_shift_scale_order_and_shape(case, shift, scale, random):
    x, mask = case
    assume(masked_var(x, mask) > 0.01)  # the 1e-8 under the root is seen below that
    whitened = masked_whiten(x, mask)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(masked_whiten(scale * x + shift, mask), whitened, **close)
    torch.testing.assert_close(masked_whiten(-x, mask), -whitened)
    torch.testing.assert_close(masked_whiten(whitened, mask), whitened, **close)
    order = torch.tensor(random.sample(range(x.numel()), x.numel()))
    shuffled = masked_whiten(x.view(1, -1)[:, order], mask.view(1, -1)[:, order])
    torch.testing.assert_close(shuffled, whitened.view(1, -1)[:, order])
    alone = x[mask].view(1, -1)
    torch.testing.assert_close(
        masked_whiten(alone, torch.ones_like(alone, dtype=torch.bool))[0], whitened[mask]
    )


# --- advantages -------------------------------------------------------------------------------

discounts = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])


def mixture_of_k_step_advantages(rewards: list, values: list, gamma: float, lam: float) -> list:
    """(1 − λ) Σ_k λ^{k−1} A^(k), the last with all the weight that is left: GAE by its definition.

    A^(k)_t = r_t + γ r_{t+1} + ... + γ^{k−1} r_{t+k−1} + γ^k V_{t+k} − V_t,  V after the end is 0.
    """
    advantages = []
    for t in range(len(rewards)):
        left = len(rewards) - t
        total = 0.0
        for k in range(1, left + 1):
            ahead = values[t + k] if k < left else 0.0
            k_step = sum(gamma**l * rewards[t + l] for l in range(k)) + gamma**k * ahead - values[t]
            total += (lam ** (k - 1) if k == left else (1 - lam) * lam ** (k - 1)) * k_step
        advantages.append(total)
    return advantages


@PROPERTY
@given(masked_tensors(2), discounts, discounts, GARBAGE)
def test_gae_is_the_mixture_of_all_k_step_advantages(case, gamma, lam, garbage):
    rewards, values, mask = case
    filled = (x.masked_fill(~mask, garbage) for x in (rewards, values))
    advantages, returns = gae(*filled, mask, gamma, lam)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for b in range(len(mask)):
        counted = rewards[b][mask[b]].tolist(), values[b][mask[b]].tolist()
        expected = mixture_of_k_step_advantages(*counted, gamma, lam)
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        targets = [a + v for a, v in zip(expected, counted[1])]
        assert returns[b][mask[b]].tolist() == pytest.approx(targets, rel=1e-9, abs=1e-9)


@PROPERTY
@given(masked_tensors(2), discounts, discounts, st.integers(0, 5), GARBAGE, st.data())
def test_gae_forgets_holes_padding_and_company(case, gamma, lam, place, garbage, data):
    rewards, values, mask = case
    place = min(place, mask.shape[1])

    def with_hole(x, fill):
        hole = torch.full((len(x), 1), fill, dtype=x.dtype)
        return torch.cat([x[:, :place], hole, x[:, place:]], dim=1)

    plain = gae(rewards, values, mask, gamma, lam)
    wider = [with_hole(x, garbage) for x in (rewards, values)]
    kept = with_hole(torch.ones_like(mask), False)[0]  # a hole inside, or padding at either end
    rows = data.draw(st.lists(st.sampled_from(range(len(mask))), min_size=1, unique=True))
    for ours, holed in zip(plain, gae(*wider, with_hole(mask, False), gamma, lam)):
        assert torch.equal(holed[:, kept], ours)
    for ours, part in zip(plain, gae(rewards[rows], values[rows], mask[rows], gamma, lam)):
        assert torch.equal(part, ours[rows])


@PROPERTY
@given(masked_tensors(4), discounts, discounts, numbers(3.0))
def test_gae_is_linear_in_rewards_and_values(case, gamma, lam, factor):
    *pair, more_rewards, more_values, mask = case
    both = pair[0] + factor * more_rewards, pair[1] + factor * more_values
    parts = zip(gae(*pair, mask, gamma, lam), gae(more_rewards, more_values, mask, gamma, lam))
    for together, (one, other) in zip(gae(*both, mask, gamma, lam), parts):
        torch.testing.assert_close(together, one + factor * other, rtol=1e-9, atol=1e-9)


# --- KL ---------------------------------------------------------------------------------------


@PROPERTY
@given(tensors(2))
def test_kl_estimators_have_their_signs_and_symmetries(pair):
    p, q = pair
    assert torch.equal(kl_k1(p, q), -kl_k1(q, p)) and torch.equal(kl_k1(p, q) > 0, p > q)
    for estimator in (kl_abs, kl_k2):
        assert torch.equal(estimator(p, q), estimator(q, p))
    by_hand = [math.expm1(-d) + d for d in (p - q).flatten().tolist()]
    assert kl_k3(p, q).flatten().tolist() == pytest.approx(by_hand, rel=1e-6, abs=1e-12)
    for estimator in (kl_abs, kl_k2, kl_k3):
        assert (estimator(p, q) >= 0).all()
    for estimator in (kl_k1, kl_abs, kl_k2, kl_k3):
        assert torch.equal(estimator(p, q) == 0, p == q)


@PROPERTY
@given(tensors(2, columns=st.integers(2, 5)), numbers(), st.randoms())
def test_kl_full_is_a_divergence_of_distributions(pair, shift, random):
    logits, ref_logits = pair
    p, q = (x.log_softmax(-1)[None] for x in pair)
    kl = kl_full(p, q)
    by_hand = [
        math.fsum(math.exp(a) * (a - b) for a, b in zip(*rows))
        for rows in zip(p[0].tolist(), q[0].tolist())
    ]
    assert kl[0].tolist() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    assert (kl >= -1e-12).all() and (kl_full(p, p) == 0).all()
    apart = (p - q).abs().amax(-1) > 1e-3
    assert (kl[apart] > 0).all()
    order = random.sample(range(p.shape[-1]), p.shape[-1])
    torch.testing.assert_close(kl_full(p[..., order], q[..., order]), kl)
    shifted = kl_full((logits + shift).log_softmax(-1)[None], q)
    torch.testing.assert_close(shifted, kl, rtol=1e-6, atol=1e-9)


@PROPERTY
@given(st.floats(1e-3, 10), st.floats(-50, 50), st.floats(-50, 50), st.integers(1, 1000))
def test_the_adaptive_coefficient_moves_little_and_the_right_way(coef, kl, other, batch_size):
    target, horizon = 6.0, 10_000.0
    arguments = {"target_kl": target, "horizon": horizon, "batch_size": batch_size}
    moved = adapt_kl_coef(coef, kl, **arguments)
    assert abs(moved / coef - 1) <= 0.2 * batch_size / horizon * (1 + 1e-9)
    assert (moved > coef) == (kl > target * (1 + 1e-12)) or abs(kl - target) < 1e-9
    low, high = sorted([kl, other])
    assert adapt_kl_coef(coef, low, **arguments) <= adapt_kl_coef(coef, high, **arguments)


# --- losses of the reward model ---------------------------------------------------------------

extremes = st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4, 88.0, -104.0])
scores = tensors(1, element=numbers() | extremes, columns=st.integers(2, 5)).map(lambda x: x[0])


@PROPERTY
@given(scores, st.data())
def test_ranking_loss_sees_differences_within_a_prompt_only(scores, data):
    loss = ranking_loss(scores)
    pairs = list(combinations(range(scores.shape[1]), 2))
    gaps = [row[i] - row[j] for row in scores.tolist() for i, j in pairs]
    assert loss.item() >= 0
    # −log σ(d) + log σ(−d) = −d: turning every ranking round changes the loss by the mean gap
    turned = ranking_loss(scores.flip(1)) - loss
    assert turned.item() == pytest.approx(statistics.fmean(gaps), rel=1e-9, abs=1e-9)
    count = len(scores)
    shift = torch.tensor(data.draw(st.lists(numbers(1e3), min_size=count, max_size=count)))
    rows = data.draw(st.permutations(range(count)))
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ranking_loss(scores + shift.double()[:, None]), loss, **close)
    torch.testing.assert_close(ranking_loss(scores[rows]), loss)
    torch.testing.assert_close(ranking_loss(torch.cat([scores, scores])), loss)


@PROPERTY
@given(scores, st.data())
def test_a_wider_gap_in_the_right_order_never_costs(scores, data):
    better = data.draw(st.integers(0, scores.shape[1] - 1))
    raised = scores.clone()
    raised[:, : better + 1] += 1.0  # every answer down to this one moves away from those below
    assert ranking_loss(raised) <= ranking_loss(scores) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PROPERTY
@given(scores)
def test_reward_losses_and_their_gradients_are_finite_for_any_gap(dtype, scores):
    for loss_function in (
        ranking_loss,
        lambda s: preference_loss(s[:, 0], s[:, 1], s[:, -1].abs()),
    ):
        leaf = scores.to(dtype).requires_grad_()
        loss = loss_function(leaf)
        loss.backward()
        assert loss.isfinite() and loss >= 0 and leaf.grad.isfinite().all()


@PROPERTY
@given(tensors(3, rows=st.just(1)).map(lambda t: [x[0] for x in t]), numbers(100.0))
def test_preference_loss_turns_round_with_its_arguments(case, shift):
    chosen, rejected, margin = case
    gap = (chosen - rejected).mean()
    turned = preference_loss(rejected, chosen) - preference_loss(chosen, rejected)
    torch.testing.assert_close(turned, gap)
    with_margin = preference_loss(chosen, rejected, margin)
    torch.testing.assert_close(with_margin, preference_loss(chosen - margin, rejected))
    shifted = preference_loss(chosen + shift, rejected + shift, margin)
    torch.testing.assert_close(shifted, with_margin, rtol=1e-6, atol=1e-9)


# --- token losses -----------------------------------------------------------------------------

eps = st.sampled_from([0.0, 0.1, 0.2, 0.9, math.inf])


@PROPERTY
@given(masked_tensors(3, element=numbers(3.0)), eps, st.floats(0.1, 10), GARBAGE, st.data())
def test_policy_loss_keeps_its_invariances(case, clip_range, scale, garbage, data):
    *inputs, mask = case
    new, old, advantages = inputs
    loss, _ = policy_loss(*inputs, mask, clip_range)
    plain = masked_mean(-advantages * (new - old).exp(), mask)
    assert loss >= plain - 1e-9 * (1 + plain.abs())  # clipping is pessimistic
    if math.isinf(clip_range):
        torch.testing.assert_close(loss, plain)
    else:  # no token gains more than from a ratio at the end of the range
        best = masked_mean(-advantages * (1 + clip_range * advantages.sign()), mask)
        assert loss >= best - 1e-9
    shifted, _ = policy_loss(new - 2, old - 2, advantages, mask, clip_range)
    torch.testing.assert_close(shifted, loss, rtol=1e-6, atol=1e-9)
    scaled, _ = policy_loss(new, old, scale * advantages, mask, clip_range)
    torch.testing.assert_close(scaled, scale * loss)
    order = data.draw(st.permutations(range(mask.numel())))
    moved = [x.masked_fill(~mask, garbage).view(1, -1)[:, order] for x in inputs]
    shuffled, _ = policy_loss(*moved, mask.view(1, -1)[:, order], clip_range)
    torch.testing.assert_close(shuffled, loss)
    nothing, _ = policy_loss(new, old, torch.zeros_like(old), mask, clip_range)
    assert nothing == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PROPERTY
@given(masked_tensors(3, element=numbers() | extremes), eps)
def test_a_broken_policy_gradient_always_shows_in_the_statistics(dtype, case, clip_range):
    # exp overflows at 88 in float32: then the ratio is infinite and training is stopped by name
    *inputs, mask = case
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    loss, stats = policy_loss(*leaves, mask, clip_range)
    loss.backward()
    gradients = torch.cat([leaf.grad.flatten() for leaf in leaves])
    shown = torch.stack([loss.detach(), *stats.values()])
    assert gradients.isfinite().all() or not shown.isfinite().all()
    assert 0 <= stats["clip_frac"] <= 1
    apart = (inputs[0] - inputs[1]).to(dtype)[mask]
    if apart.max() < 60 and inputs[2].abs().max() <= 1e4:  # e^60 is far from the largest float
        assert shown.isfinite().all()


@PROPERTY
@given(masked_tensors(3), eps, numbers(), GARBAGE, st.data())
def test_value_loss_keeps_its_invariances(case, clip_range, shift, garbage, data):
    *inputs, mask = case
    loss, stats = value_loss(*inputs, mask, clip_range)
    values, _, returns = (x[mask] for x in inputs)
    squared = 0.5 * F.mse_loss(values, returns)
    assert loss >= squared * (1 - 1e-9) >= 0
    if math.isinf(clip_range):
        torch.testing.assert_close(loss, squared)
    torch.testing.assert_close(stats["error"], 2 * squared)
    shifted, _ = value_loss(*(x + shift for x in inputs), mask, clip_range)
    torch.testing.assert_close(shifted, loss, rtol=1e-6, atol=1e-6)
    mirrored, _ = value_loss(*(-x for x in inputs), mask, clip_range)
    torch.testing.assert_close(mirrored, loss)
    order = data.draw(st.permutations(range(mask.numel())))
    moved = [x.masked_fill(~mask, garbage).view(1, -1)[:, order] for x in inputs]
    shuffled, _ = value_loss(*moved, mask.view(1, -1)[:, order], clip_range)
    torch.testing.assert_close(shuffled, loss)


@PROPERTY
@given(masked_tensors(3, element=numbers() | extremes), eps)
def test_value_loss_and_its_gradient_are_finite_for_any_gap(case, clip_range):
    *inputs, mask = case
    leaf = inputs[0].float().requires_grad_()
    loss, stats = value_loss(leaf, inputs[1].float(), inputs[2].float(), mask, clip_range)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()
    assert all(value.isfinite() for value in stats.values())


@st.composite
def language_cases(draw):
    """logits (B, T, V), tokens (B, T), loss_mask (B, T): at least one token to be predicted."""
    rows, length, words = draw(sizes), draw(st.integers(2, 4)), draw(st.integers(2, 4))
    count = rows * length

    def drawn(element, n):
        return torch.tensor(draw(st.lists(element, min_size=n, max_size=n)))

    logits = drawn(numbers() | extremes, count * words).view(rows, length, words).float()
    tokens = drawn(st.integers(0, words - 1), count).view(rows, length)
    loss_mask = drawn(st.booleans(), count).view(rows, length)
    assume(loss_mask[:, 1:].any())
    return logits, tokens, loss_mask


@PROPERTY
@given(language_cases(), numbers(), st.randoms())
def test_lm_loss_is_finite_and_forgets_shifts_names_and_order(case, shift, random):
    logits, tokens, loss_mask = case
    leaf = logits.clone().requires_grad_()
    loss = lm_loss(leaf, tokens, loss_mask)
    loss.backward()
    assert loss.isfinite() and loss >= 0 and leaf.grad.isfinite().all()
    precise = lm_loss(logits.double(), tokens, loss_mask)
    other = logits.double()
    other[:, -1] = math.nan  # the last position predicts nothing
    assert torch.equal(lm_loss(other, tokens, loss_mask), precise)
    shifted = lm_loss(logits.double() + shift, tokens, loss_mask)
    torch.testing.assert_close(shifted, precise, rtol=1e-6, atol=1e-6)
    names = torch.tensor(random.sample(range(logits.shape[-1]), logits.shape[-1]))
    renamed = lm_loss(logits.double()[..., names.argsort()], names[tokens], loss_mask)
    torch.testing.assert_close(renamed, precise)
    rows = random.sample(range(len(tokens)), len(tokens))
    torch.testing.assert_close(
        lm_loss(logits.double()[rows], tokens[rows], loss_mask[rows]), precise
    )


# --- preferences ------------------------------------------------------------------------------

rankings = st.lists(
    st.lists(st.tuples(st.text(min_size=1, max_size=4), numbers()), min_size=2, max_size=5,
             unique_by=lambda answer: answer[0]),
    min_size=1, max_size=3,
)  # fmt: skip


@PROPERTY
@given(rankings, st.booleans(), st.data())
def test_grouping_gives_back_every_ranking_whatever_the_order_of_the_pairs(ranked, scored, data):
    pairs = []
    for number, answers in enumerate(ranked):
        row = {"id": str(number), "instruction": f"question {number}", "history": [["a", "b"]]}
        texts, gold = zip(*answers)
        made = ranking_to_pairs(row, texts, gold if scored else None)
        assert len(made) == math.comb(len(texts), 2)
        assert [(p["chosen"], p["rejected"]) for p in made] == list(combinations(texts, 2))
        pairs += made
    shuffled = data.draw(st.permutations(pairs))
    grouped = {row["instruction"]: row for row in group_by_prompt(shuffled)}
    assert list(grouped) == list(dict.fromkeys(p["instruction"] for p in shuffled))
    for number, answers in enumerate(ranked):
        row, (texts, gold) = grouped[f"question {number}"], zip(*answers)
        assert row["candidates"] == list(texts)
        expected = [score - gold[-1] for score in gold] if scored else None
        assert row.get("scores") == (pytest.approx(expected, abs=1e-9) if scored else None)


@PROPERTY
@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 3)), max_size=5), st.data())
def test_ratings_state_each_strict_preference_once_whatever_their_order(rated, data):
    row = {"id": "r", "instruction": "question", "history": []}

    def stated(order):
        made = ratings_to_pairs(row, [rated[i][0] for i in order], [rated[i][1] for i in order])
        return sorted((p["chosen"], p["rejected"], p["margin"]) for p in made)

    expected = sorted(
        (a, b, float(x - y)) for (a, x), (b, y) in product(rated, rated) if x > y and a != b
    )
    assert stated(range(len(rated))) == expected
    assert stated(data.draw(st.permutations(range(len(rated))))) == expected
