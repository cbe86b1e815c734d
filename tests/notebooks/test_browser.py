"""The explorer in a real JupyterLab in a real browser: run a notebook, turn its knobs, and look whether the
picture follows.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, TimeoutError, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "runs" / "screenshots"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--mute-audio",
]
VIEW = "box.querySelectorAll('img.widget-image')[1]"  # the thumbnails come before it
PATIENCE = 420_000  # milliseconds for a notebook in the smoke profile on a busy machine
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent.trim())"
# Every code cell has its number, or something stands in the way: an error, a dialog about a kernel that died.
ENDED = f"""() => {{
    const wrong = document.querySelector(
        '.jp-OutputArea-output[data-mime-type$="jupyter.error"], .jp-Dialog');
    if (wrong) return wrong.innerText;
    const prompts = {PROMPTS};
    return prompts.length > 3 && prompts.every(text => /^\\[\\d+\\]:$/.test(text)) && 'run' }}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab on copies of the notebooks, as `make lab` starts it: the address with its token."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(
        ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    settings = folder / "settings" / "@jupyterlab"
    for name, values in (
        (
            "notebook-extension/tracker",
            {"windowingMode": "none"},
        ),  # else cells out of view are not in the page
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    # What make test shares between its runs of the notebooks is taken over; alone, the test has places of
    # its own.
    own = {"SELIB_DATA": folder / "data", "SELIB_CHECKPOINTS": folder / "checkpoints"}
    env = {name: str(path) for name, path in own.items()} | dict(os.environ)
    env |= {
        "SELIB_PROFILE": "smoke",
        "JUPYTER_TOKEN": token,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "share"),
        "SELIB_RESULTS": str(folder / "results"),
    }
    log = (folder / "lab.log").open("w")
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ip",
        "127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder}",
    ]
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab does not answer: {(folder / 'lab.log').read_text()[-2000:]}")
        # A workspace each: in a shared one JupyterLab opens the notebooks of the tests before beside this
        # one.
        yield f"{address}/lab/workspaces/{{name}}/tree/notebooks/{{name}}.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture(scope="module")
def pages() -> Iterator[Any]:
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium: install one, or name it in SELIB_CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        allowed = ["clipboard-read", "clipboard-write"]
        yield lambda: chromium.new_context(
            viewport={"width": 1400, "height": 1500}, permissions=allowed
        ).new_page()
        chromium.close()


class Notebook:
    """A notebook open in the browser, alone and run to its end."""

    def __init__(self, page: Page, address: str, name: str) -> None:
        self.page, self.name, self.errors = page, name, []  # type: ignore[var-annotated]
        page.set_default_timeout(60_000)
        page.on(
            "console", lambda message: self.errors.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address.format(name=name))
        # The toolbar shows an idle kernel before it is connected; the status bar does not.
        expect(page.locator("#jp-bottom-panel")).to_contain_text(re.compile(r"\| Idle"), timeout=120_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            how = page.wait_for_function(ENDED, timeout=PATIENCE).json_value()
        except TimeoutError:
            how = page.evaluate(f"{PROMPTS}.join(' ')")
        if how != "run":
            SHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SHOTS / f"{name}_not_run_page.png")
            pytest.fail(f"{name} was not run to its end: {how}; the console: {self.errors}; see {SHOTS}")
        self.box = (
            page.locator(".jp-OutputArea-output .widget-vbox").filter(has=page.locator(".widget-image")).first
        )
        self.box.scroll_into_view_if_needed()

    def knob(self, label: str) -> Locator:
        """The control with this label."""
        return self.box.locator(".jupyter-widgets.widget-inline-hbox").filter(
            has=self.page.locator(".widget-label", has_text=re.compile(f"^{label}$"))
        )

    def slide(self, label: str, key: str, times: int = 1) -> None:
        handle = self.knob(label).locator(".noUi-handle")
        expect(handle).to_be_visible()  # a slider that its rule has just brought up
        handle.focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    @property
    def source(self) -> str:
        """Where the browser has the main picture from."""
        return str(self.box.evaluate(f"box => {VIEW}.src"))

    def pixels(self) -> np.ndarray:
        """The main picture, as the browser shows it."""
        drawn = f"""box => {{ const image = {VIEW}, page = document.createElement('canvas');
            if (!image.complete || !image.naturalWidth) return '';
            [page.width, page.height] = [image.naturalWidth, image.naturalHeight];
            page.getContext('2d').drawImage(image, 0, 0);
            return page.toDataURL('image/png') }}"""
        deadline = time.monotonic() + 30
        while not (content := str(self.box.evaluate(drawn))):  # the next picture is being loaded
            assert time.monotonic() < deadline, "the picture is never there"
            time.sleep(0.05)
        return np.asarray(
            Image.open(io.BytesIO(base64.b64decode(content.split(",")[1]))).convert("RGB"), dtype=int
        )

    def changes(self, act: Any) -> None:
        """Do something, and see another picture: pixels are compared, not only that something was sent."""
        before, source = self.pixels(), self.source
        act()
        deadline = time.monotonic() + 30
        while self.source == source:
            if time.monotonic() > deadline:
                self.keep("failed")
                pytest.fail(f"the picture did not change; see {SHOTS}, and {self.errors}")
            time.sleep(0.05)
        after = self.pixels()
        assert after.shape != before.shape or np.abs(after - before).max() > 20

    def settled(self) -> np.ndarray:
        """The picture when nothing has moved for a second."""
        source, since = self.source, time.monotonic()
        deadline = since + 60
        while time.monotonic() - since < 1.0:
            assert time.monotonic() < deadline, "the picture does not come to rest"
            time.sleep(0.05)
            if self.source != source:
                source, since = self.source, time.monotonic()
        return self.pixels()

    def burst(self, label: str, key: str, times: int) -> int:
        """Many key presses at one stroke on a slider, faster than anyone can draw: how often was the SE
        vector drawn anew?
        """
        count = """box => {
            window.drawn = 0;
            const gates = box.querySelector('svg[role=img]').closest('.widget-html-content');
            new MutationObserver(() => window.drawn++).observe(gates, {childList: true}) }"""
        self.box.evaluate(count)
        press = """(handle, [key, times]) => {
            for (let i = 0; i < times; i++)
                handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))
        }"""
        self.knob(label).locator(".noUi-handle").evaluate(press, [key, times])
        self.page.wait_for_function("() => window.drawn > 0")
        self.page.wait_for_timeout(2000)
        return int(self.page.evaluate("window.drawn"))

    def saved_stills(self) -> list[dict[str, str]]:
        """The outputs of the saved notebook that a page without widgets shows as pictures."""
        self.page.keyboard.press("Control+s")
        expect(self.page.locator("#jp-main-dock-panel .lm-TabBar-tab.jp-mod-dirty")).to_have_count(0)
        path = f"/api/contents/notebooks/{self.name}.ipynb"
        notebook = self.page.evaluate("path => fetch(path).then(answer => answer.json())", path)["content"]
        outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
        return [data for data in outputs if "image/png" in data]

    def keep(self, what: str) -> None:
        """A screenshot of the widget, and one of the page."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.box.screenshot(path=SHOTS / f"{self.name}_{what}.png")
        self.page.screenshot(path=SHOTS / f"{self.name}_{what}_page.png")

    def close(self) -> None:
        """Keep what it looks like, and see that nothing went wrong."""
        self.keep("explorer")
        assert (
            self.page.locator(
                '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"], '
                '.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]'
            ).count()
            == 0
        )
        assert not self.errors, self.errors
        self.page.get_by_role("menuitem", name="Kernel", exact=True).click()
        self.page.get_by_role("menuitem", name="Shut Down Kernel", exact=True).click()
        expect(self.page.locator("#jp-bottom-panel")).to_contain_text("No Kernel")
        self.page.close()


def test_quickstart(lab: str, pages: Any) -> None:
    book = Notebook(pages(), lab, "00_quickstart")
    book.changes(lambda: book.slide("top share", "Home"))
    book.changes(lambda: book.knob("target").locator("select").select_option(index=1))
    # One channel of 1,280, and a second one picked by hand: of many, one more would hardly be seen.
    book.changes(lambda: book.knob("channels").locator("select").select_option("k channels"))
    book.changes(lambda: book.slide("k", "Home"))
    book.changes(lambda: book.box.locator(".widget-toggle-button").nth(1).click())
    assert book.knob("channels").locator("select").input_value() == "picked by hand"
    book.changes(lambda: book.box.get_by_role("button", name="next").click())
    # A burst of moves: most are never drawn, the last one remains, and is what the same place shows when it
    # is reached in peace.
    book.knob("channels").locator("select").select_option("top share")
    book.slide("top share", "End")
    book.settled()
    assert book.burst("top share", "ArrowLeft", 40) <= 5
    hasty = book.settled()
    assert re.search(r"\b(59|60) ?%", book.knob("top share").inner_text())
    book.slide("top share", "ArrowLeft")
    book.settled()
    book.slide("top share", "ArrowRight")
    assert np.array_equal(book.settled(), hasty)
    book.box.get_by_role("button", name="copy code").click()
    lines = book.box.locator("pre").inner_text()
    assert book.page.evaluate("navigator.clipboard.readText()") == lines and "selib.TopFraction(0.6" in lines
    # What a page without widgets will show is the last state.
    deadline = time.monotonic() + 30
    while not any("TopFraction(0.6" in still["text/plain"] for still in book.saved_stills()):
        # it follows when the knobs have rested
        assert time.monotonic() < deadline, "the still picture does not follow"
        book.page.wait_for_timeout(500)
    expect(book.page.locator("img.selib-still")).to_be_hidden()  # while the widget lives
    book.close()
    # Reopened, the notebook has no widget, and no kernel that knows of it: the picture stands there.
    page = pages()
    page.goto(lab.format(name="00_quickstart"))
    still = page.locator("img.selib-still")
    expect(still).to_be_visible(timeout=60_000)
    expect(page.locator("#jp-bottom-panel")).to_contain_text(re.compile(r"\| Idle"), timeout=120_000)
    still.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)
    page.screenshot(path=SHOTS / "00_quickstart_reopened_page.png")
    expect(still).to_be_visible()
    assert "TopFraction(0.6" in str(still.get_attribute("alt"))
    for message in page.get_by_text("Error displaying widget").all():
        expect(message).to_be_hidden()
    page.close()


def test_celeba(lab: str, pages: Any) -> None:
    book = Notebook(pages(), lab, "02_celeba")
    book.changes(lambda: book.slide("top share", "Home"))
    book.changes(lambda: book.knob("target").locator("select").select_option(index=2))
    book.changes(lambda: book.box.locator(".widget-toggle-button").first.click())
    book.changes(lambda: book.knob("compare").locator("select").select_option("Grad-CAM"))
    book.close()


def test_active_speaker(lab: str, pages: Any) -> None:
    book = Notebook(pages(), lab, "03_active_speaker")
    book.changes(lambda: book.slide("frame", "ArrowRight", 5))
    book.changes(
        lambda: book.box.locator(".widget-toggle-button", has_text="face").first.click()
    )  # switched off
    book.changes(lambda: book.slide("top share", "Home"))
    book.changes(lambda: book.box.locator(".widget-play button").first.click())  # plays
    book.changes(lambda: None)  # and goes on by itself
    book.box.locator(".widget-play button").first.click()
    book.settled()
    book.close()
