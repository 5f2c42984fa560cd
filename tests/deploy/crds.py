"""The shape of the Prometheus operator's resources that are used here, strict: its own schemas are
in no package."""

_NAME = {"type": "string", "minLength": 1}
_DURATION = {"type": "string", "pattern": r"^(\d+(ms|s|m|h|d|w))+$"}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}


def _closed(properties, required):
    return {"type": "object", "properties": properties, "required": required,
            "additionalProperties": False}


def _resource(kind, spec):
    return _closed({
        "apiVersion": {"const": "monitoring.coreos.com/v1"}, "kind": {"const": kind},
        "metadata": _closed({"name": _NAME, "namespace": _NAME, "labels": _LABELS},
                            ["name", "namespace"]),
        "spec": spec}, ["apiVersion", "kind", "metadata", "spec"])


POD_MONITOR = _resource("PodMonitor", _closed({
    "selector": _closed({"matchLabels": _LABELS}, ["matchLabels"]),
    "podMetricsEndpoints": {"type": "array", "minItems": 1, "items": _closed({
        "port": _NAME, "path": {"type": "string", "pattern": "^/"}, "interval": _DURATION,
        "scrapeTimeout": _DURATION,
        "relabelings": {"type": "array", "items": _closed({
            "sourceLabels": {"type": "array", "items": _NAME}, "targetLabel": _NAME,
            "regex": {"type": "string"}, "replacement": {"type": "string"},
            "action": _NAME}, [])}}, ["port"])}},
    ["selector", "podMetricsEndpoints"]))

_RULE = {
    "oneOf": [
        _closed({"record": _NAME, "expr": _NAME, "labels": _LABELS}, ["record", "expr"]),
        _closed({"alert": _NAME, "expr": _NAME, "for": _DURATION, "keep_firing_for": _DURATION,
                 "labels": _LABELS, "annotations": _LABELS}, ["alert", "expr"])]}

PROMETHEUS_RULE = _resource("PrometheusRule", _closed({
    "groups": {"type": "array", "minItems": 1, "items": _closed({
        "name": _NAME, "interval": _DURATION,
        "rules": {"type": "array", "minItems": 1, "items": _RULE}}, ["name", "rules"])}},
    ["groups"]))

SCHEMAS = {"PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}
