"""The builder of the notebooks: what it takes out for students, and what it calls stale."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "notebooks" / "build.py"
if not SCRIPT.exists():
    pytest.skip("notebooks/build.py is not here (an installed minippo)", allow_module_level=True)
spec = importlib.util.spec_from_file_location("build_notebooks", SCRIPT)
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)

SOURCE = '''\
# %% [markdown]
# # Doubling

# %%
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    y = x + x
    return y
    ### END SOLUTION

# %% tags=["solution"]
assert double(2) == 4

# %%
print("the end")
'''
PLAIN = "# %%\nprint(1)\n\n# %%\nprint(1)\n"


@pytest.fixture
def folder(tmp_path):
    """A folder of notebooks with one source that has an exercise."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "01_double.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def built(folder, monkeypatch):
    """The same folder after a build whose kernel is replaced by one that only counts cells."""

    def count_cells(notebook, folder, name):
        for number, cell in enumerate(builder.code_cells(notebook), start=1):
            cell.execution_count = number
        return notebook

    monkeypatch.setattr(builder, "execute", count_cells)
    assert builder.main([], folder) == 0
    return folder


def sources_of(path):
    """The sources of the cells of a notebook file, read as plain JSON."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells]


def test_a_region_becomes_one_stub_at_its_own_indentation():
    region = "        ### BEGIN SOLUTION\n        a\n        ### END SOLUTION"
    source = f"def f(x):\n    if x:\n{region}\n    b"
    stub = 'raise NotImplementedError("write this, then run the next cell")'
    assert builder.without_solutions(source) == f"def f(x):\n    if x:\n        {stub}\n    b"


def test_two_regions_of_one_cell_become_two_stubs():
    region = "    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    stubbed = builder.without_solutions(f"def f():\n{region}\ndef g():\n{region}")
    assert stubbed.count("raise NotImplementedError") == 2 and "return 1" not in stubbed


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f():\n    ### BEGIN SOLUTION\n    return 1", "without '### END SOLUTION'"),
        ("def f():\n    return 1\n    ### END SOLUTION", "does not pair up"),
        ("def f():\n    ### BEGIN SOLUTION\n    ### BEGIN SOLUTION", "does not pair up"),
        ("### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "inside a function"),
    ],
)
def test_a_region_that_cannot_be_taken_out_is_refused(source, said):
    with pytest.raises(ValueError, match=said):
        builder.without_solutions(source)


def test_the_students_copy_has_neither_solutions_nor_outputs(built):
    cells = sources_of(built / "exercises" / "01_double.ipynb")
    assert cells == [
        "# Doubling",
        'def double(x):\n    """Twice x."""\n    ' + builder.STUB,
        'print("the end")',
    ]


def test_a_source_without_regions_has_no_exercises_copy(built):
    (built / "src" / "01_double.py").write_text(PLAIN, encoding="utf-8")
    assert builder.main([], built) == 0
    assert not (built / "exercises" / "01_double.ipynb").exists()
    assert builder.main(["--check"], built) == 0


def test_ids_are_unique_and_the_same_in_every_reading(tmp_path):
    (tmp_path / "00_plain.py").write_text(PLAIN, encoding="utf-8")
    first, again = (builder.read_source(tmp_path / "00_plain.py") for _ in range(2))
    ids = [cell.id for cell in first.cells]
    assert len(set(ids)) == 2 and ids == [cell.id for cell in again.cells]


def test_check_passes_on_what_was_just_built(built, capsys):
    assert builder.main(["--check"], built) == 0
    assert "up to date" in capsys.readouterr().out


def test_check_names_both_files_and_the_remedy_when_the_source_changed(built, capsys):
    source = built / "src" / "01_double.py"
    source.write_text(SOURCE.replace("Twice", "Two times"), encoding="utf-8")
    assert builder.main(["--check"], built) == 1
    said = capsys.readouterr().out
    assert "01_double.ipynb differs from its source in cell 1" in said
    assert "exercises/01_double.ipynb is not what the source gives" in said
    assert "python notebooks/build.py --only 01_double" in said


def test_check_of_a_changed_solution_leaves_the_students_copy_alone(built, capsys):
    source = built / "src" / "01_double.py"
    source.write_text(SOURCE.replace("x + x", "2 * x"), encoding="utf-8")
    assert builder.main(["--check"], built) == 1
    said = capsys.readouterr().out
    assert "01_double.ipynb differs" in said and "exercises/" not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda nb: nb["cells"][1].update(execution_count=None), "never run: cell 1"),
        (lambda nb: nb["cells"][1]["metadata"].update(tags=["x"]), "differs from its source"),
        (lambda nb: nb["cells"][2].update(id="other"), "differs from its source in cell 2"),
        (lambda nb: nb["cells"].pop(), "has 3 cells, its source 4"),
    ],
)
def test_check_sees_a_notebook_changed_by_hand(built, capsys, change, said):
    path = built / "01_double.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    change(notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert builder.main(["--check"], built) == 1
    assert said in capsys.readouterr().out


def test_check_sees_an_exercise_changed_by_hand(built, capsys):
    path = built / "exercises" / "01_double.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("the end", "x"), encoding="utf-8")
    assert builder.main(["--check"], built) == 1
    assert "exercises/01_double.ipynb" in capsys.readouterr().out


def test_check_sees_a_source_never_built_and_a_notebook_without_source(built, capsys):
    (built / "src" / "01_double.py").rename(built / "src" / "02_double.py")
    assert builder.main(["--check"], built) == 1
    said = capsys.readouterr().out
    assert "02_double.ipynb was never built" in said
    assert "stale: 01_double.ipynb has no source" in said
    assert "stale: exercises/01_double.ipynb has no source" in said


def test_check_reports_a_mistake_in_a_source_by_its_file(built, capsys):
    source = built / "src" / "01_double.py"
    source.write_text(SOURCE.replace("### END SOLUTION", ""), encoding="utf-8")
    assert builder.main(["--check"], built) == 1
    assert "src/01_double.py: '### BEGIN SOLUTION' without" in capsys.readouterr().out


def test_only_of_an_unknown_notebook_names_those_that_exist(built, capsys):
    assert builder.main(["--only", "07"], built) == 1
    assert "there are: 01_double" in capsys.readouterr().err


def test_a_real_build_keeps_outputs_and_gives_the_same_bytes_twice(folder):
    path = folder / "01_double.ipynb"
    assert builder.main([], folder) == 0
    first = path.read_bytes()
    assert builder.main(["--only", "01"], folder) == 0
    assert path.read_bytes() == first
    cells = json.loads(first)["cells"]
    assert cells[-1]["outputs"][0]["text"] == ["the end\n"]
    assert [cell.get("execution_count") for cell in cells] == [None, 1, 2, 3]


def test_a_failing_cell_leaves_the_notebook_as_it_was(built, monkeypatch, capsys):
    monkeypatch.undo()
    before = (built / "01_double.ipynb").read_bytes()
    (built / "src" / "01_double.py").write_text("# %%\n1 / 0\n", encoding="utf-8")
    assert builder.main([], built) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert (built / "01_double.ipynb").read_bytes() == before
