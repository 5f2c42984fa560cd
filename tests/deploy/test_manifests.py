"""deploy/kubernetes without a cluster: rendered by kubectl, held against the API's schemas, Pod
Security and what the daemon needs. Each rule is also shown something that it must refuse."""

import copy
import re
import subprocess

import jsonschema
import kubernetes_validate
import pytest

import manifests
from crds import SCHEMAS
from manifests import KUBERNETES, OVERLAYS, WORKERS, daemon_pod, only, render
from pod_security import violations
from programs import ROOT

# The oldest that is supported (PodDisruptionBudget's unhealthyPodEvictionPolicy), and the newest
# that kubernetes-validate knows.
VERSIONS = ("1.27", kubernetes_validate.latest_version())

# All that the daemon's pod has beyond "restricted"; the manifests say why, beside each.
DAEMON_EXCEPTIONS = {
    ("securityContext.runAsNonRoot", "None"), ("securityContext.runAsUser", "0"),
    ("volumes.grants", "hostPath"), ("volumes.device-plugins", "hostPath")}
EXCEPTIONS = {
    "cpu-demo": DAEMON_EXCEPTIONS, "cuda": DAEMON_EXCEPTIONS,
    "mps": DAEMON_EXCEPTIONS | {("volumes.mps-pipe", "hostPath"), ("volumes.mps-shm", "hostPath")}}

RULES = (manifests.wrong_memory, manifests.wrong_probes, manifests.wrong_end,
         manifests.wrong_rights, manifests.dangling, manifests.blind,
         manifests.wrong_update)


def invalid(resource, version):
    """Why the resource is none of its kind, or None."""
    try:
        if resource["kind"] in SCHEMAS:
            jsonschema.validate(resource, SCHEMAS[resource["kind"]])
        else:
            kubernetes_validate.validate(resource, version, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return f"{resource['kind']}: {error.message}"
    return None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", OVERLAYS + WORKERS)
def test_resources_are_valid(folder, version):
    resources = render(folder)
    assert len(resources) > 1
    assert not list(filter(None, (invalid(resource, version) for resource in resources)))


def test_what_is_misspelt_is_not_valid():
    resources = render("cuda")
    daemon_set = only(resources, "DaemonSet")
    daemon_set["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    monitor = only(resources, "PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    rule = only(resources, "PrometheusRule")
    rule["spec"]["groups"][0]["rules"][0].pop("expr")
    assert all(invalid(resource, VERSIONS[-1]) for resource in (daemon_set, monitor, rule))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rules_hold(overlay, rule):
    assert not list(rule(render(overlay)))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_guaranteed(overlay):
    assert not list(manifests.not_guaranteed(daemon_pod(render(overlay))[0]))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_daemon_is_restricted_but_for_known_exceptions(overlay):
    assert violations(daemon_pod(render(overlay))[0]) == EXCEPTIONS[overlay]


def test_each_exception_is_justified_where_it_stands():
    sources = {path: path.read_text(encoding="utf-8") for path in (
        KUBERNETES / "base" / "daemonset.yaml", KUBERNETES / "overlays" / "mps" / "daemonset.yaml")}
    base, mps = sources.values()
    # The comment that begins with "Beyond", and the line it is about.
    reasons = re.compile(r'# Beyond "\w+": (\w+)[^\n]*\n(?:\s*#[^\n]*\n)*\s*(?:- name: )?([\w-]+)')
    assert set(reasons.findall(base)) == {("uid", "runAsUser"), ("hostPath", "grants"),
                                          ("hostPath", "device-plugins")}
    assert set(reasons.findall(mps)) == {("hostPath", "mps-pipe"), ("hostPath", "mps-shm")}


@pytest.mark.parametrize("folder", WORKERS)
def test_workers_ask_for_memory_and_are_restricted(folder):
    resources = render(folder)
    spec = only(resources, "Deployment")["spec"]["template"]["spec"]
    assert violations(spec) == set()
    assert not list(manifests.not_guaranteed(spec))
    limits = spec["containers"][0]["resources"]["limits"]
    assert int(limits["clusterkv.io/host-gib"]) > 0
    labels = only(resources, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    daemon_user = daemon_pod(render("cuda"))[0]["securityContext"]["runAsUser"]
    assert spec["securityContext"]["runAsUser"] not in (daemon_user, 39464)
    assert not any(name["name"] == "CLUSTERKV_ADDRESS"
                   for name in spec["containers"][0].get("env", []))  # the kubelet's to set


@pytest.mark.parametrize("folder", OVERLAYS + WORKERS)
def test_images_are_of_this_version(folder):
    version = subprocess.run([ROOT / "deploy" / "version.sh"], check=True, capture_output=True,
                             text=True).stdout.strip()
    variant = "cpu" if folder in ("cpu-demo", "sample-worker") else "cuda"
    resources = render(folder)
    kind = "DaemonSet" if folder in OVERLAYS else "Deployment"
    pod = only(resources, kind)["spec"]["template"]["spec"]
    assert [container["image"] for container in pod["containers"]] == [
        f"clusterkv:{version}-{variant}"]


def test_the_gpu_is_shared_and_not_claimed():
    for overlay in ("cuda", "mps"):
        spec, container = daemon_pod(render(overlay))
        assert spec["runtimeClassName"] == "nvidia"
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["NVIDIA_VISIBLE_DEVICES"]
        assert not any("nvidia.com" in name for name in container["resources"]["limits"])
        assert ("CUDA_MPS_PIPE_DIRECTORY" in environment) == (overlay == "mps")


def test_prometheus_rules_are_those_of_the_file():
    done = subprocess.run([KUBERNETES / "monitoring" / "prometheus-rule.py", "--check"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- What the rules refuse ----------------------------------------------------------------------

def change(resources, path, value):
    """A copy in which the DaemonSet's pod has `value` at `path` (list entries by their names); None
    takes it away."""
    changed = copy.deepcopy(resources)
    place = only(changed, "DaemonSet")["spec"]["template"]["spec"]

    def index(place, step):
        return [entry["name"] for entry in place].index(step) if isinstance(place, list) else step
    for step in path[:-1]:
        place = place[index(place, step)]
    last = index(place, path[-1])
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


CONTAINER = ("containers", "clusterkvd")
UNSAFE = {
    "host-network": (("hostNetwork",), True),
    "host-pid": (("hostPID",), True),
    "host-ipc": (("hostIPC",), True),
    "privileged": ((*CONTAINER, "securityContext", "privileged"), True),
    "escalation": ((*CONTAINER, "securityContext", "allowPrivilegeEscalation"), None),
    "capability": ((*CONTAINER, "securityContext", "capabilities", "add"), ["IPC_LOCK"]),
    "capabilities": ((*CONTAINER, "securityContext", "capabilities"), None),
    "seccomp": (("securityContext", "seccompProfile"), {"type": "Unconfined"}),
    "proc-mount": ((*CONTAINER, "securityContext", "procMount"), "Unmasked"),
    "host-path": (("volumes", "memory"), {"name": "memory", "hostPath": {"path": "/dev/shm"}}),
    "host-port": ((*CONTAINER, "ports", "admin", "hostPort"), 9464)}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_is_unsafe_is_found(name):
    resources = render("cuda")
    found = violations(daemon_pod(change(resources, *UNSAFE[name]))[0])
    assert len(found - DAEMON_EXCEPTIONS) == 1


def test_a_user_that_is_root_by_its_container_is_found():
    worker = only(render("sample-worker"), "Deployment")["spec"]["template"]["spec"]
    worker["containers"][0]["securityContext"]["runAsUser"] = 0
    assert violations(worker) == {("containers.worker.securityContext.runAsUser", "0")}


LIMITS = (*CONTAINER, "resources", "limits")
MEMORY = ("volumes", "memory", "emptyDir")
WRONG = {
    "no-limit": (manifests.not_guaranteed, (*LIMITS, "cpu"), None),
    "burstable": (manifests.not_guaranteed, (*LIMITS, "cpu"), "8"),
    "small-volume": (manifests.wrong_memory, (*MEMORY, "sizeLimit"), "128Gi"),
    "on-disk": (manifests.wrong_memory, (*MEMORY, "medium"), ""),
    "small-limit": (manifests.wrong_memory, (*LIMITS, "memory"), "129Gi"),
    "probe": (manifests.wrong_probes, (*CONTAINER, "livenessProbe", "httpGet", "path"), "/healthz"),
    "no-probe": (manifests.wrong_probes, (*CONTAINER, "readinessProbe"), None),
    "impatient": (manifests.wrong_probes, (*CONTAINER, "startupProbe", "failureThreshold"), 10),
    "port": (manifests.wrong_probes, (*CONTAINER, "ports", "admin", "containerPort"), 8080),
    "grace": (manifests.wrong_end, ("terminationGracePeriodSeconds",), 61),
    "token": (manifests.wrong_rights, ("automountServiceAccountToken",), None),
    "links": (manifests.wrong_rights, ("enableServiceLinks",), None),
    "account": (manifests.dangling, ("serviceAccountName",), "default"),
    "config": (manifests.dangling, ("volumes", "config", "configMap", "name"), "clusterkvd"),
    "mount": (manifests.dangling, (*CONTAINER, "volumeMounts", "memory", "name"), "memroy")}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name):
    rule, path, value = WRONG[name]
    changed = change(render("cuda"), path, value)
    subject = daemon_pod(changed)[0] if rule is manifests.not_guaranteed else changed
    assert list(rule(subject))


def test_a_demo_whose_device_memory_was_forgotten_is_found():
    changed = change(render("cpu-demo"), (*LIMITS, "memory"), "1536Mi")
    assert list(manifests.wrong_memory(changed))
