#!/usr/bin/env python3
"""A daemon, a load and a Prometheus on this machine for some minutes; then the plots of what the
dashboards show. deploy/observe-demo.sh sets up what it needs."""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (needs the backend above)

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "grafana"))
from dashboards import DASHBOARDS  # noqa: E402  (needs the path above)
from load import Load  # noqa: E402
from local_prometheus import ROOT, LocalPrometheus  # noqa: E402

START_SECONDS = 60
STEP_SECONDS = 5
COLUMNS = 3
MOST_LINES, MOST_NAMES = 12, 7  # of a panel
SCREENSHOTS = 10
COLORS = 256  # of a picture, which makes it a third of its size
SCALES = {"bytes": (1 << 20, "MiB"), "Bps": (1 << 20, "MiB/s"), "percentunit": (0.01, "%"),
          "s": (1e-3, "ms"), "ops": (1, "1/s"), "reqps": (1, "1/s"), "none": (1, "")}


class Daemon:
    """A context: one clusterkvd in a folder."""

    def __init__(self, programs, folder):
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith("CLUSTERKV_")}
        self.log = folder / "clusterkvd.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [programs / "clusterkvd", f"--listen=unix:{folder}/s.sock",
                 "--admin-listen=127.0.0.1:0", "--host-memory=512mb",
                 f"--host-memory-dir={folder}/kv"],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

    def __enter__(self):
        line = self.process.stdout.readline()
        found = re.match(r"READY grpc=(\S+) admin=(\S+)$", line)
        if not found:
            self.process.kill()
            raise RuntimeError(f"clusterkvd does not start:\n{self.log.read_text()}")
        self.address, self.admin = found.groups()
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(START_SECONDS)
        self.process.stdout.close()


def label_of(legend, labels):
    """As Grafana does, but for the instance, of which there is one."""
    known = {**labels, "instance": ""}
    return re.sub(r"\{\{(\w+)\}\}", lambda name: known.get(name.group(1), ""), legend).strip()


def draw(axes, prometheus, made, start, end):
    scale, unit = SCALES[made["unit"]]
    lines = []
    for query, legend in made["queries"]:
        query = (query.replace("$job", ".*").replace("$instance", ".*")
                 .replace("$__rate_interval", "30s"))
        for labels, points in prometheus.query_range(query, start, end, STEP_SECONDS):
            finite = [(at - start, value / scale) for at, value in points if math.isfinite(value)]
            if finite:
                lines.append((label_of(legend, labels), finite))
    lines.sort(key=lambda line: -max(value for _, value in line[1]))
    # Of many lines those that stay at 0 need no name.
    named = [label for label, points in lines
             if len(lines) <= 4 or any(value for _, value in points)][:MOST_NAMES]
    for label, points in lines[:MOST_LINES]:
        axes.plot(*zip(*points), linewidth=0.9, label=label if label in named else None)
    axes.set_title(made["title"] + (f", {unit}" if unit else ""), fontsize=8, loc="left")
    axes.set_xlim(0, end - start)
    axes.set_ylim(bottom=0, top=100 if made["most"] else None)
    axes.tick_params(labelsize=6)
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(named):
        axes.legend(fontsize=5, loc="best", framealpha=0.6, borderpad=0.3, labelspacing=0.2)


def plot(prometheus, name, rows, start, end, out):
    panels = [made for _, row in rows for made in row if made["kind"] == "timeseries"]
    height = math.ceil(len(panels) / COLUMNS)
    figure, grid = plt.subplots(height, COLUMNS, figsize=(11, 1.75 * height), squeeze=False)
    for axes, made in zip(grid.flat, panels):
        draw(axes, prometheus, made, start, end)
    for axes in list(grid.flat)[len(panels):]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("s", fontsize=6)
    figure.tight_layout()
    path = out / name.replace(".json", ".png")
    figure.savefig(path, dpi=80)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLORS).save(path, optimize=True)
    print(f"wrote {path}, {path.stat().st_size // 1024} KiB", file=sys.stderr)


def sequences(url):
    with urllib.request.urlopen(url + "status", timeout=10) as answer:
        return json.load(answer)["sequences"]


def screenshot(url, path):
    """Of the page on the admin port, where there is a chromium: while workers have sequences, if one
    of some tries meets them."""
    browser = shutil.which("chromium")
    if not browser:
        return print("no screenshot: it needs chromium", file=sys.stderr)
    for _ in range(SCREENSHOTS):
        before = sequences(url)
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                        "--virtual-time-budget=5000", "--window-size=1200,1240",
                        f"--screenshot={path}", url], check=True, timeout=120,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if before and sequences(url):
            break
    return print(f"wrote {path}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="how long the load runs")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the plots")
    parser.add_argument("--programs", type=pathlib.Path, default=ROOT / "build" / "release" / "bin")
    options = parser.parse_args()
    if not 0.5 <= options.minutes <= 600:
        parser.error(f"--minutes: {options.minutes} is not from 0.5 to 600")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ckv-demo-"))
    rules = HERE.parent / "prometheus" / "clusterkv.rules.yaml"
    try:
        with (Daemon(options.programs, folder) as daemon,
              LocalPrometheus(folder / "prometheus", [daemon.admin], rules) as prometheus,
              Load(daemon.address, options.programs, steps=256,
                   options=("--audit-rate", "0.05", "--sequences", "4")) as load):
            print(f"daemon http://{daemon.admin}/  prometheus {prometheus.url}/  "
                  f"for {options.minutes:g} minutes", file=sys.stderr)
            start = time.time()
            while time.time() < start + options.minutes * 60:
                time.sleep(1)
                if load.failures:
                    raise RuntimeError(load.failures)
            end = time.time()
            screenshot(f"http://{daemon.admin}/", out / "page.png")
            for name, (_, _, rows) in DASHBOARDS.items():
                plot(prometheus, name, rows, start, end, out)
            print(f"replays: {load.rounds}", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
