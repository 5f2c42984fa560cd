"""A node in miniature: the pods of deploy/kubernetes, rendered, started in the image's root file
system with the volumes, the user and the environment that they ask for, against a kubelet of the
test's. No cluster and no container engine."""

import json
import os
import pathlib
import re
import sys
import tempfile
import time

import pytest

import manifests
from contained import Container, Mount
from image import (ADMIN_PORT, PROGRAMS, START_SECONDS, assert_no_rights, image_environment,
                   replay)
from manifests import config_text, daemon_pod, only, render
from programs import ROOT

RESOURCE = "clusterkv.io/host-gib"


@pytest.fixture
def kubelet(node):
    """A kubelet on the node's plugin folder; started before any pod, as it is."""
    sys.path.insert(0, str(ROOT / "tests" / "integration"))
    from fake_kubelet import Kubelet  # pylint: disable=import-outside-toplevel,import-error
    folder = node_folder(node, "/var/lib/kubelet/device-plugins", 0o750)
    made = Kubelet(folder).start()
    yield made
    made.stop()


@pytest.fixture
def node():
    """The root of the node's own files. Its path is short: that of a socket has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="node-") as folder:
        yield folder


def node_folder(node, path, mode):
    folder = pathlib.Path(node + path)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(mode)
    return str(folder)


def volume_mount(volume, path, resources, node):
    """The mount of one volume, as the kubelet makes it."""
    if "configMap" in volume:
        folder = node_folder(node, "/config", 0o755)
        pathlib.Path(folder, "clusterkvd.yaml").write_text(config_text(resources), encoding="utf-8")
        return Mount(path, source=folder, read_only=True)
    if "emptyDir" in volume:
        return Mount(path, size=manifests.quantity(volume["emptyDir"]["sizeLimit"]), mode="0777")
    # The kubelet's own folder is root's alone.
    mode = 0o750 if volume["hostPath"]["path"].startswith("/var/lib/kubelet") else 0o755
    return Mount(path, source=node_folder(node, volume["hostPath"]["path"], mode))


def daemon_container(overlay, root, node, **variables):
    """The DaemonSet's container; `variables` go before its configuration."""
    resources = render(overlay)
    spec, container = daemon_pod(resources)
    context = spec["securityContext"]
    return Container(
        root=str(root), argv=[f"{PROGRAMS}/clusterkvd", *container["args"]],
        uid=context["runAsUser"], gid=context["runAsGroup"],
        environment={**image_environment(), **variables,
                     **{entry["name"]: entry["value"] for entry in container.get("env", [])}},
        mounts=[volume_mount(manifests.volume(spec, mount["name"]), mount["mountPath"], resources,
                             node) for mount in container["volumeMounts"]])


def worker_container(root, node, response):
    """The sample worker's container, with what the kubelet's plugin answered for it."""
    spec = only(render("sample-worker"), "Deployment")["spec"]["template"]["spec"]
    container, context = spec["containers"][0], spec["securityContext"]
    return Container(
        root=str(root), argv=[*container["command"], *container["args"]],
        uid=context["runAsUser"], gid=context["runAsGroup"],
        environment={"PATH": PROGRAMS, **response.envs},
        mounts=[Mount(mount.container_path, source=node + mount.host_path,
                      read_only=mount.read_only) for mount in response.mounts])


def test_demo_pod_starts_and_passes_its_probes(image_root, start, node):
    container = daemon_container("cpu-demo", image_root, node)
    running = start(container)
    _, described = daemon_pod(render("cpu-demo"))
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        running.wait_for(described[name]["httpGet"]["path"], ADMIN_PORT, START_SECONDS)
    assert_no_rights(running, 0)
    assert running.get("/metrics", ADMIN_PORT)[0] == 200
    assert running.stop() == 0


def test_sample_worker_gets_its_memory_and_works(image_root, start, node, kubelet, tmp_path):
    """Asked for as a resource, from the pod's request to decoded tokens; and it sees nothing more
    of the node than its own folder."""
    container = daemon_container("cpu-demo", image_root, node, CLUSTERKV_HOST_MEMORY="2gb")
    next(mount for mount in container.mounts if mount.path == "/memory").size *= 2
    daemon = start(container)
    kubelet.wait_registered()
    assert kubelet.registrations[0].resource_name == RESOURCE
    limits = only(render("sample-worker"), "Deployment")["spec"]["template"]["spec"]["containers"][
        0]["resources"]["limits"]
    wanted = int(limits[RESOURCE])
    assert len(kubelet.devices) >= wanted
    response, = kubelet.allocate(sorted(kubelet.devices)[:wanted])
    worker = start(worker_container(image_root, node, response))
    log = tmp_path / "log-1"
    deadline = time.monotonic() + 5 * START_SECONDS
    while len(re.findall(r"^ *256 +clusterkv ", log.read_text(encoding="utf-8"), re.MULTILINE)) < 2:
        assert worker.process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)  # it begins again by itself
    assert_no_rights(worker, 1000)
    # Its pool is what it asked for, and of the node it sees the folder of its sockets alone.
    asked = worker.enter([f"{PROGRAMS}/clusterkvctl", "status", "--format=json"],
                         dict(response.envs))
    assert json.loads(asked.stdout)["host_bytes"]["total"] == wanted << 30, asked.stderr
    seen = {name for name in os.listdir(f"/proc/{worker.pid}/root/run/clusterkv")
            if not name.endswith(".lock")}
    assert seen == {"clusterkvd.sock", "clusterkvd.sock.attach"}
    told = daemon.enter([f"{PROGRAMS}/clusterkvctl", "status", "--format=json"],
                        image_environment())
    assert json.loads(told.stdout)["host_bytes"]["total"] == 2 << 30, told.stderr
    assert worker.stop() == 0
    assert daemon.stop() == 0


@pytest.mark.parametrize("overlay", ["cuda", "mps"])
def test_daemon_knows_every_key_of_the_other_overlays(image_root, start, node, overlay):
    """Their configuration, with a backend and an amount of memory that this machine has."""
    running = start(daemon_container(overlay, image_root, node, CLUSTERKV_BACKEND="host",
                                     CLUSTERKV_HOST_MEMORY="1gb"))
    running.wait_for("/readyz", ADMIN_PORT, START_SECONDS)
    assert running.stop() == 0


def test_daemon_can_be_asked_from_within_its_pod(image_root, start, node):
    """`kubectl exec ds/clusterkvd -- clusterkvctl status`, and a load."""
    container = daemon_container("cpu-demo", image_root, node, CLUSTERKV_DEVICE_PLUGIN="false")
    running = start(container)
    running.wait_for("/readyz", ADMIN_PORT, START_SECONDS)
    done = replay(running, container.environment)
    assert done.returncode == 0, done.stderr


def test_variables_of_service_links_would_end_the_daemon(image_root, start, node):
    """Why the manifests switch them off."""
    container = daemon_container("cpu-demo", image_root, node,
                                 CLUSTERKV_PORT="tcp://10.0.0.1:80")
    assert start(container).process.wait(START_SECONDS) == 2
