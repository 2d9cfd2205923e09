"""An installed minippo finds its code, data, checkpoints and notebooks from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("there is no pyproject.toml to build from", allow_module_level=True)


@dataclass
class Installed:
    """An environment with minippo in it, and an empty folder to work in."""

    bin: Path
    packages: Path
    empty: Path

    def run(self, program: str, *arguments) -> str:
        """What a program of the environment prints, started in the empty folder."""
        return command(self.bin / program, *arguments, cwd=self.empty)


def command(*arguments, cwd: Path) -> str:
    """What a command prints; it must end well. The repository is not on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def install(folder: Path, *what) -> Installed:
    """A new environment that has minippo and sees the dependencies of this one.

    A path file names where they are. Path files that lie there are not read, so a minippo that is
    installed in this environment from a folder stays out of sight.
    """
    venv.create(folder / "env", with_pip=False)
    programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(command(programs / "python", "-c", where, cwd=folder).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet"]
    pip += ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--ignore-installed"]
    command(*pip, *what, cwd=folder)
    (folder / "empty").mkdir()
    return Installed(programs, packages, folder / "empty")


def left_by_builds() -> set[str]:
    """What a build may leave in the repository."""
    patterns = ("build", "dist", "*.egg-info", "minippo/data", "minippo/notebooks")
    return {str(path) for pattern in patterns for path in ROOT.glob(pattern)}


@pytest.fixture(scope="module")
def before():
    """What was there before the first build."""
    return left_by_builds()


@pytest.fixture(scope="module")
def wheel(before, tmp_path_factory):
    """The built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    command(*build, out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def from_wheel(wheel, tmp_path_factory):
    """Where the wheel is installed."""
    return install(tmp_path_factory.mktemp("from_wheel"), wheel)


@pytest.fixture(scope="module")
def editable(before, tmp_path_factory):
    """Where the repository is installed for work on it."""
    return install(tmp_path_factory.mktemp("editable"), "--editable", ROOT)


@pytest.mark.parametrize("kind", ["from_wheel", "editable"])
def test_the_shipped_checkpoints_load_and_are_evaluated_in_an_empty_folder(kind, request):
    installed = request.getfixturevalue(kind)
    said = installed.run("minippo", "doctor")
    assert said.count(" loads: ") == 5
    home = installed.packages / "minippo" if kind == "from_wheel" else ROOT
    assert f"data:   {home / 'data'}\n" in said
    said = installed.run("minippo", "evaluate", "--prompts", "4", "--best-of", "2")
    assert "win rate" in said
    assert [path.name for path in installed.empty.iterdir()] == ["runs"]


def test_the_first_notebook_of_the_wheel_gives_its_stored_outputs(from_wheel):
    notebooks = from_wheel.packages / "minippo" / "notebooks"
    (first,) = notebooks.glob("00_*.ipynb")
    shutil.copy(first, from_wheel.empty)
    options = ["-q", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", first.name]
    assert " passed" in from_wheel.run("python", "-m", "pytest", *options)


def test_the_wheel_carries_every_notebook_and_what_belongs_to_the_data(wheel):
    sizes = {item.filename: item.file_size for item in zipfile.ZipFile(wheel).infolist()}
    for folder, pattern in (("notebooks", "**/*.ipynb"), ("data", "**/*.*")):
        files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern)]
        files = [name for name in files if ".ipynb_checkpoints" not in name]
        assert files and not [name for name in files if f"minippo/{name}" not in sizes]
    assert not [name for name in sizes if "notebooks/src" in name or name.endswith("build.py")]


def test_the_five_checkpoints_of_the_wheel_take_less_than_eight_million_bytes(wheel):
    sizes = {item.filename: item.file_size for item in zipfile.ZipFile(wheel).infolist()}
    shipped = {name: size for name, size in sizes.items() if "/checkpoints/" in name}
    assert len({name.split("/")[-2] for name in shipped}) == 5
    assert sum(shipped.values()) < 8_000_000


def test_building_and_installing_leave_nothing_in_the_repository(before, from_wheel, editable):
    assert left_by_builds() == before
