"""A model file is recognised, and anything that is not a whole one is told in one line."""

import contextlib
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.gguf_file import TENSOR_TYPES, read_gguf

HEAD_BYTES = 600  # the head of the model below, and a little more


@pytest.fixture(scope="session")
def model_bytes(tmp_path_factory) -> bytes:
    """A small model, written by llama.cpp's own package, with values of every shape."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_bool("a.bool", True)
    writer.add_float64("a.float", 0.5)
    writer.add_array("a.strings", ["one", "", "three"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("first", np.ones((3, 5), dtype=np.float32))
    writer.add_tensor("second", np.ones((7,), dtype=np.float16))
    quantised = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("third", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.gguf"


def test_a_whole_model_is_taken(file, model_bytes):
    file.write_bytes(model_bytes)
    found = read_gguf(file)
    assert (found.version, found.architecture, found.tensors) == (3, "llama", 3)
    assert found.size_bytes == len(model_bytes)


def test_the_demo_model_is_taken(demo_model):
    found = read_gguf(demo_model)
    assert (found.architecture, found.tensors) == ("llama", 272)


def test_the_last_byte_of_the_last_tensor_counts(file, model_bytes):
    end = end_of_data(model_bytes)
    file.write_bytes(model_bytes[:end])
    assert read_gguf(file).tensors == 3
    file.write_bytes(model_bytes[: end - 1])
    with pytest.raises(BadInputError, match="truncated"):
        read_gguf(file)


def end_of_data(model_bytes: bytes) -> int:
    """The last tensor, 2 rows of 64 in Q8_0, has 136 bytes, and is padded to the alignment of 32."""
    return len(model_bytes) - (-136 % 32)


def refused(file: Path) -> str:
    with pytest.raises(BadInputError) as caught:
        read_gguf(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    return str(caught.value)


@settings(max_examples=80)
@given(data=st.data())
def test_cut_anywhere_it_is_refused(file, model_bytes, data):
    length = data.draw(st.integers(0, end_of_data(model_bytes) - 1))
    file.write_bytes(model_bytes[:length])
    assert ("truncated" if length else "does not begin") in refused(file)


@settings(max_examples=200)
@given(at=st.integers(0, HEAD_BYTES), noise=st.binary(min_size=1, max_size=12))
def test_damage_never_ends_in_another_error(file, model_bytes, at, noise):
    file.write_bytes(model_bytes[:at] + noise + model_bytes[at + len(noise) :])
    with contextlib.suppress(BadInputError):
        read_gguf(file)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04" + bytes(100), b"version https://git-lfs"])
def test_another_kind_of_file_is_refused(file, content):
    file.write_bytes(content)
    assert "not a GGUF model" in refused(file)


@pytest.mark.parametrize(
    ("version", "line"),
    [(b"\x01\0\0\0", "version 1"), (b"\x63\0\0\0", "version 99"), (b"\0\0\0\x03", "byte order")],
)
def test_versions_that_llama_cpp_does_not_read_are_refused(file, model_bytes, version, line):
    file.write_bytes(model_bytes[:4] + version + model_bytes[8:])
    assert line in refused(file)


def test_huge_counts_are_refused_at_once(file, model_bytes):
    file.write_bytes(model_bytes[:8] + struct.pack("<QQ", 1 << 62, 1 << 62) + model_bytes[24:])
    refused(file)


def test_what_is_no_file_is_refused(tmp_path):
    assert "there is no model" in refused(tmp_path / "absent.gguf")
    assert "is not a file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(tmp_path / "pipe")


def test_sizes_of_tensor_types_are_llama_cpps():
    theirs = {int(kind): tuple(sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in TENSOR_TYPES} == TENSOR_TYPES
    # Types that only live inside a computation, and so in no file.
    assert {gguf.GGMLQuantizationType(kind).name for kind in theirs.keys() - TENSOR_TYPES.keys()} == {
        "Q8_1",
        "Q8_K",
    }
