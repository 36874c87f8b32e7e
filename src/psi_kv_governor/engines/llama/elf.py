"""A shared library that holds nothing but the names of two others: the agent, and the llama.cpp behind it.

llama-cpp-python looks its functions up in one library. Named `libllama.so` and put in its way, this one has
the loader search the agent first and the real library after it. No compiler or linker is needed to make it.
"""

from __future__ import annotations

import platform
import struct
from pathlib import Path

_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT = 1, 4, 5, 6, 10, 11
_HEADER_BYTES, _PROGRAM_BYTES, _SYMBOL_BYTES = 64, 56, 24
_PAGE_BYTES = 0x10000  # the largest page of the machines above


def redirecting(needed: list[Path]) -> bytes:
    """The bytes of a 64-bit little-endian shared object that needs the libraries `needed`, in this order.

    Source: System V ABI, ELF-64 object file format. Raises NotImplementedError on other machines.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None or struct.calcsize("P") != 8:
        raise NotImplementedError(f"no agent for {platform.machine()} yet")
    names = [str(path).encode() for path in needed]
    strings = b"\0" + b"".join(name + b"\0" for name in names)
    symbols = bytes(_SYMBOL_BYTES)
    table = struct.pack("<4I", 1, 1, 0, 0)  # a hash table of no symbol
    symbols_at = _HEADER_BYTES + 2 * _PROGRAM_BYTES
    table_at = symbols_at + len(symbols)
    strings_at = table_at + len(table)
    dynamic_at = -(-(strings_at + len(strings)) // 8) * 8
    offset, entries = 1, []
    for name in names:
        entries.append((_NEEDED, offset))
        offset += len(name) + 1
    entries += [(_HASH, table_at), (_STRTAB, strings_at), (_SYMTAB, symbols_at)]
    entries += [(_STRSZ, len(strings)), (_SYMENT, _SYMBOL_BYTES), (0, 0)]
    dynamic = b"".join(struct.pack("<2Q", *entry) for entry in entries)
    total = dynamic_at + len(dynamic)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<2HI3QI6H", 3, machine, 1, 0, _HEADER_BYTES, 0, 0, _HEADER_BYTES, _PROGRAM_BYTES, 2, 0, 0, 0
    )
    load = struct.pack("<2I6Q", 1, 6, 0, 0, 0, total, total, _PAGE_BYTES)
    where = struct.pack("<2I6Q", 2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8)
    body = header + load + where + symbols + table + strings
    return body + bytes(dynamic_at - len(body)) + dynamic
