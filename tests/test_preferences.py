"""Rankings and ratings to pairs, and pairs back to K-way rankings."""

import itertools
import json
import random

import pytest

from minippo.hh import format_dialogue, load_preferences
from minippo.preferences import (
    group_by_prompt,
    ranked_batches,
    ranking_to_pairs,
    ratings_to_pairs,
)

PROMPT = {"id": "p7", "instruction": "Why?", "history": [["Hi", "Hello"]]}


def sides(pairs: list[dict]) -> list[tuple[str, str]]:
    return [(pair["chosen"], pair["rejected"]) for pair in pairs]


def test_ranking_of_three_gives_three_pairs_with_score_gaps():
    pairs = ranking_to_pairs(PROMPT, ["a", "b", "c"], [2.0, 1.5, -1.0])
    same = {"instruction": "Why?", "history": [["Hi", "Hello"]]}
    assert pairs == [
        {"id": "p7-0-1", **same, "chosen": "a", "rejected": "b", "margin": 0.5},
        {"id": "p7-0-2", **same, "chosen": "a", "rejected": "c", "margin": 3.0},
        {"id": "p7-1-2", **same, "chosen": "b", "rejected": "c", "margin": 2.5},
    ]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9])
def test_ranking_gives_every_pair_once_in_its_order(size):
    answers = [f"answer {i}" for i in range(size)]
    pairs = ranking_to_pairs(PROMPT, answers)
    expected = {(answers[i], answers[j]) for i in range(size) for j in range(size) if i < j}
    assert set(sides(pairs)) == expected and len(pairs) == size * (size - 1) // 2
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    assert all("margin" not in pair for pair in pairs)


def test_ranking_against_the_scores_has_a_negative_margin():
    (pair,) = ranking_to_pairs(PROMPT, ["a", "b"], [1.0, 3.0])
    assert pair["chosen"] == "a" and pair["margin"] == -2.0


def test_equal_answers_give_no_pair():
    assert sides(ranking_to_pairs(PROMPT, ["a", "b", "a"])) == [("a", "b"), ("b", "a")]
    assert ranking_to_pairs(PROMPT, ["a"]) == ranking_to_pairs(PROMPT, []) == []


def test_ratings_in_any_order_give_the_pairs_that_are_no_ties():
    ratings = {"a": 5, "b": 3, "c": 3, "d": 1}
    expected = {("a", "b", 2), ("a", "c", 2), ("a", "d", 4), ("b", "d", 2), ("c", "d", 2)}
    for order in itertools.permutations(ratings):
        pairs = ratings_to_pairs(PROMPT, order, [ratings[answer] for answer in order])
        found = [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in pairs]
        assert len(found) == 5 and set(found) == expected


def test_all_tied_ratings_give_no_pair():
    assert ratings_to_pairs(PROMPT, ["a", "b", "c"], [4, 4, 4]) == []


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [float("inf"), 0]])
@pytest.mark.parametrize("to_pairs", [ranking_to_pairs, ratings_to_pairs])
def test_scores_that_do_not_fit_are_refused(to_pairs, scores):
    with pytest.raises(ValueError, match="scores"):
        to_pairs(PROMPT, ["a", "b"], scores)


def test_grouping_undoes_ranking_whatever_the_order_of_the_pairs():
    answers, scores = ["e", "b", "d", "a", "c"], [3.0, 2.25, 2.0, 0.5, 0.0]
    pairs = ranking_to_pairs(PROMPT, answers, scores)
    pairs += ranking_to_pairs(PROMPT, ["e", "b"], [1, 0.25])  # a pair that was judged twice
    for seed in range(20):
        random.Random(seed).shuffle(pairs)
        (row,) = group_by_prompt(pairs)
        assert row["candidates"] == answers and row["scores"] == scores
        assert (row["instruction"], row["history"]) == (PROMPT["instruction"], PROMPT["history"])


def test_grouping_keeps_prompts_apart_by_instruction_and_history():
    prompts = [PROMPT, {**PROMPT, "history": []}, {**PROMPT, "instruction": "How?"}]
    rankings = [ranking_to_pairs(prompt, ["a", "b", "c"]) for prompt in prompts]
    rows = group_by_prompt([pair for triple in zip(*rankings) for pair in triple])
    keys = [(row["instruction"], row["history"], row["candidates"]) for row in rows]
    assert keys == [(p["instruction"], p["history"], ["a", "b", "c"]) for p in prompts]
    assert all("scores" not in row for row in rows)


def pairs_of(text: str) -> list[dict]:
    """ "ab bc" -> the pairs a over b, b over c."""
    return [pair for edge in text.split() for pair in ranking_to_pairs(PROMPT, list(edge))]


NO_RANKING = ["ab bc ca", "ab ba", "ab bc", "ab ac", "ab ba ac", "ab ac bc cd da bd", "ab cd"]


@pytest.mark.parametrize("edges", NO_RANKING)
def test_pairs_that_state_no_full_ranking_stay_pairs(edges):
    rows = group_by_prompt(pairs_of(edges))
    assert ["".join(row["candidates"]) for row in rows] == edges.split()


def full_ranking_by_search(stated: set[tuple[str, str]]) -> tuple | None:
    answers = {answer for edge in stated for answer in edge}
    for order in itertools.permutations(answers):
        if stated == {(a, b) for i, a in enumerate(order) for b in order[i + 1 :]}:
            return order
    return None


def test_full_rankings_are_exactly_those_a_search_over_all_orders_finds():
    edges = list(itertools.permutations("abc", 2))
    for size in range(1, 7):
        for chosen in itertools.combinations(edges, size):
            rows = group_by_prompt(pairs_of(" ".join(a + b for a, b in chosen)))
            expected = full_ranking_by_search(set(chosen))
            found = [tuple(row["candidates"]) for row in rows]
            assert found == ([expected] if expected else list(chosen))


def test_margins_that_are_no_gaps_of_one_score_keep_the_pairs_apart():
    pairs = ranking_to_pairs(PROMPT, ["a", "b", "c"], [2.0, 1.0, 0.0])
    pairs[1]["margin"] = 1.0
    rows = group_by_prompt(pairs)
    assert [row["scores"] for row in rows] == [[1.0, 0.0]] * 3
    assert [row["id"] for row in rows] == ["p7-0-1", "p7-0-2", "p7-1-2"]


def test_margin_on_some_pairs_only_gives_a_ranking_without_scores():
    pairs = ranking_to_pairs(PROMPT, ["a", "b", "c"], [2.0, 1.0, 0.0])
    pairs[2]["margin"] = None
    for rows in (group_by_prompt(pairs), group_by_prompt([*pairs[:2], pairs_of("bc")[0]])):
        assert [row["candidates"] for row in rows] == [["a", "b", "c"]] and "scores" not in rows[0]


def test_batches_are_of_one_size_and_hold_every_ranking_once():
    sizes = [4, 2, 4, 3, 2, 2, 4, 2, 2]
    batches = ranked_batches(sizes, 2)
    assert batches == [[0, 2], [6], [1, 4], [5, 7], [8], [3]]
    assert all(len({sizes[place] for place in batch}) == 1 for batch in batches)


def test_pairs_written_in_the_hh_format_are_read_back_and_grouped_again(tmp_path):
    answers, scores = ["best", "good", "bad"], [2.0, 0.5, 0.0]
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for pair in ranking_to_pairs(PROMPT, answers, scores):
            row = {"id": pair["id"], "margin": pair["margin"]}
            for side in ("chosen", "rejected"):
                row[side] = format_dialogue(pair["instruction"], pair[side], pair["history"])
            file.write(json.dumps(row) + "\n")
    data, _ = load_preferences(tmp_path / "pairs.jsonl")
    (row,) = group_by_prompt(list(data))
    assert row == {**PROMPT, "id": "p7-0-1", "candidates": answers, "scores": scores}
