"""How much there is to read: lines of code by folder, and what one step of train_ppo runs through.

    python -m tests.sizes           # the table
    python -m tests.sizes --trace   # each function that a step of train_ppo runs, with its lines

Lines of code are those that hold code: no docstring, comment or blank line.
"""

import argparse
import ast
import functools
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minippo"

# The teaching path, read in this order; an import goes to an earlier module only.
PATH = {
    "settings": ["config"],
    "formulas": ["masking", "logprobs", "kl", "rewards", "advantages", "losses"],
    "data": ["hh", "preferences", "batching"],
    "models": ["models"],
    "acting": ["generation", "rollout"],
    "learning": ["optim", "pretrain", "sft", "reward_training", "value_training", "ppo"],
}
SEEING = ["evaluation", "plots", "token_table", "lesson"]
FOLDERS = ["engine", "worlds", "app", "checks"]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def docstring_lines(node) -> set[int]:
    """The line numbers that a docstring takes, none where there is none."""
    documented = ast.get_docstring(node, clean=False) is not None
    first = node.body[0] if documented else None
    return set(range(first.lineno, first.end_lineno + 1)) if first else set()


def code_lines(path: Path) -> set[int]:
    """The line numbers of a file that hold code: no docstring, comment or blank line."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, documented):
            lines -= docstring_lines(node)
    return lines


def path_sizes() -> dict[str, dict[str, int]]:
    """Lines of code of each module of the teaching path, by rung."""
    return {
        rung: {module: len(code_lines(PACKAGE / f"{module}.py")) for module in modules}
        for rung, modules in PATH.items()
    }


def folder_size(folder: str) -> dict[str, int]:
    """Lines of code of each file in a folder of the package and below it."""
    files = sorted((PACKAGE / folder).rglob("*.py"))
    return {str(path.relative_to(PACKAGE / folder)): len(code_lines(path)) for path in files}


def traced_step() -> dict[tuple[str, str], int]:
    """(file, function) -> lines of code, of all that one step of `train_ppo` runs in the package.

    On a tiny random GPT-2 on the CPU, with PPO's default settings and a reward model.
    """
    import torch

    from minippo import PPOConfig, RewardModel, ValueModel, frozen_copy, tiny_gpt2, train_ppo

    torch.manual_seed(0)
    policy = tiny_gpt2(40, n_layer=1, n_embd=16, n_head=2, n_positions=32)
    reward_model = RewardModel.from_policy(policy)
    models = (policy, frozen_copy(policy), ValueModel.from_reward_model(reward_model), reward_model)
    sizes = {"batch_size": 4, "minibatch_size": 2, "micro_batch_size": 2}
    config = PPOConfig(steps=1, **sizes, max_response_tokens=4)
    codes = set()

    def note(frame, event, argument):
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        train_ppo(*models, [[5, 6], [7], [8, 9, 10], [11]], _Tokenizer, config)
    finally:
        sys.setprofile(None)
    inside = str(PACKAGE)
    found = {}
    for code in (code for code in codes if code.co_filename.startswith(inside)):
        name = str(Path(code.co_filename).relative_to(PACKAGE))
        if "<lambda>" not in code.co_qualname and "comp>" not in code.co_qualname:
            found[name, code.co_qualname] = len(_lines_of(code))
    return found


class _Tokenizer:
    eos_token_id, pad_token_id = 1, 0


def _lines_of(code) -> set[int]:
    """The lines of code of a function, with those of the functions inside it."""
    path = Path(code.co_filename)
    nodes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, nodes)]
    starts = {node.lineno: node for node in functions}
    starts |= {d.lineno: node for node in functions for d in node.decorator_list}
    node = starts.get(code.co_firstlineno)
    if node is None or "genexpr" in code.co_qualname or code.co_name == "<module>":
        return set()
    return code_lines(path) & set(range(node.lineno, node.end_lineno + 1))


def main() -> None:
    """Prints the table, or what a step runs through."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", action="store_true", help="every function of a step, by file")
    arguments = parser.parse_args()
    for rung, sizes in path_sizes().items():
        each = ", ".join(f"{name} {size}" for name, size in sizes.items())
        print(f"{sum(sizes.values()):6d}  {rung}: {each}")
    total = sum(sum(sizes.values()) for sizes in path_sizes().values())
    print(f"{total:6d}  settings to learning, the teaching path")
    seeing = {name: len(code_lines(PACKAGE / f"{name}.py")) for name in SEEING}
    print(f"{sum(seeing.values()):6d}  seeing: {', '.join(f'{k} {v}' for k, v in seeing.items())}")
    for folder in FOLDERS:
        sizes = folder_size(folder)
        each = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
        print(f"{sum(sizes.values()):6d}  {folder}/: {each}")
    found = traced_step()
    for where, chosen in (("", found), (", the engine left out", without_engine(found))):
        files = len({file for file, _ in chosen})
        told = f"{len(chosen)} functions in {files} modules"
        print(f"{sum(chosen.values()):6d}  a step of train_ppo: {told}{where}")
    for (file, name), size in sorted(found.items()) if arguments.trace else ():
        print(f"{size:10d}  {file}: {name}")


def without_engine(found: dict) -> dict:
    """What stands outside of the engine."""
    return {key: size for key, size in found.items() if not key[0].startswith("engine")}


if __name__ == "__main__":
    main()
