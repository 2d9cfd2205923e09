"""The known wrong variants: all of them are noticed, and the runner would say so if one were not.

`python -m tests.mutants.run` runs the table; here it runs whole, and its runner on a toy suite.
"""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutants.patching import NotApplicable, applied, find_function
from mutants.run import named_tests
from mutants.table import COMMON, VARIANTS, Variant

from minippo import losses
from minippo.kl import KL_ESTIMATORS, kl_k1
from minippo.masking import masked_mean
from minippo.rollout import collect_rollout

ROOT = Path(__file__).resolve().parents[1]
X, MASK = torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[True, True, False]])


# --- the table --------------------------------------------------------------------------------


@pytest.mark.integration
def test_every_variant_is_noticed_by_every_test_it_names():
    command = [sys.executable, "-m", "tests.mutants.run"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(VARIANTS)} of {len(VARIANTS)} variants noticed" in run.stdout


def test_every_variant_applies_to_the_code():
    for variant in VARIANTS:
        module = importlib.import_module(f"minippo.{variant.module}")
        right = parts_of(find_function(module, variant.function))
        with applied(variant.module, variant.function, variant.old, variant.new) as function:
            assert parts_of(function) != right, f"{variant.id} changes nothing"
        assert parts_of(find_function(module, variant.function)) == right, variant.id


def parts_of(function):
    """What a variant may exchange: the code, and the defaults of its arguments."""
    return function.__code__, function.__defaults__, function.__kwdefaults__


def test_the_table_is_complete():
    assert len(VARIANTS) >= 50 and len({v.id for v in VARIANTS}) == len(VARIANTS)
    for variant in VARIANTS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", variant.id)
        assert all(dataclasses.astuple(variant)), f"{variant.id} has an empty field"
        assert variant.misconception.endswith(".") and variant.symptom.endswith(".")
    historical = [v for v in VARIANTS if v.module != "worlds.oracle"]  # the oracle has no peers
    assert sum(v.source == COMMON for v in historical) <= len(historical) / 10


def test_every_part_of_the_pipeline_has_variants():
    modules = {variant.module for variant in VARIANTS}
    parts = "masking logprobs kl rewards advantages losses ppo rollout generation models hh"
    parts += " preferences reward_training engine.passes engine.packing engine.look"
    assert {*parts.split(), "engine.gradients", "worlds.oracle"} <= modules


def test_every_named_test_is_there():
    for name in named_tests(VARIANTS):
        file, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


# --- putting a variant in place -----------------------------------------------------------------


def test_a_variant_is_in_force_in_every_copy_and_gone_afterwards():
    everything = dict(old="mask.sum(dim)", new="mask.numel()")
    with applied("masking", "masked_mean", **everything):
        assert masked_mean(X, MASK).item() == pytest.approx(4 / 3)  # this file's own copy
        assert losses.masked_mean(X, MASK).item() == pytest.approx(4 / 3)  # another module's
    assert masked_mean(X, MASK).item() == losses.masked_mean(X, MASK).item() == 2


def test_a_table_of_functions_holds_the_variant_too():
    with applied("kl", "kl_k1", "logprobs - ref_logprobs", "ref_logprobs - logprobs"):
        assert KL_ESTIMATORS["kl"](torch.tensor(3.0), torch.tensor(1.0)).item() == -2
    assert kl_k1(torch.tensor(3.0), torch.tensor(1.0)).item() == 2


def test_the_code_is_put_back_when_a_test_fails():
    with pytest.raises(ZeroDivisionError):
        with applied("masking", "masked_mean", "mask.sum(dim)", "mask.numel()"):
            raise ZeroDivisionError
    assert masked_mean(X, MASK).item() == 2


def test_a_default_can_be_the_change():
    rewards, values = torch.ones(1, 3), torch.zeros(1, 3)
    everything = torch.ones(1, 3, dtype=torch.bool)
    with applied("advantages", "gae", "lam: float = 0.95", "lam: float = 0.0") as gae:
        assert gae(rewards, values, everything)[0].tolist() == [[1, 1, 1]]
    assert gae(rewards, values, everything)[0][0, 0].item() == pytest.approx(1 + 0.95 + 0.95**2)


def test_decorated_functions_methods_and_class_methods_can_be_changed():
    for module, name, old in [
        ("rollout", "collect_rollout", "raw_scores ="),
        ("engine.packing", "Rows.rows", "[there]"),
        ("models", "_ScalarHead.from_policy", "** 0.5"),
        ("models", "RewardModel.from_pretrained", "super()"),
    ]:
        with applied(module, name, old, f"{old} "):
            pass
    before = collect_rollout.__wrapped__.__code__
    with applied("rollout", "collect_rollout", "token_count > 1", "token_count > 2"):
        assert collect_rollout.__wrapped__.__code__ != before
    assert collect_rollout.__wrapped__.__code__ == before


@pytest.mark.parametrize("name, old, new, message", [
    ("masked_mean", "no such thing", "0", "0 times"),
    ("masked_whiten", "masked_fill(~mask, 0)", "x", "2 times"),
    ("masked_mean", "turns an", "x", "0 times"),  # stands in its docstring only
    ("masked_mean", "biased", "x", "0 times"),  # stands in another function
    ("masked_median", "x", "y", "no masked_median"),
    ("masked_mean", "mask.sum(dim)", "mask.sum(dim", "no valid Python"),
])  # fmt: skip
def test_a_variant_that_does_not_fit_the_code_is_refused(name, old, new, message):
    with pytest.raises(NotApplicable, match=message), applied("masking", name, old, new):
        raise AssertionError("it was applied")
    assert masked_mean(X, MASK).item() == 2


# --- the runner ---------------------------------------------------------------------------------

TOY_TESTS = """
import pytest
import torch
from minippo.masking import masked_mean

@pytest.fixture(scope="module")
def mean():
    return masked_mean(torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[True, True, False]]))

@pytest.mark.parametrize("expected", [2.0, 2])
def test_sees(mean, expected):
    assert mean.item() == expected

def test_blind():
    assert masked_mean(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)).item() == 1

def test_red():
    assert False, "always"
"""
WRONG = ("mask.sum(dim)", "mask.numel()")
TOYS = {
    "noticed": (*WRONG, "test_sees"),
    "unseen": (*WRONG, "test_blind"),
    "half-seen": (*WRONG, "test_sees test_blind"),
    "equal": ("mask.sum(dim)", "(mask.sum(dim))", "test_sees"),
    "outdated": ("mask.total(dim)", "mask.numel()", "test_sees"),
    "crashing": ("mask.sum(dim)", "mask.sum(dimension)", "test_sees"),
    "red": (*WRONG, "test_red"),
    "missing": (*WRONG, "test_nowhere"),
}
DRIVER = """
import json, sys
from pathlib import Path
from tests.mutants.run import run
from tests.mutants.table import Variant
toys = [Variant(**toy) for toy in json.loads(sys.argv[1])]
campaign = run(toys, Path(sys.argv[2]))
print("RESULT", json.dumps([campaign.noticed, campaign.problems]))
"""


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """(how many were noticed, the problems) of the runner on a toy suite."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_toy.py").write_text(TOY_TESTS)
    words = dict(misconception="-", symptom="-", source="-")
    toys = [
        Variant(name, "masking", "masked_mean", old, new, tests=toy_names(tests), **words)
        for name, (old, new, tests) in TOYS.items()
    ]
    given = json.dumps([dataclasses.asdict(toy) for toy in toys])
    command = [sys.executable, "-c", DRIVER, given, str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.rpartition("RESULT ")[2])


def toy_names(tests: str) -> list[str]:
    return [f"tests/test_toy.py::{test}" for test in tests.split()]


@pytest.mark.integration
@pytest.mark.parametrize("toy, problem", [
    ("unseen", "survives tests/test_toy.py::test_blind"),
    ("half-seen", "survives tests/test_toy.py::test_blind"),
    ("equal", "survives tests/test_toy.py::test_sees"),
    ("outdated", "does not apply: .*'mask.total.dim.' stands in it 0 times"),
    ("crashing", "crashes: .*NameError"),
    ("red", "its test is at fault: tests/test_toy.py::test_red"),
    ("missing", "its test is at fault: tests/test_toy.py::test_nowhere"),
])  # fmt: skip
def test_the_runner_names_what_is_wrong(toy_run, toy, problem):
    (found,) = [line for line in toy_run[1] if line.startswith(f"{toy}: ")]
    assert re.search(problem, found)


@pytest.mark.integration
def test_the_runner_counts_what_was_noticed_and_tells_of_broken_tests(toy_run):
    noticed, problems = toy_run
    assert noticed == 1 and not [line for line in problems if line.startswith("noticed")]
    assert len(problems) == len(TOYS) - 1 + 2
    assert [line for line in problems if "test_red" in line and "on the code as it is" in line]
    assert [line for line in problems if "test_nowhere: there is no such test" in line]


@pytest.mark.integration
def test_the_command_refuses_an_unknown_variant_and_lists_the_known_ones():
    for arguments, status in [(["--only", "no-such-variant"], 2), (["--list"], 0)]:
        command = [sys.executable, "-m", "tests.mutants.run", *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == status
    assert len(run.stdout.splitlines()) == len(VARIANTS) and "k3-reversed" in run.stdout
