"""The bounds at small sizes; `python -m tests.bounds` measures them at full size."""

import functools
import random
import re
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from bounds import __main__ as command
from bounds import measures, mutations
from bounds.measures import BOUNDS, Lab, Sizes, growth, per_step

from minippo import hh

pytestmark = pytest.mark.integration

SMALL = Sizes(
    rows=10_000, bad_rows=50_000, bomb=50_000, mutants=250, steps=30, warm_up=10, per_step=24
)
PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc has the figures")


@pytest.fixture(scope="module")
def lab():
    with closing(Lab(SMALL)) as lab:
        yield lab


@PROC
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_is_kept_at_a_small_size(lab, name):
    figures = list(BOUNDS[name](lab))
    assert figures and not [figure for figure in figures if not figure.holds]


# --- a measurement would notice ---------------------------------------------------------------


@PROC
def test_a_peak_grows_by_what_is_held(lab):
    few, many = (lab.ask("load", "hold", megabytes) for megabytes in (10, 60))
    assert abs(growth(few, many) - 50) < 2


@PROC
def test_a_training_that_keeps_something_each_step_is_over_the_limit(lab):
    short = Sizes(steps=16, warm_up=6)
    assert 90 < per_step(short, lab.ask("train", "train", short.steps, "", 100)) < 150


def test_a_cache_of_the_path_is_a_missed_bound(monkeypatch, capsys):
    assert command.main(("edited",)) == 0 and "all bounds kept" in capsys.readouterr().out
    monkeypatch.setattr(measures, "load_preferences", functools.cache(hh.load_preferences))
    assert command.main(("edited",)) == 1
    table = capsys.readouterr().out
    assert "old rows" in table and "2.0    0 rows  MISSED" in table and "1 bounds missed" in table


def repaired(raw, decode=hh._decode):
    """A reader that mends what is no UTF-8."""
    return decode(raw.decode(errors="replace").encode())


WRONG_READERS = {  # what is put in place, and the mutation that must show it
    "repairs": ("_decode", repaired, mutations.insert_bytes),
    "wants a space": ("_TAG", re.compile(r"\n\n(Human|Assistant): "), mutations.turn),
    "wants no blank line": ("_TAG", re.compile(r"\n+(Human|Assistant):"), mutations.both_sides),
}


@pytest.mark.parametrize("reader", WRONG_READERS)
def test_a_wrong_reader_is_noticed(tmp_path, monkeypatch, reader):
    name, wrong, mutation = WRONG_READERS[reader]
    rng, rows = random.Random(0), mutations.seeds(40)
    damaged = [mutation(row, rng) for row in rows]
    assert not mutations.compare(damaged, tmp_path).disagreements
    monkeypatch.setattr(hh, name, wrong)
    assert mutations.compare(damaged, tmp_path).disagreements


@pytest.mark.parametrize("name", BOUNDS)
def test_every_bound_can_be_named(name):
    assert name in get_args(command.Name)
