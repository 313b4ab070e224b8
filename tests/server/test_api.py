"""The OpenAI API of a served W4A4KV4 checkpoint, through the official client."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from benchmarks.common.server import GRACE_SECONDS, Server, serve

PROMPT = "Once upon a time, in a small village by the sea, there lived"
MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def server(fast: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serve(fast, log, "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)) as running:
        yield running


def complete(server: Server, prompt: str = PROMPT, **options: object) -> openai.types.Completion:
    """Greedy, and not shorter than asked for: how soon a model stops depends on how it was quantized."""
    defaults: dict[str, object] = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return server.client().completions.create(model=str(server.model), prompt=prompt, **(defaults | options))  # type: ignore[call-overload]


def test_a_completion_is_as_long_as_it_says(server: Server) -> None:
    reply = complete(server)
    assert reply.choices[0].text.strip()
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16


def test_paris_is_among_the_likeliest_words_after_the_capital_of_france(server: Server) -> None:
    logprobs = complete(server, "The capital of France is", logprobs=10, max_tokens=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs
    assert " Paris" in logprobs.top_logprobs[0]


def test_a_chat_uses_the_chat_template(server: Server) -> None:
    reply = server.client().chat.completions.create(
        model=str(server.model),
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=16,
    )
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 20  # the question alone has 7


def test_streamed_pieces_make_up_the_whole_answer(server: Server) -> None:
    whole = complete(server).choices[0].text
    pieces = [
        chunk.choices[0].text
        for chunk in server.client().completions.create(
            model=str(server.model),
            prompt=PROMPT,
            max_tokens=16,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    ]
    assert len(pieces) > 4
    assert "".join(pieces) == whole


def test_logprobs_are_ordered_and_greedy_takes_the_first(server: Server) -> None:
    logprobs = complete(server, logprobs=5).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    for taken, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 5
        assert taken == max(top.values()) <= 0


def test_a_stop_string_ends_the_answer_and_is_left_out(server: Server) -> None:
    whole = complete(server).choices[0].text
    word = whole.split()[3]
    choice = complete(server, stop=[word]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(word)]


def test_eight_requests_at_once_are_all_answered(server: Server) -> None:
    prompts = [f"{number} plus {number} equals" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    assert all(reply.choices[0].text.strip() for reply in replies)


def test_a_prompt_longer_than_the_model_is_a_clear_bad_request(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=str(MAX_MODEL_LEN)) as caught:
        complete(server, "word " * 2 * MAX_MODEL_LEN)
    assert caught.value.status_code == 400
    assert server.is_healthy()


def test_metrics_count_what_was_asked(server: Server) -> None:
    complete(server)
    assert server.metric("vllm:generation_tokens_total") > 0


def test_the_start_up_line_says_what_is_served_and_saved(server: Server) -> None:
    line = server.logged(r"infoquant: (.+)")
    assert "120 linears W4A4" in line
    assert "30 caches KV4" in line


def test_the_cache_holds_more_than_three_and_a_half_times_the_tokens_of_bf16(server: Server) -> None:
    layers, kv_heads, head_size = 30, 3, 64
    bf16_tokens = 2**30 // (layers * kv_heads * head_size * 2 * 2)
    assert server.kv_tokens() >= 3.55 * bf16_tokens


def test_a_stopped_server_leaves_no_process(server: Server) -> None:
    """The last test of this server."""
    family = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children(True))]
    began = time.monotonic()
    server.stop()
    assert len(family) > 1
    assert time.monotonic() - began < GRACE_SECONDS  # it ended by itself and was not killed
    assert server.process.returncode == 0
    assert not [pid for pid in family if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
