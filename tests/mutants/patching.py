"""Puts a wrong version of one function in the place of the right one, in this process.

The function object stays, only its code is exchanged. So every copy that `from module import
function` made, every table and every parametrized test that holds the function runs the wrong
version, and nothing has to be imported again.
"""

import ast
import importlib
import inspect
from contextlib import contextmanager
from types import CodeType, FunctionType


class NotApplicable(ValueError):
    """A variant that no longer fits the code: its function or its fragment is not there."""


@contextmanager
def applied(module: str, name: str, old: str, new: str):
    """Within the block `minippo.MODULE.NAME` has the fragment `old` replaced by `new`.

    name: a function, or `Class.method`
    Raises NotApplicable if module or function is not there, `old` does not stand in it exactly once
    (the docstring is not searched), or the result is no valid Python.
    """
    try:
        loaded = importlib.import_module(f"minippo.{module}")
    except ModuleNotFoundError as error:
        raise NotApplicable(f"minippo has no module {module}") from error
    function = find_function(loaded, name)
    before = function.__code__, function.__defaults__, function.__kwdefaults__
    after = wrong_version(function, inspect.getsource(loaded), loaded.__file__, name, old, new)
    function.__code__, function.__defaults__, function.__kwdefaults__ = after
    try:
        yield function
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = before


def find_function(module, name: str) -> FunctionType:
    """The plain function behind a name, without class method, decorator or wrapper around it."""
    owner, _, last = name.rpartition(".")
    try:
        place = getattr(module, owner) if owner else module
        found = inspect.getattr_static(place, last)
    except AttributeError:
        raise NotApplicable(f"{module.__name__} has no {name}") from None
    return inspect.unwrap(getattr(found, "__func__", found))


def wrong_version(function, source: str, file: str, name: str, old: str, new: str) -> tuple:
    """Code, defaults and keyword defaults of the function after the change."""
    where = f"{function.__module__}.{name}"
    changed = changed_source(source, where, name, old, new)
    try:
        code = find_code(compile(changed, file, "exec"), function.__code__.co_qualname)
    except SyntaxError as error:
        raise NotApplicable(f"{where}: {new!r} is no valid Python here: {error}") from None
    if code.co_freevars != function.__code__.co_freevars:
        raise NotApplicable(
            f"{where}: {new!r} uses names of an outer function that {old!r} does not"
        )
    arguments = find_node(ast.parse(changed), name).args
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    keywords = {key.arg: evaluated(value, function) for key, value in pairs if value is not None}
    defaults = tuple(evaluated(value, function) for value in arguments.defaults)
    return code, defaults or None, keywords or None


def changed_source(source: str, where: str, name: str, old: str, new: str) -> str:
    """The module's source with the one fragment replaced, in this function only."""
    node = find_node(ast.parse(source), name)
    if node is None:
        raise NotApplicable(f"{where} is not in the source of its module")
    lines = source.splitlines(keepends=True)
    documented = ast.get_docstring(node, clean=False) is not None
    begin = node.lineno - 1
    skip = (node.body[0].lineno - 1, node.body[0].end_lineno) if documented else (begin, begin)
    bounds = (0, begin, *skip, node.end_lineno, len(lines))
    parts = ["".join(lines[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    count = parts[1].count(old) + parts[3].count(old)  # before and after the docstring
    if count != 1:
        raise NotApplicable(f"{where}: {old!r} stands in it {count} times, not once")
    parts[1], parts[3] = (part.replace(old, new) for part in (parts[1], parts[3]))
    return "".join(parts)


def find_node(tree: ast.Module, name: str):
    """The `def` of a function or method, None if there is none."""
    node = tree
    for part in name.split("."):
        named = [n for n in node.body if getattr(n, "name", None) == part]
        if not named:
            return None
        node = named[0]
    return node


def find_code(code: CodeType, name: str) -> CodeType | None:
    """The code object of that qualified name inside the compiled module."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    matches = [const for const in inner if const.co_qualname == name]
    deeper = (find_code(const, name) for const in inner)
    return matches[0] if matches else next((found for found in deeper if found), None)


def evaluated(node: ast.expr, function):
    """The value of a default, with the names of the function's own module."""
    return eval(compile(ast.Expression(node), "<default>", "eval"), function.__globals__)
