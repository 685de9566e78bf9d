"""As a new user would: JupyterLab in a browser, open train.ipynb, Run All, see the plot."""

import os
import shutil
import subprocess
import time
import urllib.request

import pytest
from helpers import BIN, ROOT, free_port

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update""".split()


@pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
def test_run_all_in_jupyterlab_shows_the_plot(tmp_path):
    from playwright.sync_api import sync_playwright

    work = tmp_path / "nbs"
    work.mkdir()
    shutil.copy(ROOT / "nbs" / "train.ipynb", work)
    settings = (
        tmp_path
        / "config"
        / "lab"
        / "user-settings"
        / "@jupyterlab"
        / "notebook-extension"
        / "tracker.jupyterlab-settings"
    )
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # keep cells that are out of sight in the page
    port, env = (
        free_port(),
        os.environ
        | {
            "CODEX_NB_HOME": str(tmp_path / "home"),
            "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
            "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        },
    )
    lab = subprocess.Popen(
        [
            BIN / "jupyter",
            "lab",
            "--no-browser",
            "--allow-root",
            f"--port={port}",
            "--ServerApp.token=",
            "--ServerApp.password=",
            "--ServerApp.disable_check_xsrf=True",
            "--LabApp.news_url=",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            str(work),
        ],
        env=env,
        stdout=open(tmp_path / "lab.log", "w"),
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api").read()
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            page.goto(
                f"http://127.0.0.1:{port}/lab/tree/train.ipynb", wait_until="domcontentloaded"
            )
            page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
            page.wait_for_timeout(3000)
            page.get_by_text("Run", exact=True).first.click()
            page.get_by_text("Run All Cells", exact=True).click()
            end = time.monotonic() + 180
            while time.monotonic() < end and not list(
                (tmp_path / "home" / "runs").glob("*/manifest.json")
            ):
                page.wait_for_timeout(500)
            page.wait_for_timeout(1500)
            plot = page.locator(".jp-OutputArea-output img").first
            shot = os.environ.get("SCREENSHOT", str(tmp_path / "lab.png"))
            page.screenshot(path=shot)  # to look at, should the plot not come
            plot.wait_for(state="attached", timeout=20_000)
            plot.scroll_into_view_if_needed()
            page.wait_for_timeout(500)
            page.screenshot(path=shot)
            box, errors = (
                plot.bounding_box(),
                page.locator(
                    ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"
                ).count(),
            )
            browser.close()
        assert errors == 0 and box["width"] > 300 and box["height"] > 100
        (run,) = (tmp_path / "home" / "runs").iterdir()
        assert (run / "manifest.json").is_file() and (
            run / "figures" / "training.png"
        ).stat().st_size > 5000
    finally:
        lab.terminate()
        lab.wait()
