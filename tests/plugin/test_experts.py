"""The plugin's method on vLLM's own mixtures of experts: sharding, loading, and what is refused by name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.fused_moe.config as vllm_experts
from safetensors.torch import load_file
from vllm.config import ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

from infoquant_vllm import experts, register
from infoquant_vllm.config import InfoQuantConfig
from infoquant_vllm.format import FormatError
from infoquant_vllm.kernels import dispatch, ops
from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant, PackedWeight
from tests.common.checkpoints import hf_config, quantization_config, write_random
from tests.common.corpus import MIXTURE, SHARD
from tests.common.interpreted import experts as triton_experts
from tests.common.interpreted import interpreter_only
from tests.kernels.test_experts import one_by_one

PLACE = "model.layers.0.mlp.experts"
COUNT, HIDDEN, INNER = MIXTURE["num_experts"], 256, MIXTURE["moe_intermediate_size"]
SHARDED = INNER // 2
"""Features of a down projection on each of two ranks."""
GROUPED = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}
PARAMETERS = {"gate_proj": ("w1", "w13_"), "up_proj": ("w3", "w13_"), "down_proj": ("w2", "w2_")}


class Mixture:
    """The experts of a layer, created and loaded as vLLM does it."""

    def __init__(self, folder: Path, **down: Any):
        register()
        groups = quantization_config(hf_config(**MIXTURE))["config_groups"]
        groups["residual"]["weights"] = GROUPED
        groups["down"] |= {
            "input_activations": {"num_bits": 4, "segment_size": SHARDED},
            "input_transform": {"type": "hadamard", "block_size": SHARDED},
        } | down
        self.folder = write_random(folder, {"config_groups": groups}, **MIXTURE)
        self.tensors = load_file(self.folder / SHARD)
        config = json.loads((self.folder / "config.json").read_text())["quantization_config"]
        self.config = InfoQuantConfig.from_config(config)

    @contextmanager
    def rank(self, rank: int, by_experts: bool, **options: Any) -> Iterator[None]:
        """One rank of tensor or expert parallelism, as vLLM's layers see it."""
        found = VllmConfig(
            model_config=ModelConfig(str(self.folder), skip_tokenizer_init=True, **options),
            parallel_config=ParallelConfig(enable_expert_parallel=by_experts),
        )
        with (
            mock.patch.object(vllm_experts, "get_tensor_model_parallel_rank", return_value=rank),
            set_current_vllm_config(found),
        ):
            yield

    def create(self, ranks: int = 1, **options: Any) -> Any:
        sizes = {"num_experts": COUNT, "top_k": 2, "hidden_size": HIDDEN, "intermediate_size": INNER}
        parallel = {"tp_size": ranks, "dp_size": 1, "pcp_size": 1}
        runner = FusedMoEFactory(**(sizes | parallel | options), quant_config=self.config, prefix=PLACE)
        return runner.routed_experts

    def load(self, layer: Any, leave_out: str = "") -> Any:
        """Feed the checkpoint's tensors to a layer, but for those whose name ends in `leave_out`."""
        for name, tensor in self.tensors.items():
            if name.startswith(PLACE) and not (leave_out and name.endswith(leave_out)):
                expert, linear, local = name.removeprefix(f"{PLACE}.").split(".")
                shard, prefix = PARAMETERS[linear]
                param = getattr(layer, prefix + local)
                param.weight_loader(param, tensor, name, shard, int(expert))
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    def linear(self, names: tuple[str, ...], inputs: InputQuant) -> ExpertLinear:
        """A linear of all experts as the checkpoint holds it."""

        def stacked(local: str) -> torch.Tensor | None:
            if f"{PLACE}.0.{names[0]}.{local}" not in self.tensors:
                return None
            parts = [[self.tensors[f"{PLACE}.{e}.{name}.{local}"] for name in names] for e in range(COUNT)]
            return torch.stack([torch.cat(part) for part in parts])

        kinds = ("weight_packed", "weight_scale", "weight_multiplier", "weight_zero_point")
        clips = stacked("input_clip_ratio")
        assert clips is not None
        clips = clips if len(names) == 1 else clips[0, : len(clips[0]) // 2]
        weight = PackedWeight(*(stacked(kind) for kind in kinds))  # type: ignore[arg-type]
        return ExpertLinear(inputs._replace(clip_ratio=clips), weight)

    def expected(self, x: torch.Tensor, choice: ExpertChoice) -> torch.Tensor:
        gate_up = self.linear(("gate_proj", "up_proj"), InputQuant([], 0, None, 4, symmetric=False))
        down = self.linear(("down_proj",), InputQuant([], SHARDED, None, 4, symmetric=False, segments=2))
        return one_by_one(x, choice, gate_up, down)


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    return Mixture(tmp_path / "mixture")


def inputs() -> tuple[torch.Tensor, ExpertChoice]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(9, COUNT, generator=generator).argsort(1)[:, :2].to(torch.int32)
    return torch.randn(9, HIDDEN, generator=generator), ExpertChoice(torch.rand(9, 2, generator=generator), chosen)


@pytest.mark.parametrize("by_experts", [False, True])
def test_ranks_together_compute_what_the_checkpoint_says(mixture: Mixture, by_experts: bool) -> None:
    x, choice = inputs()
    expected = mixture.expected(x, choice)
    with mixture.rank(0, by_experts):
        layer = mixture.load(mixture.create())
        assert torch.equal(layer.quant_method.apply(layer, x, *choice), expected)
    parts = []
    for rank in range(2):
        with mixture.rank(rank, by_experts):
            layer = mixture.load(mixture.create(2))
            assert layer.w2_weight_scale.shape[0] == (COUNT // 2 if by_experts else COUNT)
            parts.append(layer.quant_method.apply(layer, x, *choice))
    assert all(part.any() for part in parts)
    torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-5, atol=1e-5)


@interpreter_only
@pytest.mark.parametrize("by_experts", [False, True])
def test_kernels_of_gpus_compute_what_the_checkpoint_says(
    mixture: Mixture, by_experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank, and on two of which each leaves out what the other has."""
    kernels = dispatch.BACKENDS["triton"]()
    assert kernels.experts is triton_experts.experts
    for user in (experts, ops):
        monkeypatch.setattr(user, "backend", lambda device: kernels)
    x, choice = inputs()
    expected = mixture.expected(x, choice)
    found = torch.zeros(1, *x.shape), torch.zeros(2, *x.shape)
    for ranks, outputs in zip((1, 2), found, strict=True):
        for rank in range(ranks):
            with mixture.rank(rank, by_experts):
                layer = mixture.load(mixture.create(ranks))
                outputs[rank] = layer.quant_method.apply(layer, x, *choice)
        torch.testing.assert_close(outputs.sum(0), expected, rtol=1e-5, atol=1e-5)
    assert found[1].abs().amax((1, 2)).all()


@pytest.mark.parametrize(
    "tensor", ["2.up_proj.weight_scale", "3.down_proj.weight_packed", "gate_proj.input_clip_ratio"]
)
def test_a_missing_tensor_is_refused_by_name(mixture: Mixture, tensor: str) -> None:
    with mixture.rank(0, by_experts=False), pytest.raises(FormatError, match=rf"{PLACE}.*{tensor} is missing"):
        mixture.load(mixture.create(), leave_out=tensor)


def test_experts_with_different_clips_of_their_input_are_refused(mixture: Mixture) -> None:
    mixture.tensors[f"{PLACE}.2.gate_proj.input_clip_ratio"] *= 0.9
    with (
        mixture.rank(0, by_experts=False),
        pytest.raises(FormatError, match=r"2\.gate_proj\.input_clip_ratio differs"),
    ):
        mixture.load(mixture.create())


def test_impossible_multipliers_are_refused_by_expert(mixture: Mixture) -> None:
    mixture.tensors[f"{PLACE}.3.up_proj.weight_multiplier"][7, 1] = 200
    with (
        mixture.rank(0, by_experts=False),
        pytest.raises(FormatError, match=rf"{PLACE}\.3\..*is 200, expected 1 .."),
    ):
        mixture.load(mixture.create())


def test_a_block_that_tensor_parallelism_cuts_is_refused(tmp_path: Path) -> None:
    whole = {"input_activations": {"num_bits": 4}, "input_transform": {"type": "hadamard", "block_size": INNER}}
    mixture = Mixture(tmp_path / "whole", **whole)
    with mixture.rank(1, by_experts=False), pytest.raises(FormatError, match=f"{PLACE}: .*--max-tp-size 2"):
        mixture.create(2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "gelu"}, "activation gelu"),
        ({"apply_router_weight_on_input": True, "top_k": 1}, "router weights on the input"),
        ({"has_bias": True}, "biases of experts"),
        ({"swiglu_limit": 7.0}, "a limit on the activation"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused_by_name(
    mixture: Mixture, options: dict[str, Any], said: str
) -> None:
    with mixture.rank(0, by_experts=False), pytest.raises(FormatError, match=f"{PLACE}: {said} is not served"):
        mixture.create(**options)


def test_means_of_inputs_are_refused_by_name(tmp_path: Path) -> None:
    means = {"num_bits": 4, "segment_size": SHARDED, "mean": True}
    mixture = Mixture(tmp_path / "means", input_activations=means)
    with mixture.rank(0, by_experts=False), pytest.raises(FormatError, match=f"{PLACE}: a mean of inputs"):
        mixture.create()


def test_the_transformers_backend_is_refused_by_name(mixture: Mixture) -> None:
    with (
        mixture.rank(0, by_experts=False, model_impl="transformers"),
        pytest.raises(FormatError, match=f"{PLACE}: .*--model-impl transformers"),
    ):
        mixture.create()


@pytest.mark.parametrize(("targets", "said"), [(["2.down_proj"], "need equal schemes"), ([], "all linears .* or none")])
def test_experts_of_several_schemes_are_refused(mixture: Mixture, targets: list[str], said: str) -> None:
    """Some with 8 bits, or with linears that stay unquantized."""
    data = mixture.config.data
    other = {"targets": targets, "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
    changed = data.model_dump()
    if targets:
        changed["config_groups"]["other"] = other
        changed["config_groups"]["down"]["targets"] = [f"{e}.down_proj" for e in (0, 1, 3)]
    else:
        del changed["config_groups"]["down"]
        changed["ignore"] = [*changed["ignore"], "down_proj"]
    mixture.config.data = type(data).model_validate(changed)
    with mixture.rank(0, by_experts=False), pytest.raises(FormatError, match=f"{PLACE}: .*{said}"):
        mixture.create()
