"""Starting is quick: who imports minippo or asks for help does not wait for it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
TIMED = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import minippo
end = time.perf_counter()
print(json.dumps([middle - start, end - middle]))
"""
HELP = """
import sys
from minippo.app import cli
try:
    cli.main(["--help"])
except SystemExit:
    print(sorted({"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)))
"""


ORDERS = (
    "from transformers import GPT2Config; from minippo import models",
    "from minippo import models",
    "import datasets; from minippo import models",  # it brings huggingface_hub along
)


def answer(code: str) -> str:
    """What a fresh Python prints last."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[-1]


def test_importing_minippo_adds_next_to_nothing_to_importing_torch():
    """The best of three, side by side in one process, so that a busy machine slows down both."""
    times = [json.loads(answer(TIMED)) for _ in range(3)]
    torch_seconds, own_seconds = (min(column) for column in zip(*times, strict=True))
    assert own_seconds < 0.3 and own_seconds < 0.2 * torch_seconds


def test_help_is_there_within_three_seconds_and_needs_no_torch():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert answer(HELP) == "[]"
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 3


@pytest.mark.parametrize("imports", ORDERS)
def test_loading_shows_no_bar_whichever_was_imported_first(imports):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB_")}
    command = [sys.executable, "-c", f"{imports}; models.Policy.from_pretrained('sft')"]
    environment["PYTHONPATH"] = str(ROOT)
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("", "")
