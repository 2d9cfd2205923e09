"""Rankings and ratings to preference pairs, and K-way rankings kept together per prompt.

A *candidates row* is {"id", "instruction", "history", "candidates"}: the answers to one prompt,
best first, with their "scores" where known. A *pair* is a row of `load_preferences`:
{"id", "instruction", "history", "chosen", "rejected"}, with its "margin" where known.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations


def ranking_to_pairs(
    prompt_row: dict, ranked_answers: Sequence[str], scores: Sequence[float] | None = None
) -> list[dict]:
    """All K(K-1)/2 pairs of a ranking, best first; margin = score gap where scores are given.

    The order of the answers decides who is chosen, so a margin is negative where an annotator
    ranked against the scores. Two equal answers give no pair.
    """
    _require_scores(ranked_answers, scores)
    prompt = {key: prompt_row[key] for key in ("instruction", "history")}
    pairs = []
    for i, j in combinations(range(len(ranked_answers)), 2):
        sides = {"chosen": ranked_answers[i], "rejected": ranked_answers[j]}
        margin = {} if scores is None else {"margin": float(scores[i] - scores[j])}
        if sides["chosen"] != sides["rejected"]:
            pairs.append({"id": f"{prompt_row['id']}-{i}-{j}", **prompt, **sides, **margin})
    return pairs


def ratings_to_pairs(
    prompt_row: dict, answers: Sequence[str], ratings: Sequence[float]
) -> list[dict]:
    """The pairs of answers in any order; margin = gap of the ratings, ties give no pair."""
    _require_scores(answers, ratings)
    order = sorted(range(len(answers)), key=lambda i: -ratings[i])
    ranked, scores = [answers[i] for i in order], [ratings[i] for i in order]
    return [pair for pair in ranking_to_pairs(prompt_row, ranked, scores) if pair["margin"] > 0]


def group_by_prompt(pairs: Sequence[dict]) -> list[dict]:
    """The pairs of each prompt as candidates rows, prompts in order of first appearance.

    A prompt whose pairs state one full ranking (every two of its K answers compared, no cycle, no
    contradiction, and margins, if any, the gaps of one score) becomes a single row with K
    candidates. Otherwise nothing is inferred: each of its pairs stays a row with 2 candidates.
    Scores are known up to a constant only, so the last candidate has score 0.
    """
    prompts = defaultdict(list)
    for pair in pairs:
        prompts[pair["instruction"], str(pair["history"])].append(pair)
    rows = []
    for same in prompts.values():
        ranked = _full_ranking(same)
        rows += [_row(same, ranked)] if ranked else [_row([p], _sides(p)) for p in same]
    return rows


def ranked_batches(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """Places of at most `batch_size` rankings of the same K, so that their scores form (B, K).

    sizes: K of each ranking
    """
    places = defaultdict(list)
    for place, size in enumerate(sizes):
        places[size].append(place)
    starts = [(same, i) for same in places.values() for i in range(0, len(same), batch_size)]
    return [same[i : i + batch_size] for same, i in starts]


def _sides(pair: dict) -> tuple[str, str]:
    return pair["chosen"], pair["rejected"]


def _full_ranking(pairs: list[dict]) -> list[str]:
    """The answers best first, or [] if the pairs state no full ranking."""
    stated = {_sides(pair) for pair in pairs}
    wins = Counter(chosen for chosen, _ in stated)
    ranked = sorted({answer for sides in stated for answer in sides}, key=lambda a: (-wins[a], a))
    if stated != set(combinations(ranked, 2)):
        return []
    scores = dict(zip(ranked, _row(pairs, ranked).get("scores", []), strict=False))
    gaps = [scores[p["chosen"]] - scores[p["rejected"]] - p["margin"] for p in pairs if scores]
    return ranked if all(abs(gap) <= 1e-6 for gap in gaps) else []


def _row(pairs: list[dict], ranked: Sequence[str]) -> dict:
    row = {key: pairs[0][key] for key in ("id", "instruction", "history")}
    row["candidates"] = list(ranked)
    margins = {_sides(pair): pair.get("margin") for pair in pairs}
    if all(pair.get("margin") is not None for pair in pairs):
        row["scores"] = [margins.get((answer, ranked[-1]), 0.0) for answer in ranked]
    return row


def _require_scores(answers: Sequence[str], scores: Sequence[float] | None) -> None:
    if scores is not None and len(scores) != len(answers):
        raise ValueError(f"{len(answers)} answers have {len(scores)} scores; give one for each")
    if scores is not None and not all(math.isfinite(score) for score in scores):
        raise ValueError(f"scores must be finite numbers, not {list(scores)}")
