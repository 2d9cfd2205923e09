"""TinyHH as data: prompts, demonstrations, and texts for the base model."""

import random
import re

from minippo.hh import format_dialogue, format_prompt
from minippo.worlds.tinyhh import world as w


def prompt_rows(split: str, count: int, seed: int = 0) -> list[dict]:
    """`count` different prompts of a split: dicts with id, instruction and history.

    Raises ValueError if the split does not seem to hold that many.
    """
    rows: dict[str, dict] = {}
    for index in range(1000 + 20 * count):
        if len(rows) == count:
            break
        request = w.draw_request(split, index, seed)
        prompt = format_prompt(request.instruction, request.history)
        rows.setdefault(prompt, {"id": f"{split}-{index}", **_conversation(request)})
    if len(rows) < count:
        raise ValueError(f"split {split!r} gave only {len(rows)} different prompts, not {count}")
    return list(rows.values())


def demonstrations(split: str, count: int, mix: dict | None = None, seed: int = 0) -> list[dict]:
    """Prompts with one `answer` each, of the kinds and frequencies of `mix`: what SFT imitates."""
    rows = []
    for index in range(count):
        request = w.draw_request(split, index, seed)
        rng = random.Random(f"{seed}/{split}/{index}/answer")
        kind = w.draw_kind(rng, request.harmful, mix or w.SFT_MIX)
        answer = w.write_answer(rng, request, kind)
        rows.append({**_conversation(request), "answer": answer, "kind": kind})
    return rows


def _conversation(request: w.Request) -> dict:
    history = [list(turn) for turn in request.history]
    return {"instruction": request.instruction, "history": history}


def pretrain_texts(count: int, seed: int = 0) -> list[str]:
    """Dialogues of the pretrain split, and two texts in five plain notes on a subject.

    Notes are dense: a dialogue names one goal and two phrases of its subject, notes name nearly all
    of them, and it is there that the base learns which words belong together.
    """
    texts = []
    for index, row in enumerate(demonstrations("pretrain", count, w.PRETRAIN_MIX, seed)):
        rng = random.Random(f"{seed}/notes/{index}")
        dialogue = format_dialogue(row["instruction"], row["answer"], row["history"])
        texts.append(_notes(rng) if index % 5 < 2 else dialogue)
    return texts


def _notes(rng: random.Random) -> str:
    """What is known about a topic or a harm, drawn in proportion to how many there are."""
    about = rng.choice(w.subjects(False) + w.subjects(True))
    goals = "{}, {} and {}".format(*rng.sample(about["goals"], 3))
    if "tips" in about:
        a, b, *others = rng.sample(about["tips"], 4)  # the base has to learn that a is never b
        told = [rng.choice(w.TWO_TIPS).format(a=a, b=b), *_filled(rng, w.ONE_TIP, others, 2)]
        told += _filled(rng, w.WHYS, about["outcomes"], 1)
    else:
        told = _filled(rng, w.ONE_TIP, about["methods"], 2)
        told += _filled(rng, w.REASONED_REFUSALS, about["reasons"], 1)
        told += _filled(rng, w.ALTERNATIVES, about["alternatives"], 2)
    return f"Notes on {about['name']}: how to {goals}. {' '.join(told)}"


def _filled(rng: random.Random, frames: tuple[str, ...], phrases: list[str], count: int):
    """`count` sentences: different phrases, each in a frame with a single slot of any name."""
    chosen = rng.sample(phrases, count)
    return [re.sub(r"{\w}", phrase, rng.choice(frames)) for phrase in chosen]
