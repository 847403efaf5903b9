"""The page in a real browser, opened as a file."""

import re
import shutil

import pytest

from tests.test_page import sample
from whittle_nas.page import render

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.skip("needs a browser: chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # A container's root user has no sandbox.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render(sample()), encoding="utf-8")
    driver.get(path.as_uri())
    yield Page(driver)
    # Nothing was refused by the page's own policy, and no error was thrown.
    assert driver.get_log("browser") == []


class Page:
    """What a reader sees and does."""

    def __init__(self, driver):
        from selenium.webdriver import ActionChains

        self.driver, self.act = driver, ActionChains(driver)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return self.all(selector)[0].text

    def labels(self):
        return [cell.text for cell in self.all("tbody th")]

    def color(self, selector, name):
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        found = re.findall(r"\d+", self.driver.execute_script(script, selector, name))
        return [int(part) for part in found[:3]]

    def header(self, name):
        return next(cell for cell in self.all("thead th[aria-sort]") if cell.text == name)


def test_a_point_shows_its_sizes_while_it_is_pointed_at(page):
    assert not page.all("#tip")[0].is_displayed()
    page.act.move_to_element(page.all("circle.point")[0]).perform()
    shown = page.text("#tip").split()
    assert shown[:5] == ["front-0", "n_embd", "16", "n_layer", "3"]
    assert shown[shown.index("loss") + 1 :][:3] == ["2.0000", "±", "0.2500"]
    page.act.move_to_element(page.all("h1")[0]).perform()
    assert not page.all("#tip")[0].is_displayed()


@pytest.mark.parametrize("at", [0, -1])
def test_the_box_beside_a_point_is_as_wide_as_its_words(page, at):
    """Also beside the points furthest right and left, where the page ends."""
    points = sorted(page.all("circle.point"), key=lambda point: float(point.get_attribute("cx")))
    page.act.move_to_element(points[at]).perform()
    box = page.all("#tip")[0].rect
    assert box["width"] > 120
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1200
    lines = {round(cell.rect["height"]) for cell in page.all("#tip div span")}
    assert len(lines) == 1, "a word is broken"


def test_the_original_model_is_a_star(page):
    star = page.all("path.star")[0]
    page.act.move_to_element(star).perform()
    assert page.text("#tip").startswith("original model")
    assert "original model" in page.text("#legend")


def test_a_header_sorts_the_rows(page):
    assert page.labels() == ["front-0", "front-1", "front-2"]
    button = page.header("num_params").find_element("tag name", "button")
    button.click()
    assert page.labels() == ["front-2", "front-1", "front-0"]
    assert page.header("num_params").get_attribute("aria-sort") == "ascending"
    button.click()
    assert page.labels() == ["front-0", "front-1", "front-2"]
    assert page.header("num_params").get_attribute("aria-sort") == "descending"


def test_a_row_shows_its_export_line_which_can_be_copied(page):
    page.all("tbody tr")[1].click()
    line = (
        "nas export --checkpoint_dir 'a b' --subnetwork.n_embd 16 --subnetwork.n_layer 1 "
        "--out_dir exported-1"
    )
    assert page.text("#command") == line
    page.all("#copy")[0].click()
    assert page.text("#copy") == "Copied"
    field = page.all("#limit")[0]
    field.clear()
    field.send_keys("\ue009v")  # Ctrl+V
    assert field.get_property("value") == line


def test_rows_are_chosen_with_the_keyboard(page):
    page.driver.execute_script("document.querySelector('tbody button').focus()")
    page.act.send_keys("\ue015").send_keys("\ue015").send_keys("\ue007").perform()  # down, Enter
    assert page.text("#name") == "front-2"
    chosen = page.all("tbody button[aria-pressed=true]")
    assert [button.text for button in chosen] == ["front-2"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page(page, scheme):
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    paper = page.color("body", "backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for selector in ("h1", "h1 + p", "td", ".stderr", ".group", "#sizes", "#command", "#copy"):
        assert contrast(page.color(selector, "color"), paper) >= 4.5, selector
    panel = page.color("#points", "backgroundColor")
    assert contrast(page.color("#points text", "fill"), panel) >= 4.5
    page.act.move_to_element(page.all("h1")[0]).perform()
    assert contrast(page.color("circle.point", "fill"), panel) >= 3


def luminance(color):
    """Relative luminance as the accessibility guidelines define it."""
    parts = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_best_under_a_limit_is_chosen(page):
    field = page.all("#limit")[0]
    field.clear()
    field.send_keys("1,300")
    assert page.text("#best") == "front-0: loss 2.0000 ± 0.2500"
    assert page.text("#name") == "front-0"
    assert "exported-0" in page.text("#command")
