"""A Chromium that is there already; nothing is downloaded.

No conftest.py: the other tests import from the one above by that name.
"""

import shutil

import pytest

try:
    from playwright.sync_api import expect, sync_playwright
except ModuleNotFoundError:
    expect = sync_playwright = None

PATIENCE = 60_000  # ms until a page is taken to be stuck
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.fixture(scope="session")
def browser():
    for what, is_there in (("playwright", sync_playwright), ("a Chromium", CHROMIUM)):
        if not is_there:
            pytest.skip(f"not here: {what}")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
