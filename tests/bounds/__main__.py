"""Measures the bounds at full size: `python -m tests.bounds --help`."""

import sys
from contextlib import closing
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from .measures import BOUNDS, Figure, Lab, Sizes

Name = Literal["rows", "bad_rows", "bomb", "long_row", "json", "edited", "mutations", "steps"]


def line(figure: Figure) -> str:
    """One row of the table."""
    value, limit = f"{figure.value:,.1f}", f"{figure.limit:,g} {figure.unit}"
    verdict = "" if figure.holds else "  MISSED"
    return f"  {figure.what:<76}{value:>9}{limit:>10}{verdict}"


def main(
    names: tyro.conf.Positional[tuple[Name, ...]] = tuple(BOUNDS),
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = Sizes(),  # noqa: B008
) -> int:
    """Files that strain the reader, and a long PPO: how far each bound is kept.

    Linux only. Takes some ten minutes, 2 GB of disk, and MINIPPO_HH_FILE if rows of HH-RLHF are to
    be mutated instead of TinyHH's. The exit status is 1 if a bound is missed.

    names: which bounds to measure, all if none is named
    """
    missed = 0
    print(f"  {'bound':<76}{'figure':>9}{'limit':>10}")
    with closing(Lab(sizes)) as lab:
        for name in tqdm(names, "bounds", leave=False, disable=None):
            for figure in BOUNDS[name](lab):
                tqdm.write(line(figure))
                missed += not figure.holds
    print(f"{missed} bounds missed" if missed else "all bounds kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tests.bounds"))
