"""A check: cases worked on paper, drawn inputs, and the mistakes it knows by name.

A check calls a function on trials, in this order: the worked cases, the smallest first; drawn
inputs, compared with minippo's own function; the cases at the edge (also worked on paper: holes in
a mask, huge numbers); all of these with NaN where the mask is False; with a gradient; and one in
float64. The first trial that shows something else is reported.

A mistake is named if the function shows what that mistake shows on every trial that is looked at:
the plain ones (worked and drawn) by their first output if that is wrong there, else by all outputs
if one is wrong there; else those and the edge, if it is wrong there; else all trials. So the
forgotten minus is found also in a function that besides knows nothing of holes or NaN.
"""

import functools
import importlib
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from minippo.checks import saving, saying
from minippo.checks.observing import (
    Observation,
    Trial,
    as_float64,
    as_tensor,
    first_only,
    named_outputs,
    observe,
    same_sight,
    whole,
)
from minippo.checks.source import borrows, is_stub

KINDS = ("worked", "drawn", "edge", "masked", "gradient", "float64")
PLAIN = KINDS[:2]
DRAWS = 3
GRADE_VARIABLE = "MINIPPO_GRADE"  # a file that the verdicts go to: set by `minippo grade`
RESULTS: dict[str, str] = {}  # name of a function -> its last status in this process


@contextmanager
def in_float32():
    """Inside, new tensors are float32: a lesson's default is float64, whose rounding hides much."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class CheckFailed(AssertionError):
    """A function is not right, or not written; the text says what is known about it."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the text, without the frames of the check."""
        return [f"CheckFailed: {self}"]


@dataclass(frozen=True)
class Case:
    """An input with the answer that paper gives; lists stand for tensors."""

    arguments: dict[str, object]  # in the order of the signature; optional ones may be left out
    expected: object  # numbers and lists; a tuple or dict as the function gives; an exception
    gradient: dict[str, list] = field(default_factory=dict)  # of the sum of the first output
    rtol: float = 1e-4
    atol: float = 1e-6
    edge: bool = False  # a rare input: looked at after the others


@dataclass(frozen=True)
class Mistake:
    """A misconception: how it is named, and the function of somebody who has it."""

    sentence: str  # goes on after "It looks like"
    wrong: Callable


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    status: str  # solved, wrong or unwritten
    sentence: str  # in one line
    text: str = ""  # the whole message of a wrong one


@dataclass(frozen=True, eq=False)
class Exercise:
    """The check of one function; call it with yours: `gae = check_gae(gae)`.

    What is right, is for a subclass to say, by `examine(fn) -> Verdict`.

    Hands back your function if it is right, and saves its source to my_minippo.py. Hands back
    minippo's own if yours is not written yet; with fallback=False that is an error too.
    Raises CheckFailed if it is wrong.
    """

    name: str
    module: str  # where minippo's own one is, without `minippo.`

    def __call__(self, fn: Callable, fallback: bool = True) -> Callable:
        verdict = self.judge(fn)
        RESULTS[self.name] = verdict.status
        if verdict.status == "solved":
            told = f"{verdict.sentence} {saving.save(self.name, fn)}".strip()
            verdict = replace(verdict, sentence=told)
        if graded := os.environ.get(GRADE_VARIABLE):
            record(Path(graded), self.name, verdict)
        if verdict.status == "solved":
            print(verdict.sentence)
            return fn
        # A grader has the verdict, and later exercises shall not suffer from this one.
        if graded or (verdict.status == "unwritten" and fallback):
            print(f"{verdict.sentence} The notebook goes on with minippo's own.")
            return self.reference
        raise CheckFailed(verdict.text or verdict.sentence) from None

    @functools.cached_property
    def reference(self) -> Callable:
        """minippo's own function."""
        return getattr(importlib.import_module(f"minippo.{self.module}"), self.name)

    def judge(self, fn: Callable) -> Verdict:
        """What is to be said about a function; nothing is printed, saved or raised."""
        with in_float32():
            return self.prejudge(fn) or self.examine(fn)

    def prejudge(self, fn: Callable) -> Verdict | None:
        """The verdict on what is nobody's own work: a wrong one, an unwritten one, or None yet."""
        if not callable(fn):
            return self._wrong(f"pass the function itself, check_{self.name}({self.name})")
        if fn is self.reference:
            return Verdict("unwritten", f"{self.name} is minippo's own: run the cell with yours.")
        if borrows(fn, self.name, self.reference):
            return self._wrong(f"it calls minippo's own {self.name}; write it yourself")
        return None

    def _wrong(self, sentence: str, details: str = "") -> Verdict:
        sentence = f"{sentence[0].upper()}{sentence[1:].rstrip('.')}."
        text = f"{self.name} is not right yet. {sentence}"
        return Verdict("wrong", sentence, f"{text}\n\n{details}" if details else text)


@dataclass(frozen=True, eq=False)
class Check(Exercise):
    """The check of a formula: trials with an answer each, and the mistakes it knows by name."""

    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]
    draw: Callable[[torch.Generator], dict[str, object]] | None = None
    outputs: tuple[str, ...] = ("result",)
    spoil: Callable[[dict], dict] | None = None  # writes NaN where the mask is False
    differentiable: tuple[str, ...] = ()  # arguments that a gradient must reach

    def __repr__(self) -> str:
        return f"<check of {self.name}: {len(self.mistakes)} known mistakes>"

    @functools.cached_property
    @in_float32()
    def trials(self) -> tuple[Trial, ...]:
        """All trials, those first that are reported first."""
        cases = sorted((self._worked(case) for case in self.cases), key=_size)
        worked = [trial for trial in cases if trial.kind == "worked"]
        edge = [trial for trial in cases if trial.kind == "edge"]
        generator = torch.Generator().manual_seed(0)
        draws = [self.draw(generator) for _ in range(DRAWS if self.draw else 0)]
        drawn = [self._against_own("drawn", arguments) for arguments in draws]
        plain = [*worked, *drawn, *edge]
        spoilt = [self._spoilt(trial) for trial in plain if self.spoil and _is_finite(trial)]
        gradient = [self._with_gradient(case) for case in self.cases if case.gradient]
        grad = self.differentiable
        gradient += [self._against_own("gradient", args, grad) for args in draws if grad]
        return (*plain, *spoilt, *gradient, *(_doubled(trial) for trial in worked[-1:]))

    def examine(self, fn: Callable) -> Verdict:
        """The verdict of the trials."""
        if is_stub(fn, self._observe(fn, self.trials[0])):
            return Verdict("unwritten", f"{self.name} is not written yet.")
        if fault := saying.wrong_signature(fn, self.reference):
            return self._wrong(fault)
        seen = [self._observe(fn, trial) for trial in self.trials]
        pairs = list(zip(self.trials, seen, strict=True))
        failing = [(trial, sight) for trial, sight in pairs if saying.differences(trial, sight)]
        if not failing:
            return Verdict("solved", f"{self.name} is right.")
        mistake = self.recognise(seen)
        sentence = f"It looks like {mistake.sentence}." if mistake else saying.fault(fn, pairs)
        return self._wrong(sentence, saying.details(*failing[0]))

    def recognise(self, seen: list[Observation]) -> Mistake | None:
        """The known mistake that shows the same as a function, if there is one."""
        stages = (first_only, PLAIN), (whole, PLAIN), (whole, (*PLAIN, "edge")), (whole, KINDS)
        pairs = list(zip(self.trials, seen, strict=True))
        for view, kinds in stages:
            shown = [(trial, view(sight)) for trial, sight in pairs if trial.kind in kinds]
            if all(same_sight(sight, view(trial.expected), trial) for trial, sight in shown):
                continue
            return next((m for m in self.mistakes if self._shows(m, shown, view)), None)
        return None

    def _shows(self, mistake: Mistake, shown: list[tuple[Trial, Observation]], view) -> bool:
        return all(
            same_sight(sight, view(self._observe(mistake.wrong, trial)), trial)
            for trial, sight in shown
        )

    def _observe(self, fn: Callable, trial: Trial) -> Observation:
        return observe(fn, trial.arguments, self.outputs, trial.differentiable)

    def _against_own(self, kind: str, arguments: dict, differentiable=()) -> Trial:
        expected = observe(self.reference, arguments, self.outputs, differentiable)
        return Trial(kind, arguments, expected, differentiable)

    def _worked(self, case: Case) -> Trial:
        """The types are those of minippo's own function, the numbers those of the case.

        Raises RuntimeError if the two disagree: whoever is checked is not the one who is wrong.
        """
        arguments = {name: as_tensor(value) for name, value in case.arguments.items()}
        kind = "edge" if case.edge else "worked"
        own = observe(self.reference, arguments, self.outputs)
        if isinstance(case.expected, Exception):
            expected = Observation(raised=case.expected)
        else:
            by_hand = named_outputs(case.expected, self.outputs).items()
            expected = Observation({n: _typed(x, own.outputs.get(n)) for n, x in by_hand})
        trial = Trial(kind, arguments, expected, (), case.rtol, case.atol)
        if saying.differences(trial, own):
            broken = f"minippo's own {self.name} is wrong on a worked case: it was changed"
            raise RuntimeError(f"{broken}; install minippo anew\n{saying.details(trial, own)}")
        return trial

    def _with_gradient(self, case: Case) -> Trial:
        trial = self._worked(case)
        gradient = {name: torch.tensor(value) for name, value in case.gradient.items()}
        seen = replace(trial.expected, gradient=gradient)
        return replace(trial, kind="gradient", expected=seen, differentiable=tuple(gradient))

    def _spoilt(self, trial: Trial) -> Trial:
        spoilt = self.spoil(trial.arguments)
        own = observe(self.reference, spoilt, self.outputs, self.differentiable)
        seen = replace(trial.expected, gradient=own.gradient)
        return Trial("masked", spoilt, seen, self.differentiable, trial.rtol, trial.atol)


def spoil_masked(*names: str, mask: str = "mask") -> Callable[[dict], dict]:
    """Writes NaN into the named arguments where the mask is False."""

    def spoil(arguments: dict) -> dict:
        hidden = ~arguments[mask]
        spoilt = {name: arguments[name].masked_fill(hidden, torch.nan) for name in names}
        return arguments | spoilt

    return spoil


def record(path: Path, name: str, verdict: Verdict) -> None:
    """Appends a verdict to the file of a grader."""
    line = {"exercise": name, "result": verdict.status, "sentence": verdict.sentence}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _typed(by_hand: object, own: object) -> object:
    return torch.tensor(by_hand, dtype=own.dtype) if isinstance(own, Tensor) else by_hand


def _size(trial: Trial) -> int:
    values = trial.arguments.values()
    return sum(v.numel() if isinstance(v, Tensor) else len(str(v)) for v in values)


def _is_finite(trial: Trial) -> bool:
    outputs = trial.expected.outputs.values()
    return all(bool(x.isfinite().all()) for x in outputs if isinstance(x, Tensor))


def _doubled(trial: Trial) -> Trial:
    arguments = {name: as_float64(value) for name, value in trial.arguments.items()}
    outputs = {name: as_float64(value) for name, value in trial.expected.outputs.items()}
    return replace(
        trial,
        kind="float64",
        arguments=arguments,
        expected=replace(trial.expected, outputs=outputs),
    )
