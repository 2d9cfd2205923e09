"""Every test runs offline, on one thread, and from the same seeds."""

import os

# Set before torch, transformers or matplotlib is imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import sys

import pytest


@pytest.fixture(autouse=True)
def seeds():
    """The global generators start every test from 0, whatever ran before it."""
    random.seed(0)
    if "torch" in sys.modules:  # a test that needs no torch does not pay for its import
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def generator():
    """A fresh torch.Generator with seed 0, for code that takes its randomness as an argument."""
    import torch

    return torch.Generator().manual_seed(0)
