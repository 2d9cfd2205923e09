"""What is said about a wrong function when no known mistake is recognised, and the input shown."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from minippo.checks.observing import Observation, Trial, same
from minippo.checks.source import own_line

Pairs = list[tuple[Trial, Observation]]
PLAIN = "worked", "drawn"
PLACES = {
    "worked": "",
    "edge": "What is common is right, this rare input is not.",
    "drawn": "The worked cases are right, this drawn input is not.",
    "masked": "All is right until NaN stands where the mask is False.",
    "gradient": "The values are right, the gradient is not.",
    "float64": "In float32 all is right.",
}
NAN_THROUGH = (
    "what stands at a masked position comes through: NaN times 0 is NaN, so multiplying by the "
    "mask does not remove it; fill masked positions before you compute"
)


def wrong_signature(fn: Callable, reference: Callable) -> str:
    """What is wrong with the parameters of a function, in a sentence; empty if nothing is."""
    wanted = inspect.signature(reference).parameters.values()
    form = ", ".join(map(_parameter, wanted))
    try:
        has = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return f"its parameters cannot be read; write it with def and ({form})"
    pairs = zip(has, wanted, strict=False)
    agree = all((h.name, h.default) == (w.name, w.default) for h, w in pairs)
    others = has[len(wanted) :]
    if agree and len(has) >= len(wanted) and all(p.default is not p.empty for p in others):
        return ""
    return f"its parameters have to be ({form}), yours are ({', '.join(map(_parameter, has))})"


def _parameter(p: inspect.Parameter) -> str:
    return p.name if p.default is p.empty else f"{p.name}={p.default}"


def fault(fn: Callable, pairs: Pairs) -> str:
    """A sentence about the first trial on which a function is wrong, and the trial's kind."""
    trial, seen = next((t, s) for t, s in pairs if differences(t, s))
    sentence = (
        _error(fn, trial, seen)
        or _change(trial, seen)
        or _form(trial, seen)
        or _gradient(trial, seen)
        or (trial.kind in PLAIN and _pattern([(t, s) for t, s in pairs if t.kind in PLAIN]))
        or _numbers(trial, seen)
    )
    return f"{PLACES[trial.kind]} {sentence[0].upper()}{sentence[1:]}".strip()


def details(trial: Trial, seen: Observation) -> str:
    """The input, what is expected and what came out; only the outputs that are wrong."""
    given = [f"{name} = {text}" for name, text in _shown(trial.arguments).items()]
    lines = [("with" if not n else "", text) for n, text in enumerate(given)]
    if trial.expected.raised is not None or seen.raised is not None:
        lines += [("expected", _outcome(trial.expected)), ("got", _outcome(seen))]
    for name in differences(trial, seen):
        of = name.removeprefix("gradient ")
        both = [x.gradient if name != of else x.outputs for x in (trial.expected, seen)]
        what = name if name == of else f"gradient with respect to {of}"
        if of in both[0]:
            texts = _told_apart(both, of)
            lines += zip(("expected", "got"), (f"{what} = {text}" for text in texts), strict=True)
    return "\n".join(f"  {word:<8}  {text}" for word, text in lines)


def _shown(arguments: dict[str, object]) -> dict[str, str]:
    """All arguments, with more digits if two that differ look the same with few."""
    few, many = ({name: show(x, n) for name, x in arguments.items()} for n in (4, 9))
    return few if len({*few.values()}) == len({*many.values()}) else many


def _told_apart(both: list[dict[str, object]], name: str) -> list[str]:
    """A value of both, with more digits if they look the same with few."""
    few, many = ([show(x[name], n) if name in x else "nothing" for x in both] for n in (4, 9))
    return few if few[0] != few[1] else many


def show(value: object, digits: int = 4) -> str:
    """A value as short as it can be read: tensors as lists of rounded numbers."""
    if isinstance(value, Tensor):
        kind = "" if value.dtype in (torch.float32, torch.int64, torch.bool) else f" {value.dtype}"
        return show(value.tolist(), digits) + kind.replace("torch.", "")
    if isinstance(value, list):
        return f"[{', '.join(show(item, digits) for item in value)}]"
    if not isinstance(value, float):
        return repr(value)
    text = f"{value:.{digits}g}"
    return text if set(text) & set(".en") else f"{text}.0"


def differences(trial: Trial, seen: Observation) -> list[str]:
    """What is wrong on a trial, by the names of outputs, gradients, arguments; [] if nothing is."""
    expected = trial.expected
    if seen.raised is not None or expected.raised is not None:
        reasons = [(type(x.raised), getattr(x.raised, "reason", None)) for x in (expected, seen)]
        return [] if reasons[0] == reasons[1] else ["error"]
    close = trial.rtol, trial.atol
    names = [
        name
        for name, value in expected.outputs.items()
        if name not in seen.outputs or not same(seen.outputs[name], value, *close)
    ]
    names += [
        f"gradient {name}"
        for name, value in expected.gradient.items()
        if not same(seen.gradient[name], value, *close)
    ]
    extra = list(seen.outputs.keys() - expected.outputs.keys())
    odd = [*seen.mutated, *(n for n in seen.attached if n not in expected.attached)]
    return names or extra or odd


def _outcome(seen: Observation) -> str:
    if seen.raised is None:
        return ", ".join(f"{name} = {show(value)}" for name, value in seen.outputs.items())
    reason = getattr(seen.raised, "reason", None)
    return f"{type(seen.raised).__name__}" + (f" with reason {reason!r}" if reason else "")


def _error(fn: Callable, trial: Trial, seen: Observation) -> str:
    if trial.expected.raised is not None:
        wanted = _outcome(trial.expected)
        got = f"raises {_outcome(seen)}" if seen.raised is not None else "accepts it"
        return f"this input has to raise {wanted}; yours {got}"
    if seen.raised is None:
        return ""
    where = own_line(fn, seen.raised)
    line = f" in its line {where[0]}, `{where[1]}`" if where else ""
    text = " ".join(str(seen.raised).split())
    return f"it raises {type(seen.raised).__name__}{line}: {text[:300].rstrip('.')}"


def _change(trial: Trial, seen: Observation) -> str:
    if not seen.mutated:
        return ""
    names, first = "`, `".join(seen.mutated), trial.arguments[seen.mutated[0]]
    what, kind = ("arguments" if seen.mutated[1:] else "argument"), type(first).__name__.lower()
    return f"it changes its {what} `{names}` in place; make a new {kind} instead"


def _form(trial: Trial, seen: Observation) -> str:
    """A wrong number, type, shape or dtype of the outputs."""
    expected, got = trial.expected.outputs, seen.outputs
    if expected.keys() != got.keys():
        named = [", ".join(found) for found in (expected, got)]
        return f"it has to return {named[0]}; yours returns {named[1] or 'nothing'}"
    for name, value in expected.items():
        if got[name] is None:
            return f"`{name}` is None; a return may be missing"
        if isinstance(value, Tensor) != isinstance(got[name], Tensor):
            kinds = [type(x).__name__ for x in (value, got[name])]
            return f"`{name}` has to be a {kinds[0]}, yours is a {kinds[1]}"
        for what in ("shape", "dtype") if isinstance(value, Tensor) else ():
            wanted, has = getattr(value, what), getattr(got[name], what)
            if wanted != has:
                wanted, has = (str(tuple(x) if what == "shape" else x) for x in (wanted, has))
                text = f"`{name}` has {what} {has}, it has to be {wanted}"
                return text.replace("torch.", "")
    return ""


def _gradient(trial: Trial, seen: Observation) -> str:
    wanted = trial.expected.gradient
    missing = [n for n, g in seen.gradient.items() if g is None and wanted[n] is not None]
    if missing:
        return f"no gradient reaches `{'`, `'.join(missing)}`: something detaches it on the way"
    if extra := [name for name in seen.attached if name not in trial.expected.attached]:
        names = "`, `".join(extra)
        return f"`{names}` still carries a gradient; what is only looked at is detached"
    return ""


def _pattern(pairs: Pairs) -> str:
    """What a wrong first output has in common over all plain inputs."""
    name = next(iter(pairs[0][0].expected.outputs), None)
    if any(name not in x.outputs for pair in pairs for x in (pair[0].expected, pair[1])):
        return ""
    if not any(name in differences(*pair) for pair in pairs):
        return ""
    wanted, got = [t.expected.outputs[name] for t, _ in pairs], [s.outputs[name] for _, s in pairs]
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in (*wanted, *got)):
        return ""
    for argument in pairs[0][0].arguments:
        given = [t.arguments.get(argument) for t, _ in pairs]
        if all(same(x, g, 0, 0) for x, g in zip(given, got, strict=True)):
            return f"it hands back its argument `{argument}` as it is"
    values = torch.cat([g.flatten() for g in got])
    if len(pairs) > 1 and values.numel() > 1 and bool((values == values[0]).all()):
        return f"`{name}` is {show(values[0].item())} whatever the input is"
    return _factor(name, torch.cat([w.flatten() for w in wanted]), values)


def _factor(name: str, wanted: Tensor, got: Tensor) -> str:
    """Whether the numbers are right but for a factor."""
    if wanted.shape != got.shape or not bool(wanted.any()):
        return ""
    place = wanted.nan_to_num().abs().argmax()
    factor = got[place] / wanted[place]
    if show(factor.item()) == "1.0" or not same(wanted * factor, got, 1e-4, 1e-6):
        return ""
    times = f"{show(factor.item())} times what it has to be"
    return f"`{name}` {'has the wrong sign' if factor == -1 else f'is {times}'}, everywhere"


def _numbers(trial: Trial, seen: Observation) -> str:
    wrong = differences(trial, seen)[0]
    name = wrong.removeprefix("gradient ")
    got, wanted = (x.outputs if wrong == name else x.gradient for x in (seen, trial.expected))
    got, wanted = got[name], wanted[name]
    what = f"`{name}`" if wrong == name else f"the gradient with respect to `{name}`"
    is_float = isinstance(got, Tensor) and got.is_floating_point()
    if is_float and bool((got.isnan() & ~wanted.isnan()).any()):
        return NAN_THROUGH if trial.kind == "masked" else f"{what} has NaN where a number belongs"
    return f"{what} is not what it has to be"
