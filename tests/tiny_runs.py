"""Runs so small that a test can afford them: a base model, a file of pairs, and the commands."""

import json
import os
import random
import sys
import traceback
from pathlib import Path

import torch

from minippo.app import cli
from minippo.hh import format_dialogue
from minippo.models import tiny_gpt2
from minippo.pretrain import train_tokenizer
from minippo.worlds.tinyhh import rows as tiny

SIZES = ["--vocab-size", "300", "--n-embd", "16", "--n-layer", "1", "--n-head", "2"]
REWARDED = ["--ppo.max-prompt-tokens", "100", "--ppo.max-response-tokens", "24"]
LIMITS = ["--max-prompt-tokens", "100", "--max-response-tokens", "24"]
TRAINING = ["--save-every", "2", "--warmup-steps", "1"]
COMMANDS = {
    "pretrain": [*SIZES, "--n-positions", "200", "--steps", "6", "--batch-size", "8", *TRAINING],
    "sft": ["--steps", "5", "--batch-size", "8", "--micro-batch-size", "4", *LIMITS, *TRAINING],
    "reward": ["--source", "pairs", "--batch-size", "16", *LIMITS, *TRAINING],
    "value": ["--prompts", "40", "--held-out", "8", "--candidates", "2", "--batch-size", "8",
              *REWARDED, *TRAINING],
    "ppo": ["--steps", "5", "--batch-size", "8", "--minibatch-size", "4", "--micro-batch-size", "2",
            *LIMITS, *TRAINING],
    "evaluate": ["--prompts", "8", "--best-of", "2", *LIMITS],
}  # fmt: skip


def write_pairs(path: Path, count: int) -> Path:
    """Rows in the format of HH-RLHF, one or two turns; the chosen answer is the longer one."""
    rng, rows = random.Random(1), []
    while len(rows) < count:
        words = rng.sample(["tea", "soup", "bread", "rice", "cake", "beans", "fish", "eggs"], 3)
        question, history = f"How do I make {words[0]} {len(rows)}?", []  # all different
        if len(rows) % 4 == 0:
            history = [[f"I like {words[1]}.", "So do I."]]
        chosen, rejected = f"Boil {words[0]} with {words[2]}.", f"No {words[2]}."
        pair = {"chosen": chosen, "rejected": rejected}
        rows.append({k: format_dialogue(question, v, history) for k, v in pair.items()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_base(folder: Path, seed: int = 0, n_positions: int = 512) -> Path:
    """A random tiny GPT-2 with a tokenizer of TinyHH's text."""
    tokenizer = train_tokenizer(tiny.pretrain_texts(40, seed), 300)
    model = tiny_gpt2(len(tokenizer), 1, 16, 2, n_positions, tokenizer.eos_token_id, 0, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(command: str, out: Path, data: Path, *options, name: str = "r") -> None:
    """One command with tiny settings; options given last win."""
    where = ["--name", name, "--out", str(out), "--data", str(data), "--device", "cpu"]
    torch.set_num_threads(1)
    cli.main([command, *where, *merged(COMMANDS[command], options)])


def merged(defaults, options) -> list[str]:
    """`options` after those `defaults` that they do not repeat: an option may be given once."""
    given = {option for option in map(str, options) if option.startswith("--")}
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    kept = [part for pair in pairs if pair[0] not in given for part in pair]
    return [*kept, *map(str, options)]


def forked(action, log: Path) -> int:
    """Starts `action` in a child process, its output going to `log`; returns the process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        torch.set_num_threads(1)
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """What must be equal when a run was interrupted and when it was not."""
    files = [folder / "metrics.jsonl", *sorted(folder.glob("*/final/*.safetensors"))]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}
