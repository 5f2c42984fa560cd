"""A program in a root file system of its own, as a container runtime would start it: the root
read-only, volumes mounted, a uid, no capabilities, no new privileges, its own network with one
address. Needs root and Linux namespaces, and no container engine.

Run as a program it is the inner half: in new namespaces, with the container as JSON on its command
line, it mounts, gives up its rights and becomes the program.
"""

import ctypes
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ADDRESS = "10.11.12.13"  # of the container, besides loopback
MEMLOCK_BYTES = 64 << 10  # the least that runtimes give
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclasses.dataclass
class Mount:
    """At `path`: a tmpfs of `size` bytes with `mode`, or a file or folder of the machine."""
    path: str
    source: str = ""
    size: int = 0
    mode: str = "0755"
    owner: int = 0
    read_only: bool = False


@dataclasses.dataclass
class Container:
    root: str
    argv: list
    uid: int
    gid: int
    environment: dict
    mounts: list

    def start(self, log):
        """Starts it with stdout and stderr to `log`; returns it Running."""
        inner = [sys.executable, str(pathlib.Path(__file__).resolve()),
                 json.dumps(dataclasses.asdict(self))]
        return Running(subprocess.Popen(
            ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child",
             "--propagation", "private", "--", *inner],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log), self)


class Running:
    """Of `unshare`; what it started is its one child, pid 1 of the container."""

    def __init__(self, process, container):
        self.process, self.container = process, container

    @property
    def pid(self):
        """Of the program, on this machine."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return int(pathlib.Path(children).read_text(encoding="ascii").split()[0])

    def enter(self, argv, environment=None, timeout=60):
        """Another program in the container, as `docker exec` and health checks do."""
        nsenter = shutil.which("nsenter")  # here, not where `environment` says
        entered = [nsenter, f"--target={self.pid}", "--all", "--root", "--wd=/",
                   f"--setuid={self.container.uid}", f"--setgid={self.container.gid}", "--", *argv]
        return subprocess.run(entered, env=environment or {}, capture_output=True, text=True,
                              timeout=timeout, check=False)

    def get(self, path, port, address=ADDRESS):
        """(status, body) over HTTP; (0, why) where nobody answers. From the container's network."""
        script = ("import http.client, sys\n"
                  "try:\n"
                  "    c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=5)\n"
                  "    c.request('GET', sys.argv[3])\n"
                  "    r = c.getresponse()\n"
                  "    print(r.status, r.read().decode())\n"
                  "except OSError as e:\n"
                  "    print(0, e)\n")
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--net", "--", sys.executable, "-c", script,
             address, str(port), path], capture_output=True, text=True, timeout=30, check=True)
        status, body = done.stdout.split(" ", 1)
        return int(status), body

    def wait_for(self, path, port, seconds):
        """Until `path` answers 200, as the kubelet's startup probe would."""
        deadline = time.monotonic() + seconds
        answer = (0, "not asked")
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"it ended with {self.process.returncode}")
            try:
                answer = self.get(path, port)
            except (IndexError, FileNotFoundError, subprocess.CalledProcessError):
                pass  # its namespaces are still being made
            if answer[0] == 200:
                return
            time.sleep(0.1)
        raise AssertionError(f"{path} does not answer: {answer}")

    def stop(self, seconds=60):
        """SIGTERM to the program; its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(seconds)

    def discard(self):
        if self.process.poll() is None:
            self.process.kill()  # and --kill-child
            self.process.wait()


# --- The inner half ---------------------------------------------------------------------------

def run(*argv):
    subprocess.run(argv, check=True)


def mount_all(container):
    root = container.root
    run("mount", "--bind", root, root)
    for mount in container.mounts:
        target = root + mount.path
        if mount.source and not os.path.isdir(mount.source):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            pathlib.Path(target).touch()
        else:
            os.makedirs(target, exist_ok=True)  # as a runtime does before the root is sealed
    for name in ("dev", "proc", "tmp"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    run("mount", "-o", "remount,bind,ro", root, root)
    run("mount", "-t", "proc", "proc", f"{root}/proc")
    run("mount", "-t", "tmpfs", "-o", "size=64k,mode=0755", "dev", f"{root}/dev")
    os.makedirs(f"{root}/dev/shm")
    for name in DEVICES:
        pathlib.Path(f"{root}/dev/{name}").touch()
        run("mount", "--bind", f"/dev/{name}", f"{root}/dev/{name}")
    for mount in container.mounts:
        if mount.source:
            run("mount", "--bind", mount.source, root + mount.path)
            if mount.read_only:
                run("mount", "-o", "remount,bind,ro", root + mount.path)
        else:
            options = f"size={mount.size},mode={mount.mode},uid={mount.owner},gid={mount.owner}"
            run("mount", "-t", "tmpfs", "-o", options, "tmpfs", root + mount.path)


def give_up_rights(container):
    libc = ctypes.CDLL(None, use_errno=True)
    last = int(pathlib.Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    os.chroot(container.root)
    os.chdir("/")
    # Out of the bounding set: the exec below leaves none, also to uid 0.
    for capability in range(last + 1):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")
    os.setgroups([])
    os.setgid(container.gid)
    os.setuid(container.uid)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")


def main():
    import resource  # pylint: disable=import-outside-toplevel
    fields = json.loads(sys.argv[1])
    fields["mounts"] = [Mount(**mount) for mount in fields["mounts"]]
    container = Container(**fields)
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
    mount_all(container)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK_BYTES, MEMLOCK_BYTES))
    give_up_rights(container)
    os.execve(container.argv[0], container.argv, container.environment)


if __name__ == "__main__":
    main()
