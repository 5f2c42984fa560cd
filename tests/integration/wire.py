"""The wire as an outsider sees it: stubs made from proto/, at import, into a temporary folder.

`wire.v1` holds every message, enum and stub of package clusterkv.v1, `wire.kubelet` those of the
kubelet's device plugin interface.
"""

import atexit
import importlib
import os
import pathlib
import shutil
import sys
import tempfile
import types

from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("session", "sequence", "status", "attach", "fetch", "clusterkv")
KUBELET = "kubelet/deviceplugin/v1beta1/api"
# Tells child processes where the stubs lie, so that they need not make their own.
STUBS_VARIABLE = "CLUSTERKV_TEST_STUBS"


def _generate():
    """Runs protoc over proto/; returns the folder that holds the stubs."""
    given = os.environ.get(STUBS_VARIABLE)
    if given and os.path.isdir(given):
        return given
    folder = tempfile.mkdtemp(prefix="ckv-stubs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    proto = ROOT / "proto"
    code = protoc.main(["protoc", f"-I{proto}", f"--python_out={folder}",
                        f"--grpc_python_out={folder}",
                        *(f"{proto}/clusterkv/v1/{part}.proto" for part in PARTS),
                        f"{proto}/{KUBELET}.proto"])
    if code != 0:
        raise RuntimeError(f"protoc failed with {code}")
    os.environ[STUBS_VARIABLE] = folder
    return folder


def _names(*modules):
    names = {}
    for module in modules:
        loaded = importlib.import_module(module)
        names.update({name: value for name, value in vars(loaded).items()
                      if not name.startswith("_")})
    return types.SimpleNamespace(**names)


sys.path.insert(0, _generate())
v1 = _names(*(f"clusterkv.v1.{part}_pb2" for part in PARTS), "clusterkv.v1.clusterkv_pb2_grpc")
_api = KUBELET.replace("/", ".")
kubelet = _names(f"{_api}_pb2", f"{_api}_pb2_grpc")
