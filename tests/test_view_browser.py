"""The live page in a real browser: Chromium without a window, driven by Playwright."""
import io
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import HERE
from tests.test_view import GOAL, POLICY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


@pytest.fixture(scope="module")
def running():
    """(process, address) of the command with the reference policy."""
    pytest.importorskip("mjviser")
    process = subprocess.Popen(
        [sys.executable, HERE / "run.py", "--view", POLICY, "--port", "0"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        yield process, process.stdout.readline().split()[0]
    finally:
        process.kill()


def drag_along_x(tab):
    """Drag the red arrow of the goal's handle to the lower right, far out of the training range."""
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    red = np.abs(np.asarray(picture, int) - (255, 53, 110)).sum(-1) < 60
    y, x = (float(np.median(places)) for places in np.nonzero(red))
    tab.mouse.move(x, y)
    tab.wait_for_timeout(500)
    tab.mouse.down()
    for k in range(1, 11):
        tab.mouse.move(x + 10 * k, y + 6 * k)
        tab.wait_for_timeout(50)
    tab.mouse.up()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it to test in a real browser")
def test_page_in_a_browser(running):
    """Set a goal and drag it, adapt, watch the distance fall; two browsers; Ctrl-C."""
    playwright = pytest.importorskip("playwright.sync_api")
    process, address = running
    errors = []

    def opened(browser):
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: message.type == "error" and errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.get_by_text(re.compile("The robot plays step")).wait_for()
        return tab

    def press(tab, name):
        # Not click(): that waits for two pictures first, seconds where software draws them.
        tab.get_by_role("button", name=name, exact=True).dispatch_event("click")

    def picture(tab):
        """A second later: PNG of the middle of the page, where the robot is."""
        tab.wait_for_timeout(1_000)
        return tab.screenshot(clip=dict(x=340, y=200, width=600, height=600))

    def distance(tab, step):
        """What the page tells once it plays that step."""
        told = tab.get_by_text(re.compile(f"The robot plays step {step},"))
        told.wait_for()
        return float(re.search(r"final distance ([\d.]+) m", told.inner_text())[1])

    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"])
        one, two = opened(browser), opened(browser)
        goals = [tab.locator("input[inputmode=decimal]") for tab in (one, two)]
        drag_along_x(one)
        playwright.expect(goals[1].nth(1)).to_have_value("0.767")  # y of the first held-out goal
        playwright.expect(goals[1].nth(0)).not_to_have_value("-0.022")  # x was dragged
        one.get_by_text("The goal is outside the training range.").wait_for()
        for number, value in enumerate(GOAL):
            goals[0].nth(number).fill(str(value))
            goals[0].nth(number).press("Enter")
            playwright.expect(goals[1].nth(number)).to_have_value(str(value))
        one.get_by_text("The goal is inside the training range").wait_for()
        one.get_by_text("Ready.").wait_for()
        press(one, "Adapt")
        after = distance(one, 3)
        press(two, "0")  # the second browser chooses, and the first shows it too
        before = distance(two, 0)
        assert distance(one, 0) == before and after < 0.5 * before
        two.close()
        one.get_by_text("Ready.").wait_for()
        press(one, "One more step")
        distance(one, 4)
        # The picture: not blank, and it moves. Where software draws it, a frame can take seconds.
        first = picture(one)
        assert len(first) > 20_000
        assert any(picture(one) != first for _ in range(60))
        browser.close()
    assert not errors
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and "closed" in process.stdout.read()
