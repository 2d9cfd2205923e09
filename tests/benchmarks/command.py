"""What both commands share: what they refuse, their bar, their files, their exit status."""

import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from .tables import NAMES

TRL_VERSION = "1.12.0"  # the last release that has a PPO trainer


class CannotRun(ValueError):
    """What was asked for cannot be measured; the message says what to do."""


def check_sides(only: str) -> list[str]:
    """The sides named in "ours,trl"; CannotRun if a side is unknown or cannot run here."""
    sides = [side.strip() for side in only.split(",")]
    if unknown := [side for side in sides if side not in NAMES]:
        raise CannotRun(f"--only knows ours and trl, not {', '.join(unknown)}; use --only ours,trl")
    if "trl" in sides and (found := installed("trl")) != TRL_VERSION:
        message = f"trl {TRL_VERSION} is needed and what is installed is {found}"
        remedy = "pip install -c constraints.txt 'minippo[bench]', or leave it out: --only ours"
        raise CannotRun(f"{message}; {remedy}")
    return sides


def installed(package: str) -> str:
    """The version of an installed package, "none" if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


class Progress:
    """Moves a bar on by a turn."""

    def __init__(self, bar, name: str):
        self.bar, self.name = bar, name

    def __call__(self, turn: str) -> None:
        self.bar.set_description(f"{self.name}: {turn}", refresh=False)
        self.bar.update()


def save(path: Path, measured: dict) -> None:
    """Every number, so that tables can be made anew."""
    path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def run(function: Callable, prog: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 2 if it was asked for what it cannot do."""
    try:
        tyro.cli(function, prog=prog, args=arguments)
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
