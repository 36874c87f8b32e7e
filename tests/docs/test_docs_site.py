"""The docs as a site: built strictly, read without a network, and complete against the code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from psi_kv_governor.cli import COMMANDS
from psi_kv_governor.cli.exec import command as exec_command
from psi_kv_governor.config import GovernorConfig

ROOT = Path(__file__).parents[2]
CODE = ROOT / "src/psi_kv_governor"
TROUBLE = (ROOT / "docs/troubleshooting.md").read_text()
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches by itself when it shows a page."""


class Page(HTMLParser):
    """Links, fetched addresses and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what there is to it."""
        of = {name: value or "" for name, value in attributes}
        self.anchors.update(value for name, value in of.items() if name in {"id", "name"})
        if tag == "a" and "href" in of:
            self.links.append(of["href"])
        if tag in FETCHED and FETCHED[tag] in of:
            self.fetched.append(of[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=800,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_no_link_inside_the_site_is_broken(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in anchors
            ):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_links_to_elsewhere_are_whole_addresses(pages):
    links = {link for page in pages.values() for link in page.links if urlsplit(link).scheme}
    assert links
    assert not [
        one for one in links if not re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[\w./@#%?=&~+-]*)?", one)
    ]


def test_nothing_is_fetched_from_elsewhere_when_a_page_is_read(pages):
    assert not [one for page in pages.values() for one in page.fetched if urlsplit(one).netloc]
    assert not [path for path in (ROOT / "docs").rglob("*.md") if "```mermaid" in path.read_text()]


def test_every_setting_is_listed_with_its_default(site):
    shown = (site / "settings.html").read_text()
    missing = [
        name
        for name in GovernorConfig.__struct_fields__
        if not re.search(rf"<td><code>{name}</code></td>\s*<td><code>", shown)
    ]
    assert not missing


def test_every_command_and_every_option_of_exec_is_listed(site):
    shown = (site / "commands.html").read_text()
    assert not [name for name in COMMANDS if f'id="psi-kv-{name}"' not in shown]
    assert not [
        option
        for one in exec_command.params
        for option in one.opts
        if option.startswith("--") and option not in shown
    ]


def test_what_is_public_is_in_the_reference(site):
    import psi_kv_governor

    shown = (site / "reference.html").read_text()
    assert not [name for name in psi_kv_governor.__all__ if f'.{name}"' not in shown]


# -- troubleshooting ------------------------------------------------------------------------------------


def constant(node: ast.expr | None) -> str:
    """The longest piece of a string in the code that stands in it as it is."""
    pieces = (
        [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if node
        else []
    )
    return max(pieces, key=len, default="")


def said_by_doctor() -> set[tuple[str, str]]:
    """Name of a check, and the constant part of what it says where not all is well."""
    found = set()
    for path in CODE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Check" and len(call.args) >= 2:
                name, state = constant(call.args[0]), constant(call.args[1])
                if state != "ok":
                    found.add((name, constant(call.args[2]) if len(call.args) > 2 else ""))
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "_step":
                found.add((f"can {constant(call.args[0])}", ""))
    return {(name, words) for name, words in found if name.strip() not in {"", "can"}}


def begins(node: ast.expr) -> str:
    """The first piece of a string in the code that has words in it."""
    pieces = [
        one.value
        for one in ast.walk(node)
        if isinstance(one, ast.Constant) and isinstance(one.value, str) and " " in one.value
    ]
    at = {one.value: (one.lineno, one.col_offset) for one in ast.walk(node) if isinstance(one, ast.Constant)}
    return min(pieces, key=lambda piece: at[piece], default="")


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def test_every_check_of_doctor_has_its_entry():
    names = {name for name, _ in said_by_doctor()}
    assert {"pressure", "place to park", "program", "can mask"} <= names
    headings = set(re.findall(r"^## (.*)$", TROUBLE, re.MULTILINE))
    assert not names - headings
    assert "it can't be looked at" in TROUBLE  # any of them, where looking was ended


def test_every_warning_of_doctor_is_there_in_its_own_words():
    missing = [(name, words) for name, words in said_by_doctor() if first_clause(words) not in plain(TROUBLE)]
    assert not missing


def first_clause(words: str) -> str:
    return re.split(r"[:,(]", plain(words))[0].strip()


def test_every_reason_why_a_program_is_not_reached_is_there():
    tree = ast.parse((CODE / "service/reach.py").read_text())
    reasons = {
        begins(keyword.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Reach"
        if any(
            isinstance(one.value, ast.Attribute) and one.value.attr in {"NONE", "CHILDREN", "PAGED"}
            for one in call.keywords
        )
        for keyword in call.keywords
        if keyword.arg == "how"
    }
    assert len(reasons) >= 7
    assert not [one for one in reasons if first_clause(one) not in plain(TROUBLE)]
