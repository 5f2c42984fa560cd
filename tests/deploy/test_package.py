"""The relocatable archive: made, checked, unpacked elsewhere, run."""

import hashlib
import pathlib
import re
import subprocess
import time

import pytest

from programs import ROOT


def pack(bundle, out):
    """Path of the archive that package.sh makes."""
    done = subprocess.run([ROOT / "deploy" / "package.sh", bundle, out], check=True,
                          capture_output=True, text=True)
    return pathlib.Path(done.stdout.strip())


@pytest.fixture(scope="module")
def archive(bundle, tmp_path_factory):
    return pack(bundle, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def tree(archive, tmp_path_factory):
    """Unpacked, where nobody built anything."""
    out = tmp_path_factory.mktemp("elsewhere")
    subprocess.run(["tar", "--extract", f"--directory={out}", f"--file={archive}"], check=True)
    return out / archive.name.removesuffix(".tar.gz")


def test_name_tells_version_and_variant(archive):
    version = subprocess.run([ROOT / "deploy" / "version.sh"], check=True, capture_output=True,
                             text=True).stdout.strip()
    assert re.fullmatch(rf"clusterkv-{re.escape(version)}-linux-x86_64(-cuda)?\.tar\.gz",
                        archive.name)
    said = subprocess.run([ROOT / "deploy" / "package.sh"], capture_output=True, check=False)
    assert said.returncode == 2


def test_checksum_beside_it_is_its_own(archive):
    told, name = archive.with_name(archive.name + ".sha256").read_text(encoding="ascii").split()
    assert name == archive.name
    assert told == hashlib.sha256(archive.read_bytes()).hexdigest()


def test_the_same_bundle_gives_the_same_bytes(archive, bundle, tmp_path):
    assert pack(bundle, tmp_path).read_bytes() == archive.read_bytes()


def test_tree_holds_what_it_says(tree):
    for name in ("bin/clusterkvd", "bin/clusterkv-size", "lib/libclusterkv.so", "LICENSE",
                 "include/clusterkv/clusterkv.h", "etc/clusterkvd.yaml",
                 "systemd/clusterkvd.service", "systemd/clusterkv.sysusers", "doc/README.md",
                 "doc/CONFIGURATION.md", "doc/third-party/libgrpc++1.51/copyright"):
        assert (tree / name).exists(), name
    subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=tree, check=True)
    listed = {line.split("  ./", 1)[1] for line in
              (tree / "SHA256SUMS").read_text(encoding="utf-8").splitlines()}
    files = {str(path.relative_to(tree)) for path in tree.rglob("*")
             if path.is_file() and not path.is_symlink()}
    assert files - {"SHA256SUMS"} == listed


def test_daemon_runs_from_where_it_was_unpacked(tree, tmp_path):
    address = f"unix:{tmp_path}/s.sock"
    environment = {"CLUSTERKV_ADDRESS": address, "PATH": "/usr/bin:/bin"}
    loaded = subprocess.run(["ldd", tree / "bin" / "clusterkvd"], check=True, capture_output=True,
                            text=True).stdout
    assert "not found" not in loaded
    # Everything but glibc is the archive's own.
    others = [path for path in re.findall(r"=> (/\S+)", loaded)
              if not path.startswith(str(tree))]
    assert all(re.match(r"lib(c|m|pthread|dl|rt|resolv)\.so", pathlib.Path(path).name)
               for path in others), others
    daemon = subprocess.Popen(
        [tree / "bin" / "clusterkvd", f"--listen={address}", "--host-memory=64mb",
         f"--host-memory-dir={tmp_path}/kv", "--admin-listen=127.0.0.1:0", "--backend=host"],
        env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert daemon.stdout.readline().startswith("READY ")
        subprocess.run([tree / "bin" / "clusterkvctl", "status"], env=environment, check=True)
    finally:
        daemon.terminate()
        started = time.monotonic()
        assert daemon.wait(60) == 0 and time.monotonic() - started < 60
        daemon.stdout.close()
