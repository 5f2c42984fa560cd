"""Where the checkout and the programs under test are: $CLUSTERKV_BIN, or the release build."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = (ROOT / (os.environ.get("CLUSTERKV_BIN") or "build/release/bin")).resolve()
