"""`minippo data`: writes what the package ships, the TinyHH rows and the trained checkpoints."""

import gzip
import json
import random
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from minippo.hh import format_dialogue
from minippo.models import RewardModel, ValueModel, load_policy, load_tokenizer
from minippo.tinyhh import world as w
from minippo.tinyhh.annotator import judge, rank
from minippo.tinyhh.rows import prompt_rows

PREFERENCE_PROMPTS = 4000  # with K = 4 answers each: 24,000 pairs
TEST_PROMPTS = 2000  # one pair each
CANDIDATES = 4
STAGES = {"base": "pretrain", "sft": "sft", "reward": "reward", "value": "value", "ppo": "ppo"}


def write_rows(out: Path) -> None:
    """Two files in OUT/tinyhh.

    preference.jsonl.gz: all pairs of K-way rankings
    test.jsonl.gz: one pair a prompt
    """
    pairs = pair_rows("preference", PREFERENCE_PROMPTS, CANDIDATES)
    _write(out / "tinyhh" / "preference.jsonl.gz", pairs)
    _write(out / "tinyhh" / "test.jsonl.gz", pair_rows("test", TEST_PROMPTS, 2))


def pair_rows(split: str, prompts: int, candidates: int):
    """HH-RLHF rows of ranked answers of the mixed crowd: every pair, with the score gap as margin.

    The gap is the noiseless annotator's, so a pair that the noise turned round has a negative one.
    """
    for row in tqdm(prompt_rows(split, prompts), desc=split, unit="prompt"):
        rng = random.Random(f"pairs/{row['id']}")
        instruction, history = row["instruction"], row["history"]
        about = w.read_request(instruction, history)
        request = w.Request(instruction, tuple(history), *about)
        answers = _different_answers(rng, request, candidates)
        dialogues = [format_dialogue(instruction, answer, history) for answer in answers]
        scores = [judge(instruction, answer, history).score for answer in answers]
        order = rank(scores, rng)
        for better, worse in combinations(order, 2):
            sides = {"chosen": dialogues[better], "rejected": dialogues[worse]}
            yield {"id": row["id"], **sides, "margin": round(scores[better] - scores[worse], 4)}


def _different_answers(rng: random.Random, request: w.Request, count: int) -> list[str]:
    answers: list[str] = []
    while len(answers) < count:
        answer = w.write_answer(rng, request, w.draw_kind(rng, request.harmful, w.SFT_MIX))
        answers += [answer] if answer not in answers else []
    return answers


def _write(path: Path, rows) -> None:
    """The same rows give the same bytes: no time stamp in the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def write_checkpoints(run_folder: Path, out: Path) -> None:
    """Exports the models of a finished run to OUT/checkpoints, in half precision."""
    missing = [stage for stage in STAGES.values() if not (run_folder / stage / "final").is_dir()]
    if missing:
        message = f"{run_folder} has no finished stage {missing[0]!r}"
        raise ValueError(f"{message}; run `minippo {missing[0]}` there first")
    for name, stage in tqdm(STAGES.items(), desc="checkpoints", unit="model"):
        source, target = run_folder / stage / "final", out / "checkpoints" / name
        load = {"reward": RewardModel.load, "value": ValueModel.load}.get(name, load_policy)
        model = load(source).half()
        (model.save if hasattr(model, "save") else model.save_pretrained)(target)
        load_tokenizer(source).save_pretrained(target)
