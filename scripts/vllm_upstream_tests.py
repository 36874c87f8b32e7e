"""Run vLLM's own tests of the KV connectors' contract and of the scheduler, without our plugin and with it.

    .venv-vllm/bin/python scripts/vllm_upstream_tests.py CHECKOUT [--record FILE] [PATH ...]

CHECKOUT holds vLLM's sources at the version that is installed (its sdist, or a checkout of its tag). The
tests are theirs and stay there: each run sees them beside the *installed* vLLM, in a folder of its own. What
ends alike in both runs is none of our doing: tests of GPUs, of other connectors, of models on a hub.
They want more packages than vLLM does: pip install tblib pytest-asyncio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

PATHS = ("tests/v1/core/test_scheduler.py", "tests/v1/kv_connector/unit")
LOADED = '''
def pytest_configure(config):
    """As vLLM does in each of its processes; most of these tests make parts of one."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert "PsiKvConnector" in KVConnectorFactory._registry
    KVConnectorFactory.get_connector_class_by_name("PsiKvConnector")
'''
KEEP_WORDS = 200


def folder_for(checkout: Path, folder: Path) -> None:
    """Their tests, and the configuration of the model that most of them name: no hub is asked for it."""
    from transformers import OPTConfig

    (folder / "tests").symlink_to(checkout / "tests")
    (folder / "psi_kv_loaded.py").write_text(LOADED)
    config = OPTConfig()
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(folder / "facebook" / "opt-125m")


def results(report: Path) -> dict[str, tuple[str, str]]:
    """By test, how it ended, and why in a line."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = [child for child in case if child.tag in {"failure", "error", "skipped"}]
        why = (ends[0].get("message") or "").split("\n")[0][:KEEP_WORDS] if ends else ""
        name = f"{case.get('classname')}.{case.get('name')}"
        found[name] = (ends[0].tag if ends else "passed", why)
    return found


def run(folder: Path, paths: list[str], *, plugin: bool) -> dict[str, tuple[str, str]]:
    """All tests once."""
    environ = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environ["VLLM_PLUGINS"] = "psi_kv_governor" if plugin else ""
    report = folder / f"report-{plugin}.xml"
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        f"--rootdir={folder}",
        f"--junitxml={report}",
    ]
    words += ["-p", "no:cacheprovider", "--timeout=300", "--tb=line", "-o", "addopts=", *paths]
    if plugin:
        words += ["-p", "psi_kv_loaded"]
    subprocess.run(words, check=False, cwd=folder, env=environ)
    if not report.exists():
        sys.exit("vllm_upstream_tests: pytest did not come to an end: see above")
    return results(report)


def main() -> int:
    """Both runs, and what differs; 1 where something does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("paths", nargs="*", default=list(PATHS), metavar="PATH")
    parser.add_argument("--record", type=Path, help="JSON file to keep the outcome in")
    options = parser.parse_intermixed_args()
    checkout = options.checkout.resolve()
    if not (checkout / PATHS[0]).exists():
        sys.exit(f"vllm_upstream_tests: {checkout} holds no sources of vLLM ({PATHS[0]} is not there)")
    with tempfile.TemporaryDirectory(prefix="psi-kv-vllm-") as name:
        folder_for(checkout, Path(name))
        without = run(Path(name), options.paths, plugin=False)
        loaded = run(Path(name), options.paths, plugin=True)
    differ = {
        test: {"without": without.get(test, ("absent", ""))[0], "with": end, "why": why}
        for test, (end, why) in loaded.items()
        if without.get(test, ("absent", ""))[0] != end
    }
    told = {
        "vllm": metadata.version("vllm-cpu"),
        "paths": options.paths,
        "without": dict(Counter(end for end, _ in without.values())),
        "with": dict(Counter(end for end, _ in loaded.values())),
        "differ": differ,
        "not passed with": dict(
            Counter(why for end, why in loaded.values() if end != "passed").most_common(20)
        ),
    }
    text = json.dumps(told, indent=1)
    print(text)
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(f"{text}\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
