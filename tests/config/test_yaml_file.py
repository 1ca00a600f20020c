"""Files as they lie on the disk: broken, empty, odd; every complaint names file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.composer.yaml_file import read_yaml

BROKEN = [
    ("a: 1\nb: [1, 2\nc: 3\n", "f.yaml:3"),
    ("a: 1\n b: 2\n", "f.yaml:2"),
    ("a: 1\n\tb: 2\n", "f.yaml:2"),
    ("a:\n  b: 1\n \tc: 2\n", "the line is indented with a tab: YAML takes spaces only"),
    ('a: "x\u2028"\nb:\n\tc: 2\n', "the line is indented with a tab"),  # a line break too, for YAML
    ("a:\n\tb: 2\n", "the line is indented with a tab: YAML takes spaces only"),
    ("a: 1\na: 2\n", "duplicate key"),
    ("a: 1\n---\nb: 2\n", "f.yaml:2"),
    ("just text\n", "f.yaml:1: a configuration file is a mapping"),
    ("# hello\n- a\n- b\n", "f.yaml:2: a configuration file is a mapping"),
    ("a: !!python/object:os.system x\n", "f.yaml:1"),
    ("a: *nowhere\n", "f.yaml:1"),
    ("a: !!set {x, y}\n", "f.yaml:1"),
    ("a: 'never ends\n", "f.yaml:"),
    ("{[1]: 2}\n", "f.yaml:1"),
    ("a: @x\n", "f.yaml:1"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_broken_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path, "f.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n", "{}\n"])
def test_empty_file_holds_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    found = read_yaml(path, "f.yaml")
    assert (found.data, found.defaults) == ({}, None)


def test_folder_and_bytes_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read here"):
        read_yaml(tmp_path, "here")
    path = tmp_path / "f.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"cannot read f\.yaml"):
        read_yaml(path, "f.yaml")


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb:\r\n  - x\r\n")
    found = read_yaml(path, "f.yaml")
    assert found.data == {"a": 1, "b": ["x"]}
    assert found.origin(("b", 0)) == "f.yaml:3"


def test_lines_of_keys(folder: Callable[[dict[str, str]], Path]) -> None:
    text = "# head\na:\n  p: 1\nb:\n  q:\n    - one\n    - two: 2\n5: five\n"
    found = read_yaml(folder({"f.yaml": text}) / "f.yaml", "f")
    origins = {path: found.origin(path) for path in [("a",), ("a", "p"), ("b", "q", 1, "two"), (5,), ("b", "nope")]}
    assert origins == {("a",): "f:2", ("a", "p"): "f:3", ("b", "q", 1, "two"): "f:7", (5,): "f:8", ("b", "nope"): "f:4"}


def test_long_lists_pass(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("prompts:\n" + "".join(f"  - prompt {i}\n" for i in range(11_000)))
    assert len(read_yaml(path, "f.yaml").data["prompts"]) == 11_000
