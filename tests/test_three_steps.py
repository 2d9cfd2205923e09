"""The numbers of three steps of every training stay what they were; see three_steps.py."""

import json

import pytest
import three_steps

pytestmark = pytest.mark.integration


def test_three_steps_of_every_training_are_those_of_the_record():
    """Other processors add in another order: their last digits may differ, and grow in 3 steps."""
    recorded = json.loads(three_steps.RECORD.read_text(encoding="utf-8"))
    difference, where = three_steps.largest_difference(three_steps.in_float64(), recorded)
    assert difference < 1e-9, where


def test_a_difference_is_seen_and_named():
    recorded = {"a": {"x": [1.0, 200.0]}}
    assert three_steps.largest_difference({"a": {"x": [1.0, 202.0]}}, recorded) == (0.01, "a: x")
