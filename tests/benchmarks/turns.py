"""Child processes that take turns: each side of a comparison in its own, one of them at work.

A side lives in one process from its start to its last turn, so its peak memory is its own and its
warm-up is paid once. The others wait for their turn without using the processor. Whatever slows the
machine down for a while therefore hits all sides alike.
"""

import importlib
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """The child's end: `ready()` once all is loaded, then `begin()` and `end(...)` each turn."""

    def __init__(self, connection):
        self.connection, self.began = connection, 0.0

    def ready(self) -> None:
        """Tells that loading is over."""
        self.connection.send({"start_mb": peak_mb()})

    def begin(self) -> None:
        """Waits for this side's turn; the clock starts when it comes."""
        self.connection.recv()
        self.began = time.perf_counter()

    def end(self, **facts) -> None:
        """Stops the clock and sends the seconds, the peak memory so far and what else is known."""
        seconds = time.perf_counter() - self.began
        self.connection.send({"seconds": seconds, "peak_mb": peak_mb(), **facts})


class Pace:
    """Cuts a training that runs by itself into turns of `per_turn` steps: for hooks, callbacks.

    facts: gives what is sent with a turn
    """

    def __init__(self, turns: Turns, per_turn: int, count: int, facts: Callable[[], dict] = dict):
        self.turns, self.per_turn, self.total = turns, per_turn, per_turn * count
        self.facts = facts

    def start(self) -> None:
        """Before the first step."""
        self.turns.ready()
        self.turns.begin()

    def step(self, done: int) -> None:
        """After each step; `done` is their number."""
        if done % self.per_turn == 0:
            self.turns.end(**self.facts())
            if done < self.total:
                self.turns.begin()


def peak_mb() -> float:
    """The largest resident memory this process has had, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, else kilobytes


def take_turns(
    sides: dict[str, tuple], rounds: int, threads: int, on_turn: Callable, warm_up: int = 1
) -> dict[str, list[dict]]:
    """Lets every side take `rounds` turns after those of the warm-up; returns what each sent.

    sides: name -> (function, arguments...); a function is named as "module:function", so that what
        it imports costs no memory here. It gets its `Turns`, the arguments, the number of turns.
    on_turn: called after each turn with what it was
    Raises RuntimeError if a side's process ends early; what it raised is on stderr.
    """
    count = warm_up + rounds
    calls = {name: (*call, count) for name, call in sides.items()}
    with _processes(calls, threads) as children:
        starts = {name: _receive(name, *child) for name, child in children.items()}
        sent = {name: [] for name in sides}
        for number in range(1 - warm_up, rounds + 1):
            for name, child in children.items():
                child[1].send("begin")
                sent[name].append(starts[name] | _receive(name, *child))
                on_turn(f"{name}, {number} of {rounds}" if number > 0 else f"{name}, warm-up")
    return {name: turns[warm_up:] for name, turns in sent.items()}


@contextmanager
def _processes(calls: dict[str, tuple], threads: int) -> Iterator[dict[str, tuple]]:
    """name -> (process, connection); at the end none of them is left."""
    context, children = multiprocessing.get_context("spawn"), {}  # spawned: no memory in common
    try:
        for name, call in calls.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(theirs, threads, *call))
            process.start()
            theirs.close()  # else a child that dies would not be noticed here
            children[name] = process, ours
        yield children
        for process, _ in children.values():
            process.join()
    finally:
        for process, _ in children.values():
            process.terminate()


def _run(connection, threads: int, function: str, *arguments) -> None:
    """In the child: the environment first, since torch and others read it when imported."""
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    warnings.simplefilter("ignore", FutureWarning)  # TRL's use of what transformers renamed
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(Turns(connection), *arguments)


def _receive(name: str, process, connection) -> dict:
    try:
        return connection.recv()
    except EOFError as error:
        process.join()
        message = f"the process of {name} ended early, with exit status {process.exitcode}"
        raise RuntimeError(f"{message}; what it raised stands above") from error
