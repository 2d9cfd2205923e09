"""The code base keeps its shape: who may import whom, how long things get, what they are called.

The numbers are there to be honoured in spirit: where clarity needs a line more, clarity wins, and
the budget below moves with its reason beside it.
"""

import ast
import functools
import inspect
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.version import Version
from sizes import (
    PACKAGE,
    PATH,
    ROOT,
    SEEING,
    code_lines,
    docstring_lines,
    folder_size,
    path_sizes,
    traced_step,
    tree_of,
    without_engine,
)

import minippo
from minippo.app.doctor import TESTED, TESTED_PYTHON, untested
from minippo.ppo import train_ppo
from minippo.pretrain import train_lm
from minippo.reward_training import train_reward_model
from minippo.sft import train_sft
from minippo.value_training import train_value_model

NOTEBOOKS = ROOT / "notebooks"

BUDGETS = {
    # Docstrings, comments and blank lines not counted; `python -m tests.sizes` prints them all.
    "code lines, settings to learning": 1330,
    "code lines of the engine": 850,
    "code lines of the app": 1640,
    "code lines of a step of train_ppo, the engine left out": 390,
    "modules of a step of train_ppo, the engine left out": 12,
    "lines of a function": 30,  # from def to its end, the docstring not counted
    "lines of a formula's body": 10,  # comments and blank lines not counted
    "nesting in a function": 3,
    "columns": 100,
}

# One total order: an import goes only upwards in this list, to an earlier line. A folder is one
# line: what it holds may import each other.
LADDER = {
    "settings": PATH["settings"],
    "formulas": PATH["formulas"],
    "engine": ["engine"],
    "data": PATH["data"],
    "models": PATH["models"],
    "acting": PATH["acting"],
    "learning": PATH["learning"],
    "worlds": ["worlds"],
    "seeing": SEEING,
    "the package itself": [""],  # minippo/__init__.py may offer all of the above, none may use it
    "checks": ["checks"],
    "app": ["app"],
    "the command": ["__main__"],
}
ORDER = [module for rung in LADDER.values() for module in rung]
# The seam: what the path may know of the engine. "models" alone reads checkpoints.
SEAM = {
    "engine.look": "response_logprobs response_logprobs_and_entropy response_logprobs_and_kl "
    "response_values answer_scores shared",
    "engine.passes": "token_logits next_logits hidden_states last_hidden last_hidden_of_candidates",
    "engine.gradients": "accumulate accumulate_rows optimizer_step check_shares as_floats "
    "weight_norms",
    "engine.packing": "Rows to_device_of",
    "engine.loading": "load_model read_tokenizer read_score_stats write_score_stats",
}
FORMULA_IMPORTS = {"__future__", "collections", "torch", "typing"}
# These speak to a person: commands, checks.
MAY_PRINT = ("app.cli", "app.chat", "app.doctor", "checks.")
EMPTY_NAMES = {"utils", "helpers", "core", "common"}  # names that say nothing of what is inside
UNWANTED_PACKAGES = {"trl", "accelerate", "wandb"}
MARKERS = re.compile(r"\b(?:TO[D]O|FIX[M]E)\b")  # written so that this file passes its own test
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
BLOCKS += (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# One name for one idea, in code, keys and notebooks: the name used here -> those of other code.
GLOSSARY = {
    "mask": ["padding_mask", "padding_masks", "padding_mask_p1", "action_mask", "action_masks"],
    "tokens": ["query_responses", "query_response"],
    "logprobs": ["pi_logprobs", "newlogprob", "new_logprobs", "new_logprob"],
    "old_logprobs": ["pi_old_logprobs", "logp_old", "old_action_log_probs"],
    "scores": ["rlhf_reward", "rlhf_rewards"],
    "rewards": ["total_reward", "total_rewards", "non_score_reward"],
    "approx_kl": ["approxkl", "old_approx_kl", "old_approxkl"],
    "values": ["vpred", "vpreds", "phi_values"],
    "clip_frac": ["clipfrac", "clip_fraction", "clipfracs"],
    "clip_range": ["cliprange", "cliprange_value", "clip_coef", "clip_ratio", "eps_clip"],
    "kl_coef": ["kl_coeff", "kl_ctl", "init_kl_coef"],
    "vf_coef": ["value_coeff", "value_coef", "vf_coeff"],
    "lam": ["lmbda", "gae_lambda", "lambd"],
    "ppo_epochs": ["noptepochs", "update_epochs", "num_ppo_epochs"],
    "minibatch_size": ["nminibatches", "num_mini_batches", "local_micro_batch_size"],
    "whiten": ["norm_adv", "masked_normalize"],
    "0 where masked": ["INVALID_LOGPROB"],
    "temperature": ["heat"],
    "rows_of_this_rank": ["own_rows"],
    "packed_logits": ["counted_logits"],
    "packed_values": ["counted_values"],
}
ALIASES = {alias: name for name, aliases in GLOSSARY.items() for alias in aliases}


# --- reading the code -------------------------------------------------------------------------


def module_name(path):
    """The name of a module inside the package: 'kl', 'worlds.oracle', 'checks', '' for minippo."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def rung(module):
    """The place of a module in the ladder: its own, or that of its folder."""
    return ORDER.index(module.split(".")[0])


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FORMULAS = [module for module in LADDER["formulas"] if module in MODULES]
SOURCES = [*MODULES.values(), *sorted((NOTEBOOKS / "src").glob("*.py"))]
PYTHON = [*SOURCES, *sorted((ROOT / "tests").glob("*.py")), *sorted(NOTEBOOKS.glob("*.py"))]


def place(path, node):
    """Where something was found."""
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def find(kind, paths):
    """Every node of a kind in the given files, with its file."""
    nodes = [(path, node) for path in paths for node in ast.walk(tree_of(path))]
    return [(path, node) for path, node in nodes if isinstance(node, kind)]


def functions(paths):
    """Every function and method of the given files, with its file."""
    return find((ast.FunctionDef, ast.AsyncFunctionDef), paths)


def has_docstring(node):
    """Whether a module, class or function begins with a docstring."""
    return ast.get_docstring(node, clean=False) is not None


def depth(node, level=0):
    """How deep blocks are nested inside a node; an elif stands beside its if."""
    below = [child for child in ast.iter_child_nodes(node) if not is_elif(node, child)]
    inner = [depth(child, level + isinstance(child, BLOCKS)) for child in below]
    beside = [depth(child, level) for child in ast.iter_child_nodes(node) if is_elif(node, child)]
    return max([level, *inner, *beside])


def is_elif(node, child):
    """Whether a child is the elif of an if: in its else, and in the same column."""
    both = isinstance(node, ast.If) and isinstance(child, ast.If)
    return both and child in node.orelse and child.col_offset == node.col_offset


def imported(path):
    """Every module that a file imports, anywhere in it, by its full dotted name."""
    inside = path.is_relative_to(PACKAGE)
    package = ("minippo", *path.relative_to(PACKAGE).parent.parts) if inside else ()
    for _, node in find((ast.Import, ast.ImportFrom), [path]):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        whole = ".".join([*base, *(node.module.split(".") if node.module else [])])
        yield from ((node, member(whole, alias.name)) for alias in node.names)


def member(module, name):
    """`from module import name`: a submodule where there is one, else the module itself."""
    inner = f"{module}.{name}".removeprefix("minippo.")
    return f"{module}.{name}" if module.startswith("minippo") and inner in MODULES else module


def own_imports(module):
    """The modules of the package that a module imports, with the node that does it."""
    for node, name in imported(MODULES[module]):
        fact = isinstance(node, ast.ImportFrom) and [a.name for a in node.names] == ["__version__"]
        if name.split(".")[0] == "minippo" and not fact:
            yield node, name.removeprefix("minippo").removeprefix(".")


# --- the ladder -------------------------------------------------------------------------------


def test_every_module_has_a_place_in_the_ladder():
    assert not [module for module in MODULES if module.split(".")[0] not in ORDER]


def goes_up(module, target):
    """Whether the import of a module is one of an earlier rung, or of a sibling in its folder."""
    siblings = module != target and module.split(".")[0] == target.split(".")[0]
    return rung(target) < rung(module) or siblings


def test_imports_go_only_up_the_ladder():
    wrong = [
        f"{place(MODULES[module], node)} imports {target or 'minippo'}"
        for module in MODULES
        for node, target in own_imports(module)
        if not goes_up(module, target)
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["engine", "worlds", "app", "checks"])
def test_modules_of_a_folder_do_not_import_in_a_circle(folder):
    inside = {m: {t for _, t in own_imports(m) if t in MODULES} for m in MODULES}
    graph = {
        m: {t for t in targets if t.startswith(f"{folder}.")}
        for m, targets in inside.items()
        if m.startswith(f"{folder}.")
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph) > 1


TRAININGS = (train_lm, train_sft, train_reward_model, train_value_model, train_ppo)


@pytest.mark.parametrize("train", TRAININGS, ids=lambda train: train.__name__)
def test_trainings_share_one_signature_and_one_return_value(train):
    parameters = inspect.signature(train).parameters
    kinds = [p.kind is p.KEYWORD_ONLY for p in parameters.values()]
    named = [name for name, only in zip(parameters, kinds, strict=True) if only]
    assert list(parameters)[: len(parameters) - len(named)][-1] == "config"
    assert named[-2:] == ["seed", "hooks"] and kinds == sorted(kinds)
    assert inspect.signature(train).return_annotation == list[dict[str, float]]


@pytest.mark.parametrize("module", [m for modules in PATH.values() for m in modules])
def test_the_path_meets_the_engine_at_the_seam_only(module):
    for node, target in own_imports(module):
        if target.split(".")[0] == "engine":
            assert target in SEAM, place(MODULES[module], node)
            names = {alias.name for alias in node.names}
            assert names <= set(SEAM[target].split()), place(MODULES[module], node)
            assert target != "engine.loading" or module == "models"


def test_public_names_are_given_on_first_use_and_again_after_every_module_was_imported():
    """In a fresh process each: a submodule that is imported must not take the place of a name."""
    ask = "kinds = {n: type(getattr(minippo, n)).__name__ for n in minippo.__all__}; "
    every = "".join(f"import minippo.{m}; " for m in MODULES if m and m != "__main__")
    code = f"import minippo; {ask}first = kinds; {every}{ask}"
    code += "print(kinds == first, set(minippo.__all__) <= set(dir(minippo)), len(kinds))"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "True", str(len(minippo.__all__))]


def test_no_public_name_is_that_of_a_module():
    stems = {module.rpartition(".")[2] for module in MODULES}
    assert set(minippo.__all__) & stems == {"checks"}


def test_lessons_take_public_names_from_the_package_itself():
    lessons = [path for path in SOURCES if not path.is_relative_to(PACKAGE)]
    wrong = [
        f"{place(path, node)} takes {alias.name} from {node.module}"
        for path, node in find(ast.ImportFrom, lessons)
        for alias in node.names
        if str(node.module).startswith("minippo.") and alias.name in minippo.__all__
    ]
    assert lessons and not wrong


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'gea'"):
        minippo.gea  # noqa: B018


def test_config_needs_neither_torch_nor_transformers():
    found = {name.split(".")[0] for _, name in imported(PACKAGE / "config.py")}
    assert not found & {"torch", "transformers", "minippo"}


@pytest.mark.parametrize("module", FORMULAS)
def test_formula_modules_see_torch_and_earlier_formulas_only(module):
    allowed = {f"minippo.{formula}" for formula in LADDER["formulas"]}
    wrong = [
        name
        for _, name in imported(MODULES[module])
        if name not in allowed and name.split(".")[0] not in FORMULA_IMPORTS
    ]
    assert not wrong


def test_nothing_imports_the_packages_we_do_without():
    wrong = [
        f"{place(path, node)} imports {name}"
        for path in SOURCES
        for node, name in imported(path)
        if name.split(".")[0] in UNWANTED_PACKAGES
    ]
    assert not wrong


# --- budgets ----------------------------------------------------------------------------------


def over(budget, sizes):
    """What is above a budget, with its size."""
    return {name: size for name, size in sizes.items() if size > BUDGETS[budget]}


def lines_of(node):
    """How many lines a node takes."""
    return node.end_lineno - node.lineno + 1


def test_settings_to_learning_can_be_read_in_one_sitting():
    sizes = path_sizes()
    total = sum(sum(modules.values()) for modules in sizes.values())
    assert total <= BUDGETS["code lines, settings to learning"], sizes


@pytest.mark.parametrize("folder", ["engine", "app"])
def test_what_stands_below_and_above_the_path_stays_small(folder):
    sizes = folder_size(folder)
    assert sum(sizes.values()) <= BUDGETS[f"code lines of the {folder}"], sizes


def test_train_ppo_can_be_followed_to_the_ground():
    found = without_engine(traced_step())
    name = "a step of train_ppo, the engine left out"
    assert sum(found.values()) <= BUDGETS[f"code lines of {name}"], found
    assert len({file for file, _ in found}) <= BUDGETS[f"modules of {name}"], found


def test_functions_are_short():
    sizes = {
        f"{place(path, node)} {node.name}": lines_of(node) - len(docstring_lines(node))
        for path, node in functions(MODULES.values())
    }
    assert not over("lines of a function", sizes)


@pytest.mark.parametrize("module", FORMULAS)
def test_a_formula_has_at_most_ten_lines(module):
    path = MODULES[module]
    code = code_lines(path)
    sizes = {
        node.name: len(code & set(range(node.body[0].lineno, node.end_lineno + 1)))
        for _, node in functions([path])
    }
    assert not over("lines of a formula's body", sizes)


def test_blocks_are_nested_at_most_three_deep():
    depths = {
        f"{place(path, node)} {node.name}": depth(node)
        for path, node in functions(MODULES.values())
    }
    assert not over("nesting in a function", depths)


def test_an_elif_is_no_deeper_than_its_if():
    source = "def f():\n if a: pass\n elif b: pass\n elif c:\n  for x in y: pass\n else: pass"
    assert depth(ast.parse(source).body[0]) == 2
    assert depth(ast.parse("def f():\n if a: pass\n else:\n  if b: pass").body[0]) == 2


def test_lines_fit_on_the_page():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in PYTHON
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        if len(line) > BUDGETS["columns"]
    ]
    assert not wrong


def test_module_names_say_what_is_inside():
    assert not [module for module in MODULES if set(module.split(".")) & EMPTY_NAMES]


# --- habits -----------------------------------------------------------------------------------


def public_definitions(path):
    """The public functions and classes of a module, and the public methods of such classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree_of(path).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            members = node.body if isinstance(node, ast.ClassDef) else []
            yield from (m for m in members if isinstance(m, kinds) and not m.name.startswith("_"))


def test_every_public_function_has_a_docstring():
    wrong = [
        f"{place(path, node)} {node.name}"
        for path in MODULES.values()
        for node in public_definitions(path)
        if not has_docstring(node)
    ]
    assert not wrong


def called(node):
    """The bare name that a call calls, empty where it is none."""
    return node.func.id if isinstance(node.func, ast.Name) else ""


def test_library_modules_do_not_print():
    library = [path for module, path in MODULES.items() if not module.startswith(MAY_PRINT)]
    calls = [(path, node) for path, node in find(ast.Call, library) if called(node) == "print"]
    assert not [place(path, node) for path, node in calls]


def test_no_exception_is_swallowed():
    wrong = []
    for path, node in find(ast.ExceptHandler, PYTHON):
        broad = isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
        idle = all(isinstance(step, (ast.Pass, ast.Continue, ast.Break)) for step in node.body)
        if node.type is None or (broad and idle):
            wrong.append(place(path, node))
    assert not wrong


def words(path):
    """The names in a file's code, and the parts of its short strings, such as 'loss/value'."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME:
            yield token, token.string
        if token.type == tokenize.STRING and len(token.string) < 60:
            yield from ((token, part) for part in re.findall(r"[\w-]+", token.string))


def test_one_name_for_one_idea():
    here = {Path(__file__).resolve(), ROOT / "tests" / "test_peers.py"}  # it runs TRL's own lines
    wrong = [
        f"{path.relative_to(ROOT)}:{token.start[0]} '{word}': here this is '{ALIASES[word]}'"
        for path in PYTHON
        if path not in here
        for token, word in words(path)
        if word in ALIASES
    ]
    assert not wrong


# --- every text file --------------------------------------------------------------------------

TEXT = {".py", ".md", ".ipynb", ".toml", ".txt", ".cfg", ".json", ".yml", ".yaml", ".css", ".html"}
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:home|Users|root|work|tmp|opt)/\w|\b[A-Z]:\\Users")


def listed_files():
    """The files that git tracks or would; in an unpacked archive, all outside hidden folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [ROOT / name for name in answer.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        return list(walk())


def walk():
    """Every file of the folder but those of caches, environments and runs."""
    left_out = {"build", "dist", "runs", "__pycache__"}
    for folder, below, names in os.walk(ROOT):
        below[:] = [n for n in below if n not in left_out and (n == ".ci" or n[0] != ".")]
        yield from (Path(folder) / name for name in names)


@functools.cache
def text_lines():
    """Every line of every listed text file: (place, line)."""
    files = [path for path in listed_files() if path.suffix in TEXT or path.suffix == ""]
    return [
        (f"{path.relative_to(ROOT)}:{number}", line)
        for path in files
        if path.is_file() and path.stat().st_size < 5_000_000
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    ]


def test_nothing_is_left_for_later():
    assert not [where for where, line in text_lines() if MARKERS.search(line)]


def test_no_file_names_a_place_on_some_machine():
    assert not [where for where, line in text_lines() if MACHINE_PATH.search(line)]


def test_what_the_doctor_calls_tested_is_what_the_project_asks_for_and_pins():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    table = {name: versions for name, *versions in rows if name != "---"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["course"]]
    lowest = dict(line.split(">=") for line in asked)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = dict(line.split("==") for line in pins)
    assert table.keys() == TESTED.keys() | {"Python"}
    for package, (oldest, newest) in TESTED.items():
        assert table[package] == [oldest, pinned[package], newest]
        assert Version(lowest[package]) == Version(oldest)
    assert table["Python"][::2] == list(TESTED_PYTHON)
    assert project["requires-python"] == f">={TESTED_PYTHON[0]}"


def test_a_patch_of_the_newest_counts_as_tested_and_one_before_the_oldest_does_not():
    limits = ("2.6.1", "2.15.0")
    assert [untested(x, limits) for x in ("2.6.1", "2.7", "2.15.9", "2.15.0+cpu")] == [""] * 4
    assert "older than 2.6.1" in untested("2.6.0", limits)
    assert "newer than 2.15.0" in untested("2.16.0", limits)
