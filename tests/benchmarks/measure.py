"""The comparisons: which sides there are, and what is made of what they send."""

from collections.abc import Callable

from .floor import Shape, step_flops
from .turns import take_turns
from .workloads import WORKLOADS, shape_of

OURS, PEER = "tests.benchmarks.ours", "tests.benchmarks.peer"
MODULES = {"ours": OURS, "trl": PEER}
RANKINGS, RANKINGS_A_STEP = 96, 8  # four answers each, so six pairs
CALLS = 200  # of GAE in a turn: one is too short for the clock

# part -> unit of the work, and side -> what it runs; "trl" is whoever minippo is compared with.
PARTS = {
    "sampling, tiny": (
        "tokens, against `model.generate`",
        {"ours": (f"{OURS}:generation", "tiny"), "trl": (f"{PEER}:generation", "tiny")},
    ),
    "sampling, natural": (
        "tokens, against `model.generate`",
        {"ours": (f"{OURS}:generation", "natural"), "trl": (f"{PEER}:generation", "natural")},
    ),
    "GAE, 64 answers of 48 tokens": (
        "calls, against the lines in TRL's `train`",
        {
            "ours": (f"{OURS}:advantages", CALLS, 64, 48),
            "trl": (f"{PEER}:advantages", CALLS, 64, 48),
        },
    ),
    "reward model, pairs": (
        "pairs, against TRL's `RewardTrainer`",
        {
            "ours": (f"{OURS}:reward_training", RANKINGS, RANKINGS_A_STEP, True),
            "trl": (f"{PEER}:reward_training", RANKINGS, RANKINGS_A_STEP),
        },
    ),
    "reward model, rankings of four": (
        "pairs, against TRL's `RewardTrainer` on pairs",
        {
            "ours": (f"{OURS}:reward_training", RANKINGS, RANKINGS_A_STEP, False),
            "trl": (f"{PEER}:reward_training", RANKINGS, RANKINGS_A_STEP),
        },
    ),
}


def measure_steps(
    workload: str, sides: list[str], repeats: int, threads: int, on_turn: Callable
) -> dict:
    """PPO steps of a workload, the sides taking turns, and the machine's rate in between.

    returns: gflops, and per side the seconds, response tokens and needed operations of each step,
        and the memory in MB before the first step and at its peak
    """
    calls = {side: (f"{MODULES[side]}:ppo_steps", workload) for side in sides}
    sent = take_turns({**calls, "rate": (f"{OURS}:rate",)}, repeats, threads, on_turn)
    config, shape = WORKLOADS[workload].config(1), Shape(*shape_of(WORKLOADS[workload]))
    # The best of the run: a rate that something else held down is not the machine's.
    result = {"gflops": max(turn["gflops"] for turn in sent.pop("rate"))}
    for side, turns in sent.items():
        result[side] = {
            "seconds": [turn["seconds"] for turn in turns],
            "tokens": [sum(response for _, response in turn["lengths"]) for turn in turns],
            "flops": [step_flops(shape, turn["lengths"], config.ppo_epochs) for turn in turns],
            "start_mb": turns[-1]["start_mb"],
            "peak_mb": turns[-1]["peak_mb"],
        }
    return result


def measure_part(
    part: str, sides: list[str], repeats: int, threads: int, on_turn: Callable
) -> dict:
    """One part alone; returns its unit, and per side the work done per second of each turn."""
    unit, calls = PARTS[part]
    calls = {side: call for side, call in calls.items() if side in sides}
    sent = take_turns(calls, repeats, threads, on_turn)
    rates = {side: [t["work"] / t["seconds"] for t in turns] for side, turns in sent.items()}
    return {"unit": unit, **rates}
