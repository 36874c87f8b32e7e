"""`run` and `chat` on the real model: what they print, and how they end when somebody ends them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calm import CALM
from psi_kv_governor import cli

pytestmark = pytest.mark.llama
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(cli.__file__).parents[2]),
    "PYTHONUNBUFFERED": "1",
    **CALM,
}
CHAT = (
    "My name is Anna.\n/trim 0.5\n/trim nonsense\n/status\n/undo\n/reset\n/help\nHello!\n/quit\nnever read\n"
)


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "psi_kv_governor.cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def finish(*arguments: str, said: str = "") -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(said, timeout=600)
    return process.returncode, out, err


def small(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "-c", "1024", "--temp", "0", *more]


def test_run_prints_text_and_a_line_on_what_the_governor_did(demo_model):
    status, out, err = finish("run", "--raw", "-n", "8", *small(demo_model), "The capital of France is")
    assert status == 0
    assert "Paris" in out
    assert "8 tokens at" in err
    assert "the machine was calm, nothing was given up" in err


def test_run_takes_the_prompt_from_standard_input(shallow_model):
    arguments = ["run", "--raw", "-n", "4", *small(shallow_model), "--json", "-"]
    status, out, _ = finish(*arguments, said="The capital of France is")
    report = json.loads(out)
    assert status == 0
    assert report["tokens"] == 4
    assert report["masked_cells"] == 0
    assert report["status"]["live_cells"] > 0


def test_run_uses_the_models_chat_template_unless_told_otherwise(shallow_model):
    _, raw, _ = finish("run", "--raw", "-n", "12", *small(shallow_model), "--json", "Say hello.")
    _, templated, _ = finish("run", "-n", "12", *small(shallow_model), "--json", "Say hello.")
    cells = [json.loads(text)["status"]["live_cells"] for text in (raw, templated)]
    assert cells[1] > cells[0] + 5  # the template's own tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "  "], "the prompt is empty"),
        (["run", "-m", "/nonexistent/model.gguf", "Hi"], "there is no model"),
        (["run", "--policy", "windw", "Hi"], "window"),
        (["run", "--config", "/nonexistent/psi-kv.toml", "Hi"], "psi-kv.toml"),
        (["run", "-n", "0", "Hi"], "n-predict"),
        (["run", "--events", "/nonexistent/events.jsonl", "Hi"], "events"),
        (["run", "-c", "64", "word " * 200], "larger --ctx-size"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(shallow_model, arguments, said):
    model = [] if "-m" in arguments else ["-m", str(shallow_model)]
    status, out, err = finish(arguments[0], *model, *arguments[1:])
    assert status == 2
    assert said in err
    assert "Traceback" not in out + err


def test_a_truncated_model_is_named_as_such(shallow_model, tmp_path):
    half = tmp_path / "half.gguf"
    with shallow_model.open("rb") as whole:
        half.write_bytes(whole.read(30_000_000))
    status, _, err = finish("run", "-m", str(half), "Hi")
    assert status == 2
    assert "truncated" in err
    assert "Traceback" not in err


def test_a_file_that_is_no_model_is_named_as_such(tmp_path):
    (tmp_path / "model.gguf").write_text("not a model")
    status, _, err = finish("run", "-m", str(tmp_path / "model.gguf"), "Hi")
    assert status == 2
    assert "is not a GGUF model" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_mid_generation_keeps_the_text_and_the_summary(shallow_model, number, status):
    process = start("run", "--raw", "-n", "900", *small(shallow_model), "Once upon a time")
    first = process.stdout.read(12)  # some tokens
    process.send_signal(number)
    rest, err = process.communicate(timeout=600)
    assert process.returncode == status
    assert len(first) == 12
    assert rest.endswith("\n")
    assert "tokens at" in err
    assert "Traceback" not in err


def test_events_are_appended_to_a_private_file(shallow_model, tmp_path):
    log = tmp_path / "events.jsonl"
    said = f"Say no more after this: {'word ' * 500}\n/trim 0.5\n"  # more than what is protected
    finish("chat", "-n", "4", *small(shallow_model), "--events", str(log), said=said)
    kinds = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert "Trimmed" in kinds
    assert log.stat().st_mode & 0o777 == 0o600


def test_chat_answers_line_by_line_and_obeys_its_commands(shallow_model):
    status, out, err = finish("chat", "-n", "16", *small(shallow_model), said=CHAT)
    assert status == 0
    assert len(out.strip().splitlines()) >= 2  # two answers
    assert "live cells are protected" in err or "cells (" in err
    assert "not usable" in err
    assert '"mode": "calm"' in err
    assert "/undo" in err
    assert "Traceback" not in err


def test_chat_says_what_to_do_when_the_context_is_full_and_goes_on(shallow_model):
    said = f"{'word ' * 1500}\nHi\n"
    status, out, err = finish("chat", "-n", "8", *small(shallow_model), said=said)
    assert status == 0
    assert "/undo or /reset makes room" in err
    assert out.strip()
