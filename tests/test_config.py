"""Where a setting comes from, which one wins, and what is said about one that cannot be used."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor import config as config_module
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.errors import BadInputError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    """A working directory without psi-kv.toml, so that the tests see only what they write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, text: str, name: str = "psi-kv.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# -- precedence --------------------------------------------------------------------------------------------


def test_without_anything_the_defaults_hold():
    assert load_config(environ={}) == GovernorConfig()


def test_arguments_go_before_environment_before_file_before_defaults(tmp_path):
    path = written(tmp_path, "high = 0.3\nlow = 0.05\nquiet_s = 7\n")
    config = load_config(path, {"PSI_KV_HIGH": "0.4", "PSI_KV_LOW": "0.06"}, high=0.5)
    assert (config.high, config.low, config.quiet_s) == (0.5, 0.06, 7.0)
    assert config.cooldown_s == GovernorConfig().cooldown_s


def test_a_library_never_reads_the_working_directory(tmp_path):
    """Whoever can write there would choose where private context is put, and a typo would end the model."""
    written(tmp_path, 'place = "/somewhere/else"\nhihg = 0.3\n')
    assert load_config(environ={}) == GovernorConfig()


def test_a_command_reads_the_file_in_the_working_directory_unless_another_is_named(tmp_path):
    written(tmp_path, "high = 0.3\n")
    assert load_config(environ={}, default_file=True).high == 0.3
    other = written(tmp_path, "low = 0.01\n", "other.toml")
    assert load_config(other, {}, default_file=True).high == GovernorConfig().high


def test_an_unknown_variable_is_named_once_in_the_log_and_left_out(caplog, monkeypatch):
    monkeypatch.setattr(config_module, "_named", set())  # once in a process: another test may have had them
    environ = {"PSI_KV_HIHG": "1", "PSI_KV_SERVICE_HOST": "10.0.0.1", "PSI_KV_LOW": "0.01"}
    for _ in range(2):
        assert load_config(environ=environ) == GovernorConfig(low=0.01)
    told = [record.getMessage() for record in caplog.records]  # of all threads of this process
    assert sorted(line[:40] for line in told if "environment variable" in line) == [
        "the environment variable PSI_KV_HIHG is ",
        "the environment variable PSI_KV_SERVICE_",
    ]
    assert "did you mean high?" in caplog.text


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("PSI_KV_FLOOR_CELLS", "77")
    assert load_config().floor_cells == 77


def test_other_variables_are_not_ours():
    assert (
        load_config(environ={"PSI_HIGH": "x", "psi_kv_high": "y", "PSI_KV_MODELS": "/z"}) == GovernorConfig()
    )


def test_an_argument_that_is_none_counts_as_not_given():
    assert load_config(environ={"PSI_KV_HIGH": "0.4"}, high=None).high == 0.4


def test_strings_are_read_as_the_type_of_their_field():
    config = load_config(
        environ={"PSI_KV_BACKING": "file", "PSI_KV_PLACE": "7", "PSI_KV_EVICT": "true"}, block_cells="32"
    )
    assert (config.backing, config.place, config.evict, config.block_cells) == ("file", "7", True, 32)


@settings(max_examples=50)
@given(st.floats(0.02, 1.0), st.integers(0, 10**6), st.floats(0.0, 1e6))
def test_a_value_is_the_same_from_each_origin(high, floor_cells, quiet_s):
    values = {"high": high, "floor_cells": floor_cells, "quiet_s": quiet_s}
    folder = Path.cwd()
    path = written(folder, "".join(f"{name} = {value!r}\n" for name, value in values.items()), "same.toml")
    environ = {f"PSI_KV_{name.upper()}": repr(value) for name, value in values.items()}
    assert load_config(path, {}) == load_config(None, environ) == load_config(None, {}, **values)


# -- what cannot be used -----------------------------------------------------------------------------------


def refusal(*args, **overrides) -> str:
    with pytest.raises(BadInputError) as caught:
        load_config(*args, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 2
    return message


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("PSI_KV_HIGH", "much", "high = 'much' is not usable: Expected float, got str"),
        ("PSI_KV_HIGH", "nan", "high = 'nan' is not usable: Expected float > 0.0"),
        ("PSI_KV_QUIET_S", "inf", "quiet_s = 'inf' is not usable: Expected float <= 1000000000.0"),
        ("PSI_KV_FLOOR_CELLS", "1.5", "floor_cells = '1.5' is not usable: Expected int"),
        ("PSI_KV_BACKING", "tape", "backing = 'tape' is not usable: Invalid enum value 'tape'"),
    ],
)  # fmt: skip
def test_a_bad_variable_is_named(variable, text, told):
    assert f"(from environment variable {variable})" in refusal(None, {variable: text})
    assert told in refusal(None, {variable: text})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("blok_cells = 8", "'blok_cells' (from blok_cells in {path}): did you mean block_cells?"),
        ("zzz = 8", "known are high, high_max, acute_full, low"),
        ('high = "0.2"', "high = '0.2' is not usable: Expected float, got str (from high in {path})"),
        ("high = true", "Expected float, got bool"),
        ("sink_cells = nan", "sink_cells = nan is not usable: Expected int, got float"),
        ("[high]\nx = 1", "Expected float, got object"),
        ("high = ", "{path} is not TOML: "),
        ("high = 0.2\nhigh = 0.3", "{path} is not TOML: "),
        ("low = 0.5", "low = 0.5 is not usable: it must not be above high (0.1) (from low in {path})"),
        ("headroom_low_bytes = 9000000000", "it must not be above headroom_plenty_bytes (4294967296)"),
        ("low = 0", "low = 0 is not usable: Expected float > 0.0"),
        ("poll_s = 0", "poll_s = 0 is not usable: Expected float > 0.0"),
        ("floor_cells = -1", "floor_cells = -1 is not usable: Expected int >= 0"),
        ("block_cells = 0", "block_cells = 0 is not usable: Expected int >= 1"),
        ("high = 0.0", "high = 0.0 is not usable: Expected float > 0.0"),
    ],
)  # fmt: skip
def test_a_bad_line_of_the_file_is_named(tmp_path, text, told):
    path = written(tmp_path, text)
    assert told.format(path=path) in refusal(path, {})


def test_a_contradiction_names_both_origins(tmp_path):
    path = written(tmp_path, "high = 0.05")
    told = refusal(path, {"PSI_KV_LOW": "0.06"})
    assert told.endswith(f"(from environment variable PSI_KV_LOW and high in {path})")


def test_a_bad_argument_is_named():
    assert refusal(None, {}, step_min=0.9).endswith("(from argument step_min)")
    assert "(from argument step_max)" in refusal(None, {}, step_max=math.nan)
    assert "unknown setting 'hi' (from argument hi): did you mean high?" in refusal(None, {}, hi=1)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert refusal(tmp_path / "no.toml", {}).endswith("no.toml: No such file or directory")
    assert "Is a directory" in refusal(tmp_path, {})
    (tmp_path / "latin.toml").write_bytes(b"policy = '\xff'")
    assert "latin.toml is not TOML" in refusal(tmp_path / "latin.toml", {})


@pytest.mark.parametrize("field", msgspec.structs.fields(GovernorConfig), ids=lambda field: field.name)
def test_every_number_refuses_nan_and_less_than_nothing(field):
    if field.name in {"policy", "place", "backing", "status_socket", "evict"}:
        return
    for value in ("nan", "-1"):
        assert field.name in refusal(None, {f"PSI_KV_{field.name.upper()}": value})
    for value in (math.nan, -1, True, "1"):
        with pytest.raises(BadInputError, match=field.name):
            GovernorConfig(**{field.name: value})


def test_what_a_setting_is_for_stands_with_it():
    """Every field has its reason behind it, in the source."""
    source = Path(sys.modules[GovernorConfig.__module__].__file__).read_text().splitlines()
    for field in msgspec.structs.fields(GovernorConfig):
        line = next(i for i, text in enumerate(source) if text.startswith(f"    {field.name}: "))
        assert source[line + 1].lstrip().startswith('"""'), field.name
