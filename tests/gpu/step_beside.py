"""A step of one layer alone, and beside a daemon that clusters prompts without a pause.

    step_beside.py --bin DIR [--backend NAME] [--trace FILE] [-- OPTION...]

The daemon's load is clusterkv-replay: three workers that ingest sixteen prompts at a time and decode
one step of each. What is timed is clusterkv-bench's `step` with all clusters cached, in a process of
its own; OPTIONs are clusterkv-bench's. Prints one JSON line: both sets of rows, and how much the daemon
clustered meanwhile. Fails if it clustered nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

from daemons import start_daemon

STEP = ["--contexts", "32k", "--batches", "1,16", "--budgets", "1024", "--preset", "paper",
        "--repeats", "2000"]
SECONDS_TO_BEGIN = 60.0


def measure(options):
    """Rows of `step`."""
    text = subprocess.run(
        [f"{options.bin}/clusterkv-bench", "--backend", options.backend, "--ops", "step",
         "--misses", "0", "--format", "json", *(options.step or STEP)],
        check=True, stdout=subprocess.PIPE, text=True).stdout
    return [row for row in json.loads(text)["rows"] if row["op"] == "step"]


def clustered(admin):
    """Seconds and keys of clustering so far."""
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return tuple(float(re.search(rf"^clusterkv_cluster_{name}_total (\S+)$", text, re.M).group(1))
                 for name in ("seconds", "keys"))


def beside(options, directory):
    daemon, socket, admin = start_daemon(options.bin, directory, options.backend, "4gb")
    with open(f"{directory}/load.log", "w") as log:
        load = subprocess.Popen(
            [f"{options.bin}/clusterkv-replay", options.trace, "--connect", socket, "--methods",
             "clusterkv", "--budgets", "128", "--steps", "1", "--sequences", "16", "--workers",
             "3", "--repeat", "0"], stdout=log, stderr=log)
    try:
        start = time.monotonic()
        while clustered(admin)[1] == 0:
            assert load.poll() is None, open(f"{directory}/load.log").read()
            assert time.monotonic() - start < SECONDS_TO_BEGIN, "the load does not begin"
            time.sleep(0.1)
        before, start = clustered(admin), time.monotonic()
        rows = measure(options)
        seconds = time.monotonic() - start
        after = clustered(admin)
        assert load.poll() is None, open(f"{directory}/load.log").read()
    finally:
        load.terminate()
        load.wait(60)
        daemon.terminate()
        assert daemon.wait(60) == 0
    assert after[1] > before[1], "nothing was clustered meanwhile"
    return {"beside": rows, "clustering_share": round((after[0] - before[0]) / seconds, 3),
            "keys_per_s": round((after[1] - before[1]) / seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", required=True)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--trace", default="tests/traces/smollm2-135m-moby-dick.safetensors")
    parser.add_argument("step", nargs="*", metavar="OPTION")
    options = parser.parse_args()
    result = {"op": "step-beside", "alone": measure(options)}
    with tempfile.TemporaryDirectory(prefix="ckv-", dir="/dev/shm") as directory:
        result |= beside(options, directory)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
