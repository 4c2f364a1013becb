"""A page in headless Chromium, with real keys and a real mouse. Tests that use it are skipped where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """The browser that is installed, driven by Playwright."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    driver = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; it comes with the dev extra"
    )
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, file: Path, width: int = 1400, height: int = 900, **context: Any) -> Iterator[Any]:
    """A tab that shows a file. At the end: no script failed, nothing was logged, and nothing else was asked for."""
    held = browser.new_context(viewport={"width": width, "height": height}, **context)
    tab = held.new_page()
    wrong: list[str] = []
    asked: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    yield tab
    held.close()
    assert wrong == []
    assert asked == [file.as_uri()]
