"""`minippo doctor`: is everything there that a run needs?"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors import SafetensorError

from minippo import __version__
from minippo.config import DATA_DIR
from minippo.models import RewardModel, ValueModel, load_policy, load_tokenizer

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "tyro", "matplotlib", "jupyterlab")
CHECKPOINTS = {
    "base": load_policy,
    "sft": load_policy,
    "reward": RewardModel.load,
    "value": ValueModel.load,
    "ppo": load_policy,
}


def examine() -> bool:
    """Prints what is installed, the device, and a line per shipped checkpoint; True if all load."""
    print(f"minippo {__version__} on Python {platform.python_version()}, {platform.system()}")
    for package in PACKAGES:
        print(f"  {package:14s} {_version(package)}")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {device} ({os.cpu_count()} cores)")
    print(f"data:   {DATA_DIR}{'' if DATA_DIR.is_dir() else '  (missing)'}")
    return all([_check(name, load) for name, load in CHECKPOINTS.items()])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed (only the course needs it)" if package == "jupyterlab" else "missing"


def _check(name: str, load) -> bool:
    try:
        model, tokenizer = load(name), load_tokenizer(name)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # missing or damaged
        print(f"  {name:8s} does not load: {error}")
        return False
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"  {name:8s} loads: {size:.2f} M parameters, {len(tokenizer)} tokens")
    return True
