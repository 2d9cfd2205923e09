"""`minippo doctor`: is everything there that a run needs?"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from safetensors import SafetensorError

from minippo import __version__
from minippo.app.packaging import KINDS
from minippo.config import DATA_DIR
from minippo.models import load_tokenizer

# The oldest and the newest that the tests were run with; docs/compatibility.md says when and how.
# A patch release of the newest is taken for tested.
TESTED = {
    "torch": ("2.6.0", "2.15.0"),
    "transformers": ("4.56.0", "5.24.0"),
    "datasets": ("3.0.0", "5.2.0"),
    "tokenizers": ("0.22.0", "0.23.3"),
    "numpy": ("2.0.0", "2.5.5"),
    "safetensors": ("0.4.3", "0.8.0"),
    "tyro": ("0.9.1", "1.0.17"),
    "matplotlib": ("3.9.0", "3.11.2"),
    "jupyterlab": ("4.2.0", "4.6.6"),
}
TESTED_PYTHON = ("3.11", "3.13")


def examine() -> bool:
    """Prints what is installed, the device, and a line per shipped checkpoint; True if all load."""
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"minippo {__version__} on Python {python}, {platform.system()}{untested(python)}")
    for package, limits in TESTED.items():
        print(f"  {package:14s} {_version(package, limits)}")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {device} ({os.cpu_count()} cores)")
    print(f"data:   {DATA_DIR}{'' if DATA_DIR.is_dir() else '  (missing)'}")
    return all([_check(name, kind) for name, kind in KINDS.items()])


def untested(found: str, limits: tuple[str, str] = TESTED_PYTHON) -> str:
    """Which side of the tested versions this one is on, to be printed behind it; "" if on none."""
    oldest, newest = map(Version, limits)
    if Version(found) < oldest:
        return f"  (older than {oldest}, the oldest that was tested)"
    if Version(found).release[:2] > newest.release[:2]:
        return f"  (newer than {newest}, the newest that was tested)"
    return ""


def _version(package: str, limits: tuple[str, str]) -> str:
    try:
        found = version(package)
    except PackageNotFoundError:
        return "not installed (only the course needs it)" if package == "jupyterlab" else "missing"
    return f"{found}{untested(found, limits)}"


def _check(name: str, kind) -> bool:
    try:
        model, tokenizer = kind.from_pretrained(name), load_tokenizer(name)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # missing or damaged
        print(f"  {name:8s} does not load: {error}")
        return False
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"  {name:8s} loads: {size:.2f} M parameters, {len(tokenizer)} tokens")
    return True
