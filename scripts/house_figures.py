"""The house in figures, as Markdown: lines a room, long files, what stands twice, circles of imports.

python scripts/house_figures.py [FOLDER]    # of another checkout, to compare
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = frozenset({".py", ".c", ".h"})
LONG_LINES = 300
TWICE_LINES = 6
"""So many lines alike in two places stand twice; imports, comments and brackets alone don't count."""
LEAST_CHARACTERS = 8
"""Of a line, on average: lists of names in a signature are no code that could be one."""


def sources(folder: Path) -> list[Path]:
    """What somebody wrote there."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def lines(paths: list[Path]) -> int:
    """Of all of them."""
    return sum(path.read_text().count("\n") for path in paths)


def code_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, without imports, comments and empty ones."""
    text = path.read_text()
    nodes = ast.walk(ast.parse(text)) if path.suffix == ".py" else ()
    imports = {
        number
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and number not in imports and not line.lstrip().startswith(("#", "//", "*")):
            yield number, line.strip()


def twice(paths: list[Path]) -> list[tuple[str, str]]:
    """Where a run of lines stands that stands elsewhere too, and where that is."""
    known: dict[tuple[str, ...], tuple[Path, int]] = {}
    found, going_on = [], set()
    for path in paths:
        code = list(code_of(path))
        for at in range(len(code) - TWICE_LINES + 1):
            words = tuple(line for _, line in code[at : at + TWICE_LINES])
            if sum(map(len, words)) < TWICE_LINES * LEAST_CHARACTERS:
                continue
            first = known.setdefault(words, (path, at))
            if first == (path, at):
                continue
            going_on.add((*first, path, at))
            if (first[0], first[1] - 1, path, at - 1) not in going_on:
                found.append((str(first[0]), f"{path}:{code[at][0]}"))
    return found


def on_circles(package: Path) -> int:
    """Modules of the package that import themselves by way of others, type-only imports included."""
    import grimp

    sys.path.insert(0, str(package.parent))
    graph = grimp.build_graph(package.name, cache_dir=None)
    after: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        after[module] = graph.find_modules_directly_imported_by(module)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for one in after[left.pop()] - seen:
                seen.add(one)
                left.append(one)
        return seen

    return sum(module in reached(module) for module in graph.modules)


def rows(folder: Path) -> Iterator[tuple[str, int]]:
    """What is counted, and how many."""
    package = folder / "src/psi_kv_governor"
    inside = sources(package)
    tests, benchmarks = sources(folder / "tests"), sources(folder / "benchmarks")
    for room in sorted(path for path in package.iterdir() if sources(path)):
        yield f"lines of {room.name}/", lines(sources(room))
    yield "lines beside the rooms", lines([path for path in inside if path.parent == package])
    for name, paths in (("the package", inside), ("benchmarks/", benchmarks), ("tests/", tests)):
        yield f"lines of {name}", lines(paths)
        yield f"files of {name} over {LONG_LINES} lines", sum(lines([path]) > LONG_LINES for path in paths)
        yield f"runs of {TWICE_LINES} lines that stand twice in {name}", len(twice(paths))
    yield "modules on a circle of imports", on_circles(package)


def main() -> None:
    """Prints a table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".").absolute()
    print("| | |\n| --- | ---: |")
    for name, count in rows(folder):
        print(f"| {name} | {count:,} |")


if __name__ == "__main__":
    main()
