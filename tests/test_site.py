"""The site of docs/: built strictly, whole without a network, and true about files and commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", site / "cache", DOCS, site / "html"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return site / "html"


@pytest.mark.slow
def test_every_page_is_built_without_a_warning_and_reached_from_the_first(site):
    navigation = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        assert (site / page.with_suffix(".html").name).is_file()
        if page.stem != "index":
            assert f'href="{page.stem}.html"' in navigation, page.name


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site):
    loads = r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link(?![^>]+rel=\"canonical\")[^>]+href=\"(?:https?:)?//"
    for file in site.glob("*.html"):
        assert not re.search(loads, file.read_text(encoding="utf-8")), file.name
    for file in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file.name


@pytest.mark.slow
def test_the_page_of_keys_has_every_key_with_its_default(site):
    text = re.sub(r"<[^>]+>", "", (site / "yaml.html").read_text(encoding="utf-8"))
    for key, default in (("model.optim.lr", "0.0006"), ("data.tokenizer", "gpt2"), ("trainer.max_steps", "-1")):
        assert re.search(rf"^{re.escape(key)}\s*{default} \(", text, flags=re.M), key
    assert len(re.findall(r"^(?:model|data|trainer)\.[\w.]+", text, flags=re.M)) > 80


def test_every_path_that_a_page_names_exists():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:nanogpt_lit|configs|scripts|docs|tests)/[\w./]*)", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
