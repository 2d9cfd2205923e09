"""Reading a student's function: is it written, whom does it call, and what does it need to run."""

import ast
import importlib
import inspect
import re
import symtable
import textwrap
from collections.abc import Callable
from types import CodeType, ModuleType

from minippo.checks.observing import Observation

STUB_MARKER = "write this, then run the next cell"  # what an exercise has in place of a solution
HOMES = ("torch", "torch.nn.functional", "math", "builtins")  # of functions that name no module


class NotCarried(ValueError):
    """A function cannot stand alone in a file; the text says why and what helps."""


def is_stub(fn: Callable, seen: Observation) -> bool:
    """Whether nothing has been written yet: it raises NotImplementedError, or gives nothing."""
    if isinstance(seen.raised, NotImplementedError):
        return _raised_itself(fn, seen.raised)
    if seen.raised is not None or next(iter(seen.outputs.values()), 0) is not None:
        return False
    try:
        text = source_of(fn)
    except NotCarried:
        return False
    return STUB_MARKER in text or all(map(_is_idle, ast.parse(text).body[0].body))


def _raised_itself(fn: Callable, error: BaseException) -> bool:
    """Whether an exception comes out of the function, and not out of what it calls."""
    frame = inspect.getinnerframes(error.__traceback__)[-1].frame
    return frame.f_code is getattr(inspect.unwrap(fn), "__code__", None)


def _is_idle(step: ast.stmt) -> bool:
    """A docstring, `...`, pass, or a return of nothing."""
    value = getattr(step, "value", None)
    nothing = value is None or (isinstance(value, ast.Constant) and value.value is None)
    is_constant = isinstance(step, ast.Expr) and isinstance(value, ast.Constant)
    return isinstance(step, ast.Pass) or is_constant or (isinstance(step, ast.Return) and nothing)


def own_line(fn: Callable, error: BaseException) -> tuple[int, str] | None:
    """Where an exception left the student's code: the line, counted from the def, and its text.

    None if the error came out of something that the code called without being in that file.
    """
    code = getattr(inspect.unwrap(fn), "__code__", None)
    frames = inspect.getinnerframes(error.__traceback__) if code else []
    own = [frame for frame in frames if frame.filename == code.co_filename]
    if not own:
        return None
    text = own[-1].code_context[own[-1].index].strip() if own[-1].code_context else ""
    return own[-1].lineno - code.co_firstlineno + 1, text


def borrows(fn: Callable, name: str, reference: Callable) -> bool:
    """Whether a function hands its work to minippo's function of the same name."""
    code = getattr(inspect.unwrap(fn), "__code__", None)
    names = _names(code) if code else set()
    known = {n: fn.__globals__[n] for n in names if n in getattr(fn, "__globals__", {})}
    if any(value is reference for value in known.values()):
        return True
    modules = {value.__name__ for value in known.values() if isinstance(value, ModuleType)}
    return name in names and any(n.split(".")[0] == "minippo" for n in names | modules)


def _names(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def source_of(fn: Callable) -> str:
    """The source of a function that is written with def."""
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(fn)))
        steps = ast.parse(text).body
    except (OSError, TypeError, SyntaxError) as error:
        raise NotCarried("its source cannot be found; write it with def in a cell") from error
    if len(steps) != 1 or not isinstance(steps[0], ast.FunctionDef):
        raise NotCarried("it has no source of its own; write it with def")
    return text.rstrip() + "\n"


def standing_alone(fn: Callable) -> str:
    """The source of a function after the imports, constants and helpers that it needs.

    Raises NotCarried where it uses something of the notebook that has no source.
    """
    imports, sources = {}, {}
    _gather(fn, imports, sources)
    constants = [text for text in sources.values() if not text.startswith(("def ", "@"))]
    functions = [text for text in sources.values() if text.startswith(("def ", "@"))]
    head = "\n".join([*sorted(set(imports.values())), *constants])
    return "\n\n\n".join(part.strip() for part in (head, *functions) if part.strip()) + "\n"


def _gather(fn: Callable, imports: dict[str, str], sources: dict[str, str]) -> None:
    """Fills in what a function needs, by name; what it calls comes before it."""
    fn = inspect.unwrap(fn)
    if fn.__closure__:
        inner = ", ".join(fn.__code__.co_freevars)
        raise NotCarried(f"it uses {inner} of the function around it; pass it as an argument")
    text = source_of(fn)
    place = fn.__module__
    sources[fn.__name__] = ""  # so that a function that calls itself ends
    for name in sorted(global_names(text) & fn.__globals__.keys()):
        value = fn.__globals__[name]
        if name in imports or name in sources:
            continue
        if line := import_line(name, value, place):
            imports[name] = line
        elif inspect.isfunction(value) and value.__name__ == name:
            _gather(value, imports, sources)
        else:
            sources[name] = _constant(name, value, imports)
    del sources[fn.__name__]
    sources[fn.__name__] = text


def global_names(text: str) -> set[str]:
    """The names that a piece of source takes from outside, its annotations included."""
    top = symtable.symtable(text, "source", "exec")
    tables, names = [top], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        names |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and _is_outer(s)}
    return names


def _is_outer(symbol: symtable.Symbol) -> bool:
    return symbol.is_global() or not (symbol.is_local() or symbol.is_free())


def import_line(name: str, value: object, place: str) -> str:
    """The import that gives a name its value; empty if it is of the notebook `place` itself."""
    if isinstance(value, ModuleType):
        whole = value.__name__
        return f"import {whole}" if whole == name else f"import {whole} as {name}"
    origin = getattr(value, "__qualname__", getattr(value, "__name__", None))
    if origin is None:
        return ""
    for home in (getattr(value, "__module__", None), *HOMES):
        if home and home not in (place, "__main__") and _holds(home, origin, value):
            return f"from {home} import {origin}" + (f" as {name}" if origin != name else "")
    return ""


def _holds(home: str, origin: str, value: object) -> bool:
    try:
        return getattr(importlib.import_module(home), origin, None) is value
    except ImportError:
        return False


def _constant(name: str, value: object, imports: dict[str, str]) -> str:
    if isinstance(value, re.Pattern):
        imports["re"] = "import re"
        return f"{name} = re.compile({value.pattern!r}, {value.flags})"
    try:
        if ast.literal_eval(repr(value)) == value:
            return f"{name} = {value!r}"
    except (ValueError, SyntaxError, TypeError):
        what = type(value).__name__
    else:
        what = type(value).__name__
    raise NotCarried(f"it uses {name} ({what}) of the notebook; make it inside the function")
