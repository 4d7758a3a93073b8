"""The page of `trl-klx measure` in a real headless Chromium: `apt install chromium`, `pip install playwright`."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from support.tiny import CHARACTERS, save_tiny

from trl_klx.cli.commands import main
from trl_klx.measure import measure_kl

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium: apt install chromium"),
]

RESPONSES = 500
EVIL = "</script><img src=x onerror=alert(1)>"


def text(i: int) -> str:
    return "".join(CHARACTERS[(7 * i + k * k) % len(CHARACTERS)] for k in range(10 + i % 30))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 500 responses and three checkpoints; the first has an id that would be HTML."""
    folder = tmp_path_factory.mktemp("page")
    for name, seed in (("reference", 0), ("checkpoint-5", 1), ("checkpoint-20", 2), ("checkpoint-100", 3)):
        save_tiny(folder / name, seed)
    rows = [
        {"prompt": f"{i % 50}=", "response": text(i), "correct": i % 3 == 0, "id": f"r{i}" if i else EVIL}
        for i in range(RESPONSES)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--reference", str(folder / "reference"), "--policies", str(folder / "checkpoint-*")]
    command += ["--data", str(folder / "data.jsonl"), "--output_dir", str(folder / "out"), "--batch_size", "64"]
    assert main(["measure", *command]) == 0
    return folder


@pytest.fixture(scope="module")
def tokens(measured: Path) -> pd.DataFrame:
    """What the page shows, by checkpoint and id."""
    names = [str(measured / name) for name in ("checkpoint-5", "checkpoint-20", "checkpoint-100")]
    found = measure_kl(
        str(measured / "data.jsonl"), str(measured / "reference"), names, output_dir=measured / "out", batch_size=64
    )
    return found.to_pandas().set_index(["policy", "id"])


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, measured: Path) -> Iterator:
    """The loaded page; afterwards there were neither errors nor requests for anything else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or complaints.append(request.url)
    )
    page.set_default_timeout(10_000)
    page.goto((measured / "out" / "report.html").as_uri())
    page.wait_for_selector(".t")
    yield page
    context.close()
    assert complaints == []


def open_response(page, name: str) -> None:
    page.fill("#search", name)
    page.click(f"#list button:text-is('{name}')")
    page.wait_for_selector(f"#view-title:has-text('Response {name} ')")


def listed(page) -> list[str]:
    return page.locator("#list tr td:first-child").all_inner_texts()


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


def test_five_hundred_responses_load_soon(browser, measured: Path) -> None:
    assert (measured / "out" / "report.html").stat().st_size < 15e6
    page = browser.new_page()
    start = time.perf_counter()
    page.goto((measured / "out" / "report.html").as_uri())
    page.wait_for_selector(".t")
    assert time.perf_counter() - start < 15  # about one second on a quiet machine
    assert page.locator("#list tr").count() == RESPONSES
    assert page.locator("#count").inner_text() == f"({RESPONSES} of {RESPONSES})"
    assert page.locator("figure svg").count() == 4
    assert page.locator(".matrix tbody tr").count() == 3
    page.close()


def test_the_summary_comes_first_and_every_picture_says_what_it_shows(page, measured: Path) -> None:
    title = f"KL of 3 checkpoints to {measured / 'reference'}"
    assert page.title() == f"{title}: trl-klx measure"
    assert page.inner_text("h1") == title
    assert page.locator("section >> nth=0").get_attribute("aria-labelledby") == "summary-title"
    first = page.locator("section >> nth=0").locator("table").first.inner_text()
    assert all(f"checkpoint-{step}" in first for step in (5, 20, 100))
    assert "±" in first
    figures = page.locator("figure")
    for i in range(figures.count()):
        assert figures.nth(i).locator("figcaption").inner_text()
        assert figures.nth(i).locator("[aria-label]").first.get_attribute("aria-label")
    for i in range(page.locator("figure svg").count()):  # an axis has its unit
        assert "nats" in " ".join(page.locator("figure svg").nth(i).locator("text").all_text_contents())


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways_and_all_text_can_be_read(browser, measured: Path, width: int) -> None:
    """On a phone and a desktop: wide tables scroll in boxes of their own, and no label is too small."""
    phone = {"is_mobile": True, "has_touch": True} if width < 600 else {}
    context = browser.new_context(viewport={"width": width, "height": 844}, **phone)
    page = context.new_page()
    page.goto((measured / "out" / "report.html").as_uri())
    page.wait_for_selector(".t")
    page.click("details:has-text('All figures') summary")
    page.select_option("#metric", "log_ratio")
    for token in (0, 5, 5):  # the last is tapped again
        (page.tap if phone else page.hover)(f".t >> nth={token}")
        assert page.is_visible("#tip")
        tip = page.locator("#tip").bounding_box()
        assert tip["x"] >= 0
        assert tip["x"] + tip["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.locator("svg text").evaluate_all("texts => texts.map(t => t.getBoundingClientRect().height)")
    assert min(sizes) >= 12
    context.close()


def test_a_token_shows_its_numbers_and_both_top_fives(page, tokens: pd.DataFrame) -> None:
    open_response(page, "r7")
    page.hover(".t >> nth=4")
    assert page.is_visible("#tip")
    row = tokens.loc["checkpoint-100", "r7"]
    tables = page.locator("#tip table")
    assert tables.count() == 2
    for place, side in enumerate(("policy", "ref")):
        shown = numbers("\n".join(tables.nth(place).locator("td").all_inner_texts()))
        assert shown == pytest.approx(list(row[f"top_probs_{side}"][4]), rel=1e-2)
    facts = page.inner_text("#tip")
    assert f"rank {row['rank_policy'][4]}," in facts
    assert f"rank {row['rank_ref'][4]}," in facts
    kl = numbers(re.search(r"KL\(P\|\|R\) (\S+),", facts)[1])
    assert kl == pytest.approx([row["kl_policy_ref"][4]], rel=1e-2)
    page.mouse.move(5, 5)
    assert page.is_hidden("#tip")


def test_the_slider_moves_through_the_checkpoints(page, tokens: pd.DataFrame) -> None:
    open_response(page, "r7")
    colours = []
    for step in (5, 20, 100):
        page.locator("#policy").fill(str((5, 20, 100).index(step)))
        assert page.inner_text("#policy-name") == f"checkpoint-{step}"
        shown = numbers(page.inner_text("#list tr[aria-selected=true] td:nth-child(4)"))
        assert shown == pytest.approx([tokens.loc[f"checkpoint-{step}", "r7"]["kl_policy_ref"].mean()], rel=1e-2)
        heat = page.locator(".t").evaluate_all("spans => spans.map(s => Number(s.style.getPropertyValue('--h')))")
        values = tokens.loc[f"checkpoint-{step}", "r7"]["kl_policy_ref"]
        assert pd.Series(heat).corr(pd.Series(values), method="spearman") > 0.99
        colours.append(page.locator(".t").nth(4).evaluate("span => getComputedStyle(span).backgroundColor"))
    assert len(set(colours)) == 3


def test_other_measures_colour_too(page, tokens: pd.DataFrame) -> None:
    open_response(page, "r7")
    page.select_option("#metric", "log_ratio")
    # Below 0 is overlined, too, for those who cannot tell the colours apart.
    overlined = "spans => spans.map(s => getComputedStyle(s).textDecorationLine.includes('overline'))"
    cold = page.locator(".t").evaluate_all(overlined)
    assert cold == [value < 0 for value in tokens.loc["checkpoint-100", "r7"]["log_ratio"]]
    assert "log-ratio" in page.inner_text("#legend")


def test_filters_and_search(page, tokens: pd.DataFrame) -> None:
    page.select_option("#correct", "false")
    assert len(listed(page)) == sum(i % 3 != 0 for i in range(RESPONSES))
    page.select_option("#correct", "true")
    assert len(listed(page)) == sum(i % 3 == 0 for i in range(RESPONSES))
    page.fill("#search", text(9)[:9].upper())
    wanted = [f"r{i}" if i else EVIL for i in range(0, RESPONSES, 3) if text(9)[:9] in text(i)]
    assert set(listed(page)) == set(wanted)
    page.fill("#search", "")
    page.select_option("#correct", "")
    page.select_option("#class", label="number")
    page.locator("#list button").first.click()
    classes = tokens.loc["checkpoint-100", listed(page)[0]]["class"]
    faded = page.locator(".t").evaluate_all("spans => spans.map(s => s.classList.contains('faded'))")
    assert faded == [name != "number" for name in classes]
    assert set(page.locator("#moved td:nth-child(3)").all_inner_texts()) == {"number"}


def test_the_list_is_sorted_by_mean_or_as_given(page) -> None:
    means = [float(cell) for cell in page.locator("#list tr td:nth-child(4)").all_inner_texts()]
    assert means == sorted(means, reverse=True)
    page.click("#sort")
    assert listed(page)[1:4] == ["r1", "r2", "r3"]


def test_what_moved_most_leads_to_its_place(page, tokens: pd.DataFrame) -> None:
    mine = tokens.loc["checkpoint-100"]
    largest = max(value for values in mine["kl_policy_ref"] for value in values)
    first = page.locator("#moved tr").first
    assert numbers(first.locator("td").nth(3).inner_text()) == pytest.approx([largest], rel=1e-2)
    first.locator("button").click()
    page.wait_for_selector(".t:focus")
    assert page.evaluate("document.activeElement.textContent") == first.locator("mark").inner_text()
    assert page.is_visible("#tip")


def test_everything_is_reached_by_the_keyboard(page) -> None:
    reached = set()
    page.keyboard.press("Tab")
    for _ in range(20):
        reached.add(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"policy", "metric", "class", "correct", "search", "theme"} <= reached
    page.focus("#policy")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#policy-name") == "checkpoint-20"
    assert page.get_attribute("#policy", "aria-valuetext") == "checkpoint-20"
    assert page.locator(".t[tabindex='0']").count() == 1  # one stop, not one per token
    page.focus(".t[tabindex='0']")
    assert page.is_visible("#tip")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "2"
    assert page.is_visible("#tip")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "<eos>"
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    page.focus("#list button")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelectorAll('#list tr[aria-selected=true]').length") == 1


def luminance(colour: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# The background of a token at its fullest, as it comes out over that of the page.
FULL_COLOUR = """(name) => {
    const span = document.querySelector('.t');
    span.classList.toggle('cold', name === '--cold');
    span.style.setProperty('--h', '0.85');
    const canvas = document.createElement('canvas').getContext('2d');
    for (const node of [document.body, span]) {
        canvas.fillStyle = getComputedStyle(node).backgroundColor;
        canvas.fillRect(0, 0, 1, 1);
    }
    const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
    return `rgb(${red}, ${green}, ${blue})`;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_legible(browser, measured: Path, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG AA): text, quiet text, and text on the fullest colours."""
    page = browser.new_page(color_scheme=scheme)
    page.goto((measured / "out" / "report.html").as_uri())
    page.wait_for_selector(".t")

    def contrast(front: str, back: str) -> float:
        pair = page.evaluate(
            "([front, back]) => { const probe = document.body.appendChild(document.createElement('i'));"
            "const read = (c) => { probe.style.color = c; return getComputedStyle(probe).color; };"
            "const out = [read(front), read(back)]; probe.remove(); return out; }",
            [front, back],
        )
        low, high = sorted(map(luminance, pair))
        return (high + 0.05) / (low + 0.05)

    def is_dark() -> bool:
        return luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2

    for expected in (scheme == "dark", scheme != "dark"):  # as the system has it, then switched
        assert is_dark() == expected
        for front, back in (
            ("--ink", "--paper"),
            ("--quiet", "--paper"),
            ("--accent", "--paper"),
            ("--ink", "--panel"),
        ):
            assert contrast(f"var({front})", f"var({back})") > 4.5, (front, back)
        for colour in ("--hot", "--cold"):
            shown = page.evaluate(FULL_COLOUR, colour)
            assert contrast("var(--ink)", shown) > 4.5, colour
        page.click("#theme")
    page.close()


def test_text_stays_text(page) -> None:
    page.fill("#search", EVIL)
    assert listed(page) == [EVIL]
    page.locator("#list button").first.click()
    page.wait_for_selector("#view-title:has-text('onerror')")
    assert page.locator("img").count() == 0
