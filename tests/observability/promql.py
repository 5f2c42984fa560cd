"""What queries name."""

import re

SELECTOR = re.compile(
    r"\b((?:clusterkv|grpc_server|process|scrape)_\w+|(?:gpu_mode|layer|instance|method):\w+:\w+|up)"
    r"\b(\{[^}]*\})?")


def selectors(expression):
    """Each metric of an expression with its matchers, as a query of its own."""
    return sorted({name + (labels or "") for name, labels in SELECTOR.findall(expression)})


def filled_in(expression):
    """A panel's query with what Grafana puts in."""
    return (expression.replace("$job", ".*").replace("$instance", ".*")
            .replace("$__rate_interval", "30s"))
