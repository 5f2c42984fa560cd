"""Fixtures of the deployment's tests. CLUSTERKV_BIN chooses the build under test (default
build/release/bin), whose bundle (target `bundle`) lies beside it."""

import os
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from programs import BIN, ROOT  # noqa: E402  (needs the path above)


def pytest_report_header(config):
    del config
    return f"programs: {BIN}"


@pytest.fixture(scope="session")
def bundle():
    path = BIN.parent / "bundle"
    assert (path / "bin" / "clusterkvd").exists(), f"{path}: build the target `bundle`"
    return path


@pytest.fixture(scope="session")
def image_root(bundle, tmp_path_factory):
    """An image's root file system, as the Dockerfile makes it."""
    out = tmp_path_factory.mktemp("image") / "root"
    subprocess.run([ROOT / "deploy" / "images" / "assemble-root.sh", bundle, out], check=True)
    return pathlib.Path(out)


@pytest.fixture
def as_root():
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes namespaces and mounts")


@pytest.fixture
def start(as_root, tmp_path):
    """start(container): Running; all are ended with the test, whose log is shown if it fails."""
    del as_root
    running = []

    def begin(container):
        log = open(tmp_path / f"log-{len(running)}", "w+b")  # pylint: disable=consider-using-with
        running.append((container.start(log), log))
        return running[-1][0]
    yield begin
    for one, log in running:
        one.discard()
        log.seek(0)
        print(log.read().decode(errors="replace"))
        log.close()
