"""`minippo data`: writes what the package ships, the TinyHH rows and the trained checkpoints."""

import gzip
import json
import random
import shutil
from itertools import combinations
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from minippo.app.run import final_checkpoint, save_model
from minippo.engine.files import disk_message, sync, write_file
from minippo.hh import format_dialogue
from minippo.models import Policy, RewardModel, ValueModel, load_tokenizer
from minippo.worlds.tinyhh import world as w
from minippo.worlds.tinyhh.annotator import judge, rank
from minippo.worlds.tinyhh.rows import prompt_rows

PREFERENCE_PROMPTS = 4000  # with K = 4 answers each: 24,000 pairs
TEST_PROMPTS = 2000  # one pair each
CANDIDATES = 4
STAGES = {"base": "pretrain", "sft": "sft", "reward": "reward", "value": "value", "ppo": "ppo"}
KINDS = {"base": Policy, "sft": Policy, "reward": RewardModel, "value": ValueModel, "ppo": Policy}


def write_data(out: Path, checkpoints: Path | None = None) -> None:
    """The rows, and the models of a finished run if its folder is given.

    Raises ValueError if the run lacks a stage, before anything is written, or if the disk is full.
    """
    if checkpoints is not None:
        finished_models(checkpoints)
    write_rows(out)
    if checkpoints is not None:
        write_checkpoints(checkpoints, out)


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
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, gzip.compress(text.encode(), compresslevel=9, mtime=0))


def finished_models(run_folder: Path) -> dict[str, Path]:
    """Name of a checkpoint -> the run's model. ValueError names a stage that is not finished."""
    return {name: final_checkpoint(run_folder, stage) for name, stage in STAGES.items()}


def write_checkpoints(run_folder: Path, out: Path) -> None:
    """Exports the models of a finished run to OUT/checkpoints, in half precision.

    Those that are there already are replaced when all of the new ones are on the disk.
    """
    sources = finished_models(run_folder)
    models = {name: KINDS[name].from_pretrained(path) for name, path in sources.items()}
    folder, partial = out / "checkpoints", out / "checkpoints" / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, model in tqdm(models.items(), desc="checkpoints", unit="model"):
            _export(model.half(), load_tokenizer(sources[name]), partial / name)
        for name in models:
            shutil.rmtree(folder / name, ignore_errors=True)
            (partial / name).rename(folder / name)
    except (OSError, SafetensorError) as error:
        raise ValueError(disk_message(folder, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _export(model, tokenizer, folder: Path) -> None:
    save_model(model, tokenizer, folder)
    path = folder / "tokenizer.json"  # with line breaks it is nearly twice as large
    text = json.dumps(json.loads(path.read_bytes()), ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(text.encode())
    sync(folder)
