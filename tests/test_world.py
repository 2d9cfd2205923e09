"""The TinyHH world: its splits, its conversations, and that each kind of answer is what it says."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import pytest

from minippo.hh import format_dialogue, format_prompt, parse_dialogue
from minippo.worlds.tinyhh import rows as tiny
from minippo.worlds.tinyhh import world as w
from minippo.worlds.tinyhh.annotator import judge

DRAWS = 1200  # of each split
Z_BOUND = 4.0  # in standard deviations, for every rate of this file

KINDS = [(harmful, kind) for harmful in (False, True) for kind in w.SFT_MIX[harmful]]
EXACT_LABELS = {  # kind of answer -> the labels it must get; the other kinds are tested below
    (False, "helpful"): {"on_topic"},
    (False, "off_topic"): set(),
    (False, "rude"): {"rude"},
    (False, "rude_helpful"): {"rude", "on_topic"},
    (False, "evasive"): set(),
    (False, "opener_only"): set(),
    (False, "rambling"): {"on_topic", "rambling"},
    (False, "refusing"): {"refusing"},
    (True, "complying"): {"complying"},
    (True, "safe_alternative"): {"on_topic", "refusing"},
    (True, "refusing"): {"refusing"},
    (True, "rude"): {"rude"},
    (True, "evasive"): set(),
    (True, "rambling"): {"on_topic", "refusing", "rambling"},
}


@pytest.fixture(scope="module")
def drawn():
    """split -> its first requests."""
    return {split: [w.draw_request(split, i) for i in range(DRAWS)] for split in w.SPLITS}


@pytest.fixture(scope="module")
def questions():
    """Every question that names its goal -> its (goal, form, detail), from the lists alone."""
    goals = [g for harmful in (False, True) for s in w.subjects(harmful) for g in s["goals"]]
    return {
        form.replace("{goal}", goal).replace("{detail}", detail): (goal, form, detail)
        for goal in goals
        for form in w.FORMS
        for detail in w.DETAILS
    }


def requests_about(harmful, count=200):
    """The first requests of the sft split that are (not) harmful."""
    found, index = [], 0
    while len(found) < count:
        request = w.draw_request("sft", index, seed=11)
        found += [request] if request.harmful == harmful else []
        index += 1
    return found


def z_score(hits, total, rate):
    """How many standard deviations a count is from what a rate promises."""
    return (hits - total * rate) / (total * rate * (1 - rate)) ** 0.5


def combination_of(request, questions):
    """(goal, form, detail) read from the text; a follow-up's form is the follow-up question."""
    if request.instruction in questions:
        return questions[request.instruction]
    said = request.history[-1][0]
    goals = w.subjects(request.harmful)[request.subject]["goals"]
    goal = next(g for g in goals if said.startswith(f"I want to {g}"))
    return goal, request.instruction, said.removeprefix(f"I want to {goal}")


@contextmanager
def at_most_a_second():
    """Turns an endless loop into a failure."""

    def stop(*_):
        raise TimeoutError("still running after a second")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_there_are_60_topics_8_kinds_of_answers_and_10000_combinations(questions):
    assert len(w.subjects(False)) >= 60
    assert len({kind for _, kind in KINDS}) >= 8
    assert len(set(questions.values())) == len(questions) >= 10_000


def test_the_splits_have_their_stated_shares_of_the_combinations(questions):
    counts = Counter(w.split_of("/".join(combination)) for combination in questions.values())
    assert sum(w.SPLITS.values()) == 100
    for split, percent in w.SPLITS.items():
        assert abs(z_score(counts[split], len(questions), percent / 100)) < Z_BOUND, split


def test_questions_of_two_splits_share_no_combination(drawn, questions):
    owner = {}
    for split, requests in drawn.items():
        for request in requests:
            if request.instruction in questions:
                combination = questions[request.instruction]
                assert owner.setdefault(combination, split) == split, combination


def test_follow_up_conversations_of_two_splits_share_no_combination(drawn, questions):
    owner, shared = {}, []
    for split, requests in drawn.items():
        for request in requests:
            if request.instruction in w.FOLLOW_UPS:
                combination = combination_of(request, questions)
                if owner.setdefault(combination, split) != split:
                    shared.append((split, owner[combination], combination))
    assert shared == []


def test_requests_have_one_to_four_turns_at_the_stated_rates(drawn):
    turns = Counter(1 + len(r.history) for requests in drawn.values() for r in requests)
    assert set(turns) == {1, 2, 3, 4}
    for count, rate in {1: 0.64, 2: 0.22, 3: 0.10, 4: 0.04}.items():
        assert abs(z_score(turns[count], turns.total(), rate)) < Z_BOUND, count


def test_three_requests_in_ten_are_harmful_in_every_split(drawn):
    for split, requests in drawn.items():
        assert abs(z_score(sum(r.harmful for r in requests), DRAWS, 0.3)) < Z_BOUND, split


def test_one_subject_in_ten_is_unseen_and_no_preference_request_is_about_it(drawn):
    unseen = {(i, h) for h in (False, True) for i in range(len(w.subjects(h))) if w.is_unseen(i)}
    total = len(w.subjects(False)) + len(w.subjects(True))
    asked = {split: {(r.subject, r.harmful) for r in requests} for split, requests in drawn.items()}
    assert {h for _, h in unseen} == {False, True} and 1 / 12 < len(unseen) / total < 1 / 8
    assert asked["preference"] & unseen == set()
    assert all(asked[split] >= unseen for split in w.SPLITS if split != "preference")


def test_every_request_is_understood_as_what_it_was_made_from(drawn):
    for requests in drawn.values():
        for r in requests:
            assert w.read_request(r.instruction, r.history) == (r.subject, r.harmful), r


def test_a_follow_up_question_is_understood_from_the_history_only(drawn):
    follow_ups = [r for r in drawn["test"] if r.instruction in w.FOLLOW_UPS]
    assert len(follow_ups) > 50
    assert all(w.read_request(r.instruction) is None for r in follow_ups)


def test_a_topic_talked_about_before_does_not_mislead(drawn):
    names = {s["name"]: i for i, s in enumerate(w.subjects(False))}
    misled = 0
    for r in (r for requests in drawn.values() for r in requests):
        said = [i for query, _ in r.history for name, i in names.items() if name in query]
        other = any((i, False) != (r.subject, r.harmful) for i in said)
        if other and r.instruction not in w.FOLLOW_UPS:
            misled += 1
            assert w.read_request(r.instruction, r.history) == (r.subject, r.harmful)
    assert misled > 100  # so many conversations could have


def test_the_last_question_counts_whatever_goals_were_named_before():
    kite, bread = "fly a kite", "bake a golden loaf"
    where = {g: (i, False) for i, s in enumerate(w.subjects(False)) for g in s["goals"]}
    history = [(f"I want to {kite}.", "Sure."), ("How do I read a private diary?", "No.")]
    assert w.read_request(f"How do I {bread}?", history) == where[bread]
    assert w.read_request("Any ideas?", [history[1], history[0]]) == where[kite]
    assert w.read_request("Any ideas?", [history[0], ("Hello!", f"Do you {bread}?")]) == where[kite]
    assert w.read_request(f"HOW DO I {kite.upper()}?") == where[kite]


@pytest.mark.parametrize("text", ["", "   ", "How are you?", "Any ideas?", "grow sweet"])
def test_what_asks_for_nothing_of_this_world_is_not_understood(text):
    assert w.read_request(text) is None


@pytest.mark.parametrize("text", ["How do I wash a carpet?", "Help me make a magnetic toy."])
def test_a_goal_inside_a_longer_word_is_not_that_goal(text):
    assert w.read_request(text) is None


def test_the_last_of_two_goals_in_one_question_counts():
    where = {g: (i, False) for i, s in enumerate(w.subjects(False)) for g in s["goals"]}
    text = "I know how to protect tomatoes from frost. How do I fly a kite?"
    assert w.read_request(text) == where["fly a kite"]


DIGEST = """
import hashlib
from minippo.worlds.tinyhh import world as w
texts = [str(w.draw_request(split, i)) for split in w.SPLITS for i in range(20)]
print(hashlib.sha256("".join(texts).encode()).hexdigest())
"""


def test_a_request_is_the_same_in_any_order_and_in_another_process(drawn):
    assert w.draw_request("test", 7) == drawn["test"][7] != w.draw_request("test", 8)
    assert w.draw_request("test", 7, seed=1) != drawn["test"][7]
    root = os.path.dirname(os.path.dirname(w.__file__))
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.path.dirname(root)}
    command = [sys.executable, "-c", DIGEST]
    other = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    texts = [str(drawn[split][i]) for split in w.SPLITS for i in range(20)]
    assert other.stdout.strip() == hashlib.sha256("".join(texts).encode()).hexdigest()


@pytest.mark.parametrize("harmful, kind", EXACT_LABELS)
def test_every_kind_of_answer_is_judged_as_its_kind(harmful, kind):
    rng = random.Random(3)
    for request in requests_about(harmful):
        answer = w.write_answer(rng, request, kind)
        labels = judge(request.instruction, answer, request.history).labels
        # a rambling or safe answer begins with one of two kinds of refusal: both are refusals
        assert labels == EXACT_LABELS[harmful, kind], answer


@pytest.mark.parametrize("harmful", [False, True])
def test_a_truncated_answer_is_always_seen_to_be_broken(harmful):
    rng = random.Random(3)
    for request in requests_about(harmful):
        answer = w.write_answer(rng, request, "truncated")
        assert not answer.endswith((".", "!", "?", ","))
        assert "unreadable" in judge(request.instruction, answer, request.history).labels, answer


def test_every_kind_of_the_mix_has_a_test_of_its_labels():
    assert set(KINDS) == set(EXACT_LABELS) | {(False, "truncated"), (True, "truncated")}


def test_an_off_topic_answer_is_never_about_the_topic_that_was_asked():
    rng = random.Random(4)
    for request in requests_about(False):
        about = w.subjects(False)[request.subject]
        answer = w.write_answer(rng, request, "off_topic")
        assert not any(phrase in answer for phrase in about["tips"] + about["outcomes"])


@pytest.mark.parametrize("harmful", [False, True])
def test_demonstrations_have_the_rates_of_the_stated_mix(harmful):
    rng = random.Random(5)
    counts = Counter(w.draw_kind(rng, harmful, w.SFT_MIX) for _ in range(20_000))
    assert sum(w.SFT_MIX[harmful].values()) == 100
    for kind, percent in w.SFT_MIX[harmful].items():
        assert abs(z_score(counts[kind], 20_000, percent / 100)) < Z_BOUND, kind


def test_what_sft_imitates_is_visibly_mixed():
    """The rates that PPO has to change, as the annotator sees them in the demonstrations."""
    rows = tiny.demonstrations("sft", 1500)
    found, totals = Counter(), Counter()
    for row in rows:
        harmful = w.read_request(row["instruction"], row["history"])[1]
        totals[harmful] += 1
        labels = judge(row["instruction"], row["answer"], row["history"]).labels
        found.update((harmful, label) for label in labels)
    assert 0.35 < found[True, "complying"] / totals[True] < 0.50  # stated: 42%
    assert 0.45 < found[False, "on_topic"] / totals[False] < 0.62  # stated: 40 + 8 + 7%, some cut
    assert 0.13 < found[False, "rude"] / totals[False] < 0.22  # stated: 9 + 8%
    assert 0.01 < found[False, "refusing"] / totals[False] < 0.06  # stated: 3%


def test_answers_to_one_request_are_varied():
    rng, request = random.Random(6), requests_about(False, 1)[0]
    assert len({w.write_answer(rng, request, "helpful") for _ in range(200)}) > 150


def test_texts_are_clean_sentences(drawn):
    """Capital first, one space between words, no slot left open, an end; cut answers apart."""
    rng = random.Random(7)
    for request in (r for requests in drawn.values() for r in requests[:200]):
        kinds = [kind for kind in w.SFT_MIX[request.harmful] if kind != "truncated"]
        answers = [w.write_answer(rng, request, kind) for kind in kinds]
        turns = [text for turn in request.history for text in turn]
        for text in [request.instruction, *turns, *answers]:
            assert text[0].isupper() and text.endswith((".", "?", "!")), text
            assert "  " not in text and text == text.strip() and not set("{}|\n") & set(text), text


def test_prompts_of_a_split_are_all_different():
    prompts = tiny.prompt_rows("ppo", 600)
    texts = {format_prompt(row["instruction"], row["history"]) for row in prompts}
    assert len(texts) == len({row["id"] for row in prompts}) == 600


def test_at_least_128_of_the_512_prompts_of_the_evaluation_are_harmful():
    rows = tiny.prompt_rows("test", 512)
    assert sum(w.read_request(row["instruction"], row["history"])[1] for row in rows) >= 128


def test_the_base_models_text_is_dialogues_and_two_notes_in_five():
    texts = tiny.pretrain_texts(200)
    notes = [text for text in texts if text.startswith("Notes on ")]
    dialogues = [parse_dialogue(text) for text in texts if text not in notes]
    assert len(notes) == 80
    assert {role for turns in dialogues for role, _ in turns} == {"Human", "Assistant"}
    assert texts == tiny.pretrain_texts(200) != tiny.pretrain_texts(200, seed=1)


def test_demonstrations_are_the_same_every_time_and_form_whole_dialogues():
    rows = tiny.demonstrations("sft", 100)
    assert rows == tiny.demonstrations("sft", 100) != tiny.demonstrations("sft", 100, seed=1)
    for row in rows:
        text = format_dialogue(row["instruction"], row["answer"], row["history"])
        assert [t for _, t in parse_dialogue(text)][-2:] == [row["instruction"], row["answer"]]


def test_a_split_that_does_not_exist_is_refused():
    with at_most_a_second(), pytest.raises(ValueError, match="tset"):
        w.draw_request("tset", 0)


def test_a_kind_of_answer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="helpfull"):
        w.write_answer(random.Random(0), requests_about(False, 1)[0], "helpfull")
