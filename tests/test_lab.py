"""As a new user would: train.ipynb in JupyterLab, in a real browser."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request

import nbformat
import pytest
from helpers import BIN, ROOT, free_port, write_model, write_tokenizer

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update""".split()
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
SETTINGS = {  # keep cells that are out of sight in the page; restart without asking
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/sessionDialogs": {"skipKernelRestartDialog": True},
}
ERROR = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"


class Lab:
    "JupyterLab with one notebook open, and a browser that looks at it."

    def __init__(self, folder, browser, notebook):
        self.home, work = folder / "home", folder / "nbs"
        work.mkdir()
        nbformat.write(notebook, work / "notebook.ipynb")
        for name, settings in SETTINGS.items():
            path = folder / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(settings))
        port = free_port()
        own = {"CODEX_NB_HOME": self.home, "JUPYTER_CONFIG_DIR": folder / "config"}
        own |= {"JUPYTER_DATA_DIR": folder / "data"}
        words = """--no-browser --allow-root --ServerApp.token= --ServerApp.password=
            --ServerApp.disable_check_xsrf=True --LabApp.news_url=
            --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate""".split()
        self.server = subprocess.Popen(
            [BIN / "jupyter", "lab", f"--port={port}", *words, work],
            env=os.environ | {k: str(v) for k, v in own.items()},
            stdout=open(folder / "lab.log", "w"),
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
        self.until(lambda: answers(f"{url}/api"), pause=lambda: time.sleep(0.5))
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.goto(f"{url}/lab/tree/notebook.ipynb", wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.page.wait_for_timeout(3000)

    def until(self, condition, seconds=180, pause=None):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"this did not come: {condition}"
            (pause or (lambda: self.page.wait_for_timeout(300)))()

    def choose(self, menu, entry):
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.get_by_text(entry, exact=True).click()

    def runs(self, pattern="*"):
        return sorted((self.home / "runs").glob(pattern))

    def screenshot(self, name):
        self.page.wait_for_timeout(700)
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=f"{folder}/{name}.png")

    def close(self):
        self.page.close()
        self.server.terminate()
        self.server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url).read()  # noqa: S310 (a server of our own)
    except OSError:
        return None


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def training_notebook(**parameters):
    notebook = nbformat.read(ROOT / "nbs" / "train.ipynb", 4)
    cell = next(c for c in notebook.cells if c.source.startswith("preset ="))
    for name, value in parameters.items():
        line = re.compile(rf"^{name} = None", re.M)
        assert line.search(cell.source), name
        cell.source = line.sub(f"{name} = {value!r}", cell.source)
    return notebook


@pytest.fixture
def lab(tmp_path, browser):
    opened = []

    def start(notebook=None, **parameters):
        opened.append(Lab(tmp_path, browser, notebook or training_notebook(**parameters)))
        return opened[0]

    yield start
    for one in opened:
        one.close()


def test_two_runs_in_one_kernel_show_their_plots(lab):
    lab = lab()
    for n in (1, 2):
        lab.choose("Run", "Run All Cells")
        lab.until(lambda: len(lab.runs("*/manifest.json")) == n)
        plot = lab.page.locator(".jp-OutputArea-output img").first
        plot.wait_for(state="attached", timeout=20_000)
        plot.scroll_into_view_if_needed()
        lab.screenshot(f"run-{n}")
        box = plot.bounding_box()
        assert box["width"] > 300 and box["height"] > 100
        assert lab.page.locator(ERROR).count() == 0
    assert len(lab.runs()) == 2
    for run in lab.runs():
        assert (run / "figures" / "training.png").stat().st_size > 5000


def write_talker(folder):
    "A model of random weights with a chat template, whose answers end only where they must."
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    )
    texts = ["Who mended the old clock? Ada did, in the evening."]
    size = write_tokenizer(folder, texts, special, template=template)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    shape |= dict(intermediate_size=128, max_position_embeddings=256, vocab_size=size)
    write_model(folder, eos_token_id=0, **shape)


def test_a_chat_streams_stops_and_shows_markup_as_text(lab, tmp_path):
    write_talker(tmp_path / "talker")
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    line = f"from codex_nb import chat_cell\n\nchat_cell({str(tmp_path / 'talker')!r})"
    notebook.cells = [nbformat.v4.new_code_cell(line)]
    lab = lab(notebook)
    lab.choose("Run", "Run All Cells")
    page = lab.page
    box = page.locator("textarea[placeholder='Write something']")
    box.wait_for(timeout=60_000)
    attack = "<img src=x onerror='window.taken=1'><script>window.taken=1</script>Who are you?"

    def write(text):
        box.fill(text)
        page.get_by_role("button", name="Send").click()

    stop = page.get_by_role("button", name="Stop")
    write(attack)
    lab.until(lambda: page.get_by_text("model", exact=True).count() == 1)
    lab.until(stop.is_disabled)
    assert page.get_by_text("<img src=x onerror='window.taken=1'>").count() == 1
    assert page.evaluate("window.taken") is None
    page.get_by_text("Settings", exact=True).last.click()
    length = page.get_by_label("max tokens")
    length.fill("100000")
    length.press("Enter")
    write("And for ever?")
    lab.until(stop.is_enabled)
    answer = page.locator("div:has(> b:text-is('model'))").last
    lab.until(lambda: len(answer.inner_text()) > 40)  # it streams
    lab.screenshot("chat-streams")
    stop.click()
    lab.until(stop.is_disabled, seconds=20)
    lab.screenshot("chat")
    assert page.locator("div:has(> b)", has_text=re.compile("^model")).count() == 2
    assert page.locator(ERROR).count() == 0
