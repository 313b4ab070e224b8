"""Calibration mixtures: shares are parsed, rounded to whole sequences, and reproducible."""

import json
from pathlib import Path

import pytest
import torch

from offline.errors import ToolError
from offline.mixture import Part, parse_mixture, samples_itself, sequences_of
from offline.model.source import Source
from offline.stages.calibrate import calibration_tokens
from tests.common.tiny import write_source

TEXT = "".join(f"line {number} of a text\n" for number in range(400))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source.open(write_source(tmp_path_factory.mktemp("mixture") / "source"))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("self", [Part("self", 1.0)]),
        ("self,a.txt", [Part("self", 0.5), Part("a.txt", 0.5)]),
        ("self,a.txt=0.2,b.jsonl=0.3", [Part("self", 0.5), Part("a.txt", 0.2), Part("b.jsonl", 0.3)]),
        ("a.txt=0.1,wiki:config=0.3", [Part("a.txt", 0.25), Part("wiki:config", 0.75)]),
    ],
)
def test_shares_sum_to_one_and_parts_without_one_take_the_rest(spec: str, parts: list[Part]) -> None:
    found = parse_mixture(spec)
    assert [part.spec for part in found] == [part.spec for part in parts]
    assert [part.share for part in found] == pytest.approx([part.share for part in parts])
    assert samples_itself(spec) == ("self" in spec)


def test_an_existing_file_is_one_text_whatever_its_name(tmp_path: Path) -> None:
    file = tmp_path / "a,b=0.5.txt"
    file.write_text("text")
    assert parse_mixture(str(file)) == [Part(str(file), 1.0)]
    other = tmp_path / "x=1.txt"
    other.write_text("text")
    assert [part.spec for part in parse_mixture(f"self,{other}")] == ["self", str(other)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("self=0.7,a.txt=0.7", "shares sum to 1.4"),
        ("self=1,a.txt", "shares sum to 1, expected less than 1"),
        ("self=no,a.txt", "the share of self is 'no'"),
        ("self=0,a.txt", "the share of self is '0'"),
        ("self,,a.txt", "a part of the mixture has no name"),
    ],
)
def test_wrong_shares_are_refused_by_name(spec: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        parse_mixture(spec)


def test_sequences_are_split_by_shares_and_none_is_left_out() -> None:
    parts = parse_mixture("self=0.5,a=0.3,b=0.2")
    assert sequences_of(parts, 7, "") == [4, 2, 1]
    assert sum(sequences_of(parts, 64, "")) == 64
    with pytest.raises(ToolError, match="b gets none of the 2 sequences"):
        sequences_of(parts, 2, "self=0.5,a=0.3,b=0.2")


def test_a_mixture_holds_its_parts_shuffled_and_the_same_for_a_seed(source: Source, tmp_path: Path) -> None:
    file, chat = tmp_path / "text.txt", tmp_path / "chat.jsonl"
    file.write_text(TEXT)
    messages = [{"role": "user", "content": f"What follows {n}?"} for n in range(60)]
    chat.write_text("".join(json.dumps({"messages": [message]}) + "\n" for message in messages))
    spec = f"self,{file},{chat}=0.25"
    found = calibration_tokens(spec, source, 16, 32, 0)
    assert found.shape == (16, 32)
    assert torch.equal(found, calibration_tokens(spec, source, 16, 32, 0))
    parts = [
        calibration_tokens(part, source, count, 32, 0) for part, count in (("self", 6), (str(file), 6), (str(chat), 4))
    ]
    rows = sorted(map(tuple, torch.cat(parts).tolist()))
    assert sorted(map(tuple, found.tolist())) == rows
    assert not torch.equal(found, torch.cat(parts))


def test_chats_are_rendered_by_the_chat_template(source: Source, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "abcdefgh"}, {"role": "assistant", "content": "ijklmnop"}]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    tokens = calibration_tokens(str(chat), source, 1, 18, 0)
    assert source.tokenizer().decode(tokens[0]) == "abcdefgh\nijklmnop\n"


@pytest.mark.parametrize("messages", [[{"content": 3}], "text", [{"role": "user"}, 1], None])
def test_chats_that_the_template_does_not_take_are_refused_by_line(
    source: Source, tmp_path: Path, messages: object
) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ToolError, match=r"chat\.jsonl:2: "):
        calibration_tokens(str(chat), source, 1, 8, 0)
