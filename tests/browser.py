"""Find a Chromium for the browser tests, or install one: `python tests/browser.py` prints its path, or why
there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """The path of a Chromium: SELIB_CHROMIUM, the system's, or Playwright's own."""
    system = os.environ.get("SELIB_CHROMIUM") or next(
        (path for name in NAMES if (path := shutil.which(name))), None
    )
    if system:
        return system
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


def install() -> str | None:
    """Playwright's own Chromium, else the distribution's where we may: its path, None where neither can be
    had.
    """
    attempts = [[[sys.executable, "-m", "playwright", "install", "chromium"]]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        attempts.append(
            [["apt-get", "update"], ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]]
        )
    for commands in attempts:
        try:
            for command in commands:
                subprocess.run(command, check=True, timeout=300, stdout=sys.stderr)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"{' '.join(commands[-1])}: {error}", file=sys.stderr)
        if found := find():
            return found
    return None


if __name__ == "__main__":
    print(find() or install() or "no Chromium could be found or installed: the browser tests will be skipped")
