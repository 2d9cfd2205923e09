"""One PPO step of minippo beside one of TRL's PPOTrainer: `python -m tests.benchmarks --help`."""

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from . import tables
from .measure import PARTS, measure_part, measure_steps
from .workloads import WORKLOADS

TRL_VERSION = "1.12.0"  # the last release that has a PPO trainer
HELP = {
    "workload": "; ".join(f"{name}: {w.about}" for name, w in WORKLOADS.items())
    + "; parts: sampling, GAE and reward-model training alone; all: all of these",
    "repeats": "measured turns of each side, after one that warms up",
    "threads": "of torch, on each side",
    "only": "ours,trl, or one of them; without trl nothing but minippo needs to be installed",
    "write": "put the tables into docs/performance.md; needs --workload all and both sides",
    "json": "write every measurement to this file as well",
}


class CannotRun(ValueError):
    """What was asked for cannot be measured; the message says what to do."""


def check_sides(only: str) -> list[str]:
    """"ours,trl" -> ["ours", "trl"]; CannotRun if a side is unknown or cannot run here."""
    sides = [side.strip() for side in only.split(",")]
    if unknown := [side for side in sides if side not in tables.NAMES]:
        raise CannotRun(f"--only knows ours and trl, not {', '.join(unknown)}; use --only ours,trl")
    if "trl" in sides and (found := installed("trl")) != TRL_VERSION:
        message = f"trl {TRL_VERSION} is needed and what is installed is {found}"
        remedy = "pip install -c constraints.txt 'minippo[bench]', or leave it out: --only ours"
        raise CannotRun(f"{message}; {remedy}")
    return sides


def installed(package: str) -> str:
    """The version of an installed package, "none" if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def benchmark(
    workload: Annotated[
        Literal["tiny", "natural", "gpt2", "parts", "all"], tyro.conf.arg(help=HELP["workload"])
    ] = "all",
    repeats: Annotated[int, tyro.conf.arg(help=HELP["repeats"])] = 5,
    threads: Annotated[int, tyro.conf.arg(help=HELP["threads"])] = 2,
    only: Annotated[str, tyro.conf.arg(help=HELP["only"])] = "ours,trl",
    write: Annotated[bool, tyro.conf.arg(help=HELP["write"])] = False,
    json: Annotated[Path | None, tyro.conf.arg(help=HELP["json"])] = None,
) -> None:
    """Time and memory of one PPO step, minippo's and TRL's, and the floor under both.

    Each side has a process of its own; they take turns step by step, so that what disturbs the
    machine disturbs both. The floor is the time that the operations of the algorithm take at the
    rate of large matrix products, measured in the same run. `all` takes about 20 minutes on two
    quiet cores, `tiny` and `natural` a minute each.
    """
    sides = check_sides(only)
    if repeats < 1 or threads < 1:
        raise CannotRun(f"--repeats {repeats} --threads {threads}: both must be at least 1")
    if write and (workload != "all" or len(sides) < 2):
        raise CannotRun("--write replaces all tables; it needs --workload all and --only ours,trl")
    measured = measure(workload, sides, repeats, threads)
    if json:
        save(json, measured)
    text = page_text(measured)
    print(text)
    if write:
        tables.write_block(tables.PAGE, "bench", text)


def measure(workload: str, sides: list[str], repeats: int, threads: int) -> dict:
    """{"machine", "steps", "parts"} of what was asked for, with a bar."""
    workloads = [name for name in WORKLOADS if workload in (name, "all")]
    parts = list(PARTS) if workload in ("parts", "all") else []
    turns = (repeats + 1) * ((len(sides) + 1) * len(workloads) + len(sides) * len(parts))
    result = {"machine": {"repeats": repeats, "threads": threads}, "steps": {}, "parts": {}}
    with tqdm(total=turns, unit="turn") as bar:
        for measure_one, names, place in (
            (measure_steps, workloads, result["steps"]),
            (measure_part, parts, result["parts"]),
        ):
            for name in names:
                on_turn = Progress(bar, name)
                place[name] = measure_one(name, sides, repeats, threads, on_turn)
    machine = result["machine"]
    packages = ("torch", "transformers", *(["trl"] if "trl" in sides else []))
    machine["versions"] = {name: installed(name) for name in packages}
    if workloads:
        machine["gflops"] = median(step["gflops"] for step in result["steps"].values())
    return result


class Progress:
    """Moves a bar on by a turn."""

    def __init__(self, bar, name: str):
        self.bar, self.name = bar, name

    def __call__(self, turn: str) -> None:
        self.bar.set_description(f"{self.name}: {turn}", refresh=False)
        self.bar.update()


def save(path: Path, measured: dict) -> None:
    """Every number, so that tables can be made anew."""
    path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def page_text(measured: dict) -> str:
    """The tables of what was measured, as they stand in the page."""
    parts = [tables.machine_line(measured["machine"])]
    parts += [tables.step_table(measured["steps"])] if measured["steps"] else []
    parts += [tables.part_table(measured["parts"])] if measured["parts"] else []
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 if it was asked for what it cannot do."""
    try:
        tyro.cli(benchmark, prog="python -m tests.benchmarks", args=arguments)
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
