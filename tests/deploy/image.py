"""What the Dockerfile says of the images, and what a container of one must have and not have."""

import pathlib
import re

from programs import ROOT

DOCKERFILE = ROOT / "deploy" / "images" / "Dockerfile"
PROGRAMS = "/opt/clusterkv/bin"
ADMIN_PORT = 9464
START_SECONDS = 60


def instructions():
    """(word, rest) of the Dockerfile, continued lines as one."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line.split(" ", 1) for line in lines]


def settings():
    """What the stage that both images begin with sets."""
    found, inside = {}, False
    for word, rest in instructions():
        if word == "FROM":
            inside = rest == "scratch AS settings"
        elif inside:
            found.setdefault(word, []).append(rest)
    return found


def image_environment():
    return dict(pair.split("=", 1) for line in settings()["ENV"] for pair in line.split())


def status_of(running):
    text = pathlib.Path(f"/proc/{running.pid}/status").read_text(encoding="ascii")
    return dict(line.split(":\t", 1) for line in text.splitlines())


def assert_no_rights(running, uid):
    status = status_of(running)
    assert status["Uid"].split() == [str(uid)] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    mounts = pathlib.Path(f"/proc/{running.pid}/mounts").read_text(encoding="ascii").splitlines()
    root = next(line.split() for line in mounts if line.split()[1] == "/")
    assert "ro" in root[3].split(",")


def replay(running, environment):
    return running.enter([f"{PROGRAMS}/clusterkv-replay", "/opt/clusterkv/share/sample.safetensors",
                          "--methods=clusterkv", "--budgets=128", "--steps=16"],
                         environment=environment, timeout=300)
