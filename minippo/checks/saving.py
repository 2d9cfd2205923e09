"""The student's own file: the functions that passed their check, one section each.

It is my_minippo.py in the current folder; MINIPPO_MINE names another file, or is "off". A section
stands alone (its imports, constants and helpers are in it), so that one that was edited and is
wrong takes no other down with it.
"""

import linecache
import os
import re
from collections.abc import Callable
from pathlib import Path

from minippo.checks.source import NotCarried, standing_alone
from minippo.engine.files import write_file

VARIABLE = "MINIPPO_MINE"
HEADER = '''"""The functions you wrote, as they passed the checks of minippo.

`minippo.checks.mine("gae")` takes the section gae from here, checks it again and hands it back. A
section is replaced when you solve it again; delete it to go back to minippo's own function.
"""
'''
MARKER = re.compile(r"^# --- (\w+) -{3,}$\n?", re.MULTILINE)


def mine_path() -> Path | None:
    """The student's file; None if it is switched off."""
    value = os.environ.get(VARIABLE, "my_minippo.py")
    return None if value == "off" else Path(value)


def sections() -> dict[str, str]:
    """{name of a function: its section} of the student's file; empty if there is none.

    Raises ValueError if the file cannot be read as text.
    """
    path = mine_path()
    if path is None or not path.exists():
        return {}
    try:
        parts = MARKER.split(path.read_text(encoding="utf-8"))[1:]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); move it away") from error
    return {name: text.strip() + "\n" for name, text in zip(parts[::2], parts[1::2], strict=True)}


def save(name: str, fn: Callable) -> str:
    """Writes a function to the student's file; the sentence that says so, or why not."""
    path = mine_path()
    if path is None:
        return ""
    try:
        section = standing_alone(fn)
        if fn.__name__ != name:
            section += f"\n\n{name} = {fn.__name__}\n"
        found = sections() | {name: section}
        texts = [f"# --- {key} {'-' * (70 - len(key))}\n{text}" for key, text in found.items()]
        write_file(path, "\n\n".join([HEADER, *texts]).encode())
    except NotCarried as reason:
        return f"Not saved: {reason}."
    except ValueError as error:
        return f"Not saved: {error}."
    return f"Saved to {path}."


def load(name: str, section: str) -> Callable:
    """The function of a section, run in a namespace of its own; raises what the section raises."""
    place = f"<{mine_path()}: {name}>"
    namespace = {"__name__": "my_minippo"}
    # So that its source is found again, and an error shows its line.
    linecache.cache[place] = (len(section), None, section.splitlines(keepends=True), place)
    exec(compile(section, place, "exec"), namespace)
    return namespace[name]
