"""A browser for the tests, or a skip that says what is missing."""

import pytest
from browser.alone import Alone
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


@pytest.fixture
def opened(page, monkeypatch):
    """opened(widget) shows it alone in the page, and closes it in the end."""
    made = []

    def show(widget):
        made.append(widget)
        view = Alone(page, widget, monkeypatch)
        view.settle()
        return view

    yield show
    for widget in made:
        widget.close()
