"""Fixtures of the tests that look at pages in headless Chromium (Debian's, with its own driver)."""

import base64
import importlib.util
import os
import pathlib
import sys
import time

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

HERE = pathlib.Path(__file__).resolve().parent
INTEGRATION = HERE.parent / "integration"
sys.path.insert(0, str(INTEGRATION))

# Daemons are started and stopped as in the integration tests.
_spec = importlib.util.spec_from_file_location("integration_conftest", INTEGRATION / "conftest.py")
_integration = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_integration)
start_daemon, daemon = _integration.start_daemon, _integration.daemon
node, kubelet = _integration.node, _integration.kubelet

from daemon import bound  # noqa: E402  (needs the path above)

PICTURES = HERE.parents[1] / "build" / "logs"  # kept, for people
DESKTOP, PHONE = (1280, 1000), (390, 844)


class Browser:
    """One tab of a size. Everything that the page's console says is an error of the test."""

    def __init__(self, size, dark=False):
        options = Options()
        options.binary_location = "/usr/bin/chromium"
        for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage",
                     "--no-first-run", "--disable-background-networking", "--disable-extensions",
                     f"--window-size={size[0]},{size[1]}"):
            options.add_argument(flag)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium refuses to make one as root
        if size == PHONE:
            options.add_experimental_option("mobileEmulation", {
                "deviceMetrics": {"width": size[0], "height": size[1], "pixelRatio": 2}})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self.driver.set_page_load_timeout(60)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {
  "name" : "prefers-color-scheme", "value" : "dark" if dark else "light"}]})

    def open(self, address):
        self.driver.get(address)

    def run(self, script, *arguments):
        """The value of a JavaScript expression, or of a function's body with `return`."""
        return self.driver.execute_script(script, *arguments)

    def value(self, name):
        """What <data id=name> holds for machines."""
        return self.run("return document.getElementById(arguments[0]).value", name)

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def rows(self, name):
        """The cells of a table's body, as text; none before it is filled."""
        return self.run("const body = document.getElementById(arguments[0]).tBodies[0];"
                        "return body ? [...body.rows].map(row => [...row.cells].map("
                        "cell => cell.textContent)) : []", name)

    def wait(self, fact, what, seconds=20):
        """Waits until fact() is true; asserts that it becomes so in time."""
        deadline = time.monotonic() + bound(seconds)
        while not fact():
            assert time.monotonic() < deadline, what
            time.sleep(0.1)

    def scrolls_sideways(self):
        wide, seen = self.run("const e = document.documentElement;"
                              "return [e.scrollWidth, e.clientWidth]")
        return wide > seen

    def picture(self, name):
        """The whole page, however long, into build/logs."""
        height = self.run("return document.documentElement.scrollHeight")
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {
            "captureBeyondViewport": True, "clip": {
                "x": 0, "y": 0, "width": self.run("return innerWidth"), "height": height,
                "scale": 1}})
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / name).write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        """What the console said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="session")
def _browsers():
    """Idle ones, by size and scheme: starting one takes longer than most tests."""
    idle = {}
    yield idle
    for browsers in idle.values():
        for browser in browsers:
            browser.driver.quit()


@pytest.fixture
def browse(_browsers):
    """browse(size=DESKTOP, dark=False) gives a Browser that no other test uses."""
    lent = []

    def start(size=DESKTOP, dark=False):
        idle = _browsers.setdefault((size, dark), [])
        browser = idle.pop() if idle else Browser(size, dark)
        lent.append((idle, browser))
        return browser
    yield start
    for idle, browser in lent:
        browser.open("about:blank")
        browser.complaints()
        idle.append(browser)
