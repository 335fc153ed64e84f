"""Headless Chromium, as far as a test or a picture needs it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
DROP = """
const [bytes, name, type] = arguments;
const content = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
const carried = new DataTransfer();
carried.items.add(new File([content], name, { type }));
for (const kind of ["dragenter", "dragover", "drop"])
  document.getElementById("drop").dispatchEvent(
    new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: carried }));
"""


def is_there() -> bool:
    return CHROMIUM.exists() and DRIVER.exists()


@contextmanager
def browser(width_px: int, height_px: int, scheme: str = "light") -> Iterator[WebDriver]:
    """A page of that size, whose console is kept. scheme: light or dark."""
    options = Options()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 f"--window-size={width_px},{height_px}"):  # fmt: skip
        options.add_argument(flag)
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        # The window may not be as narrow as a phone; what is shown in it may.
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": False},
        )
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        yield driver
    finally:
        driver.quit()


def drop(driver: WebDriver, file: Path, kind: str) -> None:
    """As if the file were dragged onto the page."""
    driver.execute_script(DROP, base64.b64encode(file.read_bytes()).decode(), file.name, kind)


def complaints(driver: WebDriver) -> list[str]:
    """Errors on the console, such as a breach of the page's policy."""
    return [one["message"] for one in driver.get_log("browser") if one["level"] == "SEVERE"]
