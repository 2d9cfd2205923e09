"""Evaluation, not by the reward model that was optimised but by the annotator; win rates and KL."""

import math
from collections import Counter

import torch

from minippo.batching import Encoded, answered, decode_response
from minippo.engine.look import response_logprobs
from minippo.generation import generate_many
from minippo.reward_training import score_all
from minippo.worlds.tinyhh.annotator import Judgement, judge
from minippo.worlds.tinyhh.world import is_unseen, read_request


def win_rate(scores, other_scores) -> tuple[float, float, float]:
    """How often the first beats the second, ties counting half, with its 95% Wilson interval.

    scores, other_scores: one score per prompt, in the same order
    returns: rate, lower end, upper end
    """
    pairs = list(zip(scores, other_scores, strict=True))
    rate = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    return rate, *wilson(rate, len(pairs))


def wilson(p: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share p of n independent trials (Wilson 1927)."""
    z = 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def sample_answers(
    policy, prompts, tokenizer, max_response_tokens: int, seed: int, copies: int = 1,
    temperature: float = 1.0, on_batch=None,
) -> list[Encoded]:  # fmt: skip
    """`copies` sampled answers to each tokenised prompt.

    on_batch: called with the number of answers of each batch that is done
    """
    repeated = [prompt for prompt in prompts for _ in range(copies)]
    options = {"temperature": temperature, "on_batch": on_batch}
    answers = generate_many(policy, repeated, tokenizer, max_response_tokens, seed, **options)
    starts = range(0, len(repeated), copies)
    return [Encoded(i, prompts[i], answers[s : s + copies]) for i, s in enumerate(starts)]


def best_of_n(answers: list[Encoded], scores: list[list[float]]) -> list[Encoded]:
    """Of each prompt's answers the one with the highest score."""
    best = [max(range(len(s)), key=s.__getitem__) for s in scores]
    return [Encoded(e.row, e.prompt, [e.responses[i]]) for e, i in zip(answers, best, strict=True)]


def best_of_n_kl(n: int) -> float:
    """An upper bound on KL(best-of-n, policy) in nats: log n - (n - 1)/n (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


@torch.no_grad()
def kl_per_sequence(policy, ref_policy, answers: list[Encoded], pad_id: int, temperature=1.0):
    """Mean over answers of sum_t log pi - log pi_ref: an estimate of KL(policy, ref) in nats."""
    prompts, responses = [e.prompt for e in answers], [e.responses[0] for e in answers]
    batch = answered(prompts, responses, pad_id).to_device_of(policy).with_chunk_size(64)
    logprobs = response_logprobs(policy, batch, temperature)  # (B, R)
    ref_logprobs = response_logprobs(ref_policy, batch, temperature)  # (B, R)
    return float((logprobs - ref_logprobs).sum()) / len(answers)


def judge_all(rows, answers: list[Encoded], tokenizer) -> list[Judgement]:
    """The annotator's judgement of each row's first answer."""
    texts = [decode_response(tokenizer, e.responses[0]) for e in answers]
    return [
        judge(row["instruction"], text, row["history"])
        for row, text in zip(rows, texts, strict=True)
    ]


def annotated_summary(rows, judgements: list[Judgement]) -> dict:
    """Mean gold score and the rates of the table, each over the requests it is about.

    A rate over no request at all is None.
    """
    harmful = [read_request(row["instruction"], row["history"])[1] for row in rows]

    def rate(label: str, which: bool | None = None) -> float | None:
        chosen = [
            label in j.labels
            for j, h in zip(judgements, harmful, strict=True)
            if which in (None, h)
        ]
        return sum(chosen) / len(chosen) if chosen else None

    return {
        "gold": sum(j.score for j in judgements) / len(judgements),
        "on_topic": rate("on_topic", False),
        "complying": rate("complying", True),
        "rude": rate("rude"),
        "over_refusing": rate("refusing", False),
        "unreadable": rate("unreadable"),
        "rambling": rate("rambling"),
        "forms": sentence_forms(judgements),
    }


def sentence_forms(judgements: list[Judgement]) -> int:
    """How many sentence forms at least 1% of the answers have."""
    counts = Counter(j.form for j in judgements)
    return sum(count >= 0.01 * len(judgements) for count in counts.values())


def answer_statistics(answers: list[Encoded], eos_id: int) -> dict:
    """What can be said of any answers: length, how many end, how many are distinct."""
    responses = [tuple(e.responses[0]) for e in answers]
    return {
        "tokens": sum(map(len, responses)) / len(responses),
        "ended": sum(r[-1] == eos_id for r in responses) / len(responses),
        "distinct": len(set(responses)) / len(responses),
    }


def ranking_accuracy(scores: list[list[float]]) -> dict:
    """How often the reward model puts two answers in the order of a ranking.

    scores: K per ranking, best first; a tie counts half
    returns: held_out_pairs, accuracy, and low and high, a 95% interval over rankings: the K(K-1)/2
        pairs of one share their answers, so they are no independent trials (of pairs: Wilson's)
    """
    pairs = [[(a, b) for i, a in enumerate(s) for b in s[i + 1 :]] for s in scores]
    flat = [pair for ranking in pairs for pair in ranking]
    share = win_rate(*zip(*flat, strict=True))[0]
    # The accuracy is a ratio of sums over rankings; this is its linearised standard error.
    hits = [sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in r) for r in pairs]
    errors = [hit - share * len(r) for hit, r in zip(hits, pairs, strict=True)]
    n = len(pairs)
    half = 1.96 * math.sqrt(n / max(1, n - 1) * math.fsum(e * e for e in errors)) / len(flat)
    if len(flat) == n or half < 1e-9:  # pairs, or all alike: then n rankings are n trials
        low, high = wilson(share, n)
    else:
        low, high = max(0.0, share - half), min(1.0, share + half)
    return {"held_out_pairs": len(flat), "accuracy": share, "low": low, "high": high}


def reward_agreement(rows, scores: list[list[float]], judged: list[list[Judgement]]) -> dict:
    """How often the reward model orders two answers to a prompt as the noiseless annotator does.

    scores, judged: K per row. Only pairs the annotator tells apart count. Per named part: pairs
        that differ in this part, and whose order is this part's order.
    returns: shares under "noiseless", "seen topics", "unseen topics" and each part's name, and
        "correlation", None if either side gives all answers one score
    """
    hits: dict[str, list[bool]] = {}
    for row, s, j in zip(rows, scores, judged, strict=True):
        subject, _ = read_request(row["instruction"], row["history"])
        topic = "unseen topics" if is_unseen(subject) else "seen topics"
        for better, worse in _ordered_pairs(j):
            right = s[better] > s[worse]
            parts = [p for p in j[better].parts if j[better].parts[p] > j[worse].parts[p]]
            for name in ("noiseless", topic, *parts):
                hits.setdefault(name, []).append(right)
    flat = torch.tensor([[x for r in scores for x in r], [x.score for r in judged for x in r]])
    shares = {name: sum(values) / len(values) for name, values in sorted(hits.items())}
    correlation = float(torch.corrcoef(flat)[0, 1])
    return {**shares, "correlation": correlation if math.isfinite(correlation) else None}


def _ordered_pairs(judged: list[Judgement]):
    for i, first in enumerate(judged):
        for k, second in enumerate(judged):
            if first.score > second.score:
                yield i, k


def standardised(reward_model, answers: list[Encoded], pad_id: int) -> list[float]:
    """The reward model's score of each first answer, on the scale of its reference samples."""
    scores = score_all(reward_model, answers, pad_id)
    return [(s[0] - reward_model.mean) / reward_model.std for s in scores]
