"""A node in miniature: the pods of deploy/kubernetes, rendered, started in the image's root file
system with the volumes, the user and the environment that they ask for. No cluster and no container
engine."""

import pathlib

import pytest

import manifests
from contained import Container, Mount
from image import (ADMIN_PORT, PROGRAMS, START_SECONDS, assert_no_rights, image_environment,
                   replay)
from manifests import config_text, daemon_pod, render


@pytest.fixture
def node(tmp_path):
    """The root of the node's own files, as a path."""
    return str(tmp_path / "node")


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


def test_demo_pod_starts_and_passes_its_probes(image_root, start, node):
    container = daemon_container("cpu-demo", image_root, node)
    running = start(container)
    _, described = daemon_pod(render("cpu-demo"))
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        running.wait_for(described[name]["httpGet"]["path"], ADMIN_PORT, START_SECONDS)
    assert_no_rights(running, 0)
    assert running.get("/metrics", ADMIN_PORT)[0] == 200
    assert running.stop() == 0


@pytest.mark.parametrize("overlay", ["cuda", "mps"])
def test_daemon_knows_every_key_of_the_other_overlays(image_root, start, node, overlay):
    """Their configuration, with a backend and an amount of memory that this machine has."""
    running = start(daemon_container(overlay, image_root, node, CLUSTERKV_BACKEND="host",
                                     CLUSTERKV_HOST_MEMORY="1gb"))
    running.wait_for("/readyz", ADMIN_PORT, START_SECONDS)
    assert running.stop() == 0


def test_daemon_can_be_asked_from_within_its_pod(image_root, start, node):
    """`kubectl exec ds/clusterkvd -- clusterkvctl status`, and a load."""
    container = daemon_container("cpu-demo", image_root, node)
    running = start(container)
    running.wait_for("/readyz", ADMIN_PORT, START_SECONDS)
    done = replay(running, container.environment)
    assert done.returncode == 0, done.stderr


def test_variables_of_service_links_would_end_the_daemon(image_root, start, node):
    """Why the manifests switch them off."""
    container = daemon_container("cpu-demo", image_root, node,
                                 CLUSTERKV_PORT="tcp://10.0.0.1:80")
    assert start(container).process.wait(START_SECONDS) == 2
