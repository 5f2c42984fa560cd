"""SIGKILL of workers and daemons on a GPU: memory back to the driver within 5 seconds.

    kill_test.py --bin DIR [--rounds N] [--trace FILE]

Workers are clusterkv-replay processes against one daemon; each round kills one at a random moment of
its ingest or decode. What the driver has free is asked of the driver (cuMemGetInfo). At last the
daemon itself is killed under a worker: its memory and the worker's go back as well. Prints one JSON
line; exit 0 if every bound held.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from daemons import start_daemon

SECONDS = 5.0
SLACK_BYTES = 32 << 20  # contexts and driver caches come and go in this order


class Driver:
    """Free bytes of GPU 0, by a context of this process's own."""

    def __init__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        device = ctypes.c_int()
        self.check(self.cuda.cuInit(0))
        self.check(self.cuda.cuDeviceGet(ctypes.byref(device), 0))
        self.check(self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        self.check(self.cuda.cuCtxSetCurrent(context))

    @staticmethod
    def check(result):
        if result != 0:
            raise RuntimeError(f"CUDA driver error {result}")

    def free_bytes(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.check(self.cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
        return free.value


def start_worker(bin_dir, trace, socket, directory):
    with open(f"{directory}/worker.log", "a") as log:
        return subprocess.Popen(
            [f"{bin_dir}/clusterkv-replay", trace, "--connect", socket, "--methods", "clusterkv",
             "--budgets", "128,256,512,1024", "--sequences", "4", "--format", "json"],
            stdout=subprocess.DEVNULL, stderr=log)


def status(bin_dir, socket):
    text = subprocess.run([f"{bin_dir}/clusterkvctl", "--address", socket, "status", "--format",
                           "json"], capture_output=True, text=True, check=True).stdout
    return json.loads(text)


def seconds_until(condition, limit):
    start = time.monotonic()
    while time.monotonic() - start < limit:
        if condition():
            return time.monotonic() - start
        time.sleep(0.02)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace",
                        default="tests/traces/smollm2-135m-moby-dick.safetensors")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    driver = Driver()
    result = {"op": "kill", "rounds": options.rounds, "seed": options.seed}
    with tempfile.TemporaryDirectory(prefix="ckv-", dir="/dev/shm") as directory:
        untouched = driver.free_bytes()
        daemon, socket, _ = start_daemon(options.bin, directory)
        # One whole run first: what the daemon keeps for itself (context, kernels) is there then.
        warm = start_worker(options.bin, options.trace, socket, directory)
        assert warm.wait(120) == 0, open(f"{directory}/worker.log").read()
        time.sleep(1)
        idle = driver.free_bytes()

        def is_back(bound):
            return lambda: driver.free_bytes() >= bound - SLACK_BYTES

        worst, held_most, status_worst = 0.0, 0, 0.0
        for round_ in range(options.rounds):
            worker = start_worker(options.bin, options.trace, socket, directory)
            # From before its session to deep in its decode.
            time.sleep(rng.uniform(0.05, 4.0))
            held_most = max(held_most, idle - driver.free_bytes())
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            took = seconds_until(is_back(idle), SECONDS)
            assert took is not None, f"round {round_}: {idle - driver.free_bytes()} bytes held"
            worst = max(worst, took)

            def holds_nothing():
                now = status(options.bin, socket)
                return (now["sessions"] == 0 and now["gpu_bytes"]["used"] == 0 and
                        all(now["host_bytes"][key] == 0
                            for key in ("used", "reserved", "quarantined")))

            took = seconds_until(holds_nothing, SECONDS)
            assert took is not None, status(options.bin, socket)
            status_worst = max(status_worst, took)
        result.update(worker_kill_seconds_max=round(worst, 3),
                      worker_kill_status_seconds_max=round(status_worst, 3),
                      held_bytes_max=held_most)

        worker = start_worker(options.bin, options.trace, socket, directory)
        time.sleep(2.0)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        code = worker.wait(60)
        assert code not in (0, -signal.SIGSEGV, -signal.SIGABRT), f"worker ended with {code}"
        took = seconds_until(is_back(untouched), SECONDS)
        assert took is not None, f"{untouched - driver.free_bytes()} bytes held after the daemon"
        result.update(daemon_kill_seconds=round(took, 3), worker_exit_code=code)

        # A daemon started anew on the same paths serves at once.
        daemon, socket, _ = start_daemon(options.bin, directory)
        again = start_worker(options.bin, options.trace, socket, directory)
        assert again.wait(120) == 0, open(f"{directory}/worker.log").read()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    sys.exit(main())
