"""Daemons of the programs in this folder."""

import re
import subprocess


def start_daemon(bin_dir, directory, backend="cuda", host_memory="1gb"):
    """A daemon in `directory` that serves: its process, gRPC address and admin HOST:PORT."""
    socket = f"unix:{directory}/clusterkvd.sock"
    with open(f"{directory}/daemon.log", "a") as log:
        daemon = subprocess.Popen(
            [f"{bin_dir}/clusterkvd", "--listen", socket, "--admin-listen", "127.0.0.1:0",
             "--host-memory", host_memory, "--host-memory-dir", f"{directory}/memory",
             "--backend", backend], stdout=subprocess.PIPE, stderr=log, text=True)
    line = daemon.stdout.readline()
    assert line.startswith("READY"), open(f"{directory}/daemon.log").read()
    return daemon, socket, re.search(r"admin=(\S+)", line).group(1)
