"""The teleoperation widget in a real browser: JupyterLab hands toggles and buttons to different threads of the kernel."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest

from rvlm.files import ROOT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
WORDS = ["left", "right", "away", "closer", "up", "down", "turn left", "turn right", "new scene"]
IS_READY = "window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'"
OPTIONS = [
    *("--no-browser", "--port-retries=50", "--IdentityProvider.token=", "--ServerApp.password="),
    "--LabApp.expose_app_in_browser=True",
]


def drive_alone(folder):
    """Notebook 00's cells up to the teleoperation cell."""
    notebook = json.loads((ROOT / "notebooks/00_look_first.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    parameters = next(cell for cell in code if "parameters" in cell["metadata"].get("tags", []))
    drive = next(cell for cell in code if "widgets.teleoperate(" in "".join(cell["source"]))
    first = {**drive, "id": "first", "metadata": {}}
    first["source"] = ["from rvlm.report import widgets\nfrom rvlm.envs.tabletop.env import Tabletop\nenv = Tabletop()"]
    folder.mkdir(parents=True)
    (folder / "00_look_first.ipynb").write_text(json.dumps({**notebook, "cells": [first, parameters, drive]}))


def address(process, log):
    """URL of the server."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        found = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1") or "http://localhost" in word]
        if found:
            url = found[0].split("/lab")[0].split("/tree")[0].rstrip("/")
            with contextlib.suppress(OSError):  # it is listed a moment before it answers
                urllib.request.urlopen(f"{url}/api", timeout=20)
                return url
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


@pytest.fixture
def server(tmp_path):
    """The server of `rvlm lab`, on its own copies."""
    drive_alone(tmp_path / "lab/notebooks")
    log, environment = tmp_path / "log", os.environ | {"RVLM_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    code = "import sys; from rvlm.cli.main import main; sys.exit(main())"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "lab", *OPTIONS], env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path
        )
    try:
        yield address(process, log)
    finally:
        process.terminate()
        process.wait(30)


def test_sixty_clicks_in_jupyterlab(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"{server}/lab/tree/00_look_first.ipynb", timeout=120_000)
        page.wait_for_function(IS_READY, timeout=180_000)
        page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.get_by_role("button", name="turn left").wait_for(timeout=180_000)
        assert page.get_by_text("Jupyter news").count() == 0, "nothing covers the page"
        image = page.locator(".jp-OutputArea-output img").first
        drawn, seen = random.Random(0), {image.get_attribute("src")}
        for click in range(60):
            word = "gripper open" if click % 4 == 1 else drawn.choice(WORDS)
            before = image.get_attribute("src")
            page.get_by_role("button", name=word, exact=True).click()
            page.wait_for_function(
                "([image, before]) => image.src !== before", arg=[image.element_handle(), before], timeout=60_000
            )
            seen.add(image.get_attribute("src"))
            assert page.get_by_text("Error").count() == 0, page.locator(".jp-OutputArea").last.inner_text()
        assert len(seen) > 55, "every click changes the image"
        browser.close()
