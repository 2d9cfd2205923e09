"""Runs: a folder, its stages, what they write, and how they resume.

A run folder holds config.json, metrics.jsonl (the same bytes for the same seed on the same machine;
times are in times.jsonl), one folder per stage with versioned checkpoints and a pointer to the
latest, and what the evaluation writes. docs/checkpoints.md says why a kill at any moment is safe.
"""

import json
import math
import re
import shutil
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from minippo.config import RunConfig
from minippo.engine.checkpoints import (
    check_checksums,
    read_json,
    restore_training,
    training_tensors,
    write_checksums,
)
from minippo.engine.files import disk_message, lock, remove, sync, unlock, write_file
from minippo.engine.ranks import collect, on_any_rank, on_main, whole, whole_weights, world
from minippo.optim import Hooks, NonFiniteError

POINTER = "latest"
CHECKPOINT = re.compile(r"final|step-\d{6,}")  # the names a pointer may hold
ORDER = ("pretrain", "sft", "reward", "value", "ppo", "eval")  # each builds on those before it
# What depends on all stages.
RESULTS = ("evaluation.json", "samples.jsonl", "xray.json", "report.html", "summary.json")
STEP_FILES = ("metrics.jsonl", "times.jsonl")  # a row per step
INPUTS = ("seed", "data", "split", "limit", "base")  # of RunConfig: what the numbers depend on
INPUTS += ("autocast", "tf32", "frozen_dtype")
# Of PPOConfig: what the rewards depend on that a critic is warmed up on.
REWARD = ("max_prompt_tokens", "max_response_tokens", "temperature")
REWARD += ("missing_eos_penalty", "standardize_scores")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed; the state was saved."""


class Run(Hooks):
    """A run folder, and the hooks that fill it while a stage trains."""

    def __init__(self, config: RunConfig, stages: dict, overwrite: bool = False, ppo=None):
        self.config, self.stages = config, dict(stages)
        self.ppo = self.stages.get("ppo", ppo)  # whose reward a critic is warmed up on
        self.folder = Path(config.out) / config.name
        self.tokenizer, self.bar, self.state, self.stopping = None, None, {}, False
        self.begun = False
        self.discarded: tuple[str, ...] = ()  # what --overwrite replaces, gone once the run begins
        self.is_new = not self.folder.is_dir()
        if not self.is_new:
            on_main(lock)(self.folder)
        try:
            self._end_what_was_killed(overwrite)
            self._check(overwrite)
        except BaseException:
            unlock(self.folder)
            raise

    def _check(self, overwrite: bool) -> None:
        """Refuses what contradicts the folder; writes nothing yet."""
        known, resume, folder = self._known(), self.config.resume, self.folder
        first = min(ORDER.index(name) for name in self.stages)
        again = [name for name in self.stages if name in known]
        later = [name for name in ORDER[first + 1 :] if name in known]
        if resume and overwrite:
            raise ValueError("--resume goes on and --overwrite starts over; leave one of them out")
        if resume and not known:
            raise ValueError(f"there is no run in {folder} to resume; leave out --resume")
        if overwrite:
            self.discarded = ORDER[first:] if known else ()
            return
        if again and not resume:
            message = f"{folder} has a stage {again[0]!r} already; go on with --resume, replace it"
            raise ValueError(f"{message} and later ones with --overwrite, or take another --name")
        if all(self.finished(name) for name in self.stages):
            done = ", ".join(self.stages)
            raise ValueError(f"{done} of {folder} is finished; replace it with --overwrite")
        if later and not resume:
            message = f"{folder} has a stage {later[0]!r} that does not build on this one"
            raise ValueError(f"{message}; replace it with --overwrite, or take another --name")
        for name in again:
            self._check_unchanged(name, known)

    def _check_unchanged(self, name: str, known: dict) -> None:
        begun = known.get("run", {}).get("begun", {}).get(name, {})
        before, now = {**known[name], **begun}, {**asdict(self.stages[name]), **self._inputs(name)}
        now = json.loads(_dumps("config.json", now))
        changed = [key for key in before if before[key] != now.get(key)]
        if changed:
            raise ValueError(
                f"--resume needs the settings of {self.folder / 'config.json'}: {changed[0]} of "
                f"{name!r} was {before[changed[0]]!r}, not {now.get(changed[0])!r}"
            )

    def _inputs(self, name: str) -> dict:
        """What a stage's numbers depend on beside its own settings."""
        inputs = {key: getattr(self.config, key) for key in INPUTS}
        if name == "value" and self.ppo is not None:
            inputs |= {f"ppo.{key}": getattr(self.ppo, key) for key in REWARD}
        return inputs

    def check_critic(self) -> None:
        """Raises ValueError if this run's critic was warmed up on another reward than PPO's."""
        begun = self._known().get("run", {}).get("begun", {}).get("value", {})
        now = json.loads(_dumps("config.json", self._inputs("value")))
        changed = [key for key in begun if key.startswith("ppo.") and begun[key] != now.get(key)]
        if changed:
            message = f"the critic of {self.folder} was warmed up with {changed[0]} "
            message += f"{begun[changed[0]]!r}, not {now.get(changed[0])!r}"
            remedy = f"`minippo value {self.config.options()} --overwrite`"
            raise ValueError(f"{message}; redo it: {remedy}, with that --ppo.*")

    def _known(self) -> dict:
        path = self.folder / "config.json"
        try:
            known = read_json(path) if path.is_file() else {}
            if not isinstance(known, dict) or not all(isinstance(v, dict) for v in known.values()):
                raise ValueError("its parts are no JSON objects")
            return known
        except ValueError as error:
            message = f"{path} does not hold the settings of a run ({error}); put it right"
            raise ValueError(f"{message}, or choose another --name") from error

    def _begin(self) -> None:
        """The first write of a run: what was refused before it has left no trace."""
        if self.begun:
            return
        if self.is_new:
            self._lock_new_folder()
        self.is_new = False
        gone, self.discarded = self.discarded, ()
        known = {k: v for k, v in self._known().items() if k not in gone}
        run = {k: v for k, v in asdict(self.config).items() if k not in ("resume", "out")}
        begun = known.get("run", {}).get("begun", {})
        run["begun"] = begun | {name: self._inputs(name) for name in self.stages}
        if gone:
            run["discarding"] = gone
        settings = {name: asdict(config) for name, config in self.stages.items()}
        self._write("config.json", _dumps("config.json", {**known, "run": run, **settings}))
        self._discard()
        self.begun = True

    @on_main
    def _lock_new_folder(self) -> None:
        """What stood in the way of a new run was looked for before there was a lock."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(disk_message(self.folder, error)) from error
        lock(self.folder)
        if self._known():
            message = f"another process has begun a run in {self.folder} meanwhile"
            raise ValueError(f"{message}; choose another --name")

    def _end_what_was_killed(self, overwrite: bool) -> None:
        """Nothing is decided here: it only ends a removal, or forgets what was never whole."""
        if self._known():
            self._discard()
        if self._known() and not overwrite:  # which must also do where a pointer is damaged
            self._sweep()

    @on_main
    def _discard(self) -> None:
        """Removes what --overwrite replaces.

        config.json names it first, without the old settings, and forgets it last. So a kill in
        between leaves no half of an old run that counts: the next command ends what was begun.
        """
        known = self._known()
        marked = known.get("run", {}).pop("discarding", ())
        gone = [stage for stage in ORDER if stage in marked]
        if not gone:
            return
        made = [*RESULTS, *gone, *(f"{stage}.json" for stage in gone)]
        made += ["candidates.jsonl"] if "reward" in gone else []
        for name in made:
            remove(self.folder / name)
        self._keep_rows(lambda stage, step: stage not in gone)
        self._write("config.json", _dumps("config.json", known))

    @on_main
    def _sweep(self) -> None:
        """Removes what a kill left behind: half-written files, checkpoints nothing points to."""
        for path in self.folder.glob(".*.partial"):
            remove(path)
        for stage in ORDER:
            kept = self.latest(stage)
            for path in (self.folder / stage).glob("*"):
                ours = CHECKPOINT.fullmatch(path.name) or path.match(".*.partial")
                if ours and path != kept:
                    remove(path)

    def add_stage(self, name: str, config) -> None:
        """A further stage that this run goes through."""
        self.stages[name] = config
        known = self._known()
        if self.config.resume and name in known:
            self._check_unchanged(name, known)
        elif name in known and name not in self.discarded:
            command = f"minippo {name} {self.config.options()}"
            raise ValueError(
                f"{self.folder} has a stage {name!r} that is not finished; go on with `{command} "
                f"--resume`, or replace it with `{command} --overwrite`"
            )
        self.begun = False  # its settings are written when it starts

    # what a training calls

    def start(self, stage: str, total: int, state: dict) -> int:
        """Restores what a checkpoint of this stage holds, and draws the bar."""
        self._begin()
        self.state, first = state, 0
        latest = self.latest(stage)
        if self.config.resume and latest is not None:
            first = self._restore(latest)
        else:
            on_main(remove)(self.folder / stage / POINTER)  # first: what it names must be whole
            on_main(remove)(self.folder / stage)
        self._keep_rows(lambda name, step: name != stage or step < first)
        self._check_rows(stage, first)
        self.bar = tqdm(total=total, initial=first, desc=f"{stage:10s}", unit="step", leave=True)
        self.began = time.perf_counter()
        self._catch_ctrl_c()
        return first

    def step(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step; a checkpoint when it is time or when Ctrl-C was pressed."""
        self._append("metrics.jsonl", {"stage": stage, "step": step, **metrics})
        seconds = round(time.perf_counter() - self.began, 3)
        self._append("times.jsonl", {"stage": stage, "step": step, "seconds": seconds})
        self.bar.set_postfix(_short(metrics), refresh=False)
        self.bar.update()
        stopping = on_any_rank(self.stopping)
        if stopping or (step + 1) % self.stages[stage].save_every == 0:
            self.save(stage, step + 1)
        if stopping:
            self.close()
            raise Interrupted(f"saved after step {step} of {stage}; go on with --resume")

    def finish(self, stage: str) -> None:
        """Closes a stage: a last checkpoint, without the optimizer, marked as finished.

        Raises Interrupted if Ctrl-C was pressed since the last step: no other step would see it.
        """
        self.save(stage, self.bar.n, finished=True)
        self.close()
        if on_any_rank(self.stopping):
            done = all(self.finished(name) for name in self.stages)
            then = "nothing is left to do" if done else "go on with --resume"
            raise Interrupted(f"{stage} is finished and saved; {then}")

    def close(self) -> None:
        """Gives the terminal and Ctrl-C back, if a stage has them."""
        if self.bar is not None:
            self.bar.close()
            signal.signal(signal.SIGINT, self.handler)
        self.bar = None

    # checkpoints

    def save(self, stage: str, step: int, finished: bool = False) -> Path:
        """Writes a checkpoint atomically: a new folder, fsync, then the pointer is replaced.

        Raises NonFiniteError if a weight is NaN or infinite, ValueError if the disk is full.
        """
        self._check_finite(stage)
        target = self.folder / stage / ("final" if finished else f"step-{step:06d}")
        if target == self.latest(stage):
            return target  # the same step has the same bytes, and the pointer's folder never goes
        weights = {name: whole_weights(model) for name, model in self._models().items()}
        tensors = None if finished else collect(training_tensors(self.state))
        progress = self.state.get("progress", {})
        marks = {"step": step, "finished": finished, "progress": progress}
        self._write_checkpoint(target, weights, tensors, marks)
        return target

    @on_main
    def _write_checkpoint(self, target: Path, weights: dict, tensors, marks: dict) -> None:
        stage, folder = target.parent.name, target.with_name(f".{target.name}.partial")
        try:
            remove(folder)
            folder.mkdir(parents=True)
            self._write_models(folder, weights)
            if tensors is not None:
                save_file(tensors, folder / "training.safetensors")
            (folder / "state.json").write_bytes(_dumps("state.json", marks))
            write_checksums(folder)
            sync(folder)
            remove(target)
            folder.rename(target)
            self._sync_names(stage)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(disk_message(target, error)) from error
        self._write(f"{stage}/{POINTER}", target.name.encode())
        for old in target.parent.glob("step-*"):
            if old != target:
                remove(old)

    def _sync_names(self, stage: str) -> None:
        """So that a checkpoint on the disk has its name there, and the metrics it stands on."""
        for path in (self.folder / stage, self.folder / "metrics.jsonl", self.folder):
            if path.exists():
                sync(path, below=False)

    def _check_finite(self, stage: str) -> None:
        """Trainings look at their weights after each step; this is where none can pass by."""
        for name, model in self._models().items():
            if not all(whole(p.isfinite().all()) for p in model.parameters()):
                message = f"{stage}: weights of the {name} model are NaN or infinite, so they were "
                message += "not saved; lower the learning rate and start the stage again"
                raise NonFiniteError(f"{message} with --overwrite")

    def _models(self) -> dict[str, nn.Module]:
        return {k: v for k, v in self.state.items() if isinstance(v, nn.Module)}

    def _write_models(self, folder: Path, weights: dict) -> None:
        for position, (name, model) in enumerate(self._models().items()):
            place = folder if position == 0 else folder / name  # the stage's own model comes first
            save_model(model, None if position else self.tokenizer, place, weights[name])

    def _restore(self, folder: Path) -> int:
        try:
            check_checksums(folder, below=True)
            marks = read_json(folder / "state.json")
            restore_training(self.state, load_file(folder / "training.safetensors"), marks)
            return marks["step"]
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            message = f"{folder} cannot be resumed: {error}; put it back as it was saved"
            raise ValueError(f"{message}, or start the stage again with --overwrite") from error

    def latest(self, stage: str) -> Path | None:
        """The folder of a stage's latest checkpoint, if it has one.

        Raises ValueError if the pointer names none that is there.
        """
        pointer = self.folder / stage / POINTER
        if stage in self.discarded or not pointer.is_file():
            return None
        return pointed(pointer)

    def begun_before(self, stage: str) -> bool:
        """Whether this run has such a stage, finished or not."""
        return stage not in self.discarded and stage in self._known()

    def settings(self, stage: str, kind):
        """The settings of a stage of this run, an instance of `kind`; the defaults if it has none.

        Of a stage that an earlier command went through they are read from config.json.
        """
        if stage in self.stages:
            return self.stages[stage]
        known = self._known().get(stage, {})
        if not set(known) <= {field.name for field in fields(kind)}:
            raise ValueError(f"{self.folder} was made by another minippo; choose another --name")
        return kind(**known)

    def finished(self, stage: str) -> bool:
        """Whether a stage of this run has ended."""
        latest = self.latest(stage)
        return latest is not None and latest.name == "final"

    # files

    def unlock(self) -> None:
        """Lets other processes into the folder; this one is done with it."""
        unlock(self.folder)

    @on_main
    def _keep_rows(self, kept) -> None:
        """Drops the rows of a step for which not kept(stage, step), and a torn last line."""
        for name in STEP_FILES:
            path, rows = self.folder / name, self._rows(name)
            left = b"".join(line for line, stage, step in rows if kept(stage, step))
            if path.is_file() and left != path.read_bytes():
                self._write(name, left)

    def _rows(self, name: str) -> list[tuple[bytes, str, int]]:
        """The whole lines of a file that has one per step, each with its stage and its step."""
        path, rows = self.folder / name, []
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            if not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
                rows.append((line, str(row["stage"]), int(row["step"])))
            except (ValueError, KeyError, TypeError) as error:
                message = f"{path}, line {len(rows) + 1} is no row of a step ({error!r})"
                raise ValueError(f"{message}; put it right, or choose another --name") from error
        return rows

    def _check_rows(self, stage: str, first: int) -> None:
        """Raises ValueError if metrics.jsonl lacks what a stage had written at its checkpoint."""
        steps = [step for _, name, step in self._rows("metrics.jsonl") if name == stage]
        if steps != list(range(first)):
            path = self.folder / "metrics.jsonl"
            message = f"{path} does not hold the first {first} steps of {stage} in order"
            raise ValueError(f"{message}; put it back, or start the stage again with --overwrite")

    @on_main
    def _append(self, name: str, row: dict) -> None:
        path, line = self.folder / name, _dumps(name, row, indent=None)
        try:
            with path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise ValueError(disk_message(path, error)) from error

    @on_main
    def _write(self, name: str, data: bytes) -> None:
        write_file(self.folder / name, data)

    def write_json(self, name: str, value) -> None:
        """A JSON file of the run folder. Raises NonFiniteError if a number in it is none."""
        text = _dumps(name, value)
        self._begin()
        self._write(name, text)

    def write_rows(self, name: str, rows) -> None:
        """A JSON-lines file of the run folder. Raises NonFiniteError if a number in it is none."""
        lines = [_dumps(name, row, indent=None) for row in rows]
        self._begin()
        self._write(name, b"".join(lines))

    def _catch_ctrl_c(self) -> None:
        def stop(signum, frame):
            if self.stopping and world() == 1:  # torchrun passes on what the terminal sent us too
                raise KeyboardInterrupt
            self.stopping = True
            again = "; press Ctrl-C again to stop at once" if world() == 1 else ""
            tqdm.write(f"stopping as soon as all is saved{again}")

        before = signal.signal(signal.SIGINT, stop)  # None: of no Python function
        self.handler = signal.default_int_handler if before is None else before


def pointed(pointer: Path) -> Path:
    """The checkpoint that a pointer file names; ValueError if it is none that is there."""
    name = pointer.read_bytes().decode(errors="replace").strip()
    if not CHECKPOINT.fullmatch(name) or not (pointer.parent / name).is_dir():
        message = f"{pointer} names {name!r}, which is no checkpoint there"
        raise ValueError(f"{message}; put it back, or start the stage again with --overwrite")
    return pointer.parent / name


def final_checkpoint(folder: Path, stage: str) -> Path:
    """The model that a finished stage left in a run's folder; ValueError if there is none."""
    pointer = folder / stage / POINTER
    if pointer.is_file() and pointed(pointer).name == "final":
        return folder / stage / "final"
    options = RunConfig(name=folder.name, out=folder.parent).options()
    remedy = f"run `minippo {stage} {options}` first, with --resume if it was stopped"
    raise ValueError(f"{folder} has no finished stage {stage!r}; {remedy}")


def save_model(model: nn.Module, tokenizer, folder: Path, weights: dict | None = None) -> None:
    """What `transformers` loads again. Raises OSError or SafetensorError if the disk is full.

    weights: the model's, if they are not in it: see `whole_weights`
    """
    model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no other class for a full disk
        raise OSError(str(error)) from error
    settings = folder / "tokenizer_config.json"
    if settings.is_file():  # transformers 4 does not know 5's name of the class, 5 knows 4's
        text = settings.read_text(encoding="utf-8")
        text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        settings.write_text(text, encoding="utf-8")


def _dumps(name: str, value, indent: int | None = 1) -> bytes:
    """JSON, ended by a line break if it is one line. NonFiniteError names what is no number."""
    try:
        text = json.dumps(value, indent=indent, default=str, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        broken = ", ".join(_not_finite(value))
        raise NonFiniteError(f"{name} was not written: {broken} is NaN or infinite") from error
    return (text + ("\n" if indent is None else "")).encode()


def _not_finite(value, place: str = ""):
    """Where NaN or infinity stands: table.0.reward"""
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, (list, tuple)) else items
    for key, inner in items:
        yield from _not_finite(inner, f"{place}.{key}" if place else str(key))


def _short(metrics: dict[str, float]) -> dict[str, str]:
    """The few numbers a progress bar has room for."""
    shown = {
        "loss/lm": "loss",
        "loss/reward": "loss",
        "reward/accuracy": "accuracy",
        "objective/scores": "score",
        "objective/kl_per_sequence": "kl",
    }
    shown |= {} if "objective/scores" in metrics else {"loss/value": "loss"}
    return {label: f"{metrics[key]:.3f}" for key, label in shown.items() if key in metrics}
