"""llama.cpp's own tests of its server, plain and with random parking: the results must be the same.

The tests are not ours and are not here: name a checkout (or an unpacked source) of llama.cpp of the server's
age, a Python that has what `tools/server/tests/requirements.txt` asks for and pytest-timeout, and a server.
Tests that need a model of the hub other than the tiny one, for which MODEL stands in, are left out.

    python benchmarks/server_suite.py --checkout llama.cpp --python PYTHON --model MODEL -- llama-server
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import subprocess
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from psi_kv_governor.cache import Plan, Step, Verb
from psi_kv_governor.engines.llama.fleet import Fleet
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.governor import Governor
from psi_kv_governor.native.building import agent_path
from psikv_bench.server.asking import SILENT

# Loaded by pytest in the other Python: every server gets the one model, none is loaded beforehand.
PLUGIN = """
import os
import pytest

def pytest_configure(config):
    import sys
    sys.path.insert(0, os.getcwd())
    import utils
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    start = utils.ServerProcess.start
    def start_with_model(self, *args, **kwargs):
        if self.model_hf_repo == "ggml-org/test-model-stories260K":
            self.model_hf_repo = self.model_hf_file = None
            self.model_file = os.environ["SUITE_MODEL"]
        elif self.model_hf_repo or self.model_url:
            pytest.skip("needs a model of the hub")
        return start(self, *args, **kwargs)
    utils.ServerProcess.start = start_with_model
"""
PAUSE_S = 0.02
"""Between two parks: several within each answer."""


@contextlib.contextmanager
def parking(place: str, backing: str, seed: int) -> Iterator[tuple[dict[str, str], list[int]]]:
    """The environment of a program that is parked at random, and how many bytes went so far."""
    fleet = Fleet(place=place, backing=backing)
    governor = Governor(fleet)
    ended, returned, dice = threading.Event(), [0, 0], random.Random(seed)

    def park() -> None:
        while not ended.wait(PAUSE_S * dice.random() * 2):
            with contextlib.suppress(PsiKvError):
                if dice.random() < 0.1:
                    governor.park()
                    continue
                caches = fleet.snapshot().caches
                chosen = [(cache.id, one.id) for cache in caches for one in cache.sequences]
                if chosen:
                    cache, sequence = dice.choice(chosen)
                    step = Step(verb=Verb.PARK, cache=cache, sequence=sequence)
                    returned[0] += fleet.apply(Plan(steps=(step,))).bytes_returned
                    returned[1] += 1

    thread = threading.Thread(target=park)
    thread.start()
    try:
        yield {
            "LD_PRELOAD": str(agent_path()), "PSIKV_SOCKET": fleet.name,
            "PSIKV_PLACE": place, "PSIKV_BACKING": backing,
        }, returned  # fmt: skip
    finally:
        ended.set()
        thread.join()
        governor.close()
        fleet.close()


def outcomes(report: Path) -> dict[str, str]:
    """Of each test, how it ended."""
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        end = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = end
    return found


def play(
    tests: Path,
    more: dict[str, str],
    *,
    chosen: Sequence[str],
    python: str,
    model: Path,
    server: Sequence[str],
) -> dict[str, str]:
    """One run of the suite; `more` is what the server's environment has besides."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "psi_kv_suite.py").write_text(PLUGIN)
        wrapper, report = Path(folder) / "llama-server", Path(folder) / "report.xml"
        given = " ".join(f"{name}={shlex.quote(value)}" for name, value in more.items())
        wrapper.write_text(f'#!/bin/sh\nexec env {given} {shlex.join(server)} "$@"\n')
        wrapper.chmod(0o755)
        environ = {
            **os.environ, "LLAMA_SERVER_BIN_PATH": str(wrapper), "SUITE_MODEL": str(model.resolve()),
            "PYTHONPATH": folder, "LLAMA_ARG_THREADS": "1",
        }  # fmt: skip
        command = [python, "-m", "pytest", "-q", "-p", "psi_kv_suite", "-p", "no:cacheprovider"]
        command += ["--timeout=300", f"--junitxml={report}", *chosen]
        subprocess.run(command, cwd=tests, env=environ, check=False, **SILENT)
        return outcomes(report)


@click.command()
@click.option("--checkout", required=True, type=click.Path(path_type=Path, exists=True), help="Of llama.cpp.")
@click.option("--python", required=True, help="A Python with what the tests need.")
@click.option(
    "--model", required=True, type=click.Path(path_type=Path, exists=True), help="A small GGUF file."
)
@click.option("--test", "chosen", multiple=True, default=["unit/test_completion.py"], show_default=True)
@click.option("--place", default="/var/tmp", show_default=True, help="Where context is parked.")
@click.option("--backing", default="file", type=click.Choice(["file", "memory"]), show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of the parking.")
@click.argument("server", nargs=-1, required=True, type=click.UNPROCESSED)
def main(*, checkout: Path, place: str, backing: str, seed: int, **given: Any) -> None:
    """Run the tests twice with SERVER, and say where the results differ."""
    tests = checkout / "tools" / "server" / "tests"
    plain = play(tests, {}, **given)
    folder = Path(place) / f"psi-kv-{os.geteuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    with parking(str(folder), backing, seed) as (environ, returned):
        governed = play(tests, environ, **given)
    for end in ("passed", "failure", "error", "skipped"):
        counts = [sum(value == end for value in run.values()) for run in (plain, governed)]
        click.echo(f"{end:<8} {counts[0]:>4} plain {counts[1]:>4} parked at random")
    click.echo(f"{returned[1]} parks of a slot, {returned[0] >> 20} MiB returned")
    differ = [name for name in {**plain, **governed} if plain.get(name) != governed.get(name)]
    for name in differ:
        click.echo(f"differs: {name}: {plain.get(name)} plain, {governed.get(name)} parked at random")
    raise SystemExit(1 if differ else 0)


if __name__ == "__main__":
    main()
