"""Where a PPO step spends its time, minippo's beside TRL's, by operation.

`python -m tests.benchmarks.profile --help`
"""

import importlib
import os
import sys
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from . import tables
from .command import Progress, check_sides, run
from .measure import MODULES
from .turns import Turns, take_turns

HELP = {
    "workload": "of `python -m tests.benchmarks`",
    "threads": "of torch, on each side",
    "write": "put the table into docs/performance.md",
}
# Operations by what they are for; the rest is added up as well.
KINDS = {
    "products with weights": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                  "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::bmm"),
    "AdamW": ("aten::_fused_adamw_",),
    "GELU and other elementwise operations": (
        "aten::gelu", "aten::gelu_backward", "aten::pow", "aten::tanh", "aten::tanh_backward",
        "aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::div", "aten::div_",
    ),
    "softmax, layer norm": ("aten::_softmax", "aten::_log_softmax", "aten::native_layer_norm",
                            "aten::_log_softmax_backward_data",
                            "aten::native_layer_norm_backward"),
    "memory: filling, copying, joining": ("aten::fill_", "aten::copy_", "aten::cat"),
    "norms and sums": ("aten::linalg_vector_norm", "aten::sum"),
}  # fmt: skip
LAST = ("everything else", "together")


class Profiled:
    """A child's turns, of which the last one is profiled.

    It sends the seconds of each operation, and the processor's seconds: (all, those of the kernel).
    """

    def __init__(self, turns: Turns, count: int):
        self.turns, self.left = turns, count

    def ready(self) -> None:
        """As in `Turns`."""
        self.turns.ready()

    def begin(self) -> None:
        """As in `Turns`; before the last turn the profiler starts."""
        from torch.profiler import ProfilerActivity, profile

        self.left -= 1
        self.turns.begin()
        if self.left == 0:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.start()
            self.times = os.times()

    def end(self, **facts) -> None:
        """As in `Turns`; without the other facts."""
        seconds, processor = {}, (0.0, 0.0)
        if self.left == 0:
            times = os.times()
            kernel = times.system - self.times.system
            processor = (times.user - self.times.user + kernel, kernel)
            self.profiler.stop()
            found = self.profiler.key_averages()
            seconds = {op.key: op.self_cpu_time_total / 1e6 for op in found}
        self.turns.end(operations=seconds, processor=processor)


def ppo_steps(turns: Turns, side: str, workload: str, count: int) -> None:
    """A turn is one PPO step of a side."""
    module = importlib.import_module(MODULES[side])
    module.ppo_steps(Profiled(turns, count), workload, count)


def by_kind(operations: dict[str, float]) -> dict[str, float]:
    """Seconds of each kind of operation, of all others, and of all together."""
    kinds = {kind: sum(operations.get(op, 0.0) for op in ops) for kind, ops in KINDS.items()}
    total = sum(operations.values())
    return kinds | {"everything else": total - sum(kinds.values()), "together": total}


def profile_table(found: dict[str, dict[str, float]]) -> str:
    """One row for each kind, one column for each side."""
    kinds = {side: by_kind(operations) for side, operations in found.items()}
    head = ["seconds in", *(tables.NAMES[side] for side in found)]
    rows = [[kind, *(f"{kinds[side][kind]:.1f}" for side in found)] for kind in [*KINDS, *LAST]]
    return tables.table(head, rows)


def processor_line(found: dict[str, tuple[float, float]]) -> str:
    """The processor's seconds of each side, all threads together."""
    parts = [f"{tables.NAMES[side]} {total:.0f} ({of:.1f})" for side, (total, of) in found.items()]
    return f"Seconds of the processors, in brackets the kernel's: {', '.join(parts)}."


def profiled(
    workload: Annotated[
        Literal["tiny", "natural", "gpt2"], tyro.conf.arg(help=HELP["workload"])
    ] = "gpt2",
    threads: Annotated[int, tyro.conf.arg(help=HELP["threads"])] = 2,
    write: Annotated[bool, tyro.conf.arg(help=HELP["write"])] = False,
) -> None:
    """Seconds of one step by kind of operation, on both sides; `gpt2` takes 3 minutes and 13 GB.

    One step each, after one that warms up; a profiler slows a step down by a few percent.
    """
    check_sides("ours,trl")
    sides = {side: ("tests.benchmarks.profile:ppo_steps", side, workload) for side in MODULES}
    with tqdm(total=2 * len(sides), unit="step") as bar:
        sent = take_turns(sides, 1, threads, Progress(bar, workload))
    table = profile_table({side: turns[0]["operations"] for side, turns in sent.items()})
    line = processor_line({side: turns[0]["processor"] for side, turns in sent.items()})
    text = f"One step of `{workload}`, {threads} threads.\n\n{table}\n\n{line}"
    print(text)
    if write:
        tables.write_block(tables.PAGE, "profile", text)


if __name__ == "__main__":
    sys.exit(run(profiled, "python -m tests.benchmarks.profile"))
