"""A Prometheus of one's own: on a free port, with its data in a given folder, over given daemons."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_SECONDS = 60


def tool(name):
    """Path of prometheus or promtool: unpacked by deploy/install-packages.sh --tests, or installed."""
    unpacked = ROOT / "build" / "tools" / "usr" / "bin" / name
    found = str(unpacked) if unpacked.exists() else shutil.which(name)
    if not found:
        raise FileNotFoundError(f"no {name}: run deploy/install-packages.sh --tests")
    return found


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class LocalPrometheus:
    """A context. `targets` are HOST:PORT, all of job clusterkv."""

    def __init__(self, folder, targets, rules, interval_seconds=1):
        self.folder, self.port = pathlib.Path(folder), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = {
            "global": {"scrape_interval": f"{interval_seconds}s",
                       "evaluation_interval": f"{interval_seconds}s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "clusterkv",
                                "static_configs": [{"targets": list(targets)}]}]}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "prometheus.yaml"
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
        self.log = self.folder / "prometheus.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [tool("prometheus"), f"--config.file={path}",
                 f"--storage.tsdb.path={self.folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, env={**os.environ, "TZ": ""})

    def __enter__(self):
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"prometheus does not start:\n{self.log.read_text()}")
            time.sleep(0.1)

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)

    def get(self, path, **parameters):
        """`data` of an answer of its HTTP API. Errors: RuntimeError that has its message."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression):
        """[(labels, value)] now."""
        return [(series["metric"], float(series["value"][1]))
                for series in self.get("query", query=expression)["result"]]

    def query_range(self, expression, start, end, step):
        """[(labels, [(time, value)])]"""
        result = self.get("query_range", query=expression, start=start, end=end, step=step)["result"]
        return [(series["metric"], [(at, float(value)) for at, value in series["values"]])
                for series in result]
