"""The reader's page in a real Chromium: filter, sort, open a point, keyboard, schemes, print, and nothing loaded."""

import json
import shlex

import pandas as pd
import pytest

from analysis import words
from tests.analysis.synthetic import glue, make_run, report, write_runs
from tests.browser import Visit

HOSTILE = '</script x><img src=x onerror="window.hit=1"><b>'
WIDTHS = (360, 768, 1280, 1920)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    runs = glue(
        tasks=("sst2", "rte"), backbones=("org/t5-base", "minilm"), seeds=(0, 1), methods=("variator", "pruning")
    )
    folder = write_runs(root, runs)
    (folder / "README.md").write_text("# glue: an example\n\nIt was made up. See [the other](../other/README.md).\n")
    report(folder)
    return folder


@pytest.fixture(scope="module")
def summary(made):
    return pd.read_csv(made / "tables" / "summary.csv")


@pytest.fixture
def visit(browser, made):
    """Open the page; at the end it has asked for nothing and complained about nothing."""
    opened = []

    def open_(path=None, **how):
        opened.append(Visit(browser, path or made / "report.html", **how))
        return opened[-1]

    yield open_
    for one in opened:
        one.context.close()
        assert one.complaints == [] and one.requests == {}


def rows_of(page):
    rows = page.locator("#cells tbody tr:visible")
    return [[" ".join(text.split()) for text in row] for row in rows.evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )]  # fmt: skip


def points_of(page):
    return page.locator("figure.front:visible .cells path").evaluate_all("all => all.map(one => one.dataset.cell)")


def data_of(page):
    return json.loads(page.locator("#data").text_content())


def named(cell):
    return f"{cell['series']}, k = {cell['k']}" if cell["k"] else cell["series"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_quietly_and_fits_every_width(visit, width, scheme):
    page = visit(width=width, scheme=scheme).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").inner_text() == "glue: an example"
    boxes = page.locator(".chart svg").evaluate_all("all => all.map(one => one.getBoundingClientRect())")
    assert len(boxes) == 6 and all(0 < box["width"] <= width for box in boxes)


def test_every_scored_cell_is_a_point_and_the_front_is_that_of_the_analysis(visit, summary):
    page = visit().page
    cells = {cell["id"]: cell for cell in data_of(page)["cells"]}
    assert len(rows_of(page)) == len(summary) == len(cells)
    assert sorted(points_of(page)) == sorted(cells)
    filled = page.locator(".cells path").evaluate_all(
        "all => all.filter(one => one.getAttribute('fill') !== 'var(--paper)').map(one => one.dataset.cell)"
    )
    front = {(cells[one]["backbone"], cells[one]["task"], cells[one]["series"], cells[one]["k"]) for one in filled}
    expected = summary[summary["on_front"]]
    ratios = expected["ratio"].map(words.ratio)
    assert front == set(zip(expected["backbone"], expected["task"], expected["series"], ratios, strict=True))


def test_points_stand_where_their_numbers_are(visit):
    page = visit(width=1400).page
    cells = {cell["id"]: cell for cell in data_of(page)["cells"]}
    figure = page.locator('figure[data-task="sst2"][data-backbone="minilm"]')
    drawn = figure.locator(".cells path").evaluate_all(
        "all => all.map(one => { const b = one.getBoundingClientRect();"
        " return [one.dataset.cell, b.x + b.width / 2, b.y + b.height / 2]; })"
    )
    # heights are linear in the scores, whatever the scale; marks of one cost may stand side by side
    high, low = (max(drawn, key=lambda d: sign * cells[d[0]]["score"]) for sign in (1, -1))
    slope = (low[2] - high[2]) / (cells[high[0]]["score"] - cells[low[0]]["score"])
    for one, x, y in drawn:
        assert y == pytest.approx(high[2] + slope * (cells[high[0]]["score"] - cells[one]["score"]), abs=2.0)
        assert x <= max(d[1] for d in drawn if cells[d[0]]["dense"])
    assert slope > 0
    bars = figure.locator(".bars line").evaluate_all("all => all.map(one => one.getBBox().height)")
    lengths = [cells[one]["example_high"] - cells[one]["example_low"] for one, _, _ in drawn]
    assert sorted(bars) == pytest.approx([slope * length for length in sorted(lengths)], abs=0.5)


@pytest.mark.parametrize(
    ("key", "value", "column", "shown"),
    [
        ("task", "rte", "task", "rte"),
        ("task", "average", "task", "average"),
        ("backbone", "org/t5-base", "backbone", "org/t5-base"),
        ("method", "pruning", "series", "pruning"),
        ("k", "4", "ratio", 4.0),
    ],
)
def test_a_filter_leaves_what_was_chosen(visit, summary, key, value, column, shown):
    seen = visit()
    seen.choose(key, value)
    expected = summary[summary[column] == shown]
    assert len(rows_of(seen.page)) == len(points_of(seen.page)) == len(expected) > 0
    assert seen.page.locator("#count").inner_text().startswith(f"{len(expected)} of {len(summary)} cells shown")
    seen.page.locator("#clear").click()
    assert len(rows_of(seen.page)) == len(summary)


def test_filters_meet_and_reach_the_runs_without_a_score(visit, summary):
    seen = visit()
    seen.choose("method", "pruning")
    seen.choose("method", "variator")
    seen.choose("backbone", "minilm")
    seen.choose("task", "sst2")
    both = summary[
        summary["series"].isin(["pruning", "variator"])
        & (summary["backbone"] == "minilm")
        & (summary["task"] == "sst2")
    ]
    assert len(rows_of(seen.page)) == len(both) == 6
    assert "2 of 4 runs without a score" in seen.page.locator("#count").inner_text()
    seen.choose("k", "16")
    assert rows_of(seen.page) == [] and seen.page.locator("#none").is_visible()
    assert seen.page.locator("#left tbody tr:visible").count() == 2
    assert seen.page.locator("figure.front:visible").count() == 0


def test_options_wait_until_they_are_asked_for(visit, tmp_path):
    runs = [
        make_run(method="dense", ratio=None),
        make_run(),
        make_run(options={"bottleneck": 16}),
        make_run(method="pruning"),
    ]
    folder = write_runs(tmp_path, runs)
    report(folder)
    seen = visit(folder / "report.html")
    assert len(rows_of(seen.page)) == len(points_of(seen.page)) == 3
    assert seen.page.locator("#count").inner_text().startswith("3 of 4 cells shown")
    seen.choose("method", "variator (bottleneck=16)")
    assert len(rows_of(seen.page)) == len(points_of(seen.page)) == 1
    seen.choose("method", "variator (bottleneck=16)")
    seen.choose("options", "other")
    assert len(points_of(seen.page)) == 4
    seen.choose("options", "default")
    assert len(points_of(seen.page)) == 1
    seen.page.locator("#clear").click()
    assert len(rows_of(seen.page)) == 4


def test_each_column_sorts_both_ways_with_what_is_missing_last(visit):
    page = visit().page
    data = data_of(page)
    names = {cell["id"]: cell for cell in data["cells"]}
    headings = page.locator("#cells thead th")
    for i, column in enumerate(data["columns"]):
        other = {"ascending": "descending", "descending": "ascending"}[column["first"]]
        for direction in (column["first"], other):
            headings.nth(i).locator("button").click()
            assert headings.nth(i).get_attribute("aria-sort") == direction
            order = page.locator("#cells tbody tr").evaluate_all("rows => rows.map(row => row.dataset.cell)")
            values = [names[one][column["key"]] for one in order]
            there = [value for value in values if value is not None]
            assert there == sorted(there, reverse=direction == "descending")
            assert all(value is None for value in values[len(there) :])
    assert page.locator("#cells thead [aria-sort]").count() == 1
    assert "Sorted by p" in page.locator("#said").inner_text()


def test_a_point_opens_its_provenance_and_its_command(visit, made):
    seen = visit()
    page, data = seen.page, data_of(seen.page)
    cell = next(
        c
        for c in data["cells"]
        if (c["task"], c["series"], c["k"], c["backbone"]) == ("rte", "variator", "4", "minilm")
    )
    page.locator(f'.cells path[data-cell="{cell["id"]}"]').click()
    panel = page.locator("#panel")
    assert panel.locator("h2").inner_text() == named(cell)
    text = panel.inner_text()
    assert len(cell["runs"]) == panel.locator(".run").count() == 2
    for run_id in cell["runs"]:
        raw = json.loads((made / "runs" / f"{run_id}.json").read_text())
        for told in (
            run_id,
            raw["provenance"]["commit"],
            raw["provenance"]["hardware"],
            "torch 2.13.0",
            shlex.join(raw["provenance"]["command"]),
        ):
            assert told in text
    page.locator(".copy").first.click()
    page.locator(".copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == data["runs"][cell["runs"][0]]["command"]
    page.keyboard.press("Escape")
    assert not panel.is_visible()
    assert page.evaluate("document.activeElement.dataset.cell") == cell["id"], "the reader is back at the point"


def test_an_average_leads_to_its_parts_and_an_address_to_its_run(visit):
    page = visit().page
    data = data_of(page)
    average = next(cell for cell in data["cells"] if cell["task"] == "average" and cell["k"])
    page.locator(f'#cells tr[data-cell="{average["id"]}"] button').click()
    page.locator("#panel .link", has_text="rte").click()
    assert page.locator("#panel .where").inner_text().startswith("rte")
    run = next(iter(data["runs"]))
    assert visit(address=f"#{run}").page.locator(f'#panel [aria-label="Run {run}"]').is_visible()


def test_a_failed_run_opens_with_its_reason(visit):
    page = visit().page
    page.locator("#left tbody tr", has_text="failed").first.locator("button").click()
    text = page.locator("#panel").inner_text()
    assert "RuntimeError: out of memory" in text and "bench run" in text and "failed" in text


def test_hovering_tells_the_numbers_and_both_kinds_of_interval(visit):
    page = visit().page
    point = page.locator(".cells path").nth(3)
    point.hover()
    text = page.locator("#tip").inner_text()
    cell = next(c for c in data_of(page)["cells"] if c["id"] == point.get_attribute("data-cell"))
    assert f"{cell['score']:.2f}" in text and f"{cell['example_low']:.1f} to {cell['example_high']:.1f}" in text
    assert f"{cell['seed_low']:.1f} to {cell['seed_high']:.1f}" in text and "over seeds" in text
    page.mouse.move(2, 2)
    assert not page.locator("#tip").is_visible()


def test_bars_and_costs_can_be_chosen(visit):
    seen = visit()
    lengths = "all => all.map(one => Math.abs(one.getBBox().height))"

    def drawn(name, value):
        before = seen.draws
        seen.page.locator(f'input[name="{name}"][value="{value}"]').check()
        seen.drawn(before + 1)
        return sum(seen.page.locator(".bars line").evaluate_all(lengths))

    none = drawn("bars", "none")
    assert none == 0 and drawn("bars", "seed") > 0 and drawn("bars", "example") > 0
    drawn("cost", "total")
    assert "remaining FLOPs of the whole model" in seen.page.locator(".chart").first.text_content()


def test_all_of_it_is_reached_by_keyboard_alone(visit):
    seen = visit()
    page = seen.page
    reached, marks = set(), set()
    for _ in range(400):
        page.keyboard.press("Tab")
        kind, outline, mark = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " const seen = e.matches('path') ? s.strokeWidth !== '1.8px' : s.outlineStyle !== 'none';"
            " return [e.closest('[id]')?.id || e.tagName, seen, e.dataset.cell]; }"
        )
        if kind == "BODY":
            break
        assert outline, f"the focus is not seen on {kind}"
        reached.add(kind)
        marks |= {mark} if mark else set()
    assert {"cells", "left", "front", "scheme", "findings"} <= reached
    assert len(marks) == 6, "each chart is one stop"
    chip = page.locator('.chip[data-value="pruning"]')
    chip.focus()
    page.keyboard.press("Enter")
    assert chip.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Space")
    assert chip.get_attribute("aria-pressed") == "false"
    first = page.locator('.cells path[tabindex="0"]').first
    first.focus()
    before = first.get_attribute("data-cell")
    page.keyboard.press("ArrowRight")
    now = page.evaluate("document.activeElement.dataset.cell")
    assert now and now != before and page.locator("#tip").is_visible()
    page.keyboard.press("Enter")
    cell = next(c for c in data_of(page)["cells"] if c["id"] == now)
    assert page.locator("#panel h2").inner_text() == named(cell)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.cell") == now
    heading = page.locator("#cells thead button").nth(4)
    heading.focus()
    page.keyboard.press("Enter")
    assert page.locator("#cells thead th").nth(4).get_attribute("aria-sort") == "descending"


def test_dark_and_light_follow_the_system_and_the_switch(visit):
    def paper(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = visit(scheme="light").page, visit(scheme="dark").page
    assert paper(light) == "rgb(255, 255, 255)" and paper(dark) == "rgb(21, 24, 29)"
    for page, first, then in ((light, "false", "true"), (dark, "true", "false")):
        switch = page.locator("#scheme")
        assert switch.get_attribute("aria-pressed") == first
        switch.click()
        assert switch.get_attribute("aria-pressed") == then
        page.reload()
        page.wait_for_selector("html[data-drawn]", state="attached")
        assert page.locator("#scheme").get_attribute("aria-pressed") == then, "the choice is kept"
    assert paper(light) == "rgb(21, 24, 29)" and paper(dark) == "rgb(255, 255, 255)"
    for one in (light, dark):
        one.evaluate("localStorage.clear()")


def test_it_prints_on_white_with_everything_said(visit, tmp_path):
    page = visit(scheme="dark").page
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".top").is_visible() and not page.locator("#clear").is_visible()
    assert page.locator(".filter.legend").is_visible(), "it is the legend of the charts"
    assert page.locator("figure.front:visible").count() == 6
    wide = page.locator(".wide").first
    assert wide.evaluate("one => getComputedStyle(one).overflowX") == "visible"
    assert (
        page.locator(".finding details:not([open]) dd").first.evaluate("one => one.getBoundingClientRect().height") > 0
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme):
    from axe_playwright_python.sync_playwright import Axe

    seen = visit(scheme=scheme)
    page = seen.page

    def violations(where):
        found = Axe().run(page).response["violations"]
        return [(where, one["id"], one["impact"], one["nodes"][0]["html"][:120]) for one in found]

    assert violations("page") == []
    seen.choose("method", "variator")
    page.locator("#cells thead button").nth(4).click()
    page.locator("#cells tbody tr:visible button").nth(3).click()
    for summary in page.locator("#panel summary").all():
        summary.click()
    assert violations("panel") == []


def test_what_stands_in_results_is_text_and_never_runs(visit, tmp_path):
    of = {"backbone": HOSTILE, "options": {"note": HOSTILE}}
    runs = [make_run("sst2", "dense", None, backbone=HOSTILE)]
    runs += [make_run("sst2", name, 4.0, **of) for name in ("variator", HOSTILE)]
    runs.append(
        make_run("sst2", HOSTILE, 8.0, backbone=HOSTILE, status="failed", reason=f"{HOSTILE} & \u2028 {{{{ 7 * 7 }}}}")
    )
    for result, _ in runs:
        result.notes = [HOSTILE]
        result.traceback = HOSTILE if result.status == "failed" else None
        result.provenance.commit = result.provenance.hardware = HOSTILE
        result.provenance.command = ["bench", "run", HOSTILE, "$(reboot)"]
    folder = write_runs(tmp_path, runs)
    (folder / "README.md").write_text(f"# {HOSTILE}\n\n{HOSTILE} [x](javascript:window.hit=1)\n")
    report(folder)
    page = visit(folder / "report.html").page
    data = data_of(page)
    assert any(HOSTILE in cell["series"] for cell in data["cells"])
    assert HOSTILE in page.locator("h1").inner_text() and HOSTILE in page.locator("#cells").inner_text()
    for opener in (".cells path", "#cells tbody button", "#left tbody button"):
        for i in range(page.locator(opener).count()):
            page.locator(opener).nth(i).focus()
            page.keyboard.press("Enter")
            assert HOSTILE in page.locator("#panel").inner_text()
            page.keyboard.press("Escape")
    assert "{{ 7 * 7 }}" in page.locator("#left").inner_text()
    page.locator(".chip", has_text="onerror").last.click()
    assert page.locator("img").count() == 0 and page.evaluate("window.hit") is None
    command = next(iter(data["runs"].values()))["command"]
    assert shlex.split(command) == ["bench", "run", HOSTILE, "$(reboot)"]


def test_a_smuggled_script_would_not_run(visit, made, tmp_path):
    """Break the escaping on purpose: the page's own policy still holds."""
    text = (made / "report.html").read_text()
    broken = tmp_path / "report.html"
    broken.write_text(text.replace("<h1>", "<h1><script>window.hit=1</script><img src=x onerror='window.hit=1'>", 1))
    seen = visit(broken)
    assert seen.page.evaluate("window.hit") is None
    assert len(seen.complaints) >= 2 and all("Content Security Policy" in one for one in seen.complaints)
    assert list(seen.requests.values()) == ["csp"]
    seen.complaints.clear()
    seen.requests.clear()


def test_without_scripts_the_numbers_are_still_there(browser, made, summary):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((made / "report.html").as_uri())
    assert page.locator("#cells tbody tr:visible").count() == len(summary)
    assert "need JavaScript" in page.locator("noscript").inner_text()
    context.close()


def test_a_study_of_failures_opens(visit, tmp_path):
    folder = write_runs(tmp_path, [make_run(status="failed", reason="boom")])
    report(folder)
    page = visit(folder / "report.html").page
    page.locator("#left tbody button").click()
    assert "boom" in page.locator("#panel").inner_text()
