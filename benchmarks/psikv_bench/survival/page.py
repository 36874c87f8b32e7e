"""Puts the table of a record into docs/survival.md: `python -m psikv_bench.survival.page`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from psikv_bench.record import as_table
from psikv_bench.scenes.survival import Pair, table

ROOT = Path(__file__).parents[3]
RECORD, PAGE = ROOT / "data/bench-survival/result.json", ROOT / "docs/survival.md"
_BEGIN, _END = "<!-- table -->", "<!-- end of table -->"


class _Record(msgspec.Struct):
    rows: list[Pair]


def filled(page: str, record: bytes) -> str:
    """`page` with the table of `record` between its marks."""
    before, _, rest = page.partition(_BEGIN)
    pairs = msgspec.json.decode(record, type=_Record).rows
    lines = "\n".join(as_table(table(pairs)))
    return f"{before}{_BEGIN}\n\n{lines}\n\n{_END}{rest.partition(_END)[2]}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(), RECORD.read_bytes()))


if __name__ == "__main__":
    main()
