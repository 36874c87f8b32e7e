"""Every command in the docs: taken by the real parser, and run, in its quick form where it has one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doc_commands import ROOT, Told, parse, told

from psi_kv_governor.config import tomllib  # the standard library's, or tomli
from waiting import PATIENCE_S, until
from warm import COMMANDS, PSI_KV, Warm

TOLD = sorted(set(told()))
OURS = [one for one in TOLD if one.words[0] == "psi-kv"]
OTHERS = [one for one in TOLD if one.words[0] != "psi-kv"]
FOREIGN = frozenset({"apt", "cd", "docker", "git", "kubectl", "podman", "sudo", "systemctl", "vllm"})
"""Not ours, and not to be run here: their files have to be there."""
TESTED_ELSEWHERE = {
    "bench": "tests/bench",
    "chat": "tests/cli/test_run_and_chat.py",
    "demo": "tests/sandbox/test_demo.py",
    "dashboard": "tests/service/test_beside.py",
    "model": "tests/test_model_fetch.py",
}
"""Commands that serve, ask, fetch or press: they are only parsed here."""
LOOKING = frozenset({"limit", "park", "status", "unpark", "watch"})


def _simulated(words: list[str]) -> list[str]:
    if "--trace" in words:
        return words
    one = ["--scenario", "spike"] if "--plot" in words and "--scenario" not in words else []
    return [*words, "--seconds", "2", *one]  # each of six panels would take a third of a second


QUICK: dict[str, Callable[[list[str]], list[str]]] = {
    # Without a model: what doctor finds by opening one is in tests/test_preflight.py.
    "doctor": lambda words: words if "--" in words else [*words, "--model", "none.gguf"],
    "exec": lambda words: [words[0], *([] if "--dry-run" in words else ["--dry-run"]), *words[1:]],
    "record": lambda words: [*words, "--seconds", "1"],
    "run": lambda words: [*words, "-n", "2"],
    "simulate": _simulated,
    "tune": lambda words: [*words, "--no-scene", *([] if "--trace" in words else ["--calm-s", "2"])],
    "watch": lambda words: words if "--once" in words else [*words, "--once"],
}
"""How a command that takes long or never ends is made to end."""


def name_of(one: Told) -> str:
    return str(one)


@pytest.mark.parametrize("one", OURS, ids=name_of)
def test_the_parser_takes(one):
    assert parse(one.words).startswith("psi-kv")


def test_the_parser_would_have_refused():
    with pytest.raises(Exception, match="--no-such-option"):
        parse(("psi-kv", "simulate", "--no-such-option"))
    with pytest.raises(Exception, match="--no-such-option"):
        parse(("psi-kv", "bench", "oom", "--no-such-option"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with what the docs take for granted: a recording, settings, programs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "bin").mkdir()
    for name in ("llama-server", "ollama", "vllm"):
        shutil.copy(shutil.which("sleep") or "/bin/sleep", folder / "bin" / name)
    (folder / "bin/python").symlink_to(sys.executable)
    (folder / "run").mkdir(mode=0o700)
    (folder / "tuned.toml").write_text("high = 0.2\n")
    return folder


@pytest.fixture(scope="module")
def at_the_desk(desk, tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs `psi-kv` with these words there."""
    said, environ = tmp_path_factory.mktemp("said"), environment(desk)
    with Warm(*COMMANDS) as warm:
        yield lambda *words: warm.run(PSI_KV, words, said, cwd=desk, environ=environ)


@pytest.fixture(scope="module")
def psi_kv(desk, at_the_desk) -> Callable[..., str]:
    """What `psi-kv` says to these words. It must not fail."""

    def run(*words: str) -> str:
        done = at_the_desk(*words)
        assert done.returncode in ({0, 1} if words[0] == "doctor" else {0}), done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert (done.stdout + done.stderr).strip()
        return done.stdout

    run("record", "evening.jsonl", "--seconds", "5")  # in one, a busy machine may not come to a turn
    shutil.copy(desk / "evening.jsonl", desk / "evening.trace")
    return run


def environment(desk: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{desk / 'bin'}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(desk / "run"),
    }


@pytest.fixture(scope="module")
def governed(desk, at_the_desk):
    """A governed process called llama-server, the only one that is to be seen."""
    process = subprocess.Popen(
        [sys.executable, "-m", "psi_kv_governor.cli", "exec", "--", "llama-server", "36000"],
        cwd=desk, env=environment(desk), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: at_the_desk("status", "--json").returncode == 0, "it is not to be seen")
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def named_alike(psi_kv: Callable[..., str]) -> bool:
    """Whether somebody else on this machine has a governed llama-server too: then a name is not enough."""
    return len(psi_kv("status", "--json").splitlines()) > 1


def to_run(names: Callable[[str], bool]) -> list[Told]:
    """Those of the pages whose command is one of these, each once."""
    found = {
        one.words: one
        for one in OURS
        if names(one.words[1])
        and one.words[1] not in TESTED_ELSEWHERE
        and "--pid" not in one.words
        and not one.where.startswith("psi-kv ")
    }
    return list(found.values())


@pytest.mark.parametrize("one", to_run(lambda name: name not in LOOKING | {"run"}), ids=name_of)
def test_it_runs(one, desk, psi_kv):
    words = list(one.words[1:])
    for made in ("psi-kv.toml", *(words[1:2] if words[0] == "record" else ())):
        (desk / made).unlink(missing_ok=True)  # nothing is written over a file that is there
    psi_kv(*QUICK.get(words[0], list)(words))


@pytest.mark.parametrize("one", to_run(lambda name: name in LOOKING), ids=name_of)
def test_it_looks_at_a_governed_process(one, psi_kv, governed):
    meant = {"4711", "llama-server"} if named_alike(psi_kv) else {"4711"}
    words = [str(governed.pid) if word in meant else word for word in one.words[1:]]
    if words[0] == "watch" and str(governed.pid) not in words:
        words.insert(1, str(governed.pid))  # whoever runs these tests may run others at the same time
    psi_kv(*QUICK.get(words[0], list)(words))


@pytest.mark.llama
@pytest.mark.parametrize("one", to_run(lambda name: name == "run"), ids=name_of)
def test_it_runs_a_model(one, psi_kv, demo_model):
    del demo_model
    psi_kv(*QUICK["run"](list(one.words[1:])))


def test_what_is_only_parsed_has_its_test_elsewhere():
    assert not [path for path in TESTED_ELSEWHERE.values() if not (ROOT / path).exists()]


@pytest.mark.parametrize("one", OTHERS, ids=name_of)
def test_what_is_not_ours_names_things_that_are_there(one):
    program, *words = one.words
    if program == "make":
        assert (
            subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=False).returncode == 0
        )
    elif program == "pip":
        assert words[0] == "install"
        assert all(installable(word) for word in words[1:] if not word.startswith("-"))
    elif program in {"python", ".venv/bin/pytest"}:
        assert (ROOT / words[0]).exists(), words[0]
    else:
        assert program in FOREIGN or (ROOT / program).is_file(), program
        named = [word for word in words if word.startswith(("packaging/", "examples/", "scripts/"))]
        assert not [word for word in named if not (ROOT / word).exists()]


def installable(word: str) -> bool:
    """Whether it is ours, with extras that there are, a folder of ours, or somebody else's."""
    name, _, extras = word.partition("[")
    if name in {"psi-kv-governor", "."}:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        return set(extras.rstrip("]").split(",")) - {""} <= known.keys()
    return (ROOT / name / "pyproject.toml").exists() if name.startswith(".") else True
