"""From measurements to Markdown, and from there into a page."""

from pathlib import Path
from statistics import mean, median, stdev

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
NAMES = {"ours": "minippo", "trl": "TRL"}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine_line(machine: dict) -> str:
    """What a reader has to know to compare with another machine."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = [f"{versions}, {machine['threads']} threads"]
    if "gflops" in machine:
        facts.append(f"{machine['gflops']:.0f} GFLOP/s in large float32 products")
    facts.append(f"medians of {machine['repeats']} after a warm-up, in brackets the extremes")
    return "; ".join(facts) + "."


def step_summary(mine: dict, gflops: float) -> dict[str, float]:
    """The medians of one side of a workload, and its floor: its operations at the machine's rate.

    floor_share: of each step the share of its time that its own operations take at that rate
    """
    seconds, floors = mine["seconds"], [flops / gflops / 1e9 for flops in mine["flops"]]
    return {
        "seconds": median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens": median(n / s for n, s in zip(mine["tokens"], seconds, strict=True)),
        "floor": median(floors),
        "floor_share": median(f / s for f, s in zip(floors, seconds, strict=True)),
        "peak_mb": mine["peak_mb"],
        "start_mb": mine["start_mb"],
    }


def step_table(steps: dict, gflops: float) -> str:
    """One row for each workload and side; the floor is that of a machine of `gflops`."""
    head = ["workload", "", "seconds per step", "response tokens per second"]
    head += ["peak memory, MB", "of it before the first step", "floor, seconds"]
    head += ["share of the floor", "TRL / minippo"]
    rows = []
    for workload, measured in steps.items():
        sides = [side for side in NAMES if side in measured]
        all_sides = {side: step_summary(measured[side], gflops) for side in sides}
        for side, s in all_sides.items():
            both = side == "trl" and "ours" in all_sides
            ratio = f"{s['seconds'] / all_sides['ours']['seconds']:.2f}" if both else ""
            time = f"{s['seconds']:.2f} ({s['fastest']:.2f} to {s['slowest']:.2f})"
            memory = [f"{s['peak_mb']:,.0f}", f"{s['start_mb']:,.0f}"]
            floor = [f"{s['floor']:.2f}", f"{s['floor_share']:.0%}", ratio]
            rows.append([workload, NAMES[side], time, per_second(s["tokens"]), *memory, *floor])
    return table(head, rows)


def per_second(rate: float) -> str:
    """A rate with a decimal where it is small."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def part_table(parts: dict) -> str:
    """One row for each part: work per second."""
    rows = []
    for part, measured in parts.items():
        rates = {side: median(measured[side]) for side in NAMES if side in measured}
        cells = [per_second(rates[side]) if side in rates else "" for side in NAMES]
        ratio = f"{rates['ours'] / rates['trl']:.2f}" if len(rates) == 2 else ""
        rows.append([part, measured["unit"], *cells, ratio])
    return table(["part", "per second", "minippo", "the other", "minippo / the other"], rows)


def equal_time_table(runs: list[dict], before: dict) -> str:
    """One row for each seed, then mean and spread, then where both began.

    runs: {"seed", and for each side "gold", "kl_per_sequence", "steps"}
    before: the same of the SFT policy
    """
    rows = [[str(run["seed"]), *_cells([run[side] for side in NAMES])] for run in runs]
    sides = {side: [run[side] for run in runs] for side in NAMES}
    rows.append(["mean", *_cells([averaged(sides[side], mean) for side in NAMES])])
    if len(runs) > 1:
        rows.append(["spread", *_cells([averaged(sides[side], stdev) for side in NAMES])])
    rows.append(["SFT, before", *_cells([before, before])])
    keys = ("gold", "KL per sequence", "steps")
    return table(["seed", *(f"{name}, {key}" for name in NAMES.values() for key in keys)], rows)


def averaged(runs: list[dict], average) -> dict[str, float]:
    """Mean or spread of every number of some runs."""
    keys = ("gold", "kl_per_sequence", "steps")
    return {key: average([run[key] for run in runs]) for key in keys}


def _cells(sides: list[dict]) -> list[str]:
    numbers = [(s["gold"], s["kl_per_sequence"], s["steps"]) for s in sides]
    return [cell for g, kl, n in numbers for cell in (f"{g:.2f}", f"{kl:.2f}", f"{n:.0f}")]


def write_block(page: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- name --> and <!-- /name -->.

    Raises ValueError if the page does not have exactly one such place.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        message = f"{page.name} must have one {begin} and after it one {end}"
        raise ValueError(f"{message}; put them where the table belongs")
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
