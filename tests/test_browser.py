"""A lesson as its reader opens it: in JupyterLab, in a real browser."""

import contextlib
import copy
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package tests.browser

from tests.browser.lab import Lab, differences, missing

pytestmark = pytest.mark.integration

LESSON = Path(__file__).parents[1] / "notebooks" / "00_start_here.ipynb"


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_lesson_runs_from_top_to_bottom_in_a_browser(tmp_path):
    from selenium.common.exceptions import WebDriverException

    with contextlib.ExitStack() as open_things:
        try:
            lab = open_things.enter_context(Lab([LESSON], tmp_path))
        except WebDriverException as error:
            pytest.skip(f"Chromium is installed but does not start here: {error.msg}")
        shown = lab.run(LESSON.name)
        assert "minippo" in lab.driver.page_source
        pictures = lab.pictures(tmp_path / "00")
    assert differences(shown, nbformat.read(LESSON, as_version=4)) == []
    assert len(pictures) > 3 and all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)


@pytest.fixture
def lesson():
    return nbformat.read(LESSON, as_version=4)


def printing(notebook) -> dict:
    return next(c for c in notebook.cells if c.cell_type == "code" and c.outputs)


def test_a_lesson_that_shows_what_was_committed_does_not_differ(lesson):
    assert differences(copy.deepcopy(lesson), lesson) == []


@pytest.mark.parametrize("said", ["raises ValueError", "prints other text", "ran as number None"])
def test_what_a_reader_would_see_go_wrong_is_found(lesson, said):
    shown = copy.deepcopy(lesson)
    cell = printing(shown)
    if said.startswith("raises"):
        cell.outputs = [{"output_type": "error", "ename": "ValueError", "evalue": "no"}]
    elif said.startswith("prints"):
        cell.outputs = [{"output_type": "stream", "name": "stderr", "text": "a warning"}]
    else:
        cell.execution_count = None
    found = differences(shown, lesson)
    assert found and said in found[0]


def test_a_picture_that_is_missing_is_found(lesson):
    shown = copy.deepcopy(lesson)
    for cell in shown.cells:
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if "image/png" not in x.get("data", {})]
    assert any("images" in problem for problem in differences(shown, lesson))
