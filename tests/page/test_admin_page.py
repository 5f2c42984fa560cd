"""The page at / of the admin port, as a browser shows it."""

import contextlib
import signal
import threading

import pytest

from conftest import DESKTOP, PHONE
from daemon import bound
from dense import Kv, method_of, shape_of
from fake_kubelet import Container
from worker import DIRECT, SERVED, Worker

PROMPT = 600
STEPS = 300
EVIL_NAMES = [
    '<img src=x onerror="window.hacked=1">',
    '</script><script>window.hacked=1</script>',
    '"><svg onload=window.hacked=1>',
    "javascript:window.hacked=1//\u202e" + "wide " * 12,
]
# <data> of the page: where /status has it.
FIGURES = {
    "host-used": ("host_bytes", "used"), "host-reserved": ("host_bytes", "reserved"),
    "host-quarantined": ("host_bytes", "quarantined"), "host-total": ("host_bytes", "total"),
    "gpu-used": ("gpu_bytes", "used"), "sessions": ("sessions",), "sequences": ("sequences",),
    "ingested": ("counters", "ingested_tokens"), "clustered": ("counters", "clustered_tokens"),
    "started": ("counters", "sessions_started"), "lost": ("counters", "sessions_lost"),
    "refused": ("counters", "rejected_attaches"),
}


def prepared(worker, seed=1):
    """A served sequence whose prompt is published, and its K and V."""
    kv = Kv(shape_of(), PROMPT + STEPS, seed)
    ring = worker.allocate_ring(1 << 20)
    sequence = worker.register(kv.shape, method_of(), PROMPT + STEPS, SERVED)
    worker.ingest(sequence, ring, kv, PROMPT)
    worker.wait(sequence)
    return sequence, kv


def decode(worker, sequence, kv, steps):
    for position in range(PROMPT, PROMPT + steps):
        for layer in range(kv.shape.layers):
            worker.fetch(sequence, kv, position, layer)


@contextlib.contextmanager
def load(address):
    """A worker that decodes slowly for as long as the context lasts."""
    with Worker(address, "llama-70b/rank-0") as worker:
        sequence, kv = prepared(worker)
        done = threading.Event()

        def run():
            for position in range(PROMPT, PROMPT + STEPS):
                for layer in range(kv.shape.layers):
                    worker.fetch(sequence, kv, position, layer)
                if done.wait(0.04):
                    return
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield worker
        finally:
            done.set()
            thread.join(bound(20))


def opened(browser, daemon):
    """The page, once it shows its first answer."""
    browser.open(f"http://{daemon.admin}/")
    browser.wait(lambda: browser.text("ready") != "loading", "the page shows nothing")


def size_text(count):
    """As the page has it."""
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count} B"
    return f"{count / (1 << 20):.1f} MiB"


def of(status, path):
    for name in path:
        status = status[name]
    return status


def test_it_shows_what_status_says(daemon, browse):
    with Worker(daemon.address, "one") as worker:
        sequence, kv = prepared(worker)
        decode(worker, sequence, kv, 4)
        worker.register(kv.shape, method_of(), 50, DIRECT)
        browser = browse()
        opened(browser, daemon)
        status = daemon.status()
        assert status["host_bytes"]["used"] > 0 and status["counters"]["ingested_tokens"] > PROMPT
        for name, path in FIGURES.items():
            browser.wait(lambda name=name, path=path: browser.value(name) == str(of(status, path)),
                         f"{name} does not become {of(status, path)}")
        host = status["host_bytes"]
        free = host["total"] - host["used"] - host["reserved"] - host["quarantined"]
        assert browser.value("host-free") == str(free)
        for kind in ("hit", "missed"):
            counted = sum(status["counters"][mode][f"{kind}_clusters"]
                          for mode in ("direct", "served"))
            assert counted > 0 and browser.value(kind) == str(counted)
        assert browser.text("version") == status["version"]
        assert browser.text("device") == status["device"]
        assert browser.text("ready") == "ready"
        [session] = browser.rows("session-table")
        assert session[:3] == [str(status["session_list"][0]["session_id"]), "one",
                               str(status["session_list"][0]["pid"])]
        browser.wait(lambda: len(browser.rows("sequence-table")) == 2, "no sequences")
        shown = {row[0]: row for row in browser.rows("sequence-table")}
        assert shown[str(sequence.id)][2:5] == ["served", "2 x 2/4 x 64 fp16",
                                                f"{PROMPT + 4} of {PROMPT + STEPS}"]
        assert browser.complaints() == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_shows_grants_where_there_are_any(start_daemon, node, kubelet, browse, size):
    daemon = start_daemon(node)
    kubelet.wait_registered()
    browser = browse(size)
    opened(browser, daemon)
    hidden = "return document.getElementById('grants').offsetParent === null"
    assert browser.run(hidden) and not daemon.status()["grant_list"]
    one, two = map(Container, kubelet.allocate(["gib-0"], ["gib-1", "gib-2"]))
    with Worker(one.address, "first") as first, Worker(one.address, "second"):
        prepared(first)
        with Worker(two.address, "gone") as gone:
            gone.register(shape_of(), method_of(), PROMPT, SERVED)
            held = {each["grant"]: each["host_bytes"] for each in daemon.status()["grant_list"]}
            assert held[one.grant]["used"] > 0 and held[two.grant]["reserved"] > 0
            expected = [
                [container.grant, limit,
                 *(size_text(held[container.grant][state])
                   for state in ("used", "reserved", "quarantined")), sessions]
                for container, limit, sessions in ((two, "2.0 GiB", "1"), (one, "1.0 GiB", "2"))]
            browser.wait(lambda: browser.rows("grant-table") == expected, f"not {expected}")
            assert not browser.run(hidden)
            assert not browser.scrolls_sideways()
        browser.wait(lambda: browser.rows("grant-table")[0][5] == "0", "its session still counts")
    assert browser.complaints() == []


def test_the_chart_shows_the_hit_rate_of_a_load(daemon, browse):
    with load(daemon.address), Worker(daemon.address, "llama-70b/rank-1") as other:
        prepared(other, seed=2)
        lost = Worker(daemon.address, "crashed")
        lost.drop()
        browser = browse()
        opened(browser, daemon)
        path = ("return (document.querySelector('#hit-chart path.two') || {getAttribute: () => ''})"
                ".getAttribute('d')")
        browser.wait(lambda: browser.run(path).count("L") >= 3, "no line of the served hit rate")
        before = daemon.status()["counters"]["served"]
        rate = float(browser.value("served-rate"))
        assert 0 < rate <= 1
        overall = before["hit_clusters"] / (before["hit_clusters"] + before["missed_clusters"])
        assert abs(rate - overall) < 0.3, "far from the rate since the start"
        assert browser.value("direct-rate") == "" and browser.text("direct-rate") == "\u2013"
        assert "session over" in browser.rows("error-table")[0][3]
        browser.picture("page-desktop.png")
        # A page opened later begins with the minutes before it.
        late = browse()
        opened(late, daemon)
        late.wait(lambda: late.run(path).count("L") >= 3, "no history", seconds=3)


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(daemon, browse, dark):
    with load(daemon.address), contextlib.ExitStack() as others:
        for name in EVIL_NAMES + ["x" * 128]:
            others.enter_context(Worker(daemon.address, name))
        lost = Worker(daemon.address, "y" * 128)
        lost.drop()
        browser = browse(PHONE, dark)
        opened(browser, daemon)
        browser.wait(lambda: len(browser.rows("session-table")) == 6 and
                     browser.rows("sequence-table"), "no sessions")
        assert not browser.scrolls_sideways()
        background = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(15, 20, 27)" if dark else "rgb(244, 246, 249)")
        browser.picture(f"page-phone-{'dark' if dark else 'light'}.png")


def test_a_desktop_does_not_scroll_sideways_either(daemon, browse):
    with Worker(daemon.address, "x" * 128):
        browser = browse(DESKTOP)
        opened(browser, daemon)
        browser.wait(lambda: browser.rows("session-table"), "no sessions")
        assert not browser.scrolls_sideways()


def test_what_clients_call_themselves_is_text(daemon, browse):
    with contextlib.ExitStack() as workers:
        for name in EVIL_NAMES:
            workers.enter_context(Worker(daemon.address, name))
            Worker(daemon.address, name).drop()  # its name comes with an error, too
        browser = browse()
        opened(browser, daemon)
        browser.wait(lambda: len(browser.rows("session-table")) == len(EVIL_NAMES) and
                     len(browser.rows("error-table")) == len(EVIL_NAMES), "not all are shown")
        assert {row[1] for row in browser.rows("session-table")
  } == set(EVIL_NAMES)
        assert browser.run("return window.hacked") is None
        assert browser.run("return document.querySelectorAll('img, main script, table svg').length"
                           ) == 0
        assert browser.complaints() == []


def test_the_policy_stops_what_would_get_past_that(daemon, browse):
    browser = browse()
    opened(browser, daemon)
    assert browser.complaints() == []
    browser.run("document.querySelector('main').insertAdjacentHTML('beforeend',"
                " '<img src=\"data:,x\" onerror=\"window.hacked=1\"><p style=\"color:red\">')")
    browser.run("const made = document.createElement('script'); made.textContent = 'hacked = 1';"
                "document.body.append(made)")
    browser.run("fetch('http://127.0.0.1:1/').catch(() => { window.refused = 1 })")
    browser.wait(lambda: browser.run("return window.refused") == 1, "the request is not refused")
    assert browser.run("return window.hacked") is None
    assert sum("Content Security Policy" in line for line in browser.complaints()) >= 4


def test_it_asks_nobody_but_its_daemon(daemon, browse):
    browser = browse()
    opened(browser, daemon)
    asked = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert {f"http://{daemon.admin}{path}" for path in ("/status", "/history")} <= set(asked)
    assert all(name.startswith((f"http://{daemon.admin}/", "data:")) for name in asked), asked


def test_it_says_why_the_daemon_is_not_ready_and_when_it_is_gone(start_daemon, browse):
    daemon = start_daemon({"drain-timeout": "60s"})
    browser = browse()
    with Worker(daemon.address):
        opened(browser, daemon)
        daemon.signal(signal.SIGTERM)
        browser.wait(lambda: browser.text("ready") == "not ready: draining", "it seems ready")
        assert browser.run("return document.getElementById('ready').className") == "pill bad"
        assert browser.run("return document.getElementById('stale').hidden")
    assert daemon.wait() == 0
    browser.wait(lambda: not browser.run("return document.getElementById('stale').hidden"),
                 "the page does not say that its daemon has gone")
    assert "does not answer" in browser.text("stale")
