"""Puts the table of the records into docs/survival.md: `python -m psikv_bench.survival.page`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from psikv_bench.record import as_table
from psikv_bench.scenes.survival import Pair, by_surrounding, table
from psikv_bench.survival.surroundings import SURROUNDINGS

ROOT = Path(__file__).parents[3]
RECORDS, PAGE = ROOT / "data/bench-survival", ROOT / "docs/survival.md"
_BEGIN, _END = "<!-- table -->", "<!-- end of table -->"


class _Record(msgspec.Struct):
    rows: list[Pair]


def rows() -> list[Pair]:
    """All surroundings: of the whole run, and of later runs (a folder each), which replace them."""
    found: dict[str, list[Pair]] = {}
    for record in (RECORDS / "result.json", *sorted(RECORDS.glob("*/result.json"))):
        pairs = msgspec.json.decode(record.read_bytes(), type=_Record).rows
        found |= by_surrounding(pair for pair in pairs if pair.surrounding in SURROUNDINGS)
    return [pair for pairs in found.values() for pair in pairs]


def filled(page: str, pairs: list[Pair]) -> str:
    """`page` with the table of `pairs` between its marks."""
    before, _, rest = page.partition(_BEGIN)
    lines = "\n".join(as_table(table(pairs)))
    return f"{before}{_BEGIN}\n\n{lines}\n\n{_END}{rest.partition(_END)[2]}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(), rows()))


if __name__ == "__main__":
    main()
