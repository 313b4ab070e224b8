"""Tests of what benchmarks.static reads from machine code, of its arithmetic and of its thresholds.

Run by test_benchmarks_static.py, in a process of its own.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.static import mixtures
from benchmarks.static.cases import LAYER_TOKENS, MODELS, Case
from benchmarks.static.experts import MIXTURES, TOKENS, dealt
from benchmarks.static.kernels import ENTRIES, LAYER_SCHEMES, linear_call, rotate_call
from benchmarks.static.launches import Code, compiled, launches, main_loop
from benchmarks.static.predict import MACHINES, predict, row
from benchmarks.static.presets import GPUS
from benchmarks.static.report import broken, layers, markdown, steps

KNOWN_MISSES = re.compile("kv_attention sm_(90|100): tensor cores by mma.sync|kv_decode .* bound by issue")
"""See docs/gpu-kernels.md."""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_2:
        /*0020*/                   IMMA.16832.S8.S8 R4, R8, R9, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_9) ;
.L_x_3:
        /*0040*/                   LOP3.LUT R2, R2, 0xf0, RZ, 0xc0, !PT ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   BRA.U UP2, `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_9:
        /*0080*/                   SYNCS.PHASECHK R3 ;
        /*0090*/                   BRA `(.L_x_3) ;
        /*00a0*/                   NOP ;
"""


def test_the_main_loop_is_the_innermost_with_the_tensor_cores_instructions() -> None:
    loop, rest = main_loop(SASS)
    assert loop == {"IMMA": 1, "BRA": 3, "LOP3": 1, "SYNCS": 1}
    assert rest == {"MOV": 1, "LDG": 1, "BRA": 1, "EXIT": 1}  # the padding behind it is nowhere


def test_code_without_a_loop_has_none() -> None:
    loop, rest = main_loop("/*0000*/ FADD R1, R2, R3 ;\n/*0010*/ EXIT ;")
    assert not loop
    assert rest == {"FADD": 1, "EXIT": 1}


def test_a_launch_is_what_the_launcher_makes_of_a_gpu() -> None:
    first, second = launches(linear_call(16, 4096, 4096), 80)
    assert first.kernel.__name__ == "gemm_kernel"
    assert second.kernel.__name__ == "split_k_reduce_kernel"
    given = first.arguments
    splits = first.grid[1]
    assert first.programs == 4096 // given["BLOCK_N"] * splits
    assert given["steps"] == splits * given["split_steps"]
    weights = 4096 * 4096 // 2
    partial = 4 * splits * 16 * 4096
    assert weights + partial < first.nbytes < 1.05 * weights + partial
    source = first.source()
    assert source.signature["weight_ptr"] == "*u8"
    assert source.signature["zp_offset_ptr"] == "constexpr"
    assert (first.kernel.arg_names.index("N"),) in source.attrs
    assert (first.kernel.arg_names.index("M"),) not in source.attrs


def test_tokens_of_a_class_share_compiled_code() -> None:
    sources = [[launch.source().hash() for launch in launches(linear_call(n, 4096, 4096), 90)] for n in (33, 48, 64)]
    assert sources[0] == sources[1] == sources[2]
    one, sixteen = (launches(linear_call(n, 4096, 4096), 90) for n in (1, 16))
    assert [launch.source().hash() for launch in one] == [launch.source().hash() for launch in sixteen]


def test_a_prediction_is_the_slowest_resources_time() -> None:
    launch = launches(linear_call(2048, 4096, 4096), 80)[0]
    code = Code("mma", 128, 0, 1024, {"IMMA": 64, "LOP3": 36}, {"MOV": 100})
    found = predict(launch, code, MACHINES[80])
    tile = launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_M"]
    per_sm = -(-(4096 * 2048 // tile) // 108)
    assert found.mma == pytest.approx(per_sm * tile * 4096 / 2048 / 1.41e9)
    trips, warps = 4096 / launch.arguments["BLOCK_K"], launch.options["num_warps"]
    assert found.issue == pytest.approx(per_sm * (trips * 100 + 100) * warps / 4 / 1.41e9)
    assert found.dram == pytest.approx(launch.nbytes / 2.039e12)
    step = launch.arguments["BLOCK_N"] * 64 + launch.arguments["BLOCK_M"] * 128  # bytes of 128 features
    assert found.l2 == pytest.approx(per_sm * trips * step / 32 / 1.41e9)
    assert found.seconds == max(found.mma, found.issue, found.dram, found.l2)
    assert found.bound == ("mma" if found.mma > found.issue else "issue")


def test_occupancy_is_what_registers_shared_memory_and_warps_leave() -> None:
    ampere = MACHINES[80]
    assert ampere.occupancy(4, 255, 0) == 2
    assert ampere.occupancy(4, 32, 80 * 1024) == 2
    assert ampere.occupancy(4, 32, 0) == 16
    assert MACHINES[89].occupancy(4, 32, 0) == 12


def _rows(call: Callable[[], Any], arch: int, scheme: str, tokens: int) -> list[dict[str, Any]]:
    case = Case("LLaMA-3-8B", "qkv", scheme, tokens, call, tokens * 4096 * 6144)
    return [row(case, launch, compiled(launch, arch), MACHINES[arch]) for launch in launches(call, arch)]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """A prompt's product on Hopper, a decoding one on Ampere, and a Hadamard on Ampere: compiled here."""
    return [
        *_rows(linear_call(2048, 4096, 6144), 90, "W4A4", 2048),
        *_rows(linear_call(16, 4096, 6144), 80, "W4A4", 16),
        *_rows(rotate_call(2048, 4096, 1, 4096), 80, "Hadamard, A4 per token", 2048),
    ]


def test_what_was_compiled_is_within_every_bar_and_what_a_gpu_is_good_at(rows: list[dict[str, Any]]) -> None:
    prompt, few, *_ = rows
    assert broken(rows) == []
    assert prompt["mma"].startswith("wgmma.mma_async.sync.aligned.m64n")
    assert few["mma"].startswith("mma.sync.aligned.m16n8k32")
    assert (prompt["bound"], few["bound"]) == ("l2", "dram")


CACHE_KERNELS = ("kv_store_kernel", "kv_attention_kernel", "kv_decode_kernel")


@pytest.mark.parametrize(
    ("arch", "cache"),
    [
        (80, "4 bits"),
        (90, "4 bits"),
        (100, "heads of 256"),
        (120, "heads of 64"),
        (86, "heads of 96"),
        (89, "keys of 8"),
    ],
)
def test_kernels_of_the_cache_are_within_the_bars(arch: int, cache: str) -> None:
    found = [
        row(case, launch, compiled(launch, arch), MACHINES[arch])
        for name in CACHE_KERNELS
        for case in ENTRIES[name].cases(MODELS[0])
        if case.scheme.startswith(cache)
        for launch in launches(case.call, arch)
    ]
    assert {each["kernel"] for each in found} >= {"kv_store", "kv_attention", "kv_decode", "kv_splits_reduce"}
    assert [line for line in broken(found) if not KNOWN_MISSES.search(line)] == []
    for each in found:
        if each["kernel"] == "kv_decode" and each["tokens"] == 16 and cache == "4 bits":
            assert each["bound"] == "dram"


def test_rows_are_dealt_to_experts_as_chance_has_it() -> None:
    assert dealt(1, 8, 16) == pytest.approx((1, 1))
    assert dealt(2, 2, 1) == pytest.approx((1.5, 2))
    assert dealt(2, 2, 2) == pytest.approx((1.5, 1.5))
    having, slots = dealt(16384, 128, 128)
    assert (having, 128 < slots < 256) == (pytest.approx(128), True)


def test_experts_are_predicted_faster_than_any_in_bf16() -> None:
    hopper = next(gpu for gpu in GPUS if gpu.machine.arch == 90)
    cases = [
        case
        for case in ENTRIES["grouped_gemm_kernel"].cases(MODELS[0])
        if case.scheme == "W4A4" and case.tokens in (1, 2048)
    ]
    found = [
        row(case, launch, compiled(launch, 90), MACHINES[90]) for case in cases for launch in launches(case.call, 90)
    ]
    assert {each["kernel"] for each in found} == {"align", "rotate_quantize", "grouped_gemm", "combine"}
    assert broken(found) == []
    weights = sum(each["bytes"] for each in found if each["kernel"] == "grouped_gemm" and each["tokens"] == 1)
    assert 0.9 * 8 < weights / (3 * 2048 * 768 / 2) < 1.1 * 8  # of the experts that have a token
    shape = MIXTURES["Qwen3-30B-A3B"]
    for tokens in (1, 2048):
        ours = sum(each["predicted_seconds"] for each in found if each["tokens"] == tokens)
        assert ours == pytest.approx(mixtures.seconds(MACHINES[90], shape, "fast", tokens))
        assert mixtures.floor(hopper, shape, tokens, hopper.bf16, 2) >= 1.5 * ours
    lines = list(mixtures.rows(hopper, shape, ("fast",)))
    assert [len(line) for line in lines] == [2 + len(TOKENS)] * 3


def test_a_cache_that_is_read_twice_is_told(rows: list[dict[str, Any]]) -> None:
    corrupted = rows[1] | {
        "kernel": "kv_decode",
        "scheme": "4 bits, context of 16384",
        "must_read": rows[1]["bytes"] // 2,
    }
    corrupted |= {"stack": 8, "bound": "issue"}
    assert len(broken([corrupted])) == 3


def test_broken_bars_are_told(rows: list[dict[str, Any]]) -> None:
    corrupted = rows[0] | {"spills": 3, "shared": 10**6, "issue_per_mma": 0.7, "mma": "mma.sync.f16"}
    assert len(broken([corrupted])) == 4


def test_no_tokens_of_a_layer_take_more_than_their_share_of_time() -> None:
    found = [
        row(case, launch, compiled(launch, 90), MACHINES[90])
        for case in ENTRIES["gemm_kernel"].cases(MODELS[0])
        if case.scheme in LAYER_SCHEMES
        for launch in launches(case.call, 90)
    ]
    for scheme in LAYER_SCHEMES:
        assert list(layers(found)["LLaMA-3-8B", 90, scheme]) == list(LAYER_TOKENS)
    assert broken(found) == []


def test_a_cliff_and_a_fall_are_told() -> None:
    whole = {"kernel": "gemm", "model": "LLaMA-3-8B", "arch": 90, "scheme": "W4A4"}
    seconds = {16: 1.0, 32: 1.9, 33: 2.4, 64: 2.0}
    made = [
        whole | {"layer": layer, "tokens": tokens, "predicted_seconds": each}
        for layer in MODELS[0].linears
        for tokens, each in seconds.items()
    ]
    told = steps(made)
    assert ["32 to 33" in told[0], "33 to 64" in told[1], len(told)] == [True, True, 2]
    assert steps(made[1:]) == told  # a layer that is not whole is compared with nothing


def test_the_report_says_that_it_predicts(rows: list[dict[str, Any]]) -> None:
    text = markdown(rows, broken(rows))
    assert "nothing on this page was measured on a GPU" in text
    assert "predicted microseconds" in text


def test_every_kernel_has_an_entry_and_every_model_its_linears() -> None:
    assert MODELS[3].linears == {"qkv": (8192, 2560), "o": (2048, 8192), "gate_up": (8192, 14336), "down": (7168, 8192)}
    for entry in ENTRIES.values():
        for case in entry.cases(MODELS[0]):
            assert {launch.kernel.__name__ for launch in launches(case.call, 90)} <= ENTRIES.keys()
    assert not torch.cuda.is_initialized()
