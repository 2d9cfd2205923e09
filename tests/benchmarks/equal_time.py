"""What each side's policy is worth after the same seconds of PPO, judged by the annotator.

`python -m tests.benchmarks.equal_time --help`
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from . import tables
from .command import CannotRun, Progress, check_sides, installed, run, save
from .measure import MODULES, OURS
from .turns import take_turns

HELP = {
    "seeds": "trainings of each side; seed S of one is compared with seed S of the other",
    "seconds": "of training, on the clock, loading and judging not counted",
    "held_out": "TinyHH validation prompts that are answered and judged",
    "threads": "of torch, on each side",
    "write": "put the table into docs/performance.md",
    "json": "write every measurement to this file as well",
}


def equal_time(
    seeds: Annotated[int, tyro.conf.arg(help=HELP["seeds"])] = 4,
    seconds: Annotated[float, tyro.conf.arg(help=HELP["seconds"])] = 120.0,
    held_out: Annotated[int, tyro.conf.arg(help=HELP["held_out"])] = 512,
    threads: Annotated[int, tyro.conf.arg(help=HELP["threads"])] = 2,
    write: Annotated[bool, tyro.conf.arg(help=HELP["write"])] = False,
    json: Annotated[Path | None, tyro.conf.arg(help=HELP["json"])] = None,
) -> None:
    """Gold score after equal wall time: PPO of minippo and of TRL from the shipped TinyHH models.

    Same SFT policy, reward model (TRL's returns standardised scores), critic, prompts, settings
    (those of `minippo ppo`); the learning rate falls with the time that is left, on both sides.
    The sides train one after the other, and who goes first alternates. 4 seeds of 120 seconds take
    about 20 minutes on two quiet cores.
    """
    check_sides("ours,trl")
    if min(seeds, threads, held_out) < 1 or seconds <= 0:
        raise CannotRun("--seeds, --threads, --held-out and --seconds must be greater than 0")
    measured = measure(seeds, seconds, held_out, threads)
    if json:
        save(json, measured)
    text = page_text(measured)
    print(text)
    if write:
        tables.write_block(tables.PAGE, "equal", text)


def measure(seeds: int, seconds: float, held_out: int, threads: int) -> dict:
    """{"before", "runs", and the settings}, with a bar."""
    result = {"seconds": seconds, "held_out": held_out, "threads": threads, "runs": []}
    with tqdm(total=1 + 2 * seeds, unit="training") as bar:
        start = {"SFT": (f"{OURS}:train_for", 0.0, 0, held_out)}
        turns = take_turns(start, 1, threads, Progress(bar, "judged"), warm_up=0)
        result["before"] = turns["SFT"][0]
        for seed in range(seeds):
            both = {"seed": seed}
            order = list(MODULES) if seed % 2 == 0 else list(reversed(MODULES))
            for side in order:
                call = {side: (f"{MODULES[side]}:train_for", seconds, seed, held_out)}
                progress = Progress(bar, f"seed {seed}")
                both[side] = take_turns(call, 1, threads, progress, warm_up=0)[side][0]
            result["runs"].append(both)
    return result


def page_text(measured: dict) -> str:
    """The table as it stands in the page, under the settings it was made with."""
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "trl"))
    about = f"{measured['seconds']:.0f} seconds of training each, {measured['threads']} threads; "
    about += f"{measured['held_out']} validation prompts, one answer each at temperature 1; "
    table = tables.equal_time_table(measured["runs"], measured["before"])
    return f"{about}{versions}.\n\n{table}"


if __name__ == "__main__":
    sys.exit(run(equal_time, "python -m tests.benchmarks.equal_time"))
