"""The page in headless Chromium: a prompt is run, tokens are coloured, and nothing sticks out on a phone."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from served import served, text_engine

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason="no server: pip install 'ease-lm[serve]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        try:
            chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page of a size and a scheme, which fails the test if a script does or something is asked of
    elsewhere.
    """
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith(("http://127.0.0.1", "data:")) else wrong.append(asked.url)
        ),
    )
    yield page
    context.close()
    assert wrong == []


LOOKS = pytest.mark.parametrize(
    "page", [(1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")], indirect=True
)


def set_threshold(page: Any, value: float) -> None:
    page.eval_on_selector(
        "#threshold", f"slider => {{ slider.value = {value}; slider.dispatchEvent(new Event('input')) }}"
    )


def run(page: Any, prompt: str) -> list[tuple[str, str]]:
    """Run a prompt: each token's text, and what is told of it."""
    page.uncheck("#chat")
    page.fill("#prompt", prompt)
    page.click("#go")
    page.wait_for_function("!document.getElementById('go').disabled")
    return [(token.inner_text(), token.get_attribute("title")) for token in page.query_selector_all(".token")]


@LOOKS
def test_a_prompt_is_run_and_its_tokens_coloured(page: Any) -> None:
    llm = text_engine()
    with served(llm) as server:
        page.goto(server.url)
        page.wait_for_selector("#policy option", state="attached")
        assert "toy" in page.inner_text("#model")
        page.fill("#max_tokens", "30")
        set_threshold(page, 0.3)
        tokens = run(page, "abc")
        assert len(tokens) == 30
        colours = {
            page.eval_on_selector(
                f".token[title^='depth {depth} ']", "t => getComputedStyle(t).backgroundColor"
            )
            for depth in (2, 4, 6)
        }
        assert len(colours) == 3
        page.hover(".token >> nth=3")
        assert page.inner_text("#about") == tokens[3][1]
        assert "confidence" in tokens[3][1]
        set_threshold(page, 1)
        assert page.inner_text("#shown") == "off"
        assert {title.split(" \u00b7 ")[0] for _, title in run(page, "abc")} == {"depth 6 of 6"}
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("page", [(360, "light")], indirect=True)
def test_errors_are_shown_and_a_run_is_stopped(page: Any) -> None:
    with served(text_engine(1, 256, seconds=0.05), api_key="secret") as server:
        page.goto(server.url)
        page.click("#go")
        page.wait_for_selector("#wrong:not(:empty)")
        assert "the API key is missing or wrong" in page.inner_text("#wrong")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector("#policy option", state="attached")
        page.click("#go")
        page.wait_for_selector(".token")
        page.click("#stop")
        page.wait_for_function("!document.getElementById('go').disabled")
        assert page.inner_text("#wrong") == ""
        assert 0 < len(page.query_selector_all(".token")) < 60


@pytest.mark.parametrize("page", [(1200, "light")], indirect=True)
def test_one_run_at_a_time_and_drafts_from_the_text(page: Any) -> None:
    with served(text_engine(seconds=0.02)) as server:
        page.goto(server.url)
        page.wait_for_selector("#policy option", state="attached")
        page.uncheck("#chat")
        page.fill("#max_tokens", "25")
        page.fill("#prompt", "abcabcabc")
        page.press("#prompt", "Control+Enter")
        page.wait_for_selector(".token")
        page.press("#prompt", "Control+Enter")  # changes nothing
        page.wait_for_function("!document.getElementById('go').disabled")
        assert len(page.query_selector_all(".token")) == 25
        assert not page.is_visible("#draft")
        page.select_option("#catch_up", "verify")
        page.select_option("#draft", "ngram")
        page.click("#go")
        page.wait_for_function("!document.getElementById('go').disabled")
        assert page.inner_text("#wrong") == ""
        titles = [token.get_attribute("title") for token in page.query_selector_all(".token")]
        assert len(titles) == 25
        assert all("depth 6 of 6" in title for title in titles)
