"""Read text files and data sets as windows of tokens, for calibration and evaluation."""

import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from offline.errors import ToolError, first_line

MAX_TEXT_BYTES = 2**28
SHUFFLE_BUFFER = 1000
TEXT_FIELD = "text"
CHAT_FIELD = "messages"
CLOSING_TOKENS = 2  # an end-of-turn token and a newline
RECORDS = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
"""Tables: read as text they would be nothing that a model was trained on."""


def text_windows(
    spec: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, num_windows: int, window: int, seed: int
) -> torch.Tensor:
    """Draw windows of consecutive tokens without replacement from the whole text, in its order.

    Args:
        spec: a text file; a JSONL or JSON file (by suffix) of objects with the field "text", or with chats, "messages",
            which the tokenizer's chat template renders; or a data set, NAME or NAME:CONFIG.
        tokenizer: if it starts texts with a BOS token, every window starts with one.
        vocab_size: size of the model's vocabulary, see `check_tokens`.
        num_windows: number of windows to draw.
        window: tokens per window, BOS included.
        seed: seed of the draw.

    Returns:
        int64 [num_windows, window]. Raises ToolError where the text holds too few tokens.
    """
    prefix = leading_tokens(tokenizer)
    stride = window - len(prefix)
    if Path(spec).is_dir():
        raise ToolError(f"{spec}: a text file was expected, this is a folder")
    if Path(spec).is_file():
        tokens = _tokens(_documents(Path(spec), tokenizer), tokenizer)
    else:
        texts = _dataset(spec, tokenizer, seed)
        tokens = _tokens(texts, tokenizer, enough=4 * num_windows * stride)
    check_tokens([*prefix, *tokens], tokenizer, vocab_size, spec)
    available = len(tokens) // stride
    if available < num_windows:
        raise ToolError(
            f"{spec}: {len(tokens)} tokens found, {num_windows * stride} needed "
            f"({num_windows} windows of {stride}); give a longer text or ask for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:num_windows].sort().values
    cut = torch.tensor(tokens[: available * stride]).view(available, stride)[chosen]
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(num_windows, -1), cut), dim=1)


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, place: str
) -> list[torch.Tensor]:
    """Tokenize texts, int64 [tokens] each, with BOS where the tokenizer adds it; see `check_tokens`."""
    prefix = leading_tokens(tokenizer)
    encoded = [prefix + ids for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    for ids in encoded:
        check_tokens(ids, tokenizer, vocab_size, place)
    return [torch.tensor(ids) for ids in encoded]


def check_tokens(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocab_size: int, place: str) -> None:
    """Refuse tokens that the model has no embedding for; `place` names the text."""
    largest = max(tokens, default=0)
    if largest < vocab_size:
        return
    special = {tokenizer.bos_token_id: "BOS", tokenizer.eos_token_id: "EOS"}
    role = f", its {special[largest]} token," if largest in special else ""
    raise ToolError(
        f"{place}: the tokenizer {tokenizer.name_or_path} makes token {largest} "
        f"({tokenizer.convert_ids_to_tokens(largest)!r}){role} of it, and vocab_size in config.json is {vocab_size}: "
        "the model has no embedding for that token; use the tokenizer that the model was trained with, "
        "or remove the token from the text"
    )


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] where the tokenizer starts texts with it, else []."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _tokens(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, enough: int | None = None) -> list[int]:
    """Concatenate the documents' tokens, EOS after each; stop early at `enough` tokens."""
    tokens: list[int] = []
    closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ends = found[-CLOSING_TOKENS:]  # chat templates close a text themselves
        tokens += found if not found or (closing and closing[0] in ends) else found + closing
        if enough is not None and len(tokens) >= enough:
            break
    return tokens


def _documents(file: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix in TABLES:
        raise ToolError(f"{file}: {suffix} files are not read; convert it to JSON Lines with the field {TEXT_FIELD!r}")
    text = _decoded(file)
    if suffix in RECORDS:
        yield from _records(text, file, tokenizer)
    else:
        yield text


def _decoded(file: Path) -> str:
    """Read a file's text, without byte order mark and with newlines as line ends."""
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise ToolError(
                f"{file}: {file.stat().st_size} bytes, at most {MAX_TEXT_BYTES} are read; give a smaller file"
            )
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ToolError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise ToolError(f"{file}: cannot be read ({error})") from None


def _records(text: str, file: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the documents of a JSON list, or of one object per line.

    Lines end only at newlines: JSON strings may contain U+2028, U+0085 and others at which `splitlines` splits.
    """
    if text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(text, str(file)), start=1):
            yield _text_of(record, tokenizer, f"{file}: record {number}")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _text_of(_parsed(line, f"{file}:{number}"), tokenizer, f"{file}:{number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{place}: not JSON ({error}); expected a list of objects, or one object per line") from None


def _text_of(record: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    fields = record if isinstance(record, dict) else {}
    text = fields.get(TEXT_FIELD)
    if text is None and CHAT_FIELD in fields:
        text = _rendered(fields[CHAT_FIELD], tokenizer, place)
    if not isinstance(text, str):
        raise ToolError(
            f'{place}: an object with a string "{TEXT_FIELD}" or a chat "{CHAT_FIELD}" was expected, '
            f"found {record!r:.80}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        raise ToolError(f"{place}: character {error.start} is {text[error.start]!r}, which is not text") from None
    return text


def _rendered(messages: Any, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """Render a chat, a list of {"role": ..., "content": ...}, by the tokenizer's chat template."""
    turns = messages if isinstance(messages, list) else [None]
    wrong = [turn for turn in turns if not (isinstance(turn, dict) and _is_turn(turn))]
    if wrong:
        raise ToolError(
            f'{place}: "{CHAT_FIELD}" takes objects with strings "role" and "content", found {wrong[0]!r:.80}'
        )
    if tokenizer.chat_template is None:
        raise ToolError(f"{place}: chats need a chat template, which {tokenizer.name_or_path} has none of")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs: they raise whatever their authors chose
        reason = first_line(error)
        raise ToolError(f'{place}: the chat template does not render its "{CHAT_FIELD}" ({reason})') from None


def _is_turn(turn: dict[str, Any]) -> bool:
    return all(isinstance(turn.get(name), str) for name in ("role", "content"))


def _dataset(spec: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """Yield documents of a data set's training split, shuffled and streamed."""
    if importlib.util.find_spec("datasets") is None:
        raise ToolError(
            f"{spec}: no such file; to read it as a data set, first `pip install 'infoquant-vllm[datasets]'`"
        )
    import datasets

    name, _, config = spec.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        first = next(iter(rows))
    except Exception as error:  # network, names and configs: a class of its own each
        reason = first_line(error)
        raise ToolError(f"{spec}: no such file, and not readable as a data set ({reason})") from None
    return (_text_of(row, tokenizer, spec) for row in itertools.chain([first], itertools.islice(rows, 1, None)))
