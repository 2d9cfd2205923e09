"""A documented shape is an executed one.

Every public formula names its shapes in its docstring. They are read here, each axis letter is
given its own number (mostly primes, so that a transposed axis cannot pass), the formula is called,
and what comes back is compared with what the docstring says.

    name: (B, R) bool   an argument: a shape, then float (if nothing is said), int or bool
    name: float ...     a plain Python number
    returns: (B, R)     one tensor; `a (B, R), b (B, R)` a tuple; `{"key": ()}` a dict, last in
                        the tuple; after a semicolon `(B,) with dim=1` is a further call
"""

import importlib
import inspect
import re
from collections import Counter

import pytest
import torch

EMPTY = inspect.Parameter.empty
MODULES = ["masking", "logprobs", "kl", "rewards", "advantages", "losses"]
AXES = {"B": 2, "K": 3, "R": 5, "V": 7, "Q": 11, "H": 13, "T": 16}
NUMBERS = {"response_length": AXES["R"], "batch_size": AXES["B"], "clip_range": 0.2}
DTYPES = {"": torch.float32, "int": torch.int64, "bool": torch.bool}
SHAPE = r"\((?:(?:[A-Z]|\.\.\.)(?:, ?(?:[A-Z]|\.\.\.))*,?)?\)"
ARGUMENT = re.compile(rf"^(\w+): +(?:({SHAPE})(?: (int|bool)\b)?|(int|float|bool)\b)")
VARIANT = re.compile(rf"^({SHAPE})(?: (int|bool))? with (\w+)=(\w+)")


class NoShapes(ValueError):
    """A public formula whose docstring does not give the shape of an argument or of the result."""


def formulas():
    for name in MODULES:
        module = importlib.import_module(f"minippo.{name}")
        for function in vars(module).values():
            public = inspect.isfunction(function) and not function.__name__.startswith("_")
            if public and function.__module__ == module.__name__:
                yield function


FORMULAS = pytest.mark.parametrize(
    "function", list(formulas()), ids=lambda function: function.__name__
)


def axes(shape: str, rest: tuple[int, ...] = ()) -> tuple[int, ...]:
    """`(B, R)` -> (2, 5); `...` stands for the axes in `rest`."""
    names = re.findall(r"[A-Z]|\.\.\.", shape)
    return tuple(size for name in names for size in (rest if name == "..." else (AXES[name],)))


def read_docstring(function) -> tuple[dict[str, tuple], str]:
    """({argument: (shape or None, dtype)}, text of the returns)."""
    body, separator, _ = (inspect.getdoc(function) or "").partition("\nSource:")
    before, found, returns = body.rpartition("\nreturns:")  # an argument may be called returns too
    matches = [ARGUMENT.match(line) for line in before.splitlines()]
    arguments = {m[1]: (m[2], DTYPES[m[3] or ""]) for m in matches if m}
    missing = set(inspect.signature(function).parameters) - set(arguments)
    if missing or not found or not separator or not re.search(SHAPE, returns):
        what = sorted(missing) or "returns, or no Source"
        raise NoShapes(f"{function.__name__}: no shape of {what}")
    return arguments, " ".join(returns.split())


def make_argument(name: str, shape: str | None, dtype: torch.dtype, rest: tuple[int, ...]):
    if shape is None:
        return NUMBERS.get(name, 0.5)
    size = axes(shape, rest)
    if dtype == torch.bool:
        return torch.ones(size, dtype=torch.bool)
    return torch.randint(0, AXES["V"], size) if dtype == torch.int64 else torch.rand(size)


def documented(returns: str, rest: tuple[int, ...]):
    """The nested shapes and dtypes of what the docstring says comes back."""
    main = returns.split(";")[0]
    entries = re.findall(rf'"(\w+)": ({SHAPE})', main)
    tensors = re.findall(rf"({SHAPE})(?: (int|bool)\b)?", re.sub(r"\{.*\}", "", main))
    shapes = [(axes(shape, rest), DTYPES[dtype]) for shape, dtype in tensors]
    if entries:
        shapes.append({name: (axes(shape, rest), torch.float32) for name, shape in entries})
    return shapes[0] if len(shapes) == 1 else tuple(shapes)


def returned(value):
    if isinstance(value, dict):
        return {name: returned(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(returned(entry) for entry in value)
    return tuple(value.shape), value.dtype


def calls(function, arguments: dict, rest: tuple[int, ...] = ()):
    """What comes back from the required arguments alone, and with every tensor argument."""
    parameters = inspect.signature(function).parameters
    required = {name for name in parameters if parameters[name].default is EMPTY}
    with_tensors = required | {name for name in parameters if arguments[name][0]}
    for names in (required, with_tensors):
        given = {name: make_argument(name, *arguments[name], rest) for name in names}
        yield returned(function(**given))


@FORMULAS
def test_documented_shapes_are_what_comes_back(function):
    arguments, returns = read_docstring(function)
    for rest in [(), (13,), (13, 2)] if "..." in returns else [()]:
        for result in calls(function, arguments, rest):
            assert result == documented(returns, rest)


def with_one_axis_wrong(arguments: dict, returns: str):
    """(what is wrong, arguments, returns), once for every axis that two places must agree on.

    H stands for the wrong axis: no formula has it. A letter that the docstring names only once is
    free: a loss over (B, K) scores takes any B.
    """
    main = returns.split(";")[0]
    shapes = [*re.findall(SHAPE, main), *(shape or "" for shape, _ in arguments.values())]
    letters = Counter(re.findall("[A-Z]", "".join(shapes)))
    for name, (shape, dtype) in arguments.items():
        for found in re.finditer("[A-Z]", shape or ""):
            wrong = f"{shape[: found.start()]}H{shape[found.end() :]}"
            if letters[found[0]] > 1:
                yield f"{name}: {wrong}", {**arguments, name: (wrong, dtype)}, returns
    for found in re.finditer(SHAPE, main):
        wrong = "(H,)" if found[0] == "()" else re.sub("[A-Z]", "H", found[0], count=1)
        yield f"returns: {wrong}", arguments, f"{main[: found.start()]}{wrong}{main[found.end() :]}"


def agrees(function, arguments: dict, returns: str) -> bool:
    try:
        return all(result == documented(returns, ()) for result in calls(function, arguments))
    except (RuntimeError, IndexError):  # torch refuses tensors that do not fit together
        return False


@FORMULAS
def test_one_wrong_axis_in_a_docstring_is_noticed(function, monkeypatch):
    wrong = list(with_one_axis_wrong(*read_docstring(function)))
    assert wrong
    for size in (13, 1):  # torch.gather takes an input that is too large, others broadcast a 1
        monkeypatch.setitem(AXES, "H", size)
        wrong = [case for case in wrong if agrees(function, *case[1:])]
    assert not [what for what, *_ in wrong]


@FORMULAS
def test_no_formula_reads_its_data_on_the_host(function):
    # Meta tensors have shapes and no data: .item(), bool(x), x[mask] or a check of values raise.
    arguments, returns = read_docstring(function)
    given = {name: make_argument(name, *arguments[name], ()) for name in arguments}
    given = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in given.items()}
    given.pop("dim", None)
    assert returned(function(**given)) == documented(returns, ())


@FORMULAS
def test_documented_variants_are_what_comes_back(function):
    arguments, returns = read_docstring(function)
    variants = [VARIANT.match(part.strip()) for part in returns.split(";")[1:]]
    for shape, dtype, name, value in (m.groups() for m in variants if m):
        given = {
            key: make_argument(key, *arguments[key], ())
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.default is EMPTY
        }
        result = function(**given, **{name: int(value)})
        assert returned(result) == (axes(shape), DTYPES[dtype or ""])


@FORMULAS
def test_docstring_has_the_parts_in_order(function):
    lines = inspect.getdoc(function).splitlines()
    assert len(lines[0]) <= 80 and lines[0].endswith(".") and lines[1] == ""
    formula = lines[2 : lines.index("", 2)]
    assert any("=" in line for line in formula), "no formula after the sentence"
    names = [m[1] for m in map(ARGUMENT.match, lines) if m]
    parameters = list(inspect.signature(function).parameters)
    assert names[: len(parameters)] == parameters


def test_every_formula_of_the_design_is_found():
    assert {function.__name__ for function in formulas()} == {
        "masked_mean",
        "masked_var",
        "masked_whiten",
        "response_mask",
        "position_ids",
        "response_window",
        "gather_logprobs",
        "entropy_from_logits",
        "kl_k1",
        "kl_abs",
        "kl_k2",
        "kl_k3",
        "kl_full",
        "adapt_kl_coef",
        "per_token_rewards",
        "penalize_missing_eos",
        "standardize_scores",
        "prompt_values",
        "simple_advantages",
        "gae",
        "lm_loss",
        "preference_loss",
        "ranking_loss",
        "policy_loss",
        "value_loss",
        "ppo_objective",
    }


def no_docstring(x):
    return x


def no_shape_of_y(x, y):
    """Add.

    x + y

    x: (B, R)  a number
    y: something
    returns: (B, R)
    Source: none
    """
    return x + y


def no_shape_of_the_result(x):
    """Copy.

    y = x

    x: (B, R)  a number
    returns: the same again
    Source: none
    """
    return x


@pytest.mark.parametrize("function", [no_docstring, no_shape_of_y, no_shape_of_the_result])
def test_a_formula_without_documented_shapes_is_refused(function):
    with pytest.raises(NoShapes, match=function.__name__):
        read_docstring(function)


def says_the_wrong_shape(x):
    """Transpose.

    y = xᵀ

    x: (B, R)  a matrix
    returns: (B, R)
    Source: none
    """
    return x.T


def test_a_wrong_shape_in_a_docstring_is_noticed():
    arguments, returns = read_docstring(says_the_wrong_shape)
    result = says_the_wrong_shape(make_argument("x", *arguments["x"], ()))
    assert returned(result) != documented(returns, ())
