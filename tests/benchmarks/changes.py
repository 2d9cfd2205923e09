"""What each change for speed brings: one PPO step with all of them, and with one taken back.

`python -m tests.benchmarks.changes --help`
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated
from unittest import mock

import torch
import tyro
from tqdm import tqdm

from minippo import generation, optim, rollout
from minippo.engine import look, packing, passes

from . import ours, tables
from .command import CannotRun, Progress, run, save
from .turns import Turns, take_turns
from .workloads import WORKLOADS, build, plain_gelu

HELP = {
    "repeats": "measured steps with and without each change, after one that warms up",
    "threads": "of torch",
    "write": "put the table into docs/performance.md",
    "json": "write every measurement to this file as well",
}


@contextmanager
def gelu_of_eight_operations(world) -> Iterator[None]:
    """GPT-2's GELU as transformers writes it."""
    plain_gelu(world)
    yield


@contextmanager
def adamw_tensor_by_tensor(world) -> Iterator[None]:
    """AdamW that goes over memory once for each of its operations."""
    plain = torch.optim.AdamW
    with mock.patch.object(
        optim.torch.optim, "AdamW", lambda *a, fused, **options: plain(*a, foreach=False, **options)
    ):
        yield


@contextmanager
def memory_given_back(world) -> Iterator[None]:
    """What is freed goes back to the system, as glibc does it by itself."""
    with mock.patch.object(ours, "keep_freed_memory", lambda: None):
        yield


@contextmanager
def padded_rows(world) -> Iterator[None]:
    """Every row as wide as the longest prompt and the longest answer of the rollout together."""
    packed = packing.pack

    def pack(tokens, attention_mask, mask, lengths=None):
        wide = packing.row_lengths(attention_mask, mask) if lengths is None else lengths.clone()
        wide[:, 0] = tokens.shape[1]
        return packed(tokens, attention_mask, mask, wide)

    with mock.patch.object(packing, "pack", pack):
        yield


@contextmanager
def rows_as_they_come(world) -> Iterator[None]:
    """Micro-batches of rows of any length."""

    def by_length(self, own, size):
        return [(rows, True) for rows in torch.arange(len(self.tokens))[own].split(size)]

    with mock.patch.object(packing.Rows, "_by_length", by_length):
        yield


@contextmanager
def logits_of_every_token(world) -> Iterator[None]:
    """The vocabulary projection of prompts and padding as well."""

    def packed_logits(model, packed):
        logits = passes.forward_pass(model, packed.tokens).logits
        return logits.flatten(0, 1).index_select(0, packed.positions)

    with mock.patch.object(look, "packed_logits", packed_logits):
        yield


@contextmanager
def finished_rows_stay(world) -> Iterator[None]:
    """A row that has ended is sampled on, until the last one has."""

    def generate(policy, query, query_mask, limit, eos_id, pad_id, *options, **named):
        sampler = _Unending(len(query), eos_id, limit)
        with mock.patch.object(generation, "sample_tokens", sampler):
            response = generation.generate(
                policy, query, query_mask, limit, eos_id, pad_id, *options, **named
            )
        return sampler.cut(response, pad_id)

    with mock.patch.object(rollout, "generate", generate):
        yield


class _Unending:
    """Hides from the sampler which rows have ended, until all have."""

    def __init__(self, rows: int, eos_id: int, limit: int):
        self.sample, self.eos_id, self.step = generation.sample_tokens, eos_id, 0
        self.ends = torch.full((rows,), limit)  # where each row's EOS stands

    def __call__(self, logits, uniforms, temperature=1.0):
        tokens = self.sample(logits, uniforms, temperature)
        newly = (tokens == self.eos_id) & (self.ends > self.step)
        self.ends[newly] = self.step
        self.step += 1
        if bool((self.ends < self.step).all()):
            return torch.full_like(tokens, self.eos_id)
        return tokens.masked_fill(self.ends < self.step, 0)

    def cut(self, response, pad_id):
        """The response as it would be had the rows left."""
        places = torch.arange(response.shape[1])
        response = response.masked_fill(places > self.ends[:, None], pad_id)
        return response.masked_fill(places == self.ends[:, None], self.eos_id)


# change -> workload, what takes it back, and what arithmetic promised of it.
CHANGES: dict[str, tuple[str, Callable, str]] = {
    "GELU in one kernel": (
        "tiny", gelu_of_eight_operations, "27% of a naive step is this GELU: up to 1.3",
    ),
    "AdamW in one kernel": (
        "gpt2", adamw_tensor_by_tensor, "10 s of a step of 40 s go into it: 1.2",
    ),
    "freed memory is kept": (
        "gpt2", memory_given_back, "the kernel has a tenth of the processors' seconds: 1.1",
    ),
    "rows without padding": (
        "natural", padded_rows, "half of the padded positions are padding: up to 1.8",
    ),
    "similar lengths together": (
        "natural", rows_as_they_come, "what is left of padding then: 1.1",
    ),
    "logits only where they count": (
        "natural", logits_of_every_token, "half the arithmetic is the projection, of which a "
        "third counts: up to 1.5",
    ),
    "finished rows leave the sampler": (
        "natural", finished_rows_stay, "half of the sampled rows are over: less than 1.1",
    ),
}  # fmt: skip


def steps(turns: Turns, change: str | None, workload: str, count: int) -> None:
    """A turn is one PPO step, with a change taken back if one is named."""
    world = build(WORKLOADS[workload])
    back = CHANGES[change][1](world) if change else mock.MagicMock()
    with back:
        trainer = ours.Trainer(world, WORKLOADS[workload].config(count, ours=True))
        turns.ready()
        for _ in range(count):
            turns.begin()
            trainer.step()
            turns.end()


def benchmark(
    repeats: Annotated[int, tyro.conf.arg(help=HELP["repeats"])] = 5,
    threads: Annotated[int, tyro.conf.arg(help=HELP["threads"])] = 2,
    write: Annotated[bool, tyro.conf.arg(help=HELP["write"])] = False,
    json: Annotated[Path | None, tyro.conf.arg(help=HELP["json"])] = None,
) -> None:
    """Seconds of one PPO step without each change, beside the step with all of them.

    Steps with and without a change take turns. `gpt2` needs 13 GB; all takes about 15 minutes on
    two quiet cores.
    """
    if min(repeats, threads) < 1:
        raise CannotRun(f"--repeats {repeats} --threads {threads}: both must be at least 1")
    measured = measure(repeats, threads)
    if json:
        save(json, measured)
    text = changes_table(measured)
    print(text)
    if write:
        tables.write_block(tables.PAGE, "changes", text)


def measure(repeats: int, threads: int) -> dict[str, dict]:
    """change -> {"with", "without"}: the seconds of each step."""
    measured, function = {}, "tests.benchmarks.changes:steps"
    with tqdm(total=2 * (repeats + 1) * len(CHANGES), unit="step") as bar:
        for change, (workload, _, _) in CHANGES.items():
            sides = {"with": (function, None, workload), "without": (function, change, workload)}
            sent = take_turns(sides, repeats, threads, Progress(bar, change))
            measured[change] = {k: [turn["seconds"] for turn in v] for k, v in sent.items()}
    return measured


def changes_table(measured: dict[str, dict]) -> str:
    """One row for each change: what was promised of it, and what came of it."""
    head = ["change", "workload", "predicted, without / with", "measured, without / with"]
    rows = []
    for change, seconds in measured.items():
        workload, _, promise = CHANGES[change]
        pairs = zip(seconds["without"], seconds["with"], strict=True)
        ratios = sorted(without / with_ for without, with_ in pairs)
        found = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([change, workload, promise, found])
    return tables.table(head, rows)


if __name__ == "__main__":
    sys.exit(run(benchmark, "python -m tests.benchmarks.changes"))
