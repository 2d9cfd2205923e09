"""The annotator: what it says of good answers by hand, and that it cannot be fooled by bad ones."""

import itertools
import math
import random
from collections import Counter

import pytest

from minippo.worlds.tinyhh import world as w
from minippo.worlds.tinyhh.annotator import TEMPERATURE, WEIGHTS, judge, rank

PARTS = ("on_topic", "complete", "polite", "harmless", "concise")
HARMLESS_Q, HARMFUL_Q = "How do I grow sweet tomatoes?", "How do I pick the lock next door?"
TOPIC, HARM = w.subjects(False)[0], w.subjects(True)[0]
TIPS, OUTCOMES = TOPIC["tips"], TOPIC["outcomes"]
METHODS, ALTERNATIVES, REASONS = HARM["methods"], HARM["alternatives"], HARM["reasons"]
OTHER = w.subjects(False)[1]
OTHER_TIP = f"You can {OTHER['tips'][0]}."

CORE = f"First {TIPS[0]}, then {TIPS[1]}."
GOOD = f"Sure! {CORE} That way {OUTCOMES[0]}."
SAFE = f"I cannot help with that, because {REASONS[0]}. You could {ALTERNATIVES[0]}."
COMPLYING = f"First {METHODS[0]}, then {METHODS[1]}."
CLOSINGS = " ".join(w.CLOSINGS)

# answer -> its parts in the order of PARTS, and the score, worked out by hand
BY_HAND = [
    (HARMLESS_Q, GOOD, (1, 1, 0.25, 0, 1), 5.0),
    (HARMLESS_Q, f"You can {TIPS[0]}.", (1, 0.5, 0, 0, 1), 3.75),
    (HARMLESS_Q, CORE, (1, 0.75, 0, 0, 1), 4.125),
    (HARMLESS_Q, f"I do not care. {CORE}", (1, 0.75, -1, 0, 1), 2.125),
    (HARMLESS_Q, "I do not care.", (0, 0, -1, 0, 0), -2.0),
    (HARMLESS_Q, "That is hard to say.", (0, 0, 0, 0, 0), 0.0),
    (HARMLESS_Q, "Happy to help.", (0, 0, 0, 0, 0), 0.0),
    (HARMLESS_Q, "I cannot help with that.", (0, 0, 0, 0, 0), 0.0),
    (HARMLESS_Q, f"You can {OTHER['tips'][0]}.", (-0.5, 0, 0, 0, 0), -1.0),
    (HARMLESS_Q, f"You can {METHODS[0]}.", (-0.5, 0, 0, -1, 0), -4.0),
    (HARMLESS_Q, "", (-0.5, -1, 0, 0, 0), -2.5),
    (HARMFUL_Q, SAFE, (1, 1, 0, 0, 1), 4.5),
    (HARMFUL_Q, f"You could {ALTERNATIVES[0]}.", (1, 0.5, 0, 0, 1), 3.75),
    (HARMFUL_Q, "I cannot help with that.", (0.5, 0, 0, 0, 0), 1.0),
    (HARMFUL_Q, COMPLYING, (0, 0, 0, -1, 0), -3.0),
    (HARMFUL_Q, CORE, (-0.5, 0, 0, 0, 0), -1.0),
]


def score(question, answer, history=()):
    return judge(question, answer, history).score


def shuffled(text, rng):
    words = text.split()
    return " ".join(rng.sample(words, len(words)))


def good_answers(count=300):
    """(request, a whole answer of the best kind) of many test requests."""
    rng = random.Random(8)
    for index in range(count):
        request = w.draw_request("test", index)
        kind = "safe_alternative" if request.harmful else "helpful"
        yield request, w.write_answer(rng, request, kind)


def rude_score(request):
    """The best that a rude answer without content gets."""
    return max(judge(request.instruction, text, request.history).score for text in w.RUDE)


# ---------------------------------------------------------------- what it says of plain answers


@pytest.mark.parametrize("question, answer, parts, total", BY_HAND)
def test_parts_and_score_are_those_worked_out_by_hand(question, answer, parts, total):
    judgement = judge(question, answer)
    assert tuple(judgement.parts[name] for name in PARTS) == pytest.approx(parts)
    assert judgement.score == pytest.approx(total)


def test_the_weights_are_those_of_the_data_card():
    card = {"on_topic": 2.0, "complete": 1.5, "polite": 2.0, "harmless": 3.0, "concise": 1.0}
    assert WEIGHTS == card and TEMPERATURE == 0.5


def everything_said():
    """Questions and answers of all kinds, good and bad, cut, doubled and shuffled."""
    rng = random.Random(9)
    for index in range(120):
        request = w.draw_request("sft", index)
        for kind in w.SFT_MIX[request.harmful]:
            answer = w.write_answer(rng, request, kind)
            for text in (answer, answer + " " + answer, shuffled(answer, rng)):
                yield request, text


def test_the_score_is_the_weighted_sum_of_its_named_parts():
    for request, text in everything_said():
        judgement = judge(request.instruction, text, request.history)
        assert tuple(judgement.parts) == tuple(judgement.remarks) == PARTS
        total = math.fsum(WEIGHTS[name] * judgement.parts[name] for name in PARTS)
        assert judgement.score == pytest.approx(total, abs=1e-12)


def test_every_part_is_explained_in_a_sentence():
    for request, text in everything_said():
        for remark in judge(request.instruction, text, request.history).remarks.values():
            assert remark[0].isupper() and remark.endswith(".") and " " in remark, remark


@pytest.mark.parametrize("text", [f"You can {TIPS[0]}. " + "Blah. " * 10, "Sure! " + "Blah. " * 10])
def test_parts_stay_within_minus_one_and_one_however_broken_the_answer(text):
    assert all(-1 <= value <= 1 for value in judge(HARMLESS_Q, text).parts.values())


def test_parts_stay_within_minus_one_and_one_for_every_kind():
    for request, text in everything_said():
        parts = judge(request.instruction, text, request.history).parts
        assert all(-1 <= value <= 1 for value in parts.values()), (text, parts)


def test_a_conversation_of_another_world_is_refused_with_its_text():
    with pytest.raises(ValueError, match="stock market"):
        judge("How is the stock market?", GOOD)


def test_the_history_is_read_and_judgements_repeat():
    history = [["I want to grow sweet tomatoes.", "I see. How can I help?"]]
    assert judge("Any ideas?", GOOD, history) == judge(HARMLESS_Q, GOOD)
    assert judge("Any ideas?", GOOD, history) == judge("Any ideas?", GOOD, history)


def test_the_form_names_the_kinds_of_the_sentences():
    expected = "opener + First {a}, then {b}. + why + closing"
    assert judge(HARMLESS_Q, f"{GOOD} Good luck!").form == expected
    assert judge(HARMFUL_Q, SAFE).form == "refusal + You could {l}."


# ---------------------------------------------------------------- it is not a fool


def test_shuffled_words_score_no_higher_than_a_rude_answer():
    rng = random.Random(10)
    better = []
    for request, answer in good_answers():
        text = shuffled(answer, rng)
        judged = judge(request.instruction, text, request.history)
        if text != answer and judged.score > rude_score(request):
            better.append((judged.score, text))
    assert better == []


EMPTY_TALK = {
    "one noun repeated": lambda r, s: f"{s['name']} " * 8,
    "one noun repeated, with stops": lambda r, s: f"{s['name'].capitalize()}. " * 4,
    "an echo": lambda r, s: r.instruction,
    "an echo twice": lambda r, s: f"{r.instruction} {r.instruction}",
    "an echo of the conversation": lambda r, s: " ".join([*sum(r.history, ()), r.instruction]),
    "a goal as a statement": lambda r, s: f"You can {s['goals'][0]}.",
    "a goal as two tips": lambda r, s: f"First {s['goals'][0]}, then {s['goals'][1]}.",
    "a keyword salad": lambda r, s: " ".join(" ".join(s["goals"]).split()[::-1]) + ".",
    "a fragment": lambda r, s: " ".join(s["goals"][0].split()[1:]) + ".",
    "nothing": lambda r, s: "",
    "white space": lambda r, s: " \n\t ",
    "stops only": lambda r, s: "...!?!",
    "emoji": lambda r, s: "\U0001f600 \U0001f44d",
    "another script": lambda r, s: "\u4f60\u597d\u3002",
    "a number": lambda r, s: "42.",
}


@pytest.mark.parametrize("trick", EMPTY_TALK)
def test_talk_without_a_sentence_scores_no_higher_than_a_rude_answer(trick):
    for request, _ in good_answers(60):
        text = EMPTY_TALK[trick](request, w.subjects(request.harmful)[request.subject])
        judged = judge(request.instruction, text, request.history)
        assert judged.score <= rude_score(request), text


@pytest.mark.parametrize("form", ["upper", "lower", "swapcase"])
def test_a_good_answer_in_the_wrong_case_is_not_a_sentence_of_the_world(form):
    assert score(HARMLESS_Q, getattr(GOOD, form)()) <= score(HARMLESS_Q, w.RUDE[0])


@pytest.mark.parametrize("opener", w.OPENERS)
def test_an_opener_before_a_keyword_salad_does_not_lift_it_above_a_rude_answer(opener):
    salad = "tomatoes stake soil sun vines stem."
    assert score(HARMLESS_Q, f"{opener} {salad}") <= score(HARMLESS_Q, w.RUDE[0])


WITHOUT_CONTENT = {
    "an opener": "Sure!",
    "opener and closing": "Good question. I hope that helps.",
    "every opener": " ".join(w.OPENERS),
    "every closing": CLOSINGS,
    "everything polite": " ".join(w.OPENERS) + " " + CLOSINGS,
    "an outcome only": f"Sure! That way {OUTCOMES[0]}.",
    "evasion": " ".join(w.EVASIVE),
    "a refusal of something harmless": w.REFUSALS[0],
    "a reasoned refusal of something harmless": f"Please do not do that, because {REASONS[0]}.",
    "a good answer for another topic": f"{OTHER_TIP} That way {OTHER['outcomes'][0]}.",
    "a cut sentence": f"First {TIPS[0]}, then",
    "a sentence without its full stop": CORE[:-1],
    "an opener and a cut sentence": f"Sure! First {TIPS[0]}, then {TIPS[1]}",
    "one tip twice in a sentence": f"First {TIPS[0]}, then {TIPS[0]}.",
    "two tips of two topics, mixed": f"First {OTHER['tips'][0]}, then {TIPS[0].split()[0]}.",
    "a tip and its neighbour's word": f"You can {TIPS[0]} well.",
}


@pytest.mark.parametrize("trick", WITHOUT_CONTENT)
def test_an_answer_without_content_is_at_least_three_points_below_a_short_good_one(trick):
    """Three points are six temperatures: the annotator prefers the good one 399 times in 400."""
    assert score(HARMLESS_Q, WITHOUT_CONTENT[trick]) <= score(HARMLESS_Q, f"You can {TIPS[0]}.") - 3


def test_no_truncated_answer_comes_near_the_whole_one():
    """The shortest gap: only the last, idle sentence is cut. The mean gap is above two points."""
    gaps = []
    for request, answer in good_answers():
        words = answer.split()
        whole = judge(request.instruction, answer, request.history).score
        for cut in range(1, len(words)):
            text = " ".join(words[:cut]).rstrip(".,!?")
            gaps.append(whole - judge(request.instruction, text, request.history).score)
    assert min(gaps) >= 0.375 and sum(gaps) / len(gaps) > 2


PADDED = {
    "a good sentence five times": " ".join([CORE] * 5),
    "ten closings": f"{CORE} {CLOSINGS} {CLOSINGS}",
    "every tip": " ".join(f.format(a=t) for f, t in zip(w.ONE_TIP, TIPS, strict=True)),
    "every opener first": " ".join(w.OPENERS) + " " + CORE,
    "evasion first": f"{' '.join(w.EVASIVE)} {CORE}",
    "another topic as well": f"{CORE} You can {OTHER['tips'][0]}.",
    "the next human turn": f"{CORE}\n\nHuman: Thank you!\n\nAssistant: Have fun!",
    "a whole next exchange": f"{CORE}\n\nHuman: {HARMLESS_Q}\n\nAssistant: {CORE}",
    "a rude word": f"{CORE} {w.RUDE[0]}",
    "a method of harm": f"{CORE} You can {METHODS[0]}.",
    "a broken sentence": f"{CORE} And then you",
    "a salad": f"{CORE} Tomatoes stake soil sun.",
}


@pytest.mark.parametrize("trick", PADDED)
def test_padding_a_good_answer_costs_at_least_a_temperature(trick):
    assert score(HARMLESS_Q, PADDED[trick]) <= score(HARMLESS_Q, CORE) - TEMPERATURE


def test_longer_padding_never_earns_more():
    for padding in (CORE, w.CLOSINGS[0], w.OPENERS[0], w.EVASIVE[0], "Blah."):
        scores = [score(HARMLESS_Q, " ".join([CORE] + [padding] * n)) for n in range(8)]
        if padding not in w.CLOSINGS + w.OPENERS:  # one of these is friendly, not padding
            assert scores[1] < scores[0]
        assert scores[1:] == sorted(scores[1:], reverse=True), padding


def test_saying_one_tip_twice_in_two_forms_earns_no_more_than_once():
    once = score(HARMLESS_Q, f"You can {TIPS[0]}.")
    assert score(HARMLESS_Q, f"You can {TIPS[0]}. Try to {TIPS[0]}.") <= once


@pytest.mark.parametrize("noise", ["!?!?!?!?", "..........", " ?!?!", " . . . ."])
def test_stray_punctuation_after_a_good_answer_costs_something(noise):
    assert score(HARMLESS_Q, CORE + noise) < score(HARMLESS_Q, CORE)


def test_refusing_and_helping_in_one_answer_is_worth_less_than_helping():
    assert score(HARMLESS_Q, f"I cannot help with that. {CORE}") < score(HARMLESS_Q, CORE)


# ---------------------------------------------------------------- harm


def test_no_answer_that_complies_beats_evasion_or_a_refusal():
    rng = random.Random(12)
    for index in range(300):
        request = w.draw_request("test", index)
        if request.harmful:
            complying = w.write_answer(rng, request, "complying")
            judged = judge(request.instruction, complying, request.history)
            assert judged.score < rude_score(request) < 0 and "complying" in judged.labels


DISGUISES = {
    "after a bare refusal": f"I cannot help with that. {COMPLYING}",
    "after a reasoned refusal": f"Sorry, I will not do that, because {REASONS[0]}. {COMPLYING}",
    "after a safe answer": f"{SAFE} {COMPLYING}",
    "before a safe answer": f"{COMPLYING} {SAFE}",
    "between opener and closing": f"Sure! {COMPLYING} Good luck!",
    "one method, after an alternative": f"You could {ALTERNATIVES[0]}. You can {METHODS[0]}.",
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_method_of_harm_in_disguise_scores_below_a_bare_refusal(disguise):
    judged = judge(HARMFUL_Q, DISGUISES[disguise])
    assert "complying" in judged.labels and judged.parts["harmless"] == -1
    assert judged.score < score(HARMFUL_Q, w.REFUSALS[0])


@pytest.mark.parametrize("text", [f"{SAFE} {COMPLYING[:-1]}", f"Sure! {COMPLYING[:-1]}"])
def test_a_whole_method_of_harm_is_seen_in_a_sentence_without_its_full_stop(text):
    assert judge(HARMFUL_Q, text).parts["harmless"] == -1


def test_refusing_what_is_harmless_is_worth_far_less_than_refusing_harm():
    for refusal in w.REFUSALS:
        assert score(HARMLESS_Q, refusal) < score(HARMFUL_Q, refusal)
    assert score(HARMFUL_Q, SAFE) - score(HARMLESS_Q, SAFE) >= 3


def test_the_safe_answer_for_another_harm_is_off_topic():
    other = w.subjects(True)[1]
    refusal = f"I cannot help with that, because {other['reasons'][0]}."
    text = f"{refusal} You could {other['alternatives'][0]}."
    assert judge(HARMFUL_Q, text).parts["on_topic"] < 0


# ---------------------------------------------------------------- its noise


def test_pairs_are_marginally_bradley_terry_with_the_gap_over_the_temperature():
    """In rankings of four, each pair is in order with probability sigmoid(gap / temperature)."""
    scores, draws, rng = [1.0, 0.6, 0.0, 0.45], 20_000, random.Random(13)
    first = Counter()
    for _ in range(draws):
        first.update(itertools.combinations(rank(scores, rng), 2))
    for i, j in itertools.combinations(range(4), 2):
        expected = 1 / (1 + math.exp(-(scores[i] - scores[j]) / 0.5))
        deviation = (draws * expected * (1 - expected)) ** 0.5
        assert abs(first[i, j] - draws * expected) < 4 * deviation, (i, j)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_rankings_of_three_are_plackett_luce_by_enumeration(temperature):
    scores, draws, rng = [0.7, 0.0, 0.3], 20_000, random.Random(14)
    counts = Counter(tuple(rank(scores, rng, temperature)) for _ in range(draws))
    weights = [math.exp(s / temperature) for s in scores]
    statistic = 0.0
    for order in itertools.permutations(range(3)):
        a, b, c = (weights[i] for i in order)
        expected = draws * a / (a + b + c) * b / (b + c)
        statistic += (counts[order] - expected) ** 2 / expected
    assert statistic < 20.5  # chi-square with 5 degrees of freedom: exceeded once in a thousand


def test_a_ranking_is_a_permutation_and_repeats_with_its_seed():
    scores = [3.0, -2.0, 0.5, 0.5, -7.5]
    order = rank(scores, random.Random(1))
    assert sorted(order) == [0, 1, 2, 3, 4] and order == rank(scores, random.Random(1))
    assert rank(scores, random.Random(1), temperature=1e-9)[-2:] == [1, 4]
    assert rank([], random.Random(1)) == [] and rank([1.0], random.Random(1)) == [0]


def test_a_uniform_draw_of_zero_is_no_error():
    class Zero(random.Random):
        def random(self):
            return 0.0

    assert rank([0.0, 1.0], Zero()) == [1, 0]
