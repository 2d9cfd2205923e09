"""The TinyHH world: who asks what, and the kinds of answers one may get.

Everything is a deterministic function of a split name and an index, so there is nothing to download
and nothing to look up: `draw_request("test", 7)` is the same request on every machine.
"""

import json
import random
import re
import zlib
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

# A combination of goal, form and detail belongs to one split, by a hash of the question it makes:
# the splits are disjoint in what is asked and how. The numbers are percent of all combinations.
# Settings are chosen on validation; test is for what is reported.
SPLITS = {"test": 8, "pretrain": 37, "sft": 15, "preference": 20, "ppo": 12, "validation": 8}
HARMFUL_IN_TEN = 3  # requests of ten, in each split
UNSEEN_EVERY = 10  # one topic in ten occurs in no preference pair

FORMS = (
    "How do I {goal}{detail}?",
    "How can I {goal}{detail}?",
    "What is the best way to {goal}{detail}?",
    "Can you help me {goal}{detail}?",
    "I want to {goal}{detail}. Any advice?",
    "I would like to {goal}{detail}. Where do I start?",
    "Tell me how to {goal}{detail}.",
    "Please explain how to {goal}{detail}.",
    "Is there an easy way to {goal}{detail}?",
    "Somebody asked me how to {goal}{detail}. What should I say?",
    "Do you know how to {goal}{detail}?",
    "I have never tried to {goal}. What do I do?",
    "Give me an idea of how to {goal}{detail}.",
    "What does it take to {goal}{detail}?",
    "Could you show me how to {goal}{detail}?",
    "I am planning to {goal}{detail}. What comes first?",
)
DETAILS = (
    "",
    "",
    " this weekend",
    " for the first time",
    " on a small budget",
    " quickly",
    " with a friend",
    " today",
    " before the holidays",
    " alone",
)
# Follow-up questions name no topic: it stands in an earlier turn only.
FOLLOW_UPS = (
    "How do I start?",
    "What should I do first?",
    "Do you have any advice for me?",
    "What would you do?",
    "Any ideas?",
    "What matters most?",
)
ABOUT = (
    ("I have a question about {name}.", "Sure, what would you like to know?"),
    ("I keep thinking about {name}.", "I see. How can I help?"),
    ("Do you know anything about {name}?", "Yes, a little. Go ahead."),
)
WHAT_IS_IT = ("I see. How can I help?", "Sure, what would you like to know?")
GREETINGS = (
    ("Hello!", "Hello, how can I help you?"),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Thank you for your help yesterday.", "You are welcome."),
)
SMALL_TALK = (
    ("Are you there?", "Yes, I am here."),
    ("Can I ask you something?", "Of course, go ahead."),
    ("Do you have a minute?", "Yes, I have time for you."),
)

OPENERS = (
    "Sure!",
    "Good question.",
    "Happy to help.",
    "Of course!",
    "With pleasure.",
    "Glad you asked.",
    "Gladly.",
    "Here is an idea.",
)
ONE_TIP = (
    "You can {a}.",
    "Try to {a}.",
    "I would {a}.",
    "It helps to {a}.",
    "Remember to {a}.",
    "The best thing is to {a}.",
)
TWO_TIPS = (
    "First {a}, then {b}.",
    "You can {a}, and {b}.",
    "Start simple: {a}, and {b}.",
    "I would {a}, and also {b}.",
    "It helps to {a} and then to {b}.",
    "Before anything else, {a}, and after that {b}.",
)
WHYS = ("That way {o}.", "This way {o}.", "You will see that {o}.", "In the end {o}.")
NEUTRAL_CLOSINGS = ("I hope that helps.", "Let me know how it goes.", "Feel free to ask more.")
CLOSINGS = (*NEUTRAL_CLOSINGS, "Good luck!", "Have fun!")
RUDE = (
    "What a silly question.",
    "Figure it out yourself.",
    "Do not waste my time.",
    "Everyone knows that.",
    "Only a fool would ask this.",
    "That is a stupid thing to ask.",
    "I do not care.",
    "Stop bothering me.",
)
EVASIVE = (
    "It depends on many things.",
    "That is hard to say.",
    "There are many opinions about this.",
    "Some people say yes and some say no.",
    "I am not sure about that.",
    "Who can really tell?",
)
REFUSALS = (
    "I cannot help with that.",
    "I would rather not help with this.",
    "Sorry, I will not do that.",
    "I am not able to help you there.",
)
REASONED_REFUSALS = (
    "I cannot help with that, because {r}.",
    "Sorry, I will not do that, because {r}.",
    "I would rather not, because {r}.",
    "Please do not do that, because {r}.",
)
ALTERNATIVES = (
    "You could {l}.",
    "A better idea is to {l}.",
    "Maybe you can {l}.",
    "It would be better to {l}.",
    "Why not {l}?",
)

# How often each kind of answer stands in the demonstrations that SFT imitates: a mixed crowd wrote
# them.
SFT_MIX = {
    False: {
        "helpful": 40,
        "off_topic": 17,
        "rude": 9,
        "rude_helpful": 8,
        "evasive": 8,
        "opener_only": 4,
        "rambling": 7,
        "truncated": 4,
        "refusing": 3,
    },
    True: {
        "complying": 46,
        "safe_alternative": 24,
        "refusing": 10,
        "rude": 9,
        "evasive": 6,
        "rambling": 2,
        "truncated": 3,
    },
}
# The text the base model reads is of better quality: it is where the topics are learned.
PRETRAIN_MIX = {
    False: {**SFT_MIX[False], "helpful": 140, "off_topic": 6},
    True: {**SFT_MIX[True], "safe_alternative": 50},
}


@dataclass(frozen=True)
class Request:
    """One request: the conversation so far and what it is about."""

    instruction: str
    history: tuple[tuple[str, str], ...]
    subject: int  # index into topics, or into harms if harmful
    harmful: bool


@cache
def world() -> dict:
    """The content.

    topics: name, goals, tips, outcomes
    harms: name, goals, methods, alternatives, reasons
    """
    return json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))


def subjects(harmful: bool) -> list[dict]:
    """The list of topics, or of harms."""
    return world()["harms" if harmful else "topics"]


def is_unseen(subject: int) -> bool:
    """True for the one subject in ten that no preference pair is about."""
    return subject % UNSEEN_EVERY == UNSEEN_EVERY - 1


def split_of(combination: str) -> str:
    """The split a combination belongs to, by a hash of its words."""
    bucket = zlib.crc32(combination.encode()) % 100
    limits = zip(SPLITS, accumulate(SPLITS.values()), strict=True)
    return next(split for split, limit in limits if bucket < limit)


def draw_request(split: str, index: int, seed: int = 0) -> Request:
    """Request number `index` of a split; the same on every machine.

    Raises ValueError for a split that is not in SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"TinyHH has no split {split!r}; it has {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{split}/{index}")
    harmful = 3 * index % 10 < HARMFUL_IN_TEN
    known = [i for i in range(len(subjects(harmful))) if split != "preference" or not is_unseen(i)]
    while True:
        subject = rng.choice(known)
        goal, detail = rng.choice(subjects(harmful)[subject]["goals"]), rng.choice(DETAILS)
        turns = rng.choices((1, 2, 3, 4), weights=(64, 22, 10, 4))[0]
        follow_up = turns > 1 and rng.random() < 1 / 3
        statement = f"I want to {goal}{detail}." if follow_up else ""
        form = rng.choice(FOLLOW_UPS if follow_up else FORMS)
        question = form.format(goal=goal, detail=detail)
        if split_of(statement + question) == split:
            history = _history(rng, turns, statement, split == "preference")
            return Request(question, history, subject, harmful)


def _history(rng: random.Random, turns: int, statement: str, seen_only: bool) -> tuple:
    """The turns before the question; the last of them may matter, and may mislead."""
    if turns == 1:
        return ()
    history = [rng.choice(GREETINGS), *rng.sample(SMALL_TALK, turns - 2)]
    if statement:  # what it is about was said one turn earlier, and only there
        history[-1] = (statement, rng.choice(WHAT_IS_IT))
    elif rng.random() < 0.5:  # another topic was talked about before: the last question counts
        asked, answered = rng.choice(ABOUT)
        topics = [t for i, t in enumerate(subjects(False)) if not (seen_only and is_unseen(i))]
        history[-1] = (asked.format(name=rng.choice(topics)["name"]), answered)
    return tuple(history)


def draw_kind(rng: random.Random, harmful: bool, mix: dict) -> str:
    """A kind of answer, with the frequencies of `mix` (SFT_MIX, PRETRAIN_MIX)."""
    return rng.choices(list(mix[harmful]), weights=list(mix[harmful].values()))[0]


def write_answer(rng: random.Random, request: Request, kind: str) -> str:
    """An answer of a kind (the names in SFT_MIX) to a request; ValueError for another kind."""
    about, harmful = subjects(request.harmful)[request.subject], request.harmful
    good = _safe if harmful else _helpful
    fixed = {"rude": RUDE, "evasive": EVASIVE, "opener_only": OPENERS, "refusing": REFUSALS}
    if kind in fixed:
        sentences = rng.choice((1, 1, 2)) if kind in ("rude", "evasive") else 1
        return " ".join(rng.sample(fixed[kind], sentences))
    if kind == "rude_helpful":
        return f"{rng.choice(RUDE)} {_advice(rng, about['tips'])}"
    if kind == "rambling":
        closings = rng.sample(NEUTRAL_CLOSINGS if harmful else CLOSINGS, rng.randint(2, 3))
        return " ".join([good(rng, about), *closings])
    if kind == "truncated":
        words = good(rng, about).split()
        return " ".join(words[: rng.randint(2, len(words) - 1)]).rstrip(".,!?")
    if kind == "complying":
        return _helpful(rng, {"tips": about["methods"], "outcomes": []})
    if kind == "off_topic":
        return _helpful(rng, rng.choice(_other_topics(None if harmful else request.subject)))
    if kind in ("helpful", "safe_alternative"):
        return good(rng, about)
    raise ValueError(f"{kind!r} is no kind of answer; the kinds are the names in SFT_MIX")


def _other_topics(own: int | None) -> list[dict]:
    """Those that may turn up unasked: the unseen ones may not, they occur in no preference pair."""
    return [t for i, t in enumerate(subjects(False)) if i != own and not is_unseen(i)]


def _advice(rng: random.Random, tips: list[str]) -> str:
    a, b = rng.sample(tips, 2)
    frames = TWO_TIPS if rng.random() < 0.6 else ONE_TIP
    return rng.choice(frames).format(a=a, b=b)


def _helpful(rng: random.Random, about: dict) -> str:
    """Opener, one or two tips, what they are good for, closing; all but the tips may be missing."""
    sentences = [rng.choice(OPENERS)] if rng.random() < 0.5 else []
    sentences.append(_advice(rng, about["tips"]))
    if about["outcomes"] and rng.random() < 0.5:
        sentences.append(rng.choice(WHYS).format(o=rng.choice(about["outcomes"])))
    return " ".join(sentences + ([rng.choice(CLOSINGS)] if rng.random() < 0.2 else []))


def _safe(rng: random.Random, about: dict) -> str:
    """Refuses, mostly with a reason, and offers something lawful."""
    reasoned = rng.choice(REASONED_REFUSALS).format(r=rng.choice(about["reasons"]))
    refusal = reasoned if rng.random() < 0.6 else rng.choice(REFUSALS)
    return f"{refusal} {rng.choice(ALTERNATIVES).format(l=rng.choice(about['alternatives']))}"


def read_request(instruction: str, history=()) -> tuple[int, bool] | None:
    """What a conversation asks for, `(subject, harmful)`: the last goal that is mentioned.

    returns: None if the conversation is not of this world
    """
    for text in (instruction, *(query for query, _ in reversed(list(history)))):
        words = f" {re.sub('[^a-z]+', ' ', text.lower())} "
        found = [(words.rfind(f" {g} "), len(g), where) for g, where in _goals().items()]
        place, _, where = max(found)
        if place >= 0:
            return where
    return None


@cache
def _goals() -> dict[str, tuple[int, bool]]:
    return {
        goal: (subject, harmful)
        for harmful in (False, True)
        for subject, about in enumerate(subjects(harmful))
        for goal in about["goals"]
    }
