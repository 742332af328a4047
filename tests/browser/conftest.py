"""A browser for the tests, or a skip that says what is missing."""

import pytest
from browser.lab import CHROMIUM, browsing


@pytest.fixture(scope="session")
def playwright():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def page(playwright, tmp_path_factory):
    with browsing(playwright, tmp_path_factory.mktemp("browser")) as (page, _):
        yield page
