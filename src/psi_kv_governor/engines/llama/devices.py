"""The devices that llama.cpp can compute on here, and what of a cache each of them can give back.

To be used after `loader.load()`.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

_KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}  # enum ggml_backend_dev_type
_GPUS = frozenset({"GPU", "integrated GPU"})


class Device(NamedTuple):
    """One device of llama.cpp."""

    name: str
    """As in a buffer's name: `CPU`, `Vulkan0`, `CUDA0`."""
    about: str
    kind: str
    free_bytes: int
    """What the driver says; 0 where it says nothing."""
    total_bytes: int

    @property
    def is_gpu(self) -> bool:
        return self.kind in _GPUS


def devices() -> list[Device]:
    """All of them; none where this llama.cpp is too old to tell."""
    library = bound()
    if library is None:
        return []
    found = []
    for i in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name, about = (
            (get(device) or b"").decode(errors="replace")
            for get in (library.ggml_backend_dev_name, library.ggml_backend_dev_description)
        )
        kind = _KINDS.get(library.ggml_backend_dev_type(device), "other")
        found.append(Device(name, about, kind, free.value, total.value))
    return found


def device_of(buffer_name: str) -> Device | None:
    """The device that a buffer of this name lies on: `CUDA0`, or `CUDA0_Split` of it."""
    there = [device for device in devices() if buffer_name.startswith(device.name)]
    return max(there, key=lambda device: len(device.name), default=None)


_SAME = 0.1
"""By how much of it a driver may tell another size for the machine's memory than the kernel."""


def is_the_machine_s(device: Device, machine_bytes: int) -> bool:
    """Whether what is given back of its memory is given to the machine, or may be. llama.cpp calls the GPU of
    a Jetson no integrated one; its driver says that it has all of the machine's memory."""
    known = device.kind == "GPU" and device.total_bytes and machine_bytes
    return not known or abs(device.total_bytes / machine_bytes - 1.0) < _SAME


def free_bytes(buffer_name: str) -> int:
    """What is free of the memory of this name; 0 where nobody tells."""
    device = device_of(buffer_name)
    return device.free_bytes if device is not None else 0


def what_goes_back(device: Device) -> str:
    """What of a cache on this device can be returned, and how: docs/devices.md has the whole table."""
    if device.kind == "CPU":
        return "page by page: cells are parked and masked while they stay where they are"
    if not device.is_gpu:
        return "nothing is kept there"
    shared = "the machine's own memory, " if device.kind == "integrated GPU" else ""
    return (
        f"{shared}in whole buffers: GovernedLlama makes the context smaller and whole again; a program under "
        "psi-kv exec gives its saved states, which are in host memory"
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_dev_count": (ctypes.c_size_t, ()),
    "ggml_backend_dev_get": (ctypes.c_void_p, (ctypes.c_size_t,)),
    "ggml_backend_dev_name": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_backend_dev_description": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_backend_dev_type": (ctypes.c_int, (ctypes.c_void_p,)),
    "ggml_backend_dev_memory": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)),
}


def bound() -> Any:
    """ggml, as llama.cpp reaches it: another copy of the file would have a list of devices of its own."""
    import llama_cpp.llama_cpp as bindings

    library = ctypes.CDLL(bindings._lib._name, handle=bindings._lib._handle)
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError:
        return None
    return library
