"""The dashboard in a real browser: what a person sees, by mouse, keyboard and screen reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from axe_selenium_python import Axe
from browser import CHROMIUM, DRIVER, chromium, look, picture
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from service_help import MIB

from psi_kv_governor.service.address import Address
from psi_kv_governor.service.dashboard import DashboardServer, Governed
from waiting import until

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no Chromium: apt install chromium chromium-driver"
)
TOO_WIDE = """return [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
SIZES = [(320, "light"), (320, "dark"), (1600, "light"), (1600, "dark")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def server(governor, patient_end):
    made = DashboardServer(Governed(governor), Address("127.0.0.1", 0))
    yield made
    made.close()


@pytest.fixture
def page(browser, server):
    look(browser, 1600)
    browser.get_log("browser")  # what went wrong in an earlier page is not told of this one
    browser.get(server.url)
    until(lambda: said(browser, "mode") != "connecting")
    yield browser
    browser.get("about:blank")


def said(browser, what: str) -> str:
    return browser.find_element(By.ID, what).get_property("textContent")


def strips(browser) -> list[str]:
    # In one go: the page draws them anew whenever they change.
    return browser.execute_script("return [...document.querySelectorAll('.strip')].map(e => e.ariaLabel)")


def spike(governor, source) -> None:
    """Pressure, and what is done about it."""
    governor.step()
    source.stall, source.headroom_bytes = 0.45, 900 * MIB
    for _ in range(6):
        governor.step()


def test_a_spike_is_seen_in_figures_blocks_and_events(page, governor, source):
    assert said(page, "name") == "llama-server"
    until(lambda: strips(page)[:1] == ["Sequence 0, running: 1,500 live cells"])
    spike(governor, source)
    until(lambda: said(page, "mode") in {"trimming", "holding"})
    until(lambda: "masked" in strips(page)[0] and "1,000 parked" in strips(page)[1])
    # An event that came while a view was made is told with the next one.
    until(lambda: "trimmed" in said(page, "log") and "stall 45% reached" in said(page, "reason"))
    assert said(page, "stall") == "45 %"
    widths = page.execute_script(
        "return [...document.querySelectorAll('.strip .masked')].map(e => e.getBoundingClientRect().width)"
    )
    assert widths
    assert min(widths) >= 1
    labels = [one.get_attribute("aria-label") for one in page.find_elements(By.CSS_SELECTOR, ".chart svg")]
    assert labels[0].startswith("Stall over two minutes: now 45 %")


def test_everything_can_be_done_by_keyboard(page, governor):
    reached = []
    for _ in range(7):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.switch_to.active_element.get_property("textContent").strip()[:20])
    assert {"Park what is idle", "Bring it back", "Set the limit", "No limit"} <= set(reached)
    page.find_element(By.CSS_SELECTOR, "[data-verb=park]").send_keys(Keys.ENTER)
    until(lambda: "returned" in said(page, "answer"))
    assert governor.status().parked_bytes > 0
    page.find_element(By.CSS_SELECTOR, "[data-verb=unpark]").send_keys(Keys.SPACE)
    until(lambda: "back in memory" in said(page, "answer"))
    share = page.find_element(By.ID, "share")
    share.send_keys(Keys.ARROW_LEFT * 2)
    share.send_keys(Keys.ENTER)
    until(lambda: governor.status().limit == 0.4)
    page.find_element(By.ID, "lift").send_keys(Keys.ENTER)
    until(lambda: governor.status().limit is None)


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_it_fits_a_phone_and_a_desk_in_light_and_dark(page, governor, source, width, scheme):
    spike(governor, source)
    look(page, width, scheme)
    until(lambda: "masked" in "".join(strips(page)))
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script(TOO_WIDE) == []
    axe = Axe(page)
    axe.inject()
    found = [(one["impact"], one["id"], one["nodes"][0]["html"]) for one in axe.run()["violations"]]
    assert not [one for one in found if one[0] in {"serious", "critical"}], found
    if folder := os.environ.get("PSIKV_PICTURES"):
        picture(page, Path(folder) / f"dashboard-{width}-{scheme}.png")


def test_when_the_program_ends_the_page_says_so_and_offers_nothing(page, server):
    server.close()
    until(lambda: "the program has ended" in said(page, "gone"))
    assert page.find_element(By.ID, "gone").is_displayed()
    assert not page.find_element(By.ID, "lift").is_enabled()


def test_a_wrong_token_is_one_line(browser, server):
    browser.get(server.url + "x")
    assert "wrong token: open the address" in browser.find_element(By.TAG_NAME, "body").text


def test_nothing_comes_from_elsewhere_and_nothing_goes_wrong_in_the_page(page):
    until(lambda: strips(page))
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("http://127.0.0.1:") for name in loaded)
    assert [line["message"] for line in page.get_log("browser") if "403" not in line["message"]] == []
