"""Evaluation against hand computations: win rates, intervals, KL, agreement, rates of the table."""

import math

import pytest
import torch
from torch.nn import functional as F

from minippo import evaluation as ev
from minippo.batching import Encoded
from minippo.models import frozen_copy, tiny_gpt2
from minippo.worlds.tinyhh import world as w
from minippo.worlds.tinyhh.annotator import WEIGHTS, Judgement, judge

PAD, EOS, V = 0, 1, 40


def judgement(score=0.0, labels=(), form="f", **parts) -> Judgement:
    return Judgement(score, parts, {}, form, frozenset(labels))


def topic(index: int, harmful: bool = False) -> dict:
    """A row that asks for the first goal of a subject."""
    goal = w.subjects(harmful)[index]["goals"][0]
    return {"instruction": f"How do I {goal}?", "history": []}


# win rate


def test_a_win_rate_counts_ties_half():
    rate, _, _ = ev.win_rate([3.0, 1.0, 2.0, 5.0], [1.0, 2.0, 2.0, 4.0])
    assert rate == pytest.approx((1 + 0 + 0.5 + 1) / 4)


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (10, 10), (81, 263), (450, 512)])
def test_the_interval_is_where_the_score_test_rejects(wins, n):
    """Wilson's ends solve (p - x)^2 = z^2 x (1 - x) / n: the roots of a quadratic in x."""
    p, z = wins / n, 1.96
    a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    rate, low, high = ev.win_rate([1.0] * wins + [0.0] * (n - wins), [0.5] * n)
    assert rate == pytest.approx(p)
    assert low == pytest.approx((-b - root) / (2 * a), abs=1e-9)
    assert high == pytest.approx((-b + root) / (2 * a), abs=1e-9)


def test_the_interval_stays_within_zero_and_one():
    for n in range(1, 200):
        _, low, high = ev.win_rate([1.0] * n, [0.0] * n)
        _, lowest, _ = ev.win_rate([0.0] * n, [1.0] * n)
        assert 0 <= low <= high <= 1 and lowest >= 0, n  # -5e-17 would be shown as -0.0%


def test_a_win_rate_and_the_opposite_one_add_up_to_one():
    a, b = torch.randn(2, 50).round(decimals=1).tolist()
    there, back = ev.win_rate(a, b), ev.win_rate(b, a)
    assert there[0] + back[0] == pytest.approx(1)
    assert there[1] + back[2] == pytest.approx(1)


def test_a_win_rate_of_lists_of_other_lengths_is_refused():
    with pytest.raises(ValueError):
        ev.win_rate([1.0, 2.0], [1.0])


# best of n


def test_best_of_n_takes_the_answer_with_the_highest_score():
    answers = [Encoded(0, [5], [[7], [8], [9]]), Encoded(1, [6], [[4], [3], [2]])]
    best = ev.best_of_n(answers, [[0.1, 0.9, 0.3], [-1.0, -2.0, -0.5]])
    assert [e.responses for e in best] == [[[8]], [[2]]]
    assert [(e.row, e.prompt) for e in best] == [(0, [5]), (1, [6])]


def test_the_kl_of_best_of_n_is_that_of_the_best_of_distinct_answers():
    """With distinct scores the best of n has rank density n u^(n-1); its KL is the integral."""
    for n in (2, 4, 16):
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        density = n * u ** (n - 1)
        kl = (density * density.clamp(min=1e-300).log()).mean()
        assert ev.best_of_n_kl(n) == pytest.approx(float(kl), rel=1e-3)
    assert ev.best_of_n_kl(1) == 0


# KL per sequence


def policy(seed: int):
    model = tiny_gpt2(V, 1, 16, 2, 32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def answers_of_many_lengths() -> list[Encoded]:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    responses = [[20, EOS], [21, 22, 23, 24, 25], [26, 27, EOS]]
    return [Encoded(i, p, [r, [39]]) for i, (p, r) in enumerate(zip(prompts, responses))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_per_sequence_is_the_mean_log_ratio_of_whole_answers(temperature):
    one, other, answers = policy(1), policy(2), answers_of_many_lengths()
    total = 0.0
    for e in answers:  # one row at a time, no padding, one token at a time
        tokens = torch.tensor([e.prompt + e.responses[0]])
        for model, sign in ((one, 1), (other, -1)):
            logits = model(tokens).logits[0] / temperature
            for t in range(len(e.prompt), tokens.shape[1]):
                total -= sign * float(F.cross_entropy(logits[t - 1], tokens[0, t]).detach())
    kl = ev.kl_per_sequence(one, other, answers, PAD, temperature)
    assert kl == pytest.approx(total / len(answers), rel=1e-4)


def test_the_kl_of_a_policy_from_itself_is_zero():
    one = policy(1)
    assert ev.kl_per_sequence(one, frozen_copy(one), answers_of_many_lengths(), PAD) == 0


def test_kl_per_sequence_is_a_mean_over_more_answers_than_a_batch_holds():
    one, other, answers = policy(1), policy(2), answers_of_many_lengths()
    thrice = ev.kl_per_sequence(one, other, answers * 30, PAD)
    assert thrice == pytest.approx(ev.kl_per_sequence(one, other, answers, PAD), rel=1e-4)


# agreement with the annotator


def test_reward_agreement_counts_only_pairs_the_annotator_tells_apart():
    seen, unseen = topic(0), topic(w.UNSEEN_EVERY - 1)
    judged = [
        [judgement(3.0, polite=1.0, concise=0.0), judgement(1.0, polite=0.0, concise=1.0)],
        [judgement(2.0, polite=0.0, concise=0.0), judgement(2.0, polite=0.0, concise=1.0)],
        [judgement(0.0, polite=0.0, concise=0.0), judgement(5.0, polite=1.0, concise=0.0)],
    ]
    scores = [[0.9, 0.1], [0.3, 0.7], [0.8, 0.2]]  # right, not counted, wrong
    found = ev.reward_agreement([seen, seen, unseen], scores, judged)
    assert found["noiseless"] == 0.5
    assert (found["seen topics"], found["unseen topics"]) == (1.0, 0.0)
    assert found["polite"] == 0.5
    assert "concise" not in found  # in no pair is the better one the more concise one


def test_reward_agreement_looks_at_every_pair_of_k_answers():
    judged = [[judgement(float(s), complete=s / 4) for s in (4, 2, 3, 1)]]
    found = ev.reward_agreement([topic(0)], [[0.9, 0.8, 0.5, 0.1]], judged)
    assert found["noiseless"] == pytest.approx(5 / 6)  # 2 and 3 are the wrong way round
    a = torch.tensor([0.9, 0.8, 0.5, 0.1], dtype=torch.float64)
    b = torch.tensor([4.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    correlation = float((a * b).sum() / (a.norm() * b.norm()))
    assert found["correlation"] == pytest.approx(correlation, rel=1e-4)


def test_a_tie_of_the_reward_model_is_not_agreement():
    judged = [[judgement(2.0, polite=1.0), judgement(1.0, polite=0.0)]]
    assert ev.reward_agreement([topic(0)], [[0.5, 0.5]], judged)["noiseless"] == 0


# the table


def test_sentence_forms_counts_those_of_at_least_one_percent():
    many = [judgement(form="a")] * 150 + [judgement(form="b")] * 48 + [judgement(form="c")] * 2
    assert ev.sentence_forms(many) == 3
    assert ev.sentence_forms([*many, judgement(form="d")]) == 2  # 2 and 1 of 201 are below 1%


def test_rates_are_taken_over_the_requests_they_are_about():
    rows = [topic(0), topic(1), topic(2), topic(0, harmful=True), topic(1, harmful=True)]
    found = ev.annotated_summary(rows, [
        judgement(4.0, ["on_topic"]),
        judgement(1.0, ["rude"]),
        judgement(0.0, ["refusing"]),
        judgement(-3.0, ["complying", "on_topic"]),
        judgement(2.0, ["refusing"], form="g"),
    ])  # fmt: skip
    assert found["gold"] == pytest.approx(4 / 5)
    assert found["on_topic"] == pytest.approx(1 / 3)  # of the three helpful requests
    assert found["over_refusing"] == pytest.approx(1 / 3)
    assert found["complying"] == pytest.approx(1 / 2)  # of the two harmful ones
    assert found["rude"] == pytest.approx(1 / 5)
    assert (found["unreadable"], found["rambling"], found["forms"]) == (0, 0, 2)


def test_real_answers_are_labelled_as_what_they_are():
    about, harm = w.subjects(False)[3], w.subjects(True)[2]
    advice = w.ONE_TIP[0].format(a=about["tips"][0])
    method = w.ONE_TIP[0].format(a=harm["methods"][0])
    rows = [topic(3), topic(3), topic(2, harmful=True), topic(2, harmful=True)]
    texts = [advice, w.RUDE[0], method, w.REFUSALS[0]]
    judged = [judge(row["instruction"], text) for row, text in zip(rows, texts)]
    found = ev.annotated_summary(rows, judged)
    assert (found["on_topic"], found["rude"], found["complying"]) == (0.5, 0.25, 0.5)
    assert found["over_refusing"] == 0
    by_hand = [sum(WEIGHTS[p] * v for p, v in j.parts.items()) for j in judged]
    assert found["gold"] == pytest.approx(sum(by_hand) / 4)


def test_answer_statistics_by_hand():
    answers = [Encoded(i, [5], [r]) for i, r in enumerate([[7, EOS], [7, EOS], [8, 9, 10], [EOS]])]
    found = ev.answer_statistics(answers, EOS)
    assert found == {"tokens": 2.0, "ended": 0.75, "distinct": 0.75}


def test_standardised_scores_use_the_reference_mean_and_std():
    class Scorer(torch.nn.Module):
        mean, std = 10.0, 4.0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def score_candidates(self, query, query_mask, response, mask):
            """The sum of the real tokens, K = 1."""
            return ((query * query_mask).sum(1) + (response * mask).sum((1, 2))).float()[:, None]

    answers = [Encoded(0, [5, 6], [[7, EOS]]), Encoded(1, [2], [[3]])]
    assert ev.standardised(Scorer(), answers, PAD) == pytest.approx([(19 - 10) / 4, (5 - 10) / 4])


# accuracy on rankings


def test_the_accuracy_on_rankings_counts_every_pair_and_ties_half():
    scores = [[3.0, 2.0, 1.0], [1.0, 2.0, 2.0]]  # 3 of 3; wrong, wrong, tie
    got = ev.ranking_accuracy(scores)
    assert got["held_out_pairs"] == 6 and got["accuracy"] == pytest.approx(3.5 / 6)


def test_of_plain_pairs_the_interval_is_wilsons():
    scores = [[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 12
    _, low, high = ev.win_rate([s[0] for s in scores], [s[1] for s in scores])
    got = ev.ranking_accuracy(scores)
    assert (got["low"], got["high"]) == (low, high)


def test_the_interval_of_rankings_is_over_rankings():
    """Equal K: the mean of the rankings' shares, whose standard error is textbook."""
    rng = torch.Generator().manual_seed(0)
    quality = 2 * torch.rand(80, 1, generator=rng)  # some prompts are easy, some are hopeless
    scores = quality * torch.tensor([1.5, 1.0, 0.5, 0.0]) + torch.randn(80, 4, generator=rng)
    shares = []
    for row in scores.tolist():
        hits = [a > b for i, a in enumerate(row) for b in row[i + 1 :]]
        shares.append(sum(hits) / len(hits))
    shares = torch.tensor(shares, dtype=torch.float64)
    half = 1.96 * float(shares.std()) / 80**0.5
    got = ev.ranking_accuracy(scores.tolist())
    assert got["accuracy"] == pytest.approx(float(shares.mean()))
    assert got["high"] - got["accuracy"] == pytest.approx(half, rel=1e-6)


def test_a_perfect_ranking_leaves_doubt_all_the_same():
    got = ev.ranking_accuracy([[4.0, 3.0, 2.0, 1.0]] * 8)
    low, high = ev.wilson(1.0, 8)
    assert (got["accuracy"], got["low"], got["high"]) == (1.0, low, high) and low < 0.7
    one = ev.ranking_accuracy([[3.0, 2.0, 1.0]])
    assert one["low"] == ev.wilson(1.0, 1)[0]


def test_rankings_of_different_sizes_count_by_their_pairs():
    got = ev.ranking_accuracy([[2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0]])
    assert got["held_out_pairs"] == 5 and got["accuracy"] == pytest.approx(4 / 5)
    assert 0 <= got["low"] < got["accuracy"] < got["high"] <= 1


def test_a_rate_over_no_request_is_none():
    table = ev.annotated_summary([topic(0)], [judgement(labels=("on_topic",))])
    assert table["complying"] is None and table["on_topic"] == 1.0
