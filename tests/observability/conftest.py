"""The daemons of these tests are those of tests/integration; Prometheus and the load come from
deploy/observe."""

import os
import pathlib
import sys

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in ("tests/integration", "deploy/observe", "deploy"):
    sys.path.insert(0, str(ROOT / folder))
