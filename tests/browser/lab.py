"""A JupyterLab of its own, a browser that has it open, and what is to be seen there."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS, RUN_SECONDS, SIZE = 120, 600, (1280, 1400)
# JupyterLab's own objects, which it shows to a page's scripts when it is asked to.
PANEL = "const [panel] = window.jupyterapp ? window.jupyterapp.shell.widgets('main') : [];"
READY = """
const session = panel && panel.sessionContext && panel.sessionContext.session;
return Boolean(session && panel.context.isReady && session.kernel
    && session.kernel.status === "idle" && panel.context.path === arguments[0]);
"""
RUN_ALL = """
const done = arguments[arguments.length - 1];
window.jupyterapp.shell.activateById(panel.id);
window.jupyterapp.commands.execute("notebook:run-all-cells")
    .then(() => done(""), error => done(String(error)));
"""
MODEL = "return panel.content.model.toJSON();"
SCROLL = """
const box = panel.node.querySelector(".jp-WindowedPanel-outer");
box.scrollTop = arguments[0] * (box.clientHeight - 60);
return box.scrollTop + box.clientHeight < box.scrollHeight - 2;
"""
# It would ask whether to fetch news, and look for a newer version of itself.
SETTINGS = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
OFFLINE = '{"fetchNews": "false", "checkForUpdates": false}'


def missing() -> str:
    """What has to be installed before a browser can be opened; empty if nothing."""
    packages = [name for name in ("selenium", "jupyterlab") if not importlib.util.find_spec(name)]
    programs = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    remedies = {"selenium": "pip install 'minippo[test]'", "jupyterlab": "'minippo[course]'"}
    remedies |= {"chromium": "apt install chromium", "chromedriver": "apt install chromium-driver"}
    return ", ".join(f"{name} is missing ({remedies[name]})" for name in packages + programs)


class Lab:
    """JupyterLab over copies of notebooks without outputs, open in a browser that nobody sees."""

    def __init__(self, notebooks: list[Path], home: Path):
        self.home, self.work = home, home / "work"
        self.work.mkdir()
        for path in notebooks:
            _write_without_outputs(path, self.work / path.name)

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", self.home / "jupyterlab.log"
        options = ["--no-browser", "--allow-root", "--IdentityProvider.token="]
        options += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
        options += [f"--ServerApp.root_dir={self.work}", "--LabApp.expose_app_in_browser=True"]
        command = [sys.executable, "-m", "jupyterlab", *options]
        # Settings of its own: not those of whoever runs this, and none of this for them to find.
        own = {f"JUPYTER_{x}_DIR": str(self.home / x) for x in ("CONFIG", "RUNTIME")}
        own |= {f"JUPYTERLAB_{x}_DIR": str(self.home / x) for x in ("SETTINGS", "WORKSPACES")}
        settings = self.home / "SETTINGS" / SETTINGS
        settings.parent.mkdir(parents=True)
        settings.write_text(OFFLINE)
        own |= {"JUPYTER_PREFER_ENV_PATH": "1", "MINIPPO_MINE": "off"}
        inherited = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # no figures with it
        with self.log.open("w") as log:
            self.server = subprocess.Popen(
                command, stdout=log, stderr=log, env={**inherited, **own}
            )
        try:
            self._wait("JupyterLab", lambda: _answers(f"{self.url}/api/status"))
            self.driver = _browser(self.home / "browser")
        except BaseException:
            self._stop_server()
            raise
        return self

    def __exit__(self, *error):
        self.driver.quit()
        self._stop_server()

    def run(self, name: str) -> dict:
        """Opens a notebook, runs all of its cells; returns it as JupyterLab holds it then."""
        self.driver.get(f"{self.url}/lab/tree/{name}?reset")
        self._wait(name, lambda: self._script(READY, name))
        self.driver.set_script_timeout(RUN_SECONDS)
        if failure := self.driver.execute_async_script(PANEL + RUN_ALL):
            raise RuntimeError(f"JupyterLab could not run {name}: {failure}")
        shown = None
        while shown != (shown := self._script(MODEL)) or not self._script(READY, name):
            time.sleep(1)  # a picture may come after the reply that its cell is done
        return shown

    def pictures(self, stem: Path) -> list[Path]:
        """Pictures of the open notebook from top to bottom, a screen each: STEM-01.png and on."""
        files, more = [], True
        while more:
            more = self._script(SCROLL, len(files))
            time.sleep(0.5)  # cells are drawn when they come into sight
            files.append(stem.with_name(f"{stem.name}-{len(files) + 1:02d}.png"))
            self.driver.save_screenshot(str(files[-1]))
        return files

    def _script(self, script: str, *arguments):
        """What a script that looks at the open notebook, its `panel`, returns."""
        return self.driver.execute_script(PANEL + script, *arguments)

    def _wait(self, what: str, holds) -> None:
        end = time.monotonic() + START_SECONDS
        while not holds():
            if self.server.poll() is not None or time.monotonic() > end:
                message = f"{what} was not there after {START_SECONDS} seconds"
                raise RuntimeError(f"{message}:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def _stop_server(self) -> None:
        self.server.terminate()  # it ends its kernels
        self.server.wait(30)


def _browser(profile: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    # No sandbox, for containers run as root; the rest keeps Chromium off the network and the GPU.
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                   "disable-background-networking", "disable-component-update", "disable-sync",
                   f"user-data-dir={profile}", "window-size={},{}".format(*SIZE)):  # fmt: skip
        options.add_argument(f"--{switch}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def _answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=5).status == 200
    except (URLError, TimeoutError, ConnectionError):
        return False


def _write_without_outputs(source: Path, target: Path) -> None:
    import nbformat

    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, target)


def differences(shown: dict, committed: dict, compare: bool = True) -> list[str]:
    """What a notebook shows that the committed one does not: errors, warnings, other text.

    compare: False looks for errors and cells that did not run alone, for unsolved exercises
    """
    found, count = [], 0
    pairs = zip(shown["cells"], committed["cells"], strict=True)
    for number, (cell, wanted) in enumerate(pairs):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        count += 1
        errors = [x["ename"] for x in cell["outputs"] if x["output_type"] == "error"]
        if errors:
            found.append(f"cell {number} raises {errors[0]}")
        elif cell["execution_count"] != count:
            found.append(f"cell {number} ran as number {cell['execution_count']}, not {count}")
        if compare and not _ignored(wanted) and _text(cell) != _text(wanted):
            found.append(f"cell {number} prints other text than the committed notebook")
        if compare and _images(cell) != _images(wanted):
            found.append(f"cell {number} shows {_images(cell)} images, not {_images(wanted)}")
    return found


def _ignored(cell: dict) -> bool:
    return "nbval-ignore-output" in cell["metadata"].get("tags", [])


def _text(cell: dict) -> str:
    streams = [x for x in cell["outputs"] if x["output_type"] == "stream"]
    return "".join("".join(x["text"]) for x in streams)


def _images(cell: dict) -> int:
    return sum("image/png" in x.get("data", {}) for x in cell["outputs"])
