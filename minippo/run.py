"""Runs: a folder, its stages, what they write, and how they resume.

A run folder holds config.json, metrics.jsonl (the same bytes for the same seed on the same machine;
times are in times.jsonl), one folder per stage with versioned checkpoints and a pointer to the
latest, and what the evaluation writes.
"""

import json
import math
import shutil
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from minippo.config import RunConfig
from minippo.files import disk_message, sync, write_file
from minippo.optim import Hooks, NonFiniteError

POINTER = "latest"
ORDER = ("pretrain", "sft", "reward", "value", "ppo", "eval")  # each builds on those before it
# What depends on all stages.
RESULTS = ("evaluation.json", "samples.jsonl", "xray.json", "report.html", "summary.json")
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
        self._check(overwrite)

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
            return dict(json.loads(path.read_bytes())) if path.is_file() else {}
        except (ValueError, TypeError) as error:
            message = f"{path} does not hold the settings of a run ({error}); put it right"
            raise ValueError(f"{message}, or choose another --name") from error

    def _begin(self) -> None:
        """The first write of a run: what was refused before it has left no trace."""
        if self.begun:
            return
        known = {k: v for k, v in self._known().items() if k not in self.discarded}
        self._discard()
        run = {k: v for k, v in asdict(self.config).items() if k not in ("resume", "out")}
        begun = known.get("run", {}).get("begun", {})
        run["begun"] = begun | {name: self._inputs(name) for name in self.stages}
        settings = {name: asdict(config) for name, config in self.stages.items()}
        self._write("config.json", _dumps("config.json", {**known, "run": run, **settings}))
        self.begun = True

    def _discard(self) -> None:
        """Removes what --overwrite replaces."""
        gone, self.discarded = self.discarded, ()
        for name in gone:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        made = [*RESULTS, *(f"{stage}.json" for stage in gone)]
        made += ["candidates.jsonl"] if "reward" in gone else []
        for name in made if gone else ():
            (self.folder / name).unlink(missing_ok=True)
        self._keep_metrics(lambda stage, step: stage not in gone)

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
            shutil.rmtree(self.folder / stage, ignore_errors=True)
        self._keep_metrics(lambda name, step: name != stage or step < first)
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
        if self.stopping or (step + 1) % self.stages[stage].save_every == 0:
            self.save(stage, step + 1)
        if self.stopping:
            self.close()
            raise Interrupted(f"saved after step {step} of {stage}; go on with --resume")

    def finish(self, stage: str) -> None:
        """Closes a stage: a last checkpoint, without the optimizer, marked as finished.

        Raises Interrupted if Ctrl-C was pressed since the last step: no other step would see it.
        """
        self.save(stage, self.bar.n, finished=True)
        self.close()
        if self.stopping:
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
        name = "final" if finished else f"step-{step:06d}"
        folder, target = self.folder / stage / f".{name}.partial", self.folder / stage / name
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._write_models(folder)
            if not finished:
                save_file(_tensors(self.state), folder / "training.safetensors")
            progress = self.state.get("progress", {})
            marks = {"step": step, "finished": finished, "progress": progress}
            (folder / "state.json").write_bytes(_dumps("state.json", marks))
            sync(folder)
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(disk_message(target, error)) from error
        self._write(f"{stage}/{POINTER}", name.encode())
        for old in (self.folder / stage).glob("step-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def _check_finite(self, stage: str) -> None:
        """Trainings look at their weights after each step; this is where none can pass by."""
        for name, model in self._models().items():
            if not all(p.isfinite().all() for p in model.parameters()):
                message = f"{stage}: weights of the {name} model are NaN or infinite, so they were "
                message += "not saved; lower the learning rate and start the stage again"
                raise NonFiniteError(f"{message} with --overwrite")

    def _models(self) -> dict[str, nn.Module]:
        return {k: v for k, v in self.state.items() if isinstance(v, nn.Module)}

    def _write_models(self, folder: Path) -> None:
        for position, (name, model) in enumerate(self._models().items()):
            place = folder if position == 0 else folder / name  # the stage's own model comes first
            save_model(model, None if position else self.tokenizer, place)

    def _restore(self, folder: Path) -> int:
        marks = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "training.safetensors")
        for name, part in self.state.items():
            if isinstance(part, nn.Module):
                _load_parameters(part, tensors, name)
            elif isinstance(part, torch.optim.Optimizer):
                _load_optimizer(part, tensors, name)
            else:
                part.update(marks[name])
        return marks["step"]

    def latest(self, stage: str) -> Path | None:
        """The folder of a stage's latest checkpoint, if it has one."""
        pointer = self.folder / stage / POINTER
        if stage in self.discarded or not pointer.is_file():
            return None
        return self.folder / stage / pointer.read_text().strip()

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

    def _keep_metrics(self, kept) -> None:
        """Drops the rows of metrics.jsonl for which not kept(stage, step), and a torn last line."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        rows = [(line, json.loads(line)) for line in whole]
        left = [line for line, row in rows if kept(row["stage"], row["step"])]
        if left != lines:
            self._write("metrics.jsonl", b"".join(left))

    def _append(self, name: str, row: dict) -> None:
        path, line = self.folder / name, _dumps(name, row, indent=None)
        try:
            with path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise ValueError(disk_message(path, error)) from error

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
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            tqdm.write("stopping as soon as all is saved; press Ctrl-C again to stop at once")

        before = signal.signal(signal.SIGINT, stop)  # None: of no Python function
        self.handler = signal.default_int_handler if before is None else before


def final_checkpoint(folder: Path, stage: str) -> Path:
    """The model that a finished stage left in a run's folder; ValueError if there is none."""
    final = folder / stage / "final"
    if final.is_dir():
        return final
    options = RunConfig(name=folder.name, out=folder.parent).options()
    remedy = f"run `minippo {stage} {options}` first, with --resume if it was stopped"
    raise ValueError(f"{folder} has no finished stage {stage!r}; {remedy}")


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """What `transformers` loads again. Raises OSError or SafetensorError if the disk is full."""
    (model.save if hasattr(model, "save") else model.save_pretrained)(folder)
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no other class for a full disk
        raise OSError(str(error)) from error


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


def _tensors(state: dict) -> dict[str, torch.Tensor]:
    """Every parameter and every optimizer moment under a flat name."""
    flat = {}
    for name, part in state.items():
        if isinstance(part, nn.Module):
            flat |= {f"{name}/{key}": value.detach() for key, value in part.named_parameters()}
        elif isinstance(part, torch.optim.Optimizer):
            for index, moments in part.state_dict()["state"].items():
                flat |= {f"{name}/{index}/{key}": value for key, value in moments.items()}
    return {key: value.contiguous() for key, value in flat.items()}


def _load_parameters(model: nn.Module, tensors: dict, name: str) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(tensors[f"{name}/{key}"])


def _load_optimizer(optimizer, tensors: dict, name: str) -> None:
    saved = optimizer.state_dict()
    for key, value in tensors.items():
        owner, _, rest = key.partition("/")
        if owner == name:
            index, _, moment = rest.partition("/")
            saved["state"].setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict(saved)


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
