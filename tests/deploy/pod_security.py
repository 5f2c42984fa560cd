"""Kubernetes' Pod Security Standards, level "restricted", over a pod's spec: what breaks them, as
(place, what) with the place as a path in the spec, list entries by their names."""

ALLOWED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral",
                   "persistentVolumeClaim", "projected", "secret"}
SECCOMP = {"RuntimeDefault", "Localhost"}


def containers(spec):
    """(place, container) of every container of the pod."""
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind, []):
            yield f"{kind}.{container['name']}", container


def _host_access(spec):
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key, "shares a namespace of the node"
    if spec.get("securityContext", {}).get("sysctls"):
        yield "securityContext.sysctls", "sets some"
    for volume in spec.get("volumes", []):
        for kind in set(volume) - {"name"} - ALLOWED_VOLUMES:
            yield f"volumes.{volume['name']}", kind
    for place, container in containers(spec):
        for port in container.get("ports", []):
            if port.get("hostPort"):
                yield f"{place}.ports", f"hostPort {port['hostPort']}"


def _user(spec, place, context):
    """runAsUser and runAsNonRoot of a container, or of the pod where it says nothing."""
    pod = spec.get("securityContext", {})
    for key, bad in (("runAsNonRoot", lambda value: value is not True),
                     ("runAsUser", lambda value: value == 0)):
        where = f"{place}.securityContext" if key in context else "securityContext"
        value = context.get(key, pod.get(key))
        if bad(value):
            yield f"{where}.{key}", str(value)


def _container(spec, place, container):
    context = container.get("securityContext", {})
    at = f"{place}.securityContext"
    if context.get("privileged"):
        yield f"{at}.privileged", "true"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{at}.allowPrivilegeEscalation", "not false"
    if context.get("procMount", "Default") != "Default":
        yield f"{at}.procMount", context["procMount"]
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield f"{at}.capabilities.drop", "not ALL"
    for added in set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{at}.capabilities.add", added
    profile = context.get("seccompProfile", spec.get("securityContext", {}).get("seccompProfile"))
    if (profile or {}).get("type") not in SECCOMP:
        yield f"{at}.seccompProfile", str(profile)
    for options in (context, spec.get("securityContext", {})):
        selinux = options.get("seLinuxOptions", {})
        if selinux.get("user") or selinux.get("role"):
            yield f"{at}.seLinuxOptions", "user or role"
    yield from _user(spec, place, context)


def violations(spec):
    """The set of (place, what) by which the pod is not "restricted"."""
    found = set(_host_access(spec))
    for place, container in containers(spec):
        found |= set(_container(spec, place, container))
    return found
