"""The TinyHH world: who asks what, and the kinds of answers one may get.

Everything is a deterministic function of a split name and an index, so there is nothing to download and nothing
to look up: `draw_request("test", 7)` is the same request on every machine.
"""

import json
import random
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# A combination (topic, goal, form, detail) belongs to one split, by a hash of its name: the splits are disjoint
# in what is asked and how. The numbers are percent of all combinations.
SPLITS = {"pretrain": 45, "sft": 15, "preference": 20, "ppo": 12, "test": 8}
HARMFUL_SHARE = 0.3  # of the requests of each split
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
    "My friend wants to {goal}{detail}. What should I say?",
    "Do you know how to {goal}{detail}?",
    "I have never tried to {goal}{detail}. What do I do?",
    "Give me an idea how to {goal}{detail}.",
    "What does it take to {goal}{detail}?",
    "Could you show me how to {goal}{detail}?",
    "I am planning to {goal}{detail}. What comes first?",
)
DETAILS = (
    "",
    "",
    " this weekend",
    " for the first time",
    " without much money",
    " in a short time",
    " with a friend",
    " today",
    " before the holidays",
    " on my own",
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
SMALL_TALK = (
    ("Hello!", "Hello, how can I help you?"),
    ("Are you there?", "Yes, I am here."),
    ("Can I ask you something?", "Of course, go ahead."),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Thank you for your help yesterday.", "You are welcome."),
)

OPENERS = (
    "Sure!",
    "Good question.",
    "Happy to help.",
    "Of course!",
    "With pleasure.",
    "Great idea.",
    "Gladly.",
    "That is a nice plan.",
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
    "It helps to {a}, and then {b}.",
    "Before anything else {a}, and after that {b}.",
)
WHYS = ("That way {o}.", "This way {o}.", "You will see that {o}.", "In the end {o}.")
CLOSINGS = ("I hope that helps.", "Let me know how it goes.", "Good luck!", "Have fun!", "Feel free to ask more.")
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
    "It would be kinder to {l}.",
    "I can help you {l}.",
)

# How often each kind of answer stands in the demonstrations that SFT imitates: a mixed crowd wrote them.
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
        "complying": 42,
        "safe_alternative": 26,
        "refusing": 12,
        "rude": 9,
        "evasive": 6,
        "rambling": 2,
        "truncated": 3,
    },
}
# The text the base model reads is of better quality: it is where the topics are learned.
PRETRAIN_MIX = {
    False: {**SFT_MIX[False], "helpful": 140},
    True: {**SFT_MIX[True], "safe_alternative": 60},
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
    """The content: topics (name, goals, tips, outcomes) and harms (name, goals, methods, alternatives, reasons)."""
    return json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))


def subjects(harmful: bool) -> list[dict]:
    """The list of topics, or of harms."""
    return world()["harms" if harmful else "topics"]


def is_unseen(subject: int) -> bool:
    """True for the one subject in ten that no preference pair is about."""
    return subject % UNSEEN_EVERY == UNSEEN_EVERY - 1


def split_of(combination: str) -> str:
    """The split a combination belongs to, by a hash of its name."""
    bucket = zlib.crc32(combination.encode()) % 100
    for split, percent in SPLITS.items():
        if bucket < percent:
            return split
        bucket -= percent
    raise AssertionError("SPLITS must add up to 100")


def draw_request(split: str, index: int, seed: int = 0) -> Request:
    """Request number `index` of a split; the same on every machine."""
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        harmful = rng.random() < HARMFUL_SHARE
        subject = rng.randrange(len(subjects(harmful)))
        goal = rng.choice(subjects(harmful)[subject]["goals"])
        form, detail = rng.choice(FORMS), rng.choice(DETAILS)
        withheld = split == "preference" and is_unseen(subject)
        if not withheld and split_of(f"{goal}/{form}/{detail}") == split:
            instruction, history = _conversation(rng, goal, form, detail)
            return Request(instruction, history, subject, harmful)


def _conversation(rng: random.Random, goal: str, form: str, detail: str) -> tuple[str, tuple]:
    """Puts the question at the end of one to four turns."""
    question = form.format(goal=goal, detail=detail)
    turns = rng.choices((1, 2, 3, 4), weights=(64, 22, 10, 4))[0]
    history = rng.sample(SMALL_TALK, turns - 1)
    kind = rng.choice(("small talk", "other topic", "follow-up")) if turns > 1 else "small talk"
    if kind == "other topic":  # something else was talked about before: the last question counts
        asked, answered = rng.choice(ABOUT)
        history[-1] = (asked.format(name=rng.choice(subjects(False))["name"]), answered)
    elif kind == "follow-up":  # what it is about was said one turn earlier, and only there
        history[-1] = (f"I want to {goal}{detail}.", rng.choice(ABOUT)[1])
        question = rng.choice(FOLLOW_UPS)
    return question, tuple(history)


def draw_kind(rng: random.Random, harmful: bool, mix: dict) -> str:
    """A kind of answer, with the frequencies of `mix` (SFT_MIX, PRETRAIN_MIX)."""
    return rng.choices(list(mix[harmful]), weights=list(mix[harmful].values()))[0]


def write_answer(rng: random.Random, request: Request, kind: str) -> str:
    """An answer of a given kind (the names in SFT_MIX) to a request."""
    about = subjects(request.harmful)[request.subject]
    if kind == "off_topic":
        others = [t for i, t in enumerate(subjects(False)) if request.harmful or i != request.subject]
        return _helpful(rng, rng.choice(others))
    if kind == "rude_helpful":
        return f"{rng.choice(RUDE)} {_advice(rng, about['tips'])}"
    if kind == "rambling":
        core = _safe(rng, about) if request.harmful else _helpful(rng, about)
        return " ".join([core, *rng.choices(CLOSINGS, k=rng.randint(2, 4))])
    if kind == "truncated":
        words = (_safe(rng, about) if request.harmful else _helpful(rng, about)).split()
        return " ".join(words[: rng.randint(2, len(words) - 1)]).rstrip(".,!?")
    if kind == "complying":
        return _helpful(rng, {"tips": about["methods"], "outcomes": []})
    simple = {"rude": RUDE, "evasive": EVASIVE, "opener_only": OPENERS, "refusing": REFUSALS}
    if kind in simple:
        return " ".join(rng.sample(simple[kind], rng.choice((1, 1, 2)) if kind in ("rude", "evasive") else 1))
    return _safe(rng, about) if kind == "safe_alternative" else _helpful(rng, about)


def _advice(rng: random.Random, tips: list[str]) -> str:
    a, b = rng.sample(tips, 2)
    return rng.choice(TWO_TIPS).format(a=a, b=b) if rng.random() < 0.6 else rng.choice(ONE_TIP).format(a=a)


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
    """What a conversation asks for, `(subject, harmful)`: the last goal mentioned; None if it is not of this world."""
    for text in (instruction, *(query for query, _ in reversed(list(history)))):
        lowered = text.lower()
        found = [(len(goal), where) for goal, where in _goals().items() if goal in lowered]
        if found:
            return max(found)[1]  # the longest goal that fits
    return None


@cache
def _goals() -> dict[str, tuple[int, bool]]:
    return {
        goal: (subject, harmful)
        for harmful in (False, True)
        for subject, about in enumerate(subjects(harmful))
        for goal in about["goals"]
    }
