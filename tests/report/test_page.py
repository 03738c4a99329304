"""The page in a browser: it needs nothing, says nothing wrong, shows all, and does what nobody else told it."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cromss_dist.cli import main
from cromss_dist.report.report import compose, write_report
from tests.report.browser import CHROMIUM, Page, chromium
from tests.report.run_folders import panel, pretraining_run, transfer_run, write_spool

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
HOSTILE = (
    """</text><script>window.owned=1</script>"><img src=//example.com/x.png onerror="window.owned=1"></svg>'$x^{$ {{ 7*7 }}"""
)


def write(out: Path, folders: list[Path], title: str = "Runs", panels: int = 2) -> Path:
    runs, sections = compose(folders, panels)
    write_report(sections, title, runs, out)
    return out


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, pretrainings: Path, transfers: Path) -> Path:
    return write(tmp_path_factory.mktemp("report") / "report.html", [pretrainings, transfers])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs whose every name, tag, key and value tries to get out."""
    folder = tmp_path_factory.mktemp("hostile")
    name = HOSTILE.replace("/", "\N{DIVISION SLASH}")
    pretraining_run(folder / name, 1, 3, **{HOSTILE: {HOSTILE: [HOSTILE]}})
    write_spool(
        folder / name,
        {"event": "tags", "values": {"git_revision": HOSTILE, HOSTILE: HOSTILE}},
        {"event": "dataset", "name": HOSTILE, "digest": HOSTILE, "source": HOSTILE},
        {"event": "spike", "step": HOSTILE, "reason": HOSTILE},
        {"event": "progress", "step": 9, "samples": 200, "metrics": {HOSTILE: 1, f"train/kept_s1/{HOSTILE}": 1}},
        {"event": "end", "status": HOSTILE, "error": HOSTILE},
    )
    transfer_run(folder / "a", HOSTILE, class_names=("water", HOSTILE))
    transfer_run(folder / "b", "other", class_names=("water", HOSTILE), skill=0.3)
    panel(folder / "a" / "panels" / f"{name}.png")
    return write(folder / "report.html", [folder], title=HOSTILE)


def check(page: Page, path: Path) -> None:
    """What has to hold of every page."""
    page.complaints.clear()
    page.requests.clear()
    page.open(path)
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("[...document.querySelectorAll('tbody')].filter(body => body.rows.length === 0).length") == 0


@needs_chromium
def test_a_page_asks_no_network_and_complains_of_nothing_and_shows_all(page: Page, report: Path) -> None:
    check(page, report)
    assert page.evaluate("document.images.length") == 5  # two of each run, one of a transfer
    assert page.evaluate("document.querySelectorAll('table').length") > 8
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    sizes = page.evaluate("[...document.querySelectorAll('.canvas > svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(sizes) > 15
    assert min(sizes) > 100
    assert page.evaluate("getComputedStyle(document.querySelector('.canvas path[style*=\"--series\"]')).stroke.startsWith('rgb')")


@needs_chromium
def test_nothing_is_wider_than_the_window_of_a_phone(page: Page, report: Path) -> None:
    page.open(report, width_px=390)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@needs_chromium
def test_colours_follow_the_readers_scheme_and_prints_are_light_and_fit_the_paper(page: Page, report: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page.open(report)
    light = page.evaluate(background)
    page.open(report, dark=True)
    assert page.evaluate(background) != light
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()") == "#22262b"
    page.resize(720, 1000)  # A4, without margins of 1 cm
    assert page.evaluate("document.documentElement.scrollWidth") == 720
    page.call("Emulation.setEmulatedMedia", media="")


@needs_chromium
def test_a_click_on_a_heading_sorts_by_number(page: Page, report: Path) -> None:
    page.open(report)
    column = (
        "(() => { const table = document.querySelector('#transfer table'); const head = [...table.tHead.rows[0].cells];"
        "const place = head.findIndex(cell => cell.textContent === 'OA'); head[place].querySelector('button').click();"
        "return [head[place].ariaSort, ...[...table.tBodies[0].rows].map(row => parseFloat(row.cells[place].textContent))] })()"
    )
    order, *first = page.evaluate(column)
    assert (order, first) == ("descending", sorted(first, reverse=True))
    order, *then = page.evaluate(column)
    assert (order, then) == ("ascending", sorted(first))
    assert len(set(first)) == 2


@needs_chromium
def test_what_runs_wrote_is_text_and_nothing_else(page: Page, hostile: Path) -> None:
    check(page, hostile)
    assert page.evaluate("window.owned") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert page.evaluate("document.querySelectorAll('img').length") == 3
    assert page.evaluate("document.title") == HOSTILE
    shown = page.evaluate("document.body.textContent")
    assert shown.count("{{ 7*7 }}") > 20
    assert page.evaluate("[...document.querySelectorAll('svg text')].some(text => text.textContent.includes('</text><script>'))")


@needs_chromium
def test_the_policy_stops_what_would_get_out_all_the_same(page: Page, report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    injected = '<script>window.owned=1</script><img src="https://example.com/x.png" onerror="window.owned=1">'
    broken.write_text(report.read_text().replace("</main>", f"{injected}</main>"))
    page.requests.clear()
    page.open(broken)
    assert page.evaluate("window.owned") is None
    assert page.evaluate("[...document.scripts].length") == 2
    assert sum("Content Security Policy" in complaint for complaint in page.complaints) >= 2
    page.complaints.clear()


@needs_chromium
@pytest.mark.slow
def test_a_page_of_a_run_that_was_trained_shows_all(page: Page, synthetic_shards: Path, tmp_path: Path) -> None:
    keys = {
        "config": "configs/pretrain/demo.yaml", "data.shards": synthetic_shards, "data.crop_px": 32, "train.epochs": 2,
        "train.validate_every_epochs": 1, "train.log_every_steps": 1, "engine.global_batch": 4, "launch.workers": 1,
        "launch.cpus_per_worker": 1, "tracking.uri": "offline", "output": tmp_path / "runs",
    }  # fmt: skip
    assert main(["pretrain", *(text for key, value in keys.items() for text in (f"--{key}", str(value)))]) == 0
    check(page, write(tmp_path / "report.html", [tmp_path / "runs"]))
    shown = page.evaluate("document.body.innerText")
    assert "FINISHED" in shown
    assert "Share of pixels that is kept whole, by class" in shown
    assert page.evaluate("document.images.length") == 2


class Outline(HTMLParser):
    """What assistive programs need of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.wrong: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given: dict[str, Any] = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.targets += [given["href"][1:]] if str(given.get("href", "")).startswith("#") else []
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        if (tag == "img" and not given.get("alt")) or (tag == "th" and "scope" not in given):
            self.wrong.append(json.dumps(given))
        if given.get("role") in ("img", "region") and not given.get("aria-label"):
            self.wrong.append(json.dumps(given))


@pytest.mark.parametrize("name", ["report", "hostile"])
def test_pictures_have_words_tables_have_headings_and_ids_are_distinct(name: str, request: pytest.FixtureRequest) -> None:
    outline = Outline()
    outline.feed(request.getfixturevalue(name).read_text())
    assert outline.wrong == []
    assert len(outline.ids) == len(set(outline.ids)) > 5
    assert set(outline.targets) <= set(outline.ids)
    assert outline.headings[0] == "h1"
    assert outline.headings.count("h1") == 1
