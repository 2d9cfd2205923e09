"""One PPO step of minippo beside one of TRL's PPOTrainer: `python -m tests.benchmarks --help`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from . import tables
from .command import CannotRun, Progress, check_sides, installed, run, save
from .measure import PARTS, measure_part, measure_steps
from .workloads import WORKLOADS

HELP = {
    "workload": "; ".join(f"{name}: {w.about}" for name, w in WORKLOADS.items())
    + "; parts: sampling, GAE and reward-model training alone; all: all of these",
    "repeats": "measured turns of each side, after one that warms up",
    "threads": "of torch, on each side",
    "only": "ours,trl, or one of them; without trl nothing but minippo needs to be installed",
    "write": "put the tables into docs/performance.md; needs --workload all and both sides",
    "json": "write every measurement to this file as well",
}


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
        machine["gflops"] = max(step["gflops"] for step in result["steps"].values())
    return result


def page_text(measured: dict) -> str:
    """The tables of what was measured, as they stand in the page."""
    machine, text = measured["machine"], [tables.machine_line(measured["machine"])]
    if measured["steps"]:
        text.append(tables.step_table(measured["steps"], machine["gflops"]))
    if measured["parts"]:
        text.append(tables.part_table(measured["parts"]))
    return "\n\n".join(text)


if __name__ == "__main__":
    sys.exit(run(benchmark, "python -m tests.benchmarks"))
