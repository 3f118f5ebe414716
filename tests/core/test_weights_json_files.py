"""Configuration files as transformers takes them: what is harmless is accepted, what nobody can understand is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pellucid.errors import ModelNotFoundError, PellucidError, WeightFormatError
from pellucid.models.config import ModelConfig
from pellucid.weights.json_files import GIT_LFS_POINTER, ConfigObject, read_config, read_json
from pellucid.weights.safetensors import open_safetensors

POINTER = GIT_LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"


def config_of(tmp_path: Path, text: str | bytes) -> ConfigObject:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(path)


def test_byte_order_mark_when_read_then_passed_over(tmp_path: Path) -> None:
    assert config_of(tmp_path, b'\xef\xbb\xbf{"a": "\xc3\xa9"}') == {"a": "é"}


def test_numbers_that_python_reads_when_read_then_they_are_numbers(tmp_path: Path) -> None:
    found = config_of(
        tmp_path, '{"a": Infinity, "b": NaN, "c": -Infinity, "d": 1e999, "e": 123456789012345678901234567890}'
    )
    assert (found["a"], found["c"], found["d"]) == (math.inf, -math.inf, math.inf)
    assert math.isnan(found["b"])
    assert found["e"] == 123456789012345678901234567890


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"a": {"b": [1]}, "a": {"b": [1]}}', '{"a": NaN, "a": NaN}'])
def test_key_that_stands_twice_with_one_value_when_read_then_that(tmp_path: Path, text: str) -> None:
    found = config_of(tmp_path, text)
    assert repr(found["a"]) == repr(json.loads(text)["a"])


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "a", "a"),
        ('{"a": 1, "b": 2, "a": 1.0}', "a", "a"),
        ('{"a": 1, "b": 2, "a": true}', "a", "a"),
        ('{"a": {"c": 1, "c": 2}, "b": 2}', "a", "a.c"),
        ('{"a": {"c": {"d": 1, "d": []}}, "b": 2}', "a", "a.c.d"),
    ],
)
def test_key_that_stands_twice_with_two_values_when_that_key_is_read_then_refused_by_name(
    tmp_path: Path, text: str, key: str, name: str
) -> None:
    found = config_of(tmp_path, text)
    assert (found["b"], found.get("z"), set(found)) == (2, None, {"a", "b"})
    assert json.loads(json.dumps(found)) == json.loads(text), "unread it is as Python has it"
    for read in (lambda: found[key], lambda: found.get(key)):
        with pytest.raises(
            WeightFormatError, match=f"^config.json: JSON key is '{name}'; it stands twice, with different"
        ):
            read()


def test_config_with_keys_that_stand_twice_when_made_into_a_model_config_then_only_what_is_read_matters(
    tmp_path: Path,
) -> None:
    text = '{"model_type": "llama", "_name_or_path": "a", "x": Infinity, "_name_or_path": "b", "vocab_size": 5'
    assert ModelConfig.from_dict(config_of(tmp_path, text + ', "vocab_size": 5}')).vocab_size == 5
    for more, name in (
        (', "vocab_size": 6}', "vocab_size"),
        (', "rope_scaling": {"rope_type": "linear", "factor": 2.0, "factor": 4.0}}', "rope_scaling.factor"),
        (', "text_config": {"vocab_size": 1, "vocab_size": 2}}', "text_config.vocab_size"),
        (', "architectures": ["A"], "architectures": ["B"]}', "architectures"),
    ):
        with pytest.raises(WeightFormatError, match=f"JSON key is '{name}'"):
            ModelConfig.from_dict(config_of(tmp_path, text + more))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON is 'Expecting value'"),
        (b"[]", "top-level value is .*; it must be a JSON object"),
        (b"null", "top-level value is None"),
        (b'{"a": 1', "JSON is .*; parsing stopped at character 7"),
        (b'{"a": "\xff"}', "JSON byte is 7; it must be valid UTF-8"),
        (b"\xff\xfe{\0}\0", "JSON byte is 0; it must be valid UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nesting is 'too deep'; the limit is 100 levels"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "JSON nesting is 'too deep'; the limit is 100 levels"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "JSON is 'Exceeds the limit"),
        (b" " * (16 * 2**20 + 1), "file size is 16777217; the limit is 16777216"),
        (POINTER, "this is a Git LFS pointer, not the file itself; `git lfs pull` in its folder fetches that"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_configuration_when_read_then_typed_error_that_names_the_file(
    tmp_path: Path, content: bytes, words: str
) -> None:
    with pytest.raises(WeightFormatError, match=f"^config.json: {words}"):
        config_of(tmp_path, content)


def test_nesting_within_the_limit_when_read_then_it_can_be_written_again(tmp_path: Path) -> None:
    found = config_of(tmp_path, '{"a": ' + "[" * 98 + "]" * 98 + "}")
    assert json.loads(json.dumps(found)) == found


def test_pointer_in_the_place_of_weights_when_opened_then_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(WeightFormatError, match=r"^model.safetensors: this is a Git LFS pointer"):
        open_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "x.json").write_bytes(POINTER)
    with pytest.raises(WeightFormatError, match=r"^x.json: this is a Git LFS pointer"):
        read_json(tmp_path / "x.json")


def test_files_that_the_system_does_not_give_when_read_then_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for read in (read_config, read_json, open_safetensors):
        for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300)):
            with pytest.raises(PellucidError):
                read(path)
        with pytest.raises(ModelNotFoundError, match="absent"):
            read(tmp_path / "absent")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "f.json").write_bytes(b"{}")
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in (read_config, read_json, open_safetensors):
        with pytest.raises(WeightFormatError, match=r"^f.json: it cannot be read: Permission denied"):
            read(tmp_path / "f.json")
