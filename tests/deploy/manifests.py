"""The Kubernetes manifests: rendering, and what must hold of them, as functions that give a list of
what is wrong."""

import functools
import re
import shutil
import subprocess

import yaml

from programs import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu-demo", "cuda", "mps")
WORKERS = ("sample-worker", "sample-worker-cuda")
MIB = 1 << 20
SUFFIXES = {"Ki": 1 << 10, "Mi": MIB, "Gi": 1 << 30, "Ti": 1 << 40}
SIZES = {"kb": 1 << 10, "mb": MIB, "gb": 1 << 30, "tb": 1 << 40}
DURATIONS = {"ms": 0.001, "s": 1, "m": 60}
# For the process: code, stacks, gRPC's buffers, sessions.
PROCESS_BYTES = 256 * MIB
# To end what is left, unpin and free.
END_SECONDS = 30
LEAST_STARTUP_SECONDS = 600
RBAC = {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}


@functools.lru_cache(maxsize=None)
def _text(folder):
    kubectl = shutil.which("kubectl")
    assert kubectl, "no kubectl (Debian: kubernetes-client)"
    return subprocess.run([kubectl, "kustomize", str(KUBERNETES / folder)], check=True,
                          capture_output=True, text=True, timeout=60).stdout


def render(folder):
    """The resources of an overlay's or a worker's folder; the caller may change them."""
    folder = f"overlays/{folder}" if folder in OVERLAYS else folder
    return [resource for resource in yaml.safe_load_all(_text(folder)) if resource]


def only(resources, kind):
    found = [resource for resource in resources if resource["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of {kind}"
    return found[0]


def daemon_pod(resources):
    """The pod's spec, and its one container."""
    spec = only(resources, "DaemonSet")["spec"]["template"]["spec"]
    assert len(spec["containers"]) == 1
    return spec, spec["containers"][0]


def config_text(resources):
    return only(resources, "ConfigMap")["data"]["clusterkvd.yaml"]


def config(resources):
    return yaml.safe_load(config_text(resources))


def quantity(text):
    """Bytes, or a count, of a Kubernetes quantity."""
    number, suffix = re.fullmatch(r"(\d+)([KMGT]i)?", str(text)).groups()
    return int(number) * SUFFIXES.get(suffix, 1)


def size(text):
    """Bytes of a size as clusterkvd reads it."""
    number, unit = re.fullmatch(r"(\d+)([kmgt]b)", text).groups()
    return int(number) * SIZES[unit]


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|m)", text).groups()
    return int(number) * DURATIONS[unit]


def volume(spec, name):
    return next(volume for volume in spec["volumes"] if volume["name"] == name)


# --- What must hold ---------------------------------------------------------------------------

def not_guaranteed(spec):
    """QoS class Guaranteed: each container has limits of CPU and memory, and equal requests."""
    for container in spec.get("initContainers", []) + spec["containers"]:
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        for name in {"cpu", "memory"} - set(limits):
            yield f"{container['name']}: no limit of {name}"
        for name in set(limits) | set(requests):
            if limits.get(name) != requests.get(name):
                yield f"{container['name']}: {name}: {requests.get(name)} of {limits.get(name)}"


def wrong_memory(resources):
    """The volume holds the host memory, and the limit both and the process."""
    spec, container = daemon_pod(resources)
    keys = config(resources)
    host = size(keys["host-memory"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    if not keys["host-memory-dir"].startswith(mounts.get("memory", "?") + "/"):
        yield f"host-memory-dir {keys['host-memory-dir']} is not in the volume memory"
    empty_dir = volume(spec, "memory")["emptyDir"]
    if empty_dir.get("medium") != "Memory":
        yield "volume memory is not in memory"
    limit = quantity(empty_dir.get("sizeLimit", 0))
    if limit < host + 16 * MIB:
        yield f"sizeLimit {limit} is less than host-memory {host} and a little"
    # The host backend's GPU memory is host memory.
    gpu = size(keys["gpu-memory"]) if keys["backend"] == "host" else 0
    memory = quantity(container["resources"]["limits"]["memory"])
    if memory < limit + gpu + PROCESS_BYTES:
        yield f"limit of memory {memory}: {limit} is the volume, {gpu} the device's"
    threads = keys.get("threads", 0)
    if keys["backend"] == "host" and threads != quantity(container["resources"]["limits"]["cpu"]):
        yield f"threads is {threads}, not the limit of CPUs"


def wrong_probes(resources):
    _, container = daemon_pod(resources)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listen = config(resources)["admin-listen"]
    if ports != {"admin": int(listen.rsplit(":", 1)[1])}:
        yield f"ports are {ports}, the daemon listens on {listen}"
    if listen.rsplit(":", 1)[0] not in ("0.0.0.0", "[::]"):
        yield f"the kubelet does not reach {listen}"
    for name, path in (("startupProbe", "/startupz"), ("readinessProbe", "/readyz"),
                       ("livenessProbe", "/livez")):
        probe = container.get(name, {})
        if probe.get("httpGet") != {"path": path, "port": "admin"}:
            yield f"{name}: {probe}"
        if probe.get("timeoutSeconds", 1) > probe.get("periodSeconds", 10):
            yield f"{name}: its timeout is longer than its period"
    startup = container.get("startupProbe", {})
    budget = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
    if budget < LEAST_STARTUP_SECONDS:
        yield f"startupProbe: {budget} s"


def wrong_end(resources):
    spec, _ = daemon_pod(resources)
    drain = seconds(config(resources)["drain-timeout"])
    if spec.get("terminationGracePeriodSeconds", 30) < drain + END_SECONDS:
        yield f"{spec.get('terminationGracePeriodSeconds')} s, and drain-timeout is {drain} s"


def wrong_rights(resources):
    """No role, no token, no API server; and nothing in the environment that others put there."""
    spec, _ = daemon_pod(resources)
    for kind in {resource["kind"] for resource in resources} & RBAC:
        yield f"there is a {kind}"
    if only(resources, "ServiceAccount").get("automountServiceAccountToken") is not False:
        yield "the ServiceAccount gives its token"
    if spec.get("automountServiceAccountToken") is not False:
        yield "the pod takes a token"
    if spec.get("enableServiceLinks") is not False:
        yield "a Service named clusterkv would give the daemon variables that it refuses"
    policy = only(resources, "NetworkPolicy")["spec"]
    if set(policy["policyTypes"]) != {"Ingress", "Egress"} or policy.get("egress"):
        yield "the network policy lets something out"
    ports = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    if ports != ["admin"] or not all(rule.get("from") for rule in policy["ingress"]):
        yield f"the network policy lets in {policy['ingress']}"


def blind(resources):
    """Selectors that do not see the pod."""
    daemon_set = only(resources, "DaemonSet")
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    selectors = {"DaemonSet": daemon_set["spec"]["selector"]}
    for kind, key in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector"),
                      ("PodMonitor", "selector")):
        for resource in resources:
            if resource["kind"] == kind:
                selectors[kind] = resource["spec"][key]
    for kind, selector in selectors.items():
        if not selector.get("matchLabels", {}).items() <= labels.items() or set(selector) != {
                "matchLabels"}:
            yield f"{kind} does not select the pod: {selector}"


def dangling(resources):
    """Names that lead nowhere."""
    spec, container = daemon_pod(resources)
    for resource in resources:
        namespace = resource["metadata"].get("namespace")
        wanted = None if resource["kind"] in ("Namespace", "PriorityClass") else "clusterkv"
        if namespace != wanted:
            yield f"{resource['kind']} is in namespace {namespace}"
    names = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    for kind, name in (("ServiceAccount", spec["serviceAccountName"]),
                       ("PriorityClass", spec["priorityClassName"]),
                       ("ConfigMap", volume(spec, "config")["configMap"]["name"])):
        if (kind, name) not in names:
            yield f"there is no {kind} {name}"
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    if volumes != mounted:
        yield f"volumes {volumes}, mounted are {mounted}"


def wrong_update(resources):
    """An update never takes several daemons at once, and no budget that the controller rejects."""
    strategy = only(resources, "DaemonSet")["spec"]["updateStrategy"]
    rolling = strategy.get("rollingUpdate", {})
    if strategy["type"] != "OnDelete" and rolling.get("maxUnavailable") != 1:
        yield f"updateStrategy: {strategy}"
    budget = only(resources, "PodDisruptionBudget")["spec"]
    if "maxUnavailable" in budget or not isinstance(budget.get("minAvailable"), int):
        yield f"a budget that no DaemonSet can have: {budget}"
