"""docs/errata.md and docs/symbols.md: what they refer to is there, and prints what they quote."""

import importlib
import re
from functools import cache
from operator import attrgetter
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.stem[:2]: path for path in sorted((ROOT / "notebooks" / "src").glob("*.py"))}
if not (ROOT / "docs").is_dir():
    pytest.skip("docs/ is not here: these tests need a checkout", allow_module_level=True)

ERRATA = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
SYMBOLS = (ROOT / "docs" / "symbols.md").read_text(encoding="utf-8")
ENTRIES = re.split(r"^### ", ERRATA, flags=re.MULTILINE)[1:]
SHOWN = re.compile(
    r"""\[(?P<number>\d\d)\]\(\.\./notebooks/(?P<name>\w+)\.ipynb\),\s+"(?P<section>[^"]+)"
    (?:,\s+`(?P<words>[^`]+)`)?""",
    re.VERBOSE,
)
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in SYMBOLS.splitlines()
    if line.startswith("| ") and not line.startswith("| symbol ")
]


@cache
def cells(name: str) -> list[tuple[str, object]]:
    """(section, code cell) of a built notebook; a section is what follows a heading."""
    section, found = "", []
    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            found.append((section, cell))
        elif headings := re.findall(r"^## (.+)$", cell.source, re.MULTILINE):
            section = headings[-1]
    return found


def printed(cell) -> str:
    """What a cell prints."""
    return "".join(output.get("text", "") for output in cell.outputs)


# --- errata.md ----------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.splitlines()[0])
def test_an_entry_says_what_is_printed_and_meant_and_where_it_is_shown(entry):
    assert [entry.count(f"\n- {part}: ") for part in ("Printed", "Meant")] == [1, 1]
    _, *shown = entry.split("\n- Shown: ")
    assert shown
    for text in shown:
        check_shown(text)


def check_shown(text: str) -> None:
    """The notebook, the section and the cell are there, and the cell prints what is quoted."""
    place = SHOWN.match(text)
    assert place, f'not [NN](../notebooks/NAME.ipynb), "section", `words`: {text[:90]}'
    name, section = place["name"], place["section"]
    source = SOURCES[place["number"]]
    assert source.stem == name
    headings = re.findall(r"^# ## (.+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert section in headings, f"{name} has no section {section!r}"
    quoted = re.findall(r"^      (.+)$", text, re.MULTILINE)
    if place["words"] is None:
        assert not quoted and "no number" in text
        return
    there = [cell for where, cell in cells(name) if where == section]
    outputs = [printed(cell) for cell in there if cell.source.startswith(place["words"])]
    assert len(outputs) == 1, f"{len(outputs)} cells begin with {place['words']!r} in {section!r}"
    assert quoted and set(quoted) <= {line.rstrip() for line in outputs[0].splitlines()}


# --- symbols.md ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[3]}")
def test_what_makes_a_symbol_can_be_imported_and_its_notebooks_use_it(row):
    _, name, shape, made_by, notebooks, chinese = row
    thing = resolve(made_by.strip("`"))
    assert thing is not None and shape and chinese
    words = [*re.findall(r"`(\w+)`", name), made_by.strip("`").split(".")[-1]]
    for number in notebooks.split():
        used = set(re.findall(r"\w+", SOURCES[number].read_text(encoding="utf-8")))
        assert used & set(words), f"notebook {number} uses none of {words}"


def resolve(path: str):
    """What a dotted path below minippo (or of torch) stands for; an error if there is nothing."""
    path = path if path.startswith("torch.") else f"minippo.{path}"
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return attrgetter(".".join(parts[cut:]))(module)
    raise ModuleNotFoundError(path)


def test_one_row_an_idea():
    keys = [(row[0], row[1], row[3]) for row in ROWS]
    assert len(ROWS) > 50 and len(set(keys)) == len(keys)


@pytest.mark.parametrize("number", SOURCES)
def test_every_function_of_a_lessons_table_of_symbols_is_in_the_list(number):
    made = {row[3].strip("`").split(".")[-1] for row in ROWS}
    made |= {row[3].strip("`").split(".")[-2] for row in ROWS}  # RewardModel.forward
    for name in functions_of_tables(SOURCES[number].read_text(encoding="utf-8")):
        assert name in made, f"{name} is in the table of notebook {number} and not in symbols.md"


def functions_of_tables(text: str) -> set[str]:
    """The functions in the column "function" of a lesson's tables."""
    found, column = set(), None
    for line in text.splitlines():
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if not line.startswith("# |"):
            column = None
        elif "function" in row:
            column = row.index("function")
        elif column is not None:
            found |= {n.split(".")[-1] for n in re.findall(r"`([\w.]+)`", row[column])}
    return found - {"score_fn", "margin", "logprobs"}  # an argument; fields of dataclasses
