"""What the terminal is shown of a network's text."""

from nanogpt_lit.gpt.generate import printable


def test_escape_sequences_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\x9bc\r") == "a\ufffd[2Jb\ufffd\ufffdc\ufffd"


def test_ordinary_text_stays_as_it_is():
    text = "def f(x):\n\treturn 'Şəki 日本 🙂'\n"
    assert printable(text) == text
