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
VIEW = "[...box.querySelectorAll('.selib-view img')].at(-2)"  # the last picture before the colour bar
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
        self.address = address.format(name=name)
        page.set_default_timeout(60_000)
        page.on(
            "console", lambda message: self.errors.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.address)
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
        self.box = self.explorer()
        self.box.scroll_into_view_if_needed()

    def explorer(self, number: int = 0) -> Locator:
        """One of the explorers on the page."""
        views = self.page.locator(".selib-view")
        return self.page.locator(".jp-OutputArea-output > .widget-vbox").filter(has=views).nth(number)

    def choose(self, label: str, value: str) -> None:
        """Of a menu."""
        self.knob(label).locator("select").select_option(value)

    def fill(self, label: str, value: str) -> None:
        """A field, and Enter."""
        field = self.knob(label).locator("input")
        field.fill(value)
        field.press("Enter")

    def press(self, name: str) -> None:
        """A button."""
        self.box.get_by_role("button", name=name, exact=True).click()

    def at(self, pictures: str, number: int, x: float, y: float) -> tuple[float, float]:
        """A place in a picture of a row, x and y from 0 to 1, in pixels of the page."""
        image = self.box.locator(f".selib-{pictures} img").nth(number)
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        assert box is not None
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def lines(self) -> str:
        """The copied lines."""
        return self.box.locator("pre").inner_text()

    def says(self, text: str) -> None:
        """Wait until the copied lines hold this."""
        expect(self.box.locator("pre")).to_contain_text(text)

    def run_below(self, code: str | None) -> Locator:
        """Run code in a new cell at the end, or what is in the clipboard: the cell."""
        page = self.page
        page.locator(".jp-Notebook").press("Escape")
        page.locator(".jp-Cell").last.locator(".jp-InputPrompt, .jp-MarkdownOutput").first.click()
        page.keyboard.press("Escape")
        page.keyboard.press("b")
        page.keyboard.press("Enter")
        cell = page.locator(".jp-Cell").last
        expect(cell.locator(".cm-content")).to_be_focused()
        if code is None:
            page.keyboard.press("Control+v")
            page.keyboard.press("Control+End")
            page.keyboard.insert_text("\nheatmap.shape")
        else:
            page.keyboard.insert_text(code)
        page.keyboard.press("Control+Enter")
        expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"))
        return cell

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
            const gates = box.querySelector('.selib-charts img');
            new MutationObserver(() => window.drawn++).observe(gates, {attributeFilter: ['src']}) }"""
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
    book.changes(lambda: book.slide("share", "Home"))
    book.changes(lambda: book.box.locator(".selib-thumbnails button").nth(1).click())
    # One channel of 1,280, and a second one picked by hand: of many, one more would hardly be seen.
    book.choose("channels", "k channels")
    book.changes(lambda: book.fill("k", "1"))
    book.changes(lambda: book.box.locator(".selib-channels button").nth(1).click())
    assert book.knob("channels").locator("select").input_value() == "picked by hand"
    book.changes(lambda: book.press("random"))
    book.choose("channels", "weight above")
    book.changes(lambda: book.slide("above", "End"))
    book.choose("channels", "paper's rule")
    book.press("reset")
    book.says("TopFraction(0.1)")
    book.changes(lambda: book.choose("method", "top-gate"))
    book.says("NormalQuantile")
    book.changes(lambda: book.choose("method", "log-odds influence"))
    book.says("contrast=True")
    book.changes(lambda: book.choose("beside", "Grad-CAM"))
    height = book.box.bounding_box()["height"]  # type: ignore[index]
    book.changes(lambda: book.choose("beside", "gate"))
    assert book.box.bounding_box()["height"] == height  # type: ignore[index]
    book.changes(lambda: book.choose("colours", "viridis"))
    book.changes(lambda: book.slide("opacity", "End"))
    book.changes(lambda: book.box.get_by_label("smooth").click())
    book.press("reset")
    book.settled()
    turn(book)
    point(book)
    ask(book)
    hurry(book)
    keep_and_paste(book)
    reopen(book, pages)


def turn(book: Notebook) -> None:
    """Through images and channels."""
    item, pages = book.knob("image").locator("select"), book.box.get_by_text(" of 1280")
    first = item.input_value()
    book.changes(lambda: book.box.get_by_title("The image after").click())
    book.changes(lambda: book.box.get_by_title("The image before").click())
    assert item.input_value() == first
    book.changes(lambda: item.select_option(index=3))
    book.says("batch([3])")
    book.settled()
    expect(pages).to_have_text("1–8 of 1280")
    shown = book.box.locator(".selib-channels span").first.inner_text()
    book.box.get_by_title("Channels after these").click()
    expect(pages).to_have_text("9–16 of 1280")
    book.box.get_by_title("Channels before these").click()
    expect(pages).to_have_text("1–8 of 1280")
    book.choose("sort by", "gate")
    expect(book.box.locator(".selib-channels span").first).not_to_have_text(shown)
    book.box.get_by_label("wrong").click()
    expect(item.locator("option")).not_to_have_count(4)
    book.box.get_by_label("wrong").click()
    expect(item.locator("option")).to_have_count(4)
    book.box.locator("select:has(option:text-is('every class'))").select_option(index=1)
    expect(item.locator("option")).to_have_count(1)
    book.press("reset")
    expect(item.locator("option")).to_have_count(4)


def point(book: Notebook) -> None:
    """What the pointer says, and what it drags."""
    mouse, tip = book.page.mouse, book.box.locator(".selib-tip.selib-on")
    mouse.move(*book.at("view", 1, 0.5, 0.5))
    expect(tip).to_have_text(re.compile(r"^[01]\.\d\d$"))
    mouse.move(*book.at("charts", 0, 0.3, 0.5))
    expect(tip).to_contain_text(re.compile(r"channel \d+: gate .* influence"))
    expect(tip.locator("img")).to_be_visible()
    before = book.lines()
    mouse.down()
    mouse.move(*book.at("charts", 0, 0.5, 0.5), steps=6)
    mouse.move(*book.at("charts", 0, 0.6, 0.5), steps=6)
    mouse.up()
    expect(book.box.locator("pre")).not_to_have_text(before)
    book.says("TopFraction(")
    book.choose("channels", "k channels")
    book.fill("k", "3")
    book.says("TopK(3)")
    mouse.move(*book.at("charts", 0, 0.3, 0.5))
    mouse.down()
    mouse.move(*book.at("charts", 0, 0.7, 0.5), steps=5)
    mouse.up()
    expect(book.box.locator("pre")).to_contain_text(re.compile(r"TopK\(\d{2,}\)"))
    book.press("reset")


def ask(book: Notebook) -> None:
    """For other classes: a click on an answer, the menu, a search."""
    target = book.knob("target").locator("select")
    before = target.input_value()
    x, y = book.at("charts", 1, 0.2, 0.34)  # the second answer
    book.changes(lambda: book.page.mouse.click(x, y))
    assert target.input_value() != before
    expect(book.box.get_by_label("follow")).not_to_be_checked()
    book.changes(lambda: book.box.get_by_label("follow").click())
    assert target.input_value() == before
    book.changes(lambda: book.fill("search", "tripod"))
    expect(target.locator("option")).to_have_text(["tripod"])
    book.press("reset")
    expect(target.locator("option")).to_have_count(1000)


def hurry(book: Notebook) -> None:
    """A burst of moves: most are never drawn, the last one remains, and is what the same place shows when it
    is reached in peace.
    """
    book.slide("share", "End")
    book.settled()
    assert book.burst("share", "ArrowLeft", 40) <= 6
    hasty = book.settled()
    book.says("TopFraction(0.158)")  # 10 ** (-40 * 0.02)
    book.slide("share", "ArrowLeft")
    book.settled()
    book.slide("share", "ArrowRight")
    assert np.array_equal(book.settled(), hasty)


def keep_and_paste(book: Notebook) -> None:
    """Save a picture, copy the code and run it, add a photograph of one's own."""
    book.press("save PNG")
    expect(book.box.get_by_text("saved runs/explorer-")).to_be_visible()
    book.press("copy code")
    lines = book.lines()
    assert book.page.evaluate("navigator.clipboard.readText()") == lines and "TopFraction(0.158)" in lines
    # What a page without widgets will show is the last state.
    deadline = time.monotonic() + 30
    while not any("TopFraction(0.158" in still["text/plain"] for still in book.saved_stills()):
        # it follows when the knobs have rested
        assert time.monotonic() < deadline, "the still picture does not follow"
        book.page.wait_for_timeout(500)
    expect(book.page.locator("img.selib-still")).to_be_hidden()  # while the widget lives
    expect(book.run_below(None).locator(".jp-OutputArea")).to_contain_text("torch.Size([1, 224, 224])")
    cell = book.run_below("display(widgets.explorer(model, [photo], classes=network.classes))")
    own = cell.locator(".widget-vbox").first
    expect(own.locator(".selib-view img")).to_have_count(3)
    file = io.BytesIO()
    Image.effect_mandelbrot((300, 200), (-3, -2.5, 2, 2.5), 100).save(file, "PNG")
    sent = {"name": "mine.png", "mimeType": "image/png", "buffer": file.getvalue()}
    with book.page.expect_file_chooser() as chooser:
        own.locator(".widget-upload").click()
    chooser.value.set_files(sent)  # type: ignore[arg-type]
    expect(own.locator("pre")).to_contain_text("mine.png")
    path = own.get_by_placeholder("path of a photograph")
    path.fill("no/such.png")
    path.press("Enter")
    expect(own.get_by_text("such.png")).to_be_visible()
    for scale, most in ((1400, 560), (900, 580), (700, 1200)):
        book.page.set_viewport_size({"width": scale, "height": 1500})
        book.page.wait_for_timeout(500)
        book.box.scroll_into_view_if_needed()
        book.keep(f"{scale}px")
        box = book.box.bounding_box()
        assert box is not None and box["height"] <= most, (scale, box)
        assert book.box.evaluate("box => box.scrollWidth <= box.clientWidth + 1"), f"cut off at {scale} px"
        book.changes(lambda: book.slide("share", "Home"))
        book.changes(lambda: book.box.get_by_title("The image after").click())
        book.press("reset")
        book.settled()
    book.page.set_viewport_size({"width": 1400, "height": 1500})
    book.page.get_by_role("menuitem", name="Settings", exact=True).click()
    book.page.get_by_text("Theme", exact=True).hover()
    book.page.get_by_text("JupyterLab Dark", exact=True).first.click()
    expect(book.page.locator("body[data-jp-theme-light=false]")).to_have_count(1)
    book.keep("dark")
    colour = "element => getComputedStyle(element).color"
    text = book.box.locator(".selib-view span").first.evaluate(colour)
    assert min(map(int, re.findall(r"\d+", text)[:3])) > 180, text  # light on dark
    book.says("TopFraction(")


def reopen(book: Notebook, pages: Any) -> None:
    """Reopened, the notebook has no widget, and no kernel that knows of it: the picture stands there."""
    book.saved_stills()
    book.close()
    page = pages()
    page.goto(book.address)
    still = page.locator("img.selib-still").first
    expect(still).to_be_visible(timeout=60_000)
    expect(page.locator("#jp-bottom-panel")).to_contain_text(re.compile(r"\| Idle"), timeout=120_000)
    still.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)
    page.screenshot(path=SHOTS / "00_quickstart_reopened_page.png")
    expect(still).to_be_visible()
    assert "TopFraction(" in str(still.get_attribute("alt"))
    for message in page.get_by_text("Error displaying widget").all():
        expect(message).to_be_hidden()
    page.close()


def test_celeba(lab: str, pages: Any) -> None:
    book = Notebook(pages(), lab, "02_celeba")
    book.changes(lambda: book.slide("share", "Home"))
    book.changes(lambda: book.knob("target").locator("select").select_option(index=2))
    book.changes(lambda: book.box.locator(".selib-channels button").nth(1).click())
    book.changes(lambda: book.choose("beside", "Grad-CAM"))
    book.close()


def test_active_speaker(lab: str, pages: Any) -> None:
    book = Notebook(pages(), lab, "03_active_speaker")
    frame = book.box.get_by_label("frame")
    book.changes(lambda: frame.fill("5"))
    book.changes(
        lambda: book.box.locator(".widget-toggle-button", has_text="face").first.click()
    )  # switched off
    book.changes(lambda: book.slide("share", "Home"))
    heard = "box => { const sound = box.querySelector('audio'); return [sound.paused, sound.currentTime] }"
    # Read and pressed at one stroke: a clip is short, and a machine may be slow.
    pause = """box => {
        const sound = box.querySelector('audio'), slider = box.querySelector('.selib-transport input');
        const state = [sound.paused, sound.currentTime, Number(slider.value)];
        if (!sound.paused) box.querySelector('.selib-transport button').click();
        return state }"""
    book.changes(lambda: book.press("▶ play"))
    book.changes(lambda: None)  # and goes on by itself
    paused, seconds, shown = book.box.evaluate(pause)
    assert not paused and abs(25 * seconds - shown) < 5  # one clock for both
    assert book.box.evaluate(heard)[0]
    book.settled()
    frame.fill("9")
    assert abs(book.box.evaluate(heard)[1] - 9 / 25) < 0.05
    book.close()
