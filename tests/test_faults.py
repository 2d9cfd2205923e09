"""A kill or a full disk at every single step of what a run writes.

The steps are those of the system: a folder made, a file opened, half of its bytes written, a flush,
a rename, a file removed. A run dies at the first of them, the next run at the second, and so on
until one gets to its end. `python -m tests.faults` kills whole demos, at random moments.
"""

import errno
import io
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import forked

from minippo.app import run as run_module
from minippo.app.run import Run
from minippo.config import PPOConfig, RunConfig
from minippo.engine import files
from minippo.optim import adamw

pytestmark = pytest.mark.integration

STEPS, DEAD = 3, 77
REMOVALS = ("unlink", "rmdir")
CALLS = ("mkdir", "fsync", "rename", "replace")


@pytest.fixture(autouse=True, scope="module")
def a_disk_that_is_quick():
    """fsync waits for the disk to survive a power cut; here only processes die."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


# a training that is over at once


class Weights(torch.nn.Module):
    """A model of three weights. What `transformers` writes, whole demos are killed at."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(3, generator=generator))

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        run_module.save_file({"weight": self.weight.detach()}, folder / "model.safetensors")


def train(out: Path, seed: int = 0, resume: bool = False, overwrite: bool = False) -> None:
    """Three steps of two models under one optimizer, and every kind of file that a run has."""
    config = RunConfig(name="r", out=out, seed=seed, resume=resume)
    run = Run(config, {"ppo": PPOConfig(save_every=2)}, overwrite)
    models = {"policy": Weights(seed), "value": Weights(seed + 10)}
    optimizer = adamw(models, {"policy": 1e-2, "value": 1e-2})
    progress = {"kl_coef": 0.5}
    state = {**models, "optimizer": optimizer, "progress": progress}
    run.write_rows("candidates.jsonl", [{"seed": seed}])
    try:
        for step in range(run.start("ppo", STEPS, state), STEPS):
            loss = sum((model.weight - step).square().mean() for model in models.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress["kl_coef"] *= 1.1
            run.step("ppo", step, {"loss/total": loss.item(), **progress})
        run.write_json("ppo.json", progress)
        run.write_rows("samples.jsonl", [progress])
        run.finish("ppo")
    finally:
        run.close()
        run.unlock()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, also those that should not be there, but for the times."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "times.jsonl"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[int, Path]:
    """Uninterrupted runs of two seeds: the folders that hold them."""
    outs = {seed: tmp_path_factory.mktemp(f"whole-{seed}") for seed in (0, 1)}
    for seed, out in outs.items():
        train(out, seed)
    return outs


# one fault


class Torn:
    """A file of which each write is a step: a fault lets half of the bytes through."""

    def __init__(self, file, fault):
        self.file, self.fault = file, fault

    def write(self, data):
        if self.fault.is_here():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            self.fault.strike()
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


class Dead(BaseException):
    """Stands for a kill within this process: no further step does anything either."""


def die():
    """A kill of the process itself."""
    os._exit(DEAD)


def die_in_process():
    raise Dead


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Fault:
    """Counts the steps, and strikes at the given one and at all that follow."""

    def __init__(self, at: int, patch: pytest.MonkeyPatch, strike):
        self.left, self.strike = at, strike
        for name in CALLS if strike is disk_full else (*CALLS, *REMOVALS):  # it lets go of files
            patch.setattr(os, name, self.before(getattr(os, name)))
        patch.setattr(run_module, "save_file", self.saved)
        patch.setattr(io, "open", partial(self.opened, io.open))

    def is_here(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def before(self, call):
        def stepped(*args, **kwargs):
            if self.is_here():
                self.strike()
            return call(*args, **kwargs)

        return stepped

    def saved(self, tensors, path):
        """save_file writes by itself: its steps are all of the file, and half of it."""
        hit = self.is_here()
        save_file(tensors, path)
        if hit:
            os.truncate(path, path.stat().st_size // 2)
            self.strike()

    def opened(self, original, file, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+"):
            return original(file, mode, *args, **kwargs)
        if self.is_here():
            self.strike()
        return Torn(original(file, mode, *args, **kwargs), self)


def struck(action, at: int, strike) -> str:
    """What ended the action, or nothing if it was through before the fault struck."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            Fault(at, patch, strike)
            action()
    except (Dead, ValueError) as end:
        return str(end) or "dead"
    return ""


def struck_child(action, at: int, log: Path) -> str:
    """The same of a process of its own, which is really dead then."""
    child = forked(lambda: print(struck(action, at, die)), log)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, DEAD), log.read_text()
    return "dead" if status == DEAD else ""


def go_on(out: Path, seed: int) -> None:
    """What a person types next: --resume; a run that was not begun is begun again."""
    begun = out / "r" / "config.json"
    if not begun.is_file() or json.loads(begun.read_bytes())["run"]["seed"] != seed:
        return train(out, seed, overwrite=begun.is_file())
    try:
        train(out, seed, resume=True)
    except ValueError as error:
        assert "is finished" in str(error)  # only the old checkpoint was still to be removed


def every_step(strike, prepare, tmp_path: Path):
    """(step, folder of all runs, what ended it) until a run comes to its end unharmed."""
    for at in range(1, 1000):
        out = tmp_path / str(at)
        prepare(out)
        end = strike(out, at)
        if not end:
            assert at > 90, "a run writes more than that"
            return
        yield at, out, end
        shutil.rmtree(out)


def test_a_process_killed_at_any_step_of_its_writing_resumes_to_the_same_bytes(whole, tmp_path):
    expected = contents(whole[0] / "r")

    def killed(out, at):
        return struck_child(partial(train, out), at, tmp_path / "log")

    for at, out, _ in every_step(killed, Path.mkdir, tmp_path):
        go_on(out, seed=0)
        assert contents(out / "r") == expected, at


def test_an_overwriting_run_killed_at_any_step_leaves_no_half_of_the_old_one(whole, tmp_path):
    old, expected, begun = contents(whole[0] / "r"), contents(whole[1] / "r"), 0

    def killed(out, at):
        return struck(partial(train, out, seed=1, overwrite=True), at, die_in_process)

    for at, out, _ in every_step(killed, partial(shutil.copytree, whole[0]), tmp_path):
        if b'"seed": 0,' in (out / "r" / "config.json").read_bytes():
            left = contents(out / "r")
            assert {name: left[name] for name in old} == old, at
        else:
            begun += 1
        go_on(out, seed=1)
        assert contents(out / "r") == expected, at
    assert begun > 90


def test_a_disk_full_from_any_step_on_is_one_line_and_loses_nothing(whole, tmp_path):
    expected = contents(whole[0] / "r")

    def filled(out, at):
        return struck(partial(train, out), at, disk_full)

    for at, out, said in every_step(filled, Path.mkdir, tmp_path):
        assert "cannot write" in said and os.strerror(errno.ENOSPC) in said, (at, said)
        assert "\n" not in said and not list(out.rglob(".*.partial"))
        go_on(out, seed=0)
        assert contents(out / "r") == expected, at


# what was changed between two commands


@pytest.fixture
def halfway(tmp_path) -> Path:
    """A run that was killed after its third step, with a checkpoint of its second."""
    original = Run.step

    def dying(self, stage, step, metrics):
        original(self, stage, step, metrics)
        if step == 2:
            raise Dead

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
        patch.setattr(Run, "step", dying)
        train(tmp_path)
    return tmp_path / "r"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SAVED = ("training.safetensors", "state.json", "model.safetensors", "value/model.safetensors")


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: os.truncate(path, 10)])
def test_a_checkpoint_that_was_changed_is_noticed_on_resume(halfway, name, damage):
    damage(halfway / "ppo" / "step-000002" / name)
    before = contents(halfway)
    what = f"{Path(name).name} was (lost|changed) since the checkpoint was saved"
    with pytest.raises(ValueError, match=f"step-000002 cannot be resumed: {what}.*--overwrite"):
        train(halfway.parent, resume=True)
    kept = {name: before[name] for name in before if "candidates" not in name}
    assert kept.items() <= contents(halfway).items()


@pytest.mark.parametrize("name", ["../../r", "step-000009", "", "/", "final\0", "step-2"])
def test_a_pointer_to_nowhere_or_elsewhere_is_refused(halfway, name):
    (halfway / "ppo" / "latest").write_text(name)
    with pytest.raises(ValueError, match="latest names .* no checkpoint there.*--overwrite"):
        train(halfway.parent, resume=True)
    train(halfway.parent, overwrite=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[1:], "does not hold the first 2 steps of ppo in order"),
        (lambda lines: lines[:1] + lines, "does not hold the first 2 steps of ppo in order"),
        (lambda lines: [], "does not hold the first 2 steps of ppo in order"),
        (lambda lines: [lines[0], b"oops\n", *lines[1:]], "line 2 is no row of a step"),
        (lambda lines: [b'{"stage": "ppo"}\n', *lines], "line 1 is no row of a step"),
    ],
)
def test_metrics_that_were_changed_are_noticed_on_resume(halfway, change, said):
    path = halfway / "metrics.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=f"metrics.jsonl.*{said}"):
        train(halfway.parent, resume=True)


def test_a_run_that_came_from_elsewhere_cannot_name_what_is_removed(halfway):
    """The list of what a killed --overwrite had still to remove is read from a file."""
    precious = halfway.parent / "precious"
    precious.mkdir()
    path = halfway / "config.json"
    known = json.loads(path.read_bytes())
    known["run"]["discarding"] = ["../precious", str(precious), "."]
    path.write_text(json.dumps(known))
    train(halfway.parent, resume=True)
    assert precious.is_dir() and (halfway / "ppo" / "final").is_dir()


# two processes


def held(folder: Path, log: Path) -> int:
    """A process that is at work in a run's folder."""
    ready, done = os.pipe()

    def hold():
        config = RunConfig(name=folder.name, out=folder.parent, resume=True)
        Run(config, {"ppo": PPOConfig(save_every=2)})
        os.write(done, b".")
        time.sleep(600)

    child = forked(hold, log)
    os.close(done)  # so that reading ends if the child has died
    assert os.read(ready, 1) == b".", log.read_text()
    os.close(ready)
    return child


def test_two_runs_in_one_folder_are_refused_and_the_process_is_named(halfway, tmp_path):
    before, holder = contents(halfway), held(halfway, tmp_path / "log")
    try:
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=f"in use by process {holder}; wait.*--name"):
                train(halfway.parent, **options)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    left = contents(halfway)
    assert left.pop(".lock") == str(holder).encode() and left == before
    train(halfway.parent, resume=True)  # the kernel has let it go
    assert not (halfway / ".lock").exists()


def test_a_run_that_another_process_began_meanwhile_is_refused(tmp_path, whole):
    late = Run(RunConfig(name="r", out=tmp_path), {"ppo": PPOConfig(save_every=2)})
    train(tmp_path)
    with pytest.raises(ValueError, match="another process has begun a run in .*--name"):
        late.write_json("ppo.json", {})
    late.unlock()
    assert contents(tmp_path / "r") == contents(whole[0] / "r")


def test_a_lock_whose_file_was_removed_by_its_holder_is_taken_anew(tmp_path):
    files.lock(tmp_path)
    held_file = (tmp_path / ".lock").stat()
    (tmp_path / ".lock").unlink()
    files.lock(tmp_path)  # of this process, but another file: it must not count as held
    assert not os.path.samestat(held_file, (tmp_path / ".lock").stat())
    files.unlock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_could_not_be_written_is_not_held(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Fault(2, patch, disk_full)  # the file is opened; its writing fails
        with pytest.raises(ValueError, match="cannot write") as kept:
            files.lock(tmp_path)
    files.lock(tmp_path)  # though the error, and with it every local name, is still there
    assert (tmp_path / ".lock").read_text() == str(os.getpid()), kept
    files.unlock(tmp_path)
