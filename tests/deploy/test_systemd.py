"""deploy/systemd: valid, hardened but for what is named here, and the daemon keeps its side of
Type=notify."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request

import pytest

from programs import BIN, ROOT

FOLDER = ROOT / "deploy" / "systemd"
UNIT = FOLDER / "clusterkvd.service"
TRACE = ROOT / "tests" / "traces" / "smollm2-135m-moby-dick.safetensors"
# What `systemd-analyze security` counts against the unit; it says why in its comments.
EXPOSED = {
    "DeviceAllow", "PrivateDevices",  # the GPU
    "IPAddressDeny", "PrivateNetwork", "RestrictAddressFamilies_AF_INET_INET6",  # the admin port
    "RestrictAddressFamilies_AF_NETLINK", "RestrictAddressFamilies_AF_UNIX",
    "MemoryDenyWriteExecute", "ProcSubset", "ProtectKernelTunables",  # the GPU's driver library
    "PrivateUsers", "RootDirectoryOrRootImage", "SystemCallFilter_resources"}
# In tenths of systemd's exposure level; up to 20 is "OK".
MOST_EXPOSURE = 20


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A root with the unit, systemd's own, and a program where the unit has it."""
    root = tmp_path_factory.mktemp("root")
    (root / "etc/systemd/system").mkdir(parents=True)
    shutil.copy(UNIT, root / "etc/systemd/system")
    shutil.copytree("/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
    (root / "lib").symlink_to("usr/lib")
    program = root / "opt/clusterkv/bin/clusterkvd"
    program.parent.mkdir(parents=True)
    shutil.copy(BIN / "clusterkvd", program)
    return root


def analyze(*words, root):
    return subprocess.run(["systemd-analyze", "--no-pager", f"--root={root}", *words],
                          capture_output=True, text=True, check=False)


def test_unit_is_valid(tree):
    done = analyze("verify", "--man=no", "clusterkvd.service", root=tree)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_unit_that_is_wrong_is_not_valid(tree, tmp_path):
    broken = tmp_path / "root"
    shutil.copytree(tree, broken, symlinks=True)
    path = broken / "etc/systemd/system/clusterkvd.service"
    path.write_text(UNIT.read_text(encoding="utf-8").replace("NoNewPrivileges", "NoMorePrivileges"),
                    encoding="utf-8")
    assert "NoMorePrivileges" in analyze("verify", "--man=no", "clusterkvd.service",
                                         root=broken).stderr


def test_unit_is_hardened_but_for_known_exceptions(tree):
    done = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE}",
                   "clusterkvd.service", root=tree)
    assert done.returncode == 0, done.stdout
    listed = json.loads(analyze("security", "--offline=true", "--json=short", "clusterkvd.service",
                                root=tree).stdout)
    exposed = {entry["json_field"] for entry in listed if entry["exposure"] not in (None, "0", "")}
    assert exposed == EXPOSED


def test_program_and_configuration_are_where_the_archive_has_them():
    unit = UNIT.read_text(encoding="utf-8")
    assert re.search(r"^ExecStart=/opt/clusterkv/bin/clusterkvd --config "
                     r"/etc/clusterkv/clusterkvd.yaml$", unit, re.MULTILINE)
    user = re.search(r"^User=(\w+)$", unit, re.MULTILINE).group(1)
    users = (FOLDER / "clusterkv.sysusers").read_text(encoding="utf-8")
    assert re.search(rf"^u {user} ", users, re.MULTILINE)
    done = subprocess.run(["systemd-sysusers", "--dry-run", FOLDER / "clusterkv.sysusers"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def allowed_calls():
    """What the unit's SystemCallFilter lines leave, with systemd's own sets."""
    def members(name):
        listed = subprocess.run(["systemd-analyze", "--no-pager", "syscall-filter", name],
                                check=True, capture_output=True, text=True).stdout
        entries = [line.strip() for line in listed.splitlines()[1:]]
        calls = {entry for entry in entries if re.fullmatch(r"\w+", entry)}
        return calls.union(*(members(entry) for entry in entries if entry.startswith("@")))
    allowed = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", UNIT.read_text(encoding="utf-8"),
                           re.MULTILINE):
        named = [members(word) if word[0] == "@" else {word} for word in line.lstrip("~").split()]
        allowed = allowed.difference(*named) if line[0] == "~" else allowed.union(*named)
    return allowed


def test_every_call_of_a_daemon_at_work_is_allowed(tmp_path):
    """A start, a worker, a scrape and an end under strace. Of the GPU's driver library it says
    nothing."""
    trace, address = tmp_path / "trace", f"unix:{tmp_path}/s.sock"
    process = subprocess.Popen(
        ["strace", "--follow-forks", "--seccomp-bpf", f"--output={trace}", "--",
         BIN / "clusterkvd", "--backend=host", f"--listen={address}",
         f"--host-memory-dir={tmp_path}/kv", "--host-memory=256mb",
         "--admin-listen=localhost:0"], env={}, stdout=subprocess.PIPE, text=True)
    try:
        admin = re.search(r"admin=localhost:(\d+)", process.stdout.readline()).group(1)
        subprocess.run([BIN / "clusterkv-replay", TRACE, f"--connect={address}",
                        "--methods=clusterkv", "--budgets=128", "--steps=4"], check=True,
                       capture_output=True, env={})
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=60) as reply:
            assert reply.status == 200
        traced = int(trace.read_text(encoding="utf-8").split(" ", 1)[0])
        os.kill(traced, signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    made = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(encoding="utf-8"), re.MULTILINE))
    assert {"execve", "mmap", "accept4", "fallocate"} <= made
    assert made - allowed_calls() == set()
    assert "ptrace" not in allowed_calls() and "chroot" not in allowed_calls()


def notified(receiver):
    receiver.settimeout(30)
    return receiver.recv(4096).decode()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_when_the_daemon_serves_and_when_it_ends(tmp_path, abstract):
    name = f"\0clusterkv-{os.getpid()}" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name)
        # The sample configuration, on a socket and a folder of the test's.
        process = subprocess.Popen(
            [BIN / "clusterkvd", "--config", FOLDER / "clusterkvd.yaml", "--backend=host",
             f"--listen=unix:{tmp_path}/s.sock", f"--host-memory-dir={tmp_path}/kv",
             "--host-memory=64mb", "--admin-listen=127.0.0.1:0"],
            env={"NOTIFY_SOCKET": name.replace("\0", "@")}, stdout=subprocess.PIPE, text=True)
        try:
            assert notified(receiver) == "READY=1"
            assert process.stdout.readline().startswith("READY ")
            process.send_signal(signal.SIGTERM)
            assert notified(receiver) == "STOPPING=1"
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_socket_that_is_not_there_is_told_and_no_reason_to_stop(tmp_path):
    process = subprocess.Popen(
        [BIN / "clusterkvd", "--backend=host", f"--listen=unix:{tmp_path}/s.sock",
         f"--host-memory-dir={tmp_path}/kv", "--host-memory=64mb", "--admin-listen=127.0.0.1:0"],
        env={"NOTIFY_SOCKET": f"{tmp_path}/none"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    assert process.stdout.readline().startswith("READY ")
    process.terminate()
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0 and "cannot tell systemd" in log
