"""clusterkv-replay --html, as a browser shows it."""

import json
import os
import pathlib
import subprocess

import pytest

from children import make_trace
from conftest import DESKTOP, PHONE
from daemon import bound, clean_environment, program

EVIL = "<img src=x onerror='window.hacked=1'>.safetensors"
BUDGETS, SIZES = (32, 64), (160, 640, 2560)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """(what was printed as JSON, the report's address) of a trace with a hostile name."""
    folder = tmp_path_factory.mktemp("replay")
    trace = make_trace(folder / EVIL, tokens=2600, decode_tokens=80, layers="2,5,11")
    html = folder / "report.html"
    done = subprocess.run(
        [program("clusterkv-replay"), trace, "--budgets", ",".join(map(str, BUDGETS)),
         "--set", "tokens_per_cluster=8", "--cache-tokens", ",".join(map(str, SIZES)),
         "--html", str(html), "--format", "json", "--backend", "host"],
        env=clean_environment(), capture_output=True, text=True, timeout=bound(120), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), f"file://{html}"


def opened(browse, address, *arguments):
    browser = browse(*arguments)
    browser.open(address)
    return browser


def test_its_tables_are_the_json(replayed, browse):
    report, address = replayed
    browser = opened(browse, address)
    assert json.loads(browser.text("json")) == report
    shown = browser.rows("summary")
    wanted = [row for row in report["results"] if row["layer"] == "all"]
    assert len(shown) == len(wanted) == 4 * len(BUDGETS)
    for row in wanted:
        [cells] = [cells for cells in shown if cells[0] == str(row["budget"])
                   and cells[1].split()[0] == row["method"]]
        assert cells[2:5] == [f"{row['recall']:.3f}", f"{row['output_error']:.4f}",
                              f"{row['mass']:.4f}"]
    figures = browser.run("return [...document.querySelectorAll('figcaption')].map("
                          "caption => caption.textContent)")
    assert len(figures) == 6 and "over its size" in figures[3]
    # A point for each size and budget, and what it says.
    swept = [row for row in report["cache_sweep"] if row["layer"] == "all"]
    assert {row["cache_tokens"] for row in swept} == set(SIZES) and len(swept) == 6
    titles = browser.run("return [...document.querySelectorAll('figure')[3].querySelectorAll("
                         "'g title')].map(title => title.textContent)")
    for row in swept:
        assert sum(f"budget {row['budget']}, {row['cache_tokens']} tokens" in title and
                   title.endswith(f": {100 * row['hit_rate']:.1f} %") for title in titles) == 1
    assert browser.complaints() == []
    browser.picture("replay-desktop.png")


def test_more_cache_finds_no_less(replayed):
    report, _ = replayed
    for budget in BUDGETS:
        rates = {row["cache_tokens"]: row["hit_rate"] for row in report["cache_sweep"]
                 if row["budget"] == budget and row["layer"] == "all"}
        rising = [rates[size] for size in SIZES]
        assert rising[0] < rising[-1] and rising == sorted(rising), rates
        # The table's own rows are of the first size.
        [row] = [row for row in report["results"] if row["method"] == "clusterkv" and
                 row["budget"] == budget and row["layer"] == "all"]
        assert row["hit_rate"] == rates[SIZES[0]]
    assert report["preset"]["cache_tokens"] == SIZES[0]


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_does_not_scroll_sideways(replayed, browse, size, dark):
    browser = opened(browse, replayed[1], size, dark)
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert not browser.scrolls_sideways()
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 20, 27)" if dark else "rgb(246, 247, 249)")
    if size == PHONE:
        browser.picture(f"replay-phone-{'dark' if dark else 'light'}.png")


def test_a_hostile_name_is_text_and_nothing_is_loaded(replayed, browse):
    browser = opened(browse, replayed[1])
    assert EVIL in browser.run("return document.querySelector('h1').textContent")
    assert browser.run("return document.querySelectorAll('img, script').length") == 0
    assert browser.run("return performance.getEntriesByType('resource').filter("
                       "entry => !entry.name.startsWith('data:')).length") == 0


def test_several_workers_measure_the_sweep_too(tmp_path):
    trace = make_trace(tmp_path / "t.safetensors", tokens=400, decode_tokens=8)
    done = subprocess.run(
        [program("clusterkv-replay"), trace, "--methods", "clusterkv", "--budgets", "32,256",
         "--set", "tokens_per_cluster=8", "--cache-tokens", "0,200", "--workers", "2",
         "--format", "json", "--backend", "host", "--dump-outputs", str(tmp_path / "dump")],
        env=clean_environment(), capture_output=True, text=True, timeout=bound(120), check=False)
    assert done.returncode == 0, done.stderr
    swept = json.loads(done.stdout)["cache_sweep"]
    # 200 is too small for budget 256.
    assert {(row["cache_tokens"], row["budget"]) for row in swept} == {
        (4 * 32 + 32, 32), (4 * 256 + 32, 256), (200, 32)}


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    trace = make_trace(tmp_path / "t.safetensors", tokens=400, decode_tokens=8)
    done = subprocess.run([program("clusterkv-replay"), trace, "--html", "/nonexistent/r.html"],
                          env=clean_environment(), capture_output=True, text=True,
                          timeout=bound(30), check=False)
    assert done.returncode == 2 and "/nonexistent/r.html" in done.stderr and not done.stdout
    assert sorted(os.listdir(tmp_path)) == [pathlib.Path(trace).name]
