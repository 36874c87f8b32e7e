"""A device without a device: Mesa's lavapipe, a Vulkan driver in software, and the Vulkan backend of just the
llama.cpp that is installed. Its memory is this process's, and still no host memory to llama.cpp.

Made once a version in the user's cache folder: Mesa and headers from the machine's own distribution, unpacked
into a private root, and the one target `ggml-vulkan` compiled from llama-cpp-python's source (four minutes of
one core). Nothing is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from packages_help import CACHE, PIP, Unavailable, alone, needs_apt, run, unpack_debs

_CACHE = CACHE / "test-devices"
_PACKAGES = ("mesa-vulkan-drivers", "libvulkan-dev", "glslc", "spirv-headers")
_BUILD_S = 2400
_OFF = (
    "GGML_NATIVE", "GGML_CPU", "LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_COMMON", "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER",
)  # fmt: skip
# Debian 12's headers are older than this extension; its names are used where the driver lacks it, too.
_SHIM = """#pragma once
#include_next <vulkan/vulkan.hpp>
#ifndef VK_EXT_layer_settings
namespace vk {
enum class LayerSettingTypeEXT : std::uint32_t { eBool32 };
struct LayerSettingEXT {
    const char * layer; const char * name; LayerSettingTypeEXT type; std::uint32_t count; const void * values;
};
struct LayerSettingsCreateInfoEXT {
    VkStructureType sType = static_cast<VkStructureType>(1000496000);
    const void * pNext = nullptr;
    std::uint32_t count;
    const LayerSettingEXT * settings;
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & all)
        : count(static_cast<std::uint32_t>(all.size())), settings(all.data()) {}
};
}
#endif
"""


class Backend(NamedTuple):
    """A Vulkan backend for the llama.cpp that is installed."""

    shared_object: Path
    environ: dict[str, str]
    """What a process needs to find the driver."""


def backend() -> Backend:
    """The backend, made if it is not there. Raises Unavailable."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError as error:
        raise Unavailable("llama-cpp-python is not installed") from error
    folder = _CACHE / f"llama-cpp-python-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(_CACHE / "all"):
        library = folder / "libggml-vulkan.so"
        root = _root(_CACHE / "root")
        if not library.is_file():
            _build(version, root, folder, library)
    return Backend(library, environ(root))


def environ(root: Path) -> dict[str, str]:
    """The environment in which the driver under `root`, and no other, is found."""
    driver = next(root.glob("usr/lib/*/libvulkan_lvp.so"))
    manifest = root / "lavapipe.json"
    icd = {"library_path": str(driver), "api_version": "1.3.0"}
    mine = root / f"lavapipe-{os.getpid()}.json"
    mine.write_text(json.dumps({"ICD": icd, "file_format_version": "1.0.0"}))
    mine.replace(manifest)  # a driver that another test just starts reads the old one whole, or the new one
    return {
        **os.environ,
        "VK_ICD_FILENAMES": str(manifest),  # read by old loaders, the next by new ones
        "VK_DRIVER_FILES": str(manifest),
        "LD_LIBRARY_PATH": str(driver.parent),
        "GGML_VK_VISIBLE_DEVICES": "0",  # a driver on the processor is passed over otherwise
        "LP_NUM_THREADS": "2",
    }


def _root(root: Path) -> Path:
    """Mesa, the loader, headers and a shader compiler for the C library of this machine."""
    if (root / "ready").is_file():
        return root
    needs_apt("Mesa's lavapipe")
    shutil.rmtree(root, ignore_errors=True)
    unpack_debs(root, "", _PACKAGES, "--reinstall")  # what is installed counts as there
    if next(root.glob("usr/lib/*/libvulkan_lvp.so"), None) is None:
        raise Unavailable("Mesa's lavapipe: this distribution's mesa-vulkan-drivers has none")
    (root / "ready").touch()
    return root


def _build(version: str, root: Path, folder: Path, library: Path) -> None:
    """Compiles what an earlier run did not come to."""
    work = folder / "work"
    libraries = next(root.glob("usr/lib/*/libvulkan_lvp.so")).parent
    options = {"env": {**os.environ, "LD_LIBRARY_PATH": str(libraries)}}
    if not (work / "configured").is_file():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _configure(version, root, work, libraries, options)
        (work / "configured").touch()
    build = ["--build", work / "build", "--target", "ggml-vulkan", "--parallel", os.cpu_count() or 1]
    run([_cmake(work), *build], _BUILD_S, **options)
    (work / "build/bin/libggml-vulkan.so").replace(library)
    shutil.rmtree(work)


def _configure(version: str, root: Path, work: Path, libraries: Path, options: dict[str, Any]) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*pip, "--no-binary", "llama-cpp-python", "--dest", work, f"llama-cpp-python=={version}"])
    with tarfile.open(next(work.glob("*.tar.gz"))) as source:
        if sys.version_info >= (3, 12):
            source.extractall(work, filter="data")
        else:
            source.extractall(work)
    (work / "shim/vulkan").mkdir(parents=True)
    (work / "shim/vulkan/vulkan.hpp").write_text(_SHIM)
    told = {
        "GGML_VULKAN": "ON",
        "GGML_BACKEND_DL": "ON",
        "BUILD_SHARED_LIBS": "ON",
        **dict.fromkeys(_OFF, "OFF"),
        "CMAKE_BUILD_TYPE": "None",
        # Shaders run in the driver: of the backend itself nothing here takes time.
        "CMAKE_CXX_FLAGS": f"-O1 -DNDEBUG -isystem {work}/shim -isystem {root}/usr/include",
        "Vulkan_INCLUDE_DIR": f"{root}/usr/include",
        "Vulkan_LIBRARY": f"{libraries}/libvulkan.so",
        "Vulkan_GLSLC_EXECUTABLE": f"{root}/usr/bin/glslc",
        "SPIRV-Headers_DIR": f"{root}/usr/share/cmake/SPIRV-Headers",
    }
    source_dir = next(work.glob("llama_cpp_python-*")) / "vendor/llama.cpp"
    flags = [f"-D{name}={value}" for name, value in told.items()]
    run([_cmake(work), "-S", source_dir, "-B", work / "build", *flags], **options)


def _cmake(work: Path) -> str:
    if (found := shutil.which("cmake")) is not None:
        return found
    cmake = work / "tools/bin/cmake"
    if not cmake.is_file():
        run([sys.executable, "-m", "venv", work / "tools"])
        run([work / "tools/bin/python", *PIP, "cmake"])
    return str(cmake)
