"""Kills a shortened demo with SIGKILL at random moments, resumes it, compares every byte.

    python -m tests.faults --kills 50

The demo has all its stages: SFT, candidates, reward model, critic, PPO, evaluation. It starts from
the shipped base, and is 20 seconds long on an idle core. A moment is drawn evenly over the time in
which an uninterrupted run has something to lose: from its first file to its end.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "sft": "--steps 4 --batch-size 8 --micro-batch-size 8",
    "reward": "--prompts 16 --held-out 8 --candidates 3 --batch-size 4 --micro-batch-size 4",
    "value": "--prompts 16 --held-out 8 --candidates 2 --batch-size 4",
    "ppo": "--steps 4 --batch-size 8 --minibatch-size 8 --micro-batch-size 8",
    "eval": "--prompts 12 --best-of 2 --samples 3",
}
STAGES = ("sft", "reward", "value", "ppo")
# What tells the time, or by how much of it the run was interrupted.
TIMED = ("times.jsonl", "summary.json")
PATIENCE = 600  # seconds after which a child that has not ended is an error


@dataclass(frozen=True)
class Settings:
    """What to try."""

    kills: int = 50  # how many runs are killed and resumed
    seed: int = 0  # of the moments
    every: int = 2  # steps between checkpoints
    jobs: int = 2  # runs at the same time, each on one thread
    out: Path | None = None  # where every kill is written to, as JSON


@dataclass
class Trial:
    """One kill: when, what the run was at, and the files that differ after the resumed run."""

    moment: float
    at: str = ""
    half_written: bool = False
    different: tuple[str, ...] = ()


def start(folder: Path, every: int, log: Path, resume: bool = False) -> subprocess.Popen:
    """The shortened demo in a process of its own, with one thread."""
    command = [sys.executable, "-m", "minippo.app.cli", "demo", "--name", folder.name]
    command += ["--out", str(folder.parent), "--device", "cpu"]
    for stage, text in SHORT.items():
        command += text.replace("--", f"--{stage}.").split()
    command += [part for stage in STAGES for part in (f"--{stage}.save-every", str(every))]
    command += ["--resume"] if resume else []
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **alone}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def wait_for_start(child: subprocess.Popen, folder: Path) -> float:
    """Until the run has written its first file; returns the moment."""
    end = time.monotonic() + PATIENCE
    while not (folder / "config.json").is_file():
        if child.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the demo in {folder} did not start; see the log beside it")
        time.sleep(0.01)
    return time.monotonic()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, also those that should not be there, but for those that tell time."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name not in TIMED}


def whole_run(folder: Path, every: int) -> float:
    """An uninterrupted run; returns its seconds from its first file to its end."""
    child = start(folder, every, folder.parent / "log")
    began = wait_for_start(child, folder)
    if child.wait(PATIENCE):
        raise RuntimeError(f"the demo failed; see {folder.parent / 'log'}")
    return time.monotonic() - began


def killed(place: Path, every: int, moments) -> Trial:
    """Starts runs until one is still at work at its moment, and kills it there."""
    for attempt, moment in enumerate(moments):
        folder = place / f"{attempt}" / "r"
        child = start(folder, every, folder.parent / "log")
        time.sleep(max(0.0, wait_for_start(child, folder) + moment - time.monotonic()))
        child.send_signal(signal.SIGKILL)
        if child.wait() == -signal.SIGKILL:
            return finish(folder, every, Trial(moment))
    raise AssertionError("moments never end")


def finish(folder: Path, every: int, trial: Trial) -> Trial:
    """Notes what the run was at, and resumes it to its end."""
    trial.at = where(folder)
    trial.half_written = bool(list(folder.rglob(".*.partial")))
    child = start(folder, every, folder.parent / "log", resume=True)
    if child.wait(PATIENCE):
        trial.different = (f"it did not resume; see {folder.parent / 'log'}",)
    return trial


def where(folder: Path) -> str:
    """The first stage that is not finished; the evaluation comes after all of them."""
    for stage in STAGES:
        pointer = folder / stage / "latest"
        if not pointer.is_file() or pointer.read_text() != "final":
            return stage
    return "evaluation"


def trial(place: Path, every: int, whole: dict[str, bytes], seconds: float, seed: str) -> Trial:
    """One kill and what became of it; its folder is kept if it differs."""
    chance = random.Random(seed)
    result = killed(place, every, iter(lambda: chance.uniform(0, seconds), None))
    found = contents(max(place.glob("*/r"), key=lambda f: int(f.parent.name)))
    names = sorted(whole.keys() | found.keys())
    different = [name for name in names if whole.get(name) != found.get(name)]
    result.different = (*result.different, *different)
    if not result.different:
        shutil.rmtree(place)
    return result


def table(trials: list[Trial]) -> str:
    """How many runs were killed in which stage, and how many ended with other bytes."""
    rows = ["killed in      runs   while writing   different"]
    kinds = {name: [t for t in trials if t.at == name] for name in (*STAGES, "evaluation")}
    for name, some in {**kinds, "all": trials}.items():
        writing, different = sum(t.half_written for t in some), sum(bool(t.different) for t in some)
        rows.append(f"{name:12s} {len(some):6d} {writing:15d} {different:11d}")
    counts = Counter(name for t in trials for name in t.different)
    return "\n".join([*rows, *(f"{name}: differs {n} times" for name, n in counts.most_common())])


def undisturbed(place: Path, settings: Settings) -> tuple[dict[str, bytes], float]:
    """What uninterrupted runs write, and their mean seconds, under the load of the trials.

    There are two at least: were they not equal, nothing could be said of the others.
    """
    folders = [place / f"whole-{i}" / "r" for i in range(max(2, settings.jobs))]
    with ThreadPoolExecutor(settings.jobs) as pool:
        seconds = list(pool.map(lambda folder: whole_run(folder, settings.every), folders))
    whole, *others = map(contents, folders)
    if any(other != whole for other in others):
        raise RuntimeError(f"two uninterrupted runs differ already: {place}")
    return whole, sum(seconds) / len(seconds)


def main(settings: Settings) -> int:
    """Runs the trials; the exit status is 1 if any run ended with other bytes."""
    place = Path(tempfile.mkdtemp(prefix="minippo-faults-"))
    whole, seconds = undisturbed(place, settings)
    print(f"an uninterrupted run: {seconds:.1f} s after its first file, {len(whole)} files")
    with ThreadPoolExecutor(settings.jobs) as pool:
        jobs = [
            pool.submit(
                trial, place / f"kill-{i}", settings.every, whole, seconds, f"{settings.seed}/{i}"
            )
            for i in range(settings.kills)
        ]
        done = [job.result() for job in tqdm(as_completed(jobs), total=len(jobs), unit="kill")]
    print(table(done))
    if settings.out is not None:
        settings.out.write_text(json.dumps([asdict(t) for t in done], indent=1), encoding="utf-8")
    if any(t.different for t in done):
        print(f"the folders of those that differ are in {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
