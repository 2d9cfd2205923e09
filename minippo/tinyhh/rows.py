"""TinyHH as data: prompts, demonstrations, and texts for the base model."""

import random

from minippo.hh import format_dialogue, format_prompt
from minippo.tinyhh import world as w


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
    """Dialogues of the pretrain split, and one text in five plain notes on a subject."""
    texts = []
    for index, row in enumerate(demonstrations("pretrain", count, w.PRETRAIN_MIX, seed)):
        rng = random.Random(f"{seed}/notes/{index}")
        dialogue = format_dialogue(row["instruction"], row["answer"], row["history"])
        texts.append(_notes(rng) if index % 5 == 0 else dialogue)
    return texts


def _notes(rng: random.Random) -> str:
    about = rng.choice(w.subjects(False))
    advice = " ".join(rng.choice(w.ONE_TIP).format(a=tip) for tip in rng.sample(about["tips"], 3))
    goals = f"{about['goals'][0]}, {about['goals'][1]} and {about['goals'][2]}"
    outcome = rng.choice(about["outcomes"])
    return f"Notes on {about['name']}: how to {goals}. {advice} That way {outcome}."
