"""TinyHH as data: rows in the format of HH-RLHF, prompts, texts for the base model, and the packaged files."""

import random

from minippo.hh import format_dialogue, format_prompt
from minippo.tinyhh import world as w
from minippo.tinyhh.annotator import judge, rank


def prompt_rows(split: str, count: int, seed: int = 0, harmful_share: float | None = None) -> list[dict]:
    """`count` different prompts of a split: dicts with id, instruction and history."""
    rows, seen, index = [], set(), 0
    while len(rows) < count:
        request = w.draw_request(split, index, seed)
        prompt = format_prompt(request.instruction, request.history)
        if prompt not in seen:
            seen.add(prompt)
            history = [list(turn) for turn in request.history]
            rows.append({"id": f"{split}-{index}", "instruction": request.instruction, "history": history})
        index += 1
    return rows


def demonstrations(split: str, count: int, mix: dict | None = None, seed: int = 0) -> list[dict]:
    """Prompts with one `answer` each, of the kinds and frequencies of `mix`: what SFT imitates."""
    rows = []
    for index in range(count):
        request = w.draw_request(split, index, seed)
        rng = random.Random(f"{seed}/{split}/{index}/answer")
        kind = w.draw_kind(rng, request.harmful, mix or w.SFT_MIX)
        answer = w.write_answer(rng, request, kind)
        history = [list(turn) for turn in request.history]
        rows.append({"instruction": request.instruction, "history": history, "answer": answer, "kind": kind})
    return rows


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
    return f"Notes on {about['name']}: how to {goals}. {advice} That way {rng.choice(about['outcomes'])}."
