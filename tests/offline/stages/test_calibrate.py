"""Calibration tokens are those asked for, the same for the same seed, and refused where there are too few."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from infoquant_vllm.format import ARCHITECTURES
from offline.errors import ToolError
from offline.model.source import Source
from offline.model.windowed_attention import windowed_attention
from offline.stages import sample
from offline.stages.calibrate import calibration_tokens, save_tokens
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source

WORDS = "".join(f"line {number} of a text\n" for number in range(400))
END = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source.open(write_source(tmp_path_factory.mktemp("calibration") / "source"))


def write(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def test_model_samples_its_own_text(source: Source) -> None:
    reports: list[tuple[int, int]] = []
    tokens = calibration_tokens("self", source, 6, 32, 0, lambda done, total: reports.append((done, total)))
    assert tokens.shape == (6, 32)
    assert tokens.dtype == torch.int64
    assert reports[0] == (0, 6 * 32)
    assert reports[-1] == (6 * 32, 6 * 32)
    assert torch.equal(tokens, calibration_tokens("self", source, 6, 32, 0))
    assert not torch.equal(tokens, calibration_tokens("self", source, 6, 32, 1))


def test_texts_begin_with_the_bos_that_the_tokenizer_adds_whatever_separates_documents(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", vocab_size=VOCAB_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([sample.SEPARATOR])
    assert sample._document_start(tokenizer) == tokenizer.get_vocab()[sample.SEPARATOR] != tokenizer.bos_token_id
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(folder)
    for spec in ("self", write(tmp_path / "text.txt", WORDS)):
        tokens = calibration_tokens(spec, Source.open(folder), 4, 32, 0)
        assert (tokens[:, 0] == tokenizer.bos_token_id).all()


def test_sequences_beyond_one_batch_are_sampled_in_the_next(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SAMPLED_TOGETHER", 4)
    reports: list[tuple[int, int]] = []
    tokens = calibration_tokens("self", source, 6, 16, 0, lambda done, total: reports.append((done, total)))
    assert tokens.unique(dim=0).shape == (6, 16)
    assert reports[-1] == (96, 96)
    assert sorted(reports) == reports


@pytest.mark.parametrize("vocabulary", [1, 97, 272, 1000])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, vocabulary, generator=generator) * 2
    drawn = torch.cat([sample._draw(logits.expand(2000, -1), generator) for _ in range(20)])
    found = drawn.bincount(minlength=vocabulary) / len(drawn)
    expected = logits.softmax(-1)[0]
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-4).all()


def test_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((500, 272), -torch.inf)
    logits[:, 3::16] = 0
    drawn = sample._draw(logits, torch.Generator().manual_seed(0))
    assert (drawn % 16 == 3).all()


def test_reordered_weights_give_the_products_of_the_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, features, outputs in ((1, 64, 48), (7, 33, 5), (256, 576, 960)):
        linear = torch.nn.Linear(features, outputs, bias=outputs == 5).bfloat16().requires_grad_(False)
        x = torch.randn(rows, 1, features, generator=generator).bfloat16()
        torch.testing.assert_close(sample._PackedLinear(linear, rows)(x), linear(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_dtypes_sample_from_every_class_of_model(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "sampling_dtype", lambda: dtype)
    for size in SIZES:
        tied = ARCHITECTURES[SIZES[size].get("architecture", "LlamaForCausalLM")].tied == "always"
        tiny = Source.open(write_source(tmp_path / size, **SIZES[size] | {"tie_word_embeddings": tied}))
        tokens = calibration_tokens("self", tiny, 3, 12, 0)
        assert torch.equal(tokens, calibration_tokens("self", tiny, 3, 12, 0))
        assert tokens[:, 1:].unique().numel() > 10


def test_saved_tokens_come_back_and_fewer_or_shorter_ones_are_their_beginnings(source: Source, tmp_path: Path) -> None:
    tokens = torch.randint(0, source.shape.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "tokens.safetensors"
    save_tokens(file, tokens)
    assert torch.equal(calibration_tokens(str(file), source, 4, 32, 0), tokens)
    assert torch.equal(calibration_tokens(str(file), source, 2, 16, 0), tokens[:2, :16])
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.safetensors"]
    with pytest.raises(ToolError, match="exists already"):
        save_tokens(file, tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, 32, dtype=torch.int64), "3 sequences of 32 tokens, the recipe reads 4 of 32"),
        (torch.full((4, 32), 272), "tokens 272 .. 272, the model knows 0 .. 271"),
        (torch.full((4, 32), -1), "tokens -1 .. -1"),
        (torch.zeros(4, 32), "torch.float32"),
    ],
)
def test_tokens_that_do_not_suit_are_refused(
    source: Source, tmp_path: Path, tokens: torch.Tensor, message: str
) -> None:
    file = tmp_path / "tokens.safetensors"
    save_tokens(file, tokens)
    with pytest.raises(ToolError, match=message):
        calibration_tokens(str(file), source, 4, 32, 0)


def test_a_file_of_something_else_is_refused(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    for content in (b"", b"junk" * 10):
        file.write_bytes(content)
        with pytest.raises(ToolError, match="infoquant sample"):
            calibration_tokens(str(file), source, 4, 32, 0)
    with pytest.raises(ToolError, match=r"\.safetensors was expected"):
        save_tokens(tmp_path / "tokens.pt", torch.zeros(1, 1))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("soft_cap", [None, 1.0])
def test_one_token_attends_as_the_last_of_a_sequence_does(window: int | None, soft_cap: float | None) -> None:
    generator, module = torch.Generator().manual_seed(0), torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 3
    query, key, value = (torch.randn(2, heads, 9, 16, generator=generator) for heads in (6, 2, 2))
    options = {"scaling": 0.5, "sliding_window": window, "softcap": soft_cap}
    whole, _ = windowed_attention(module, query, key, value, None, **options)
    last, _ = sample._attend_with_one_token(module, query[:, :, -1:], key, value, None, **options)
    torch.testing.assert_close(last, whole[:, -1:])
    free, _ = windowed_attention(module, query, key, value, None, scaling=0.5)
    assert torch.allclose(free, whole) == (window is None and soft_cap is None)


@pytest.mark.parametrize("size", ["tied", "mistral-window"])
def test_sampled_tokens_follow_the_models_distribution(size: str, tmp_path: Path) -> None:
    """Of what the model gave 90% of its probability to, about 90% must come out."""
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    tokens = calibration_tokens("self", source, 32, 64, 0)
    with torch.no_grad():
        probabilities = source.model(torch.bfloat16)(tokens).logits.float().softmax(-1)[:, 8:-1]
    order = probabilities.sort(-1, descending=True)
    inside = order.values.cumsum(-1) - order.values < 0.5
    likely = torch.zeros_like(inside).scatter(-1, order.indices, inside)
    chosen = likely.gather(-1, tokens[:, 9:, None]).float().mean()
    expected = (probabilities * likely).sum(-1).mean()
    assert abs(chosen - expected) < 0.05


def test_document_that_ends_is_followed_by_a_fresh_one(source: Source) -> None:
    """A model that soon ends its documents: what follows the end is a beginning, then other text."""
    tokens = calibration_tokens("self", source, 64, 128, 0)
    ends = (tokens[:, :-2] == END).nonzero()
    assert len(ends) > 0
    begin = tokens[0, 0]
    assert (tokens[ends[:, 0], ends[:, 1] + 1] == begin).all()
    assert tokens[ends[:, 0], ends[:, 1] + 2].unique().numel() > min(len(ends), 20) // 2


def test_windows_come_from_the_whole_file_in_its_order(source: Source, tmp_path: Path) -> None:
    tokens = calibration_tokens(write(tmp_path / "words.txt", WORDS), source, 10, 64, 0)
    places = [WORDS.index(source.tokenizer().decode(row)) for row in tokens]
    assert places == sorted(places)
    assert places[-1] > len(WORDS) / 2
    assert len(set(places)) == 10


def test_jsonl_is_read_document_by_document(source: Source, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": "ab" * 30, "id": number}) for number in range(4))
    tokens = calibration_tokens(write(tmp_path / "words.jsonl", lines), source, 4, 61, 0)
    assert (tokens[:, -1] == END).all()
    assert (tokens[:, :-1] > END).all()


@pytest.mark.parametrize("name", ["words.jsonl", "words.JSONL", "words.ndjson", "words.json", "WORDS.JSON"])
def test_records_are_known_by_their_suffix_in_any_case(source: Source, tmp_path: Path, name: str) -> None:
    tokens = calibration_tokens(write(tmp_path / name, '{"text": "ab"}\n' * 30), source, 10, 3, 0)
    assert source.tokenizer().decode(tokens[0]) == "ab</s>"


def test_list_of_records_in_one_json_value_is_read(source: Source, tmp_path: Path) -> None:
    listed = json.dumps([{"text": "ab"}] * 30, indent=2)
    tokens = calibration_tokens(write(tmp_path / "words.json", listed), source, 10, 3, 0)
    assert source.tokenizer().decode(tokens[0]) == "ab</s>"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\u000b", "\u001c"])
def test_characters_that_python_takes_for_line_ends_stay_inside_a_record(
    source: Source, tmp_path: Path, character: str
) -> None:
    line = json.dumps({"text": f"a{character}b"}, ensure_ascii=False)
    text = calibration_tokens(write(tmp_path / "words.jsonl", f"{line}\r\n{line}\n"), source, 1, 8, 0)
    assert source.tokenizer().decode(text[0]).startswith(f"a{character}b</s>")


@pytest.mark.parametrize("name", ["words.jsonl", "words.txt"])
def test_byte_order_mark_is_no_text(source: Source, tmp_path: Path, name: str) -> None:
    text = '{"text": "ab"}\n' if name == "words.jsonl" else "ab"
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    tokens = calibration_tokens(str(tmp_path / name), source, 1, 3, 0)
    assert source.tokenizer().decode(tokens[0]) == "ab</s>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("words.csv", "text\na", r"words\.csv: \.csv files are not read; convert it to JSON Lines"),
        ("words.json", '[{"text": "a"}, 3]', r"words\.json: record 2: an object"),
        ("words.json", "[" * 100_000, r"words\.json: not JSON"),
        ("words.jsonl", '{"text": "a\\ud800"}', r"words\.jsonl:1: character 1 is '.ud800', which is not text"),
    ],
)
def test_files_of_something_else_are_refused(
    source: Source, tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(ToolError, match=message):
        calibration_tokens(write(tmp_path / name, content), source, 1, 8, 0)


def test_folder_in_place_of_a_text_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="a text file was expected, this is a folder"):
        calibration_tokens(str(tmp_path), source, 1, 8, 0)


def test_too_short_text_is_refused_with_found_and_needed(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"short\.txt: 12 tokens found, 640 needed \(10 windows of 64\)"):
        calibration_tokens(write(tmp_path / "short.txt", "eleven char"), source, 10, 64, 0)


def test_empty_text_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"empty\.txt: 0 tokens found, 640 needed"):
        calibration_tokens(write(tmp_path / "empty.txt", ""), source, 10, 64, 0)


@pytest.mark.parametrize(("line", "message"), [("{", "not JSON"), ('{"body": "x"}', '"text" or a chat'), ("3", "3")])
def test_line_that_is_no_document_is_named(source: Source, tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ToolError, match=rf"words\.jsonl:2: .*{message}"):
        calibration_tokens(write(tmp_path / "words.jsonl", '{"text": "a"}\n' + line), source, 1, 8, 0)


def test_bytes_that_are_no_text_are_refused(source: Source, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(b"abc\xff")
    with pytest.raises(ToolError, match=r"words\.txt: not UTF-8 text \(byte 3\)"):
        calibration_tokens(str(tmp_path / "words.txt"), source, 1, 8, 0)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package datasets is installed")
def test_data_set_without_its_package_is_refused_with_the_command_to_run(source: Source) -> None:
    with pytest.raises(ToolError, match=r"no-such-thing: no such file; .* `pip install 'infoquant-vllm\[datasets\]'`"):
        calibration_tokens("no-such-thing", source, 1, 8, 0)


def test_sequence_longer_than_the_models_positions_is_refused(source: Source) -> None:
    with pytest.raises(ToolError, match="sequences of 513 tokens, the model takes 512"):
        calibration_tokens("self", source, 1, 513, 0)
