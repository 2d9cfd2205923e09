"""Mutates every operator and argument of the core modules: `python -m tests.mutants.general`.

The tool is mutmut (`pip install mutmut==3.8.1`), run in a copy of the package and of the tests that
are about these modules. A mutant that survives fails the run unless `equivalent.toml` has it, with
the reason why no test can or should tell it from the original; an entry that no mutant needs any
more fails it too.
"""

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTED = Path(__file__).with_name("equivalent.toml")
FORMULAS = ("masking", "logprobs", "kl", "rewards", "advantages", "losses")
GROUPS = {"formulas": FORMULAS, "rollout and ppo": ("rollout", "ppo")}
BARS = {"formulas": (0.90, 0.97), "rollout and ppo": (0.85, 0.92)}  # outright, with the listed
TESTS = ("conftest", "test_variants", *(f"test_{m}" for g in GROUPS.values() for m in g))
KILLED = (1, 3)  # mutmut's exit codes: a test failed, or pytest itself did
SURVIVED = (0, 5, 33)  # all tests passed, or there are none
NAME = re.compile(r"(?:x_|xǁ)(.+)__mutmut_(\d+|orig)$")


def prepare(folder: Path) -> None:
    """Copies what is needed and writes mutmut's settings."""
    shutil.copytree(ROOT / "minippo", folder / "minippo")
    (folder / "tests").mkdir()
    modules = [f"minippo/{module}.py" for group in GROUPS.values() for module in group]
    options = '[tool.pytest.ini_options]\naddopts = "-p no:cacheprovider"\n[tool.mutmut]\n'
    options += f'source_paths = ["minippo"]\nalso_copy = ["minippo"]\nonly_mutate = {modules}\n'
    options += "timeout_constant = 600\n"  # a machine that is busy, or was asleep, kills nothing
    (folder / "pyproject.toml").write_text(options.replace("'", '"'), encoding="utf-8")
    for module in modules:
        undecorate(folder / module)


def undecorate(path: Path) -> None:
    """Moves `@torch.no_grad()` to the end of the module: mutmut leaves out what is decorated."""
    source = path.read_text(encoding="utf-8")
    names = re.findall(r"^@torch\.no_grad\(\)\ndef (\w+)", source, re.MULTILINE)
    source = re.sub(r"^@torch\.no_grad\(\)\n", "", source, flags=re.MULTILINE)
    source += "".join(f"\n\n{name} = torch.no_grad()({name})\n" for name in names)
    path.write_text(source, encoding="utf-8")


def refresh(folder: Path) -> None:
    """The tests as they are now; what survived them before is to be tried again."""
    for name in TESTS:
        shutil.copy(ROOT / "tests" / f"{name}.py", folder / "tests")
    for path in (folder / "mutants" / "minippo").glob("*.meta"):
        meta = json.loads(path.read_text())
        codes = meta["exit_code_by_key"]
        meta["exit_code_by_key"] = {k: c if c in KILLED else None for k, c in codes.items()}
        path.write_text(json.dumps(meta))


def mutate(folder: Path) -> None:
    """Runs mutmut, one process; it shows its own progress."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1"]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def results(folder: Path) -> dict[str, list[tuple[str, str, str, int | None]]]:
    """Per module, each mutant as (function, old lines, new lines, exit code)."""
    found = {}
    for module in (module for group in GROUPS.values() for module in group):
        path = folder / "mutants" / "minippo" / f"{module}.py"
        codes = json.loads(path.with_name(f"{module}.py.meta").read_text())["exit_code_by_key"]
        versions = bodies(path)
        found[module] = [
            (*changed_lines(versions, key.rpartition(".")[2]), code) for key, code in codes.items()
        ]
    return found


def bodies(path: Path) -> dict[str, list[str]]:
    """The lines of every version of every function in a file that mutmut wrote."""
    source = path.read_text(encoding="utf-8")
    lines = re.sub(r"__mutmut_(\d+|orig)\(", "(", source).splitlines()
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    return {n.name: lines[n.lineno - 1 : n.end_lineno] for n in nodes if "__mutmut_" in n.name}


def changed_lines(versions: dict, name: str) -> tuple[str, str, str]:
    """The function's own name, and the lines that differ from the original, before and after."""
    function, number = NAME.match(name).groups()
    original = versions[f"{name.removesuffix(number)}orig"]
    difference = list(difflib.ndiff(original, versions[name]))
    sides = ("\n".join(d[2:].strip() for d in difference if d[0] == sign) for sign in "-+")
    return function.replace("ǁ", "."), *sides


def judge(found: dict, listed: list[dict]) -> list[str]:
    """Prints the scores; returns what is wrong: mutants that survive unlisted, entries unused."""
    keys = {(e["function"], e["old"], e["new"]): False for e in listed}
    problems = []
    for group, modules in GROUPS.items():
        mutants = [(f"{m}.{f}", old, new, code) for m in modules for f, old, new, code in found[m]]
        excused = 0
        for *key, code in (mutant for mutant in mutants if mutant[3] not in KILLED):
            if tuple(key) in keys and code in SURVIVED:
                excused, keys[tuple(key)] = excused + 1, True
            else:
                state = "survives" if code in SURVIVED else f"has no verdict (exit code {code})"
                problems.append(f"{key[0]} {state}\n  - {key[1]}\n  + {key[2]}")
        killed, total = sum(code in KILLED for *_, code in mutants), len(mutants)
        shares = killed / total, (killed + excused) / total
        text = f"{group}: {total} mutants, {killed} killed ({shares[0]:.1%})"
        print(f"{text}, {excused} listed as equivalent ({shares[1]:.1%} with them)")
        if shares[0] < BARS[group][0] or shares[1] < BARS[group][1]:
            problems.append(f"{group}: below {BARS[group][0]:.0%} outright or {BARS[group][1]:.0%}")
    stale = [key for key, used in keys.items() if not used]
    return problems + [f"listed, but no such mutant survives: {key}" for key in stale]


def main() -> int:
    """The command; 0 if every mutant is killed or listed."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants.general", description=description
    )
    parser.add_argument("--folder", type=Path, help="work here; go on with what is unkilled")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary) / "copy").resolve()
        if not folder.exists():
            folder.mkdir(parents=True)
            prepare(folder)
        refresh(folder)
        mutate(folder)
        listed = tomllib.loads(LISTED.read_text(encoding="utf-8"))["equivalent"]
        problems = judge(results(folder), listed)
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
