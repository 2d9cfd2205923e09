"""The bounds: what each measures, how far it may go, and the sizes it is measured at."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path

from tqdm import tqdm

from minippo.hh import KINDS, MAX_JSON_BYTES, load_preferences

from .mutations import compare, mutants

ROOT = Path(__file__).resolve().parents[2]
H, A = "\n\nHuman:", "\n\nAssistant:"
FEW = 1000  # rows of the file whose peak is subtracted: Python, datasets and Arrow themselves


@dataclass(frozen=True)
class Sizes:
    """How much a measurement takes."""

    rows: int = 1_000_000
    bad_rows: int = 1_000_000
    bomb: int = 1_000_000  # bytes, packed
    mutants: int = 10_000
    steps: int = 300
    warm_up: int = 100  # steps that are not looked at
    per_step: float = 8  # kB that a step may leave behind; over few steps it is measured coarsely


@dataclass(frozen=True)
class Figure:
    """One line of the table; it holds if the value is at most the limit."""

    what: str
    value: float
    limit: float
    unit: str

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.limit


class Lab:
    """Sizes, a folder for files, and the processes that measure; all is gone when it is closed."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.processes = sizes, {}
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)

    def ask(self, kind: str, job: str, *arguments: object) -> dict:
        """What a process with the imports of `kind` says of a job; see probe.py."""
        if kind not in self.processes:
            command = [sys.executable, "-m", "tests.bounds.probe", kind]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.processes[kind] = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        process = self.processes[kind]
        temporary = tempfile.mkdtemp(dir=self.folder)
        print(json.dumps([job, temporary, *arguments], default=str), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer.startswith("{"):
            raise RuntimeError(f"{job} {arguments} failed: see what it wrote to stderr")
        return json.loads(answer)

    @cached_property
    def few(self) -> dict:
        """The probe of the small file that others are compared with."""
        path = write_lines(self.folder / "few.jsonl", map(good_line, range(FEW)))
        return self.ask("load", "load", path)

    def close(self) -> None:
        """Ends the processes, removes the files."""
        for process in self.processes.values():
            process.communicate()
        self.temporary.cleanup()


def good_line(number: int) -> bytes:
    """A row of about a thousand bytes."""
    question = f"{H} question {number}?{A} "
    answers = {"chosen": question + "good " * 90, "rejected": question + "evil " * 90}
    return json.dumps(answers).encode() + b"\n"


def write_lines(path: Path, lines: Iterable[bytes], total: int | None = None) -> Path:
    """A file of these lines, packed if its name says so."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.writelines(tqdm(lines, path.name, total, leave=False, disable=None))
    return path


def growth(few: dict, many: dict) -> float:
    """MB by which one peak is over another."""
    return (many["peak"] - few["peak"]) / 1024


# --- the bounds ---------------------------------------------------------------------------------


def rows(lab: Lab) -> Iterator[Figure]:
    """Many rows: flat memory, mapped back without a copy, and no file left behind."""
    count = lab.sizes.rows
    path = write_lines(lab.folder / "many.jsonl", map(good_line, range(count)), count)
    many = lab.ask("load", "load", path)
    path.unlink()
    name = f"{count:,} rows"
    yield Figure(f"{name}: peak over that of {FEW:,} rows", growth(lab.few, many), 32, "MB")
    yield Figure(f"{name}: memory to read them all back", many["read_back"] / 1024, 8, "MB")
    yield Figure(f"{name}: missing", count - many["accepted"], 0, "rows")
    yield Figure("files left while the data is in use", len(many["left"]), 0, "files")


def bad_rows(lab: Lab) -> Iterator[Figure]:
    """Many refused rows: they are counted, their messages are not kept."""
    count = lab.sizes.bad_rows
    few = write_lines(lab.folder / "few bad.jsonl", [*repeat(b"{}\n", FEW), good_line(0)])
    few = lab.ask("load", "load", few)
    path = write_lines(lab.folder / "bad.jsonl", chain(repeat(b"{}\n", count), [good_line(0)]))
    got = lab.ask("load", "load", path)
    yield Figure(f"{count:,} refused rows: peak over that of {FEW:,}", growth(few, got), 8, "MB")
    uncounted = count - got["refused"]["missing_key"]
    yield Figure(f"{count:,} refused rows: not counted", uncounted, 0, "rows")


def bomb(lab: Lab) -> Iterator[Figure]:
    """A packed file that inflates a thousandfold, into one line."""
    start, end = good_line(0) + b'{"chosen": "', b'"}\n' + good_line(1)
    blocks = repeat(b"x" * 1_000_000, lab.sizes.bomb // 1000)
    path = write_lines(lab.folder / "bomb.jsonl.gz", chain([start], blocks, [end]))
    name = f"{path.stat().st_size / 1e6:.1f} MB packed, {lab.sizes.bomb / 1e6:g} GB in a line"
    skipped, strict = lab.ask("load", "load", path), lab.ask("load", "load", path, "raise")
    yield Figure(f"{name}: peak, skipping", growth(lab.few, skipped), 32, "MB")
    yield Figure(f"{name}: peak, raising", growth(lab.few, strict), 32, "MB")
    yield refused_between_good_ones(name, skipped)
    yield Figure(f"{name}: raises otherwise", strict["error"] != "too_large", 0, "errors")


def long_row(lab: Lab) -> Iterator[Figure]:
    """One row of 10 MB between two good ones."""
    text = f"{H} q{A} " + "a" * 5_000_000
    row = json.dumps({"chosen": text, "rejected": text[:-1]}).encode() + b"\n"
    path = write_lines(lab.folder / "long.jsonl", [good_line(0), row, good_line(1)])
    got = lab.ask("load", "load", path)
    yield Figure("a row of 10 MB: peak", growth(lab.few, got), 32, "MB")
    yield refused_between_good_ones("a row of 10 MB", got)


def refused_between_good_ones(name: str, got: dict) -> Figure:
    """Of three rows the one in the middle is too large, the others are read."""
    right = got["accepted"] == 2 and got["refused"] == {**dict.fromkeys(KINDS, 0), "too_large": 1}
    return Figure(f"{name}: not too_large, or others lost", not right, 0, "")


def json_list(lab: Lab) -> Iterator[Figure]:
    """A .json file is read whole, up to a size; a larger one is refused with what to do."""
    lines = b",".join(map(good_line, range(MAX_JSON_BYTES // 1000 + 1)))
    path = write_lines(lab.folder / "list.json", [b"[", lines, b"]"])
    got, name = lab.ask("load", "load", path), f"a .json of {path.stat().st_size / 1e6:.0f} MB"
    yield Figure(f"{name}: peak", growth(lab.few, got), 64, "MB")
    clear = "list.json" in got["error"] and "write it as .jsonl" in got["error"]
    yield Figure(f"{name}: not refused with what to do", not clear, 0, "")


def edited(lab: Lab) -> Iterator[Figure]:
    """A file whose rows change while its name, size and time do not."""
    path, old = lab.folder / "edited.jsonl", 0
    for version in "abc":
        row = {"chosen": f"{H} q{A} {version}", "rejected": f"{H} q{A} no"}
        write_lines(path, [json.dumps(row).encode()])
        os.utime(path, ns=(10**18, 10**18))
        old += load_preferences(path)[0]["chosen"][:] != [version]
    yield Figure("a file edited twice, same size and time: old rows", old, 0, "rows")


def mutations(lab: Lab) -> Iterator[Figure]:
    """Damaged rows, read by the package and by the slow reader."""
    damaged, bar = mutants(lab.sizes.mutants, 0), {"leave": False, "disable": None}
    result = compare(damaged, lab.folder, lambda rows: tqdm(rows, "mutants", **bar))
    for line in result.disagreements[:5]:
        tqdm.write(line)
    name = f"{lab.sizes.mutants:,} mutated rows"
    yield Figure(f"{name}: disagreements", len(result.disagreements), 0, "rows")
    yield Figure(f"{name}: slowest, CPU time", result.slowest, 3, "s")
    never = [kind for kind in KINDS if not result.kinds[kind]]
    yield Figure(f"{name}: kinds that never occur", len(never), 0, "kinds")
    accepted = 100 * result.kinds[None] / sum(result.kinds.values())
    yield Figure(f"{name}: accepted all the same", accepted, 60, "%")


def steps(lab: Lab) -> Iterator[Figure]:
    """PPO goes on and on; what grows is the history it returns."""
    for name, out in (("train_ppo", ""), ("train_ppo in a run", lab.folder / "run")):
        got = lab.ask("train", "train", lab.sizes.steps, out)
        history = f"the history it returns: {got['history'] / lab.sizes.steps:.1f}"
        each, limit = per_step(lab.sizes, got), lab.sizes.per_step
        yield Figure(f"{name}, a step ({history})", each, limit, "kB")


def per_step(sizes: Sizes, got: dict) -> float:
    """kB by which a training grows each step once it is warm."""
    warm, last = got["after"][sizes.warm_up - 1], got["after"][-1]
    return (last - warm) / (sizes.steps - sizes.warm_up)


BOUNDS: dict[str, Callable[[Lab], Iterator[Figure]]] = {
    "rows": rows,
    "bad_rows": bad_rows,
    "bomb": bomb,
    "long_row": long_row,
    "json": json_list,
    "edited": edited,
    "mutations": mutations,
    "steps": steps,
}
