"""Reads /metrics again and again and checks what must hold at every scrape."""

import re
import threading

SERIES = re.compile(r'^(\w+)(?:\{(.*)\})?$')
PERIOD_SECONDS = 0.05


def broken_rules(before, now):
    """What is wrong with a scrape (and the one before it, if any), as texts."""
    wrong = []
    for series, value in now.items():
        name, labels = SERIES.match(series).groups()
        if name.endswith("_selected_total"):
            parts = [now[f"{name.replace('_selected_', kind)}{{{labels}}}"]
                     for kind in ("_hit_", "_missed_")]
            if value != sum(parts):
                wrong.append(f"{series} is {value}, hit and missed are {parts}")
        if name.endswith("_total") and before and value < before.get(series, 0):
            wrong.append(f"{series} fell from {before[series]} to {value}")

    def pool(scrape):
        return sum(value for series, value in scrape.items()
                   if series.startswith("clusterkv_host_pool_bytes"))
    if before and pool(now) != pool(before):
        wrong.append(f"the pool's states sum to {pool(now)}, before to {pool(before)}")
    if before and before.keys() - now.keys():
        wrong.append(f"gone: {before.keys() - now.keys()}")
    return wrong


class Scraper:
    """A context that scrapes 20 times a second, and asserts at its end that all was well."""

    def __init__(self, daemon):
        self.daemon, self.count, self.wrong = daemon, 0, []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        before = None
        while not self.stop.wait(PERIOD_SECONDS):
            try:
                now = self.daemon.metrics()
            except OSError as error:
                self.wrong.append(f"no scrape: {error}")
                return
            self.wrong += broken_rules(before, now)
            self.count += 1
            before = now

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, *_):
        self.stop.set()
        self.thread.join(10)
        if kind is None:
            assert not self.wrong, self.wrong[:10]
            assert self.count > 0, "no scrape"
