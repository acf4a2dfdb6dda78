"""Every page in a browser, on a desk and on a phone, light and dark: nothing overflows, nothing is asked for from elsewhere, nothing fails,
and what can be worked works by mouse and by keys."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from diffalign import comparing
from diffalign.evaluation import suite
from diffalign.runs.watching import server
from diffalign.runtime.serving import listening
from diffalign.sampling import pictures
from tests.comparing.test_comparison import METHODS, SMALL, trained

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = ("sample", "evaluate", "compare", "run", "list", "watched")
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
GRAVE = {"serious", "critical"}  # of axe's faults
COLOURS, SHAPES = ("red", "blue", "green"), ("stars", "circles", "squares")
PROMPTS = [
    f"a photo of {n} {colour} {shape}" for n in ("one", "two", "three") for colour in COLOURS for shape in SHAPES
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pages in a browser: playwright is not installed")
    pytest.importorskip("axe_playwright_python", reason="pages in a browser: axe-playwright-python is not installed")
    if CHROMIUM is None:
        pytest.skip("pages in a browser: no Chromium is installed")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A comparison of two runs, samples of one, and its evaluation; page -> its address."""
    folder = tmp_path_factory.mktemp("pages")
    overrides = (*SMALL, "output.sample_every=1", "eval_rewards=[shapes_geneval, jpeg_compressibility]")
    comparison = comparing.opened((*METHODS, *overrides), folder / "compared", seeds="0", budget="updates=3", every=1)
    trained(comparison)
    comparing.reported(comparison)
    run = comparison.units[0].place
    pictures.sample(str(run), PROMPTS[:2], n=2, out=folder / "samples", base=True)
    prompts = folder / "prompts.jsonl"
    lines = [{"prompt": text, "tag": text.split()[3], "include": []} for text in PROMPTS]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated = folder / "evaluated"
    rewards = ["jpeg_compressibility"]
    suite.evaluate(
        [str(run)], str(prompts), evaluated, judges=rewards, samples=2, steps=2, drift=False, say=lambda line: None
    )
    with listening("127.0.0.1", 0) as (bound, address):
        served = server.Server(server.Watched(folder / "compared"), bound, None)
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield {
            "sample": (folder / "samples" / "index.html").as_uri(),
            "evaluate": (evaluated / "index.html").as_uri(),
            "compare": (folder / "compared" / "index.html").as_uri(),
            "run": (run / "index.html").as_uri(),
            "list": f"{address}/",
            "watched": f"{address}/run/{run.relative_to(folder / 'compared').as_posix()}/",
            "folder": run,
        }
        served.shutdown()


class Opened:
    """A page, what it asked for from elsewhere, and what it complained of."""

    def __init__(self, browser, address, size=SIZES["desk"], scheme="light"):
        self.context = browser.new_context(
            viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme
        )
        self.strange, self.said = [], []
        home = address.rsplit("/", 1)[0] if address.startswith("file:") else "/".join(address.split("/")[:3])
        self.context.route("**/*", lambda route: self._route(route, home))
        self.page = self.context.new_page()
        self.page.on(
            "console", lambda message: self.said.append(message.text) if message.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address)

    def _route(self, route, home):
        if route.request.url.startswith((home, "data:")):
            route.continue_()
        else:
            self.strange.append(route.request.url)
            route.abort()

    def __enter__(self):
        return self.page

    def __exit__(self, *_):
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole(browser, made, name, size, scheme):
    from axe_playwright_python.sync_playwright import Axe

    opened = Opened(browser, made[name], SIZES[size], scheme)
    with opened as page:
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        assert page.evaluate(
            "[...document.images].every((image) => !image.complete || image.naturalWidth || image.loading == 'lazy')"
        )
        found = Axe().run(page).response["violations"]
        grave = [each for each in found if each["impact"] in GRAVE]
        faults = [(each["id"], part["html"][:160], part["failureSummary"]) for each in grave for part in each["nodes"]]
        assert not faults
    assert not opened.strange
    assert not opened.said


def shown(page):
    """Which moments' pictures are seen."""
    seen = "[...document.querySelectorAll('[data-at]')].filter((part) => part.checkVisibility())"
    return page.evaluate(f"[...new Set({seen}.flatMap((part) => part.dataset.at.trim().split(/ +/)))]")


@pytest.mark.parametrize("name", ["run", "compare", "watched"])
def test_the_slider_goes_through_training(browser, made, name):
    with Opened(browser, made[name]) as page:
        slider = page.locator("#moment")
        assert page.locator("#said").text_content() == "3"
        assert shown(page) == ["3"]
        slider.focus()
        page.keyboard.press("Home")
        first = slider.get_attribute("data-moments").split()[0]
        assert page.locator("#said").text_content() == first
        assert shown(page) == [first]
        assert slider.get_attribute("aria-valuetext") == f"after {first} updates"
        page.keyboard.press("ArrowRight")
        assert shown(page) == [slider.get_attribute("data-moments").split()[1]]


def test_axes_of_a_comparison_are_switched_by_mouse_and_keys(browser, made):
    with Opened(browser, made["compare"]) as page:
        seen = lambda kind: page.locator(f".by-{kind}").is_visible()  # noqa: E731
        assert seen("updates") and not seen("rows")
        page.get_by_role("radio", name="network rows").check()
        assert seen("rows") and not seen("updates")
        page.locator("#x-rows").focus()
        page.keyboard.press("ArrowLeft")
        assert seen("updates") and not seen("rows")


def test_samples_of_an_evaluation_are_sorted_and_filtered(browser, made):
    data = json.loads(
        Path(made["evaluate"].removeprefix("file://")).read_text().partition('id="data">')[2].partition("</script>")[0]
    )
    scores = data["scores"][0][1]
    means = [sum(scores[2 * k : 2 * k + 2]) / 2 for k in range(len(PROMPTS))]
    with Opened(browser, made["evaluate"]) as page:
        titles = lambda: page.locator("#prompts h3").all_text_contents()  # noqa: E731
        assert titles() == PROMPTS[:24]
        page.locator("#more").click()
        assert titles() == PROMPTS
        assert not page.locator("#more").is_visible()
        page.locator("#order").select_option("worst")
        assert titles() == [PROMPTS[k] for k in sorted(range(len(PROMPTS)), key=lambda k: means[k])][:24]
        page.locator("#order").select_option("best")
        assert titles()[0] == PROMPTS[max(range(len(PROMPTS)), key=lambda k: means[k])]
        page.locator("#words").fill("GREEN")
        assert sorted(titles()) == sorted(text for text in PROMPTS if "green" in text)
        page.locator("#task").select_option("two")
        assert sorted(titles()) == sorted(text for text in PROMPTS if "two green" in text)
        assert page.locator("#count").text_content() == "3 of 3 prompts, of 27 in all"
        before = data["scores"][0][0]
        changed = [
            k
            for k in range(len(PROMPTS))
            if "two green" in PROMPTS[k] and scores[2 * k : 2 * k + 2] != before[2 * k : 2 * k + 2]
        ]
        page.locator("#order").select_option("flipped")
        assert sorted(titles()) == sorted(PROMPTS[k] for k in changed)


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_a_picture_opens_in_full_size_and_arrows_lead_on(browser, made, name):
    with Opened(browser, made[name]) as page:
        told = lambda: page.locator(".viewer .told").text_content()  # noqa: E731
        first = page.locator(".shot").first
        first.focus()
        page.keyboard.press("Enter")
        assert page.locator(".viewer").is_visible()
        width = "document.querySelector('.viewer img').getBoundingClientRect().width"
        size = page.evaluate(f"[{width}, innerWidth]")
        assert 300 < size[0] <= size[1], "larger than its 64 pixels"
        start = told()
        page.keyboard.press("ArrowRight")
        right = told()
        page.keyboard.press("ArrowDown")
        other = told()
        assert len({start, right, other}) == 3
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
        assert told() == start
        page.keyboard.press("ArrowLeft")
        assert told() == start, "there is none before the first"
        page.get_by_role("button", name="next").click()
        assert told() == right
        page.keyboard.press("Escape")
        assert not page.locator(".viewer").is_visible()
        assert page.evaluate("document.activeElement.className") == "shot"


def test_a_watched_page_follows_the_run_and_stays_where_one_is(browser, made):
    log = made["folder"] / "metrics.jsonl"
    before = log.read_text()
    opened = Opened(browser, made["watched"])
    try:
        with opened as page:
            page.locator("summary").first.click()
            page.locator("#moment").focus()
            page.keyboard.press("Home")
            row = {"update": 9, "reward/total": 7.25, "reward/jpeg_compressibility": 7.25, "seconds/total": 1.0}
            log.write_text(before + json.dumps(row) + "\n")
            page.locator("dd").first.filter(has_text="9").wait_for(timeout=20_000)
            assert page.locator("#said").text_content() == "1", "the slider stays"
            assert page.locator("details").first.get_attribute("open") is not None, "what was opened stays open"
            assert page.evaluate("document.activeElement.id") == "moment"
            page.context.set_offline(True)
            page.get_by_text("The server does not answer").wait_for(timeout=20_000)
            page.context.set_offline(False)
            page.get_by_text("The server does not answer").wait_for(state="detached", timeout=20_000)
    finally:
        log.write_text(before)
    assert not opened.strange
    assert all("ERR_INTERNET_DISCONNECTED" in line for line in opened.said)
