"""deploy/*.md: what is generated is up to date, commands print what is shown of them, links lead
somewhere."""

import json
import math
import re
import shlex
import subprocess

import pytest

from programs import BIN, ROOT

DOCUMENTS = sorted((ROOT / "deploy").glob("**/*.md"))


def test_configuration_reference_is_what_the_daemon_says():
    said = subprocess.run([BIN / "clusterkvd", "--help=markdown"], check=True, capture_output=True,
                          text=True).stdout
    path = ROOT / "deploy" / "CONFIGURATION.md"
    assert path.read_text(encoding="utf-8") == said, (
        "run build/release/bin/clusterkvd --help=markdown >deploy/CONFIGURATION.md")


def shown_commands(path):
    """(command, output) of each ```console block: a line that begins with $, then its output."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        command, output = block.split("\n", 1)
        while command.endswith("\\"):
            more, output = output.split("\n", 1)
            command = command[:-1] + more.strip()
        assert command.startswith("$ "), command
        yield command[2:], output


def test_sizing_guide_shows_what_the_program_says():
    commands = list(shown_commands(ROOT / "deploy" / "SIZING.md"))
    assert len(commands) >= 3
    for command, output in commands:
        words = shlex.split(command)
        assert words[0] == "clusterkv-size"
        done = subprocess.run([BIN / words[0], *words[1:]], check=True, capture_output=True,
                              text=True)
        assert done.stdout == output, f"{command} prints\n{done.stdout}"


FORMULAS = {"full KV": "full_kv_bytes", "cluster cache": "cache_bytes",
            "clusters": "clusters_bytes", "sinks and window": "window_bytes",
            "slots of rows": "rows_bytes"}


def test_formulas_of_the_guide_give_what_the_program_says():
    """The last column of their table, with numbers in it."""
    done = subprocess.run([BIN / "clusterkv-size", "--tokens=131072", "--format=json"], check=True,
                          capture_output=True, text=True)
    said = json.loads(done.stdout)["sequence"]
    text = (ROOT / "deploy" / "SIZING.md").read_text(encoding="utf-8")
    for name, key in FORMULAS.items():
        sums = re.search(rf"^\| {name} \| .* \| ([\d,x+() -]+) \|$", text, re.MULTILINE).group(1)
        value = eval(sums.replace(",", "").replace("x", "*"))  # pylint: disable=eval-used
        # Parts of the state begin on 256 bytes.
        assert 0 <= said[key] - value < 5 * 256, (name, value, said[key])


def test_what_is_left_to_an_engine_is_what_the_program_leaves():
    """The table's rows: a --gpu-memory that the guide shows, the share that an engine may then take
    in steps of 0.01, and what that is."""
    path = ROOT / "deploy" / "SIZING.md"
    shown = {re.search(r"--gpu-memory (\d+)mb", output).group(1)
             for _, output in shown_commands(path)}
    total = 79.1
    rows = re.findall(r"\| (\d+)mb \| (0\.\d\d) \| ([\d.]+) GiB \|",
                      path.read_text(encoding="utf-8"))
    assert len(rows) >= 3
    for gpu_memory, utilization, left in rows:
        assert gpu_memory in shown
        most = math.floor(100 * (1 - (int(gpu_memory) / 1024 + 1) / total)) / 100
        assert (float(utilization), left) == (most, f"{most * total:.1f}")


def test_sizes_are_also_json():
    done = subprocess.run([BIN / "clusterkv-size", "--tokens=131072", "--format=json"], check=True,
                          capture_output=True, text=True)
    assert '"full_kv_bytes": 17179869184' in done.stdout
    bad = subprocess.run([BIN / "clusterkv-size", "--tokens=131072", "--head-dim=80"],
                         capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and "head_dim" in bad.stderr


def anchors(path):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target
