"""Measure the KL to the source when one site of one layer is quantized."""

from typing import Any

import torch
from torch import nn

from infoquant_vllm.format import SITES, ActivationArgs, LinearScheme, activation_groups
from offline.algorithms.clip_search import search_clips
from offline.algorithms.fake_quantize import fake_quantize
from offline.algorithms.gptq import output_error
from offline.algorithms.head_kl import kl_to, log_probabilities
from offline.algorithms.rotations import Transforms, transform_hessian, transform_input, undo_in_weights
from offline.algorithms.rtn import round_to_nearest
from offline.choices import SiteChoices
from offline.model.architectures import embedding_scale, head_of
from offline.model.hidden_states import Rotary
from offline.run import Run
from offline.stages.lm_head import rounded_rows
from offline.stages.quantize_layer import LayerInputs
from offline.training.fake_quant import FakeQuantInput, FakeQuantLinear, FixedClip
from offline.training.fake_quant_layer import local_tensors

Tensors = dict[str, torch.Tensor]


class LaterLayers:
    """The source's layers behind those that were skipped, and the KL of what comes out of them.

    tokens: int64 [sequences, length]
    """

    def __init__(self, run: Run, tokens: torch.Tensor, transforms: Transforms | None):
        residual = None if transforms is None else transforms.residual
        device = run.devices[0]
        self._back = None if residual is None else residual.T.float().to(device)
        self._tokens, model = tokens.to(device), run.source.model(torch.float32)
        nn.Module.to(model, device)
        self._decoder, self._head = model.model, head_of(model)
        multiplies = hasattr(model.config, "embedding_multiplier")  # also embeddings that the decoder is given
        self._multiplier = embedding_scale(self._decoder, torch.float32) if multiplies else 1.0
        self._tied = run.source.shape.tie_word_embeddings
        self._expected = log_probabilities(self._last(self._decoder.embed_tokens(self._tokens)), self._head)

    def skip(self, layer: int) -> None:
        """Leave out a layer, the next one, and free its weights."""
        self._decoder.layers[layer] = _Skipped(self._decoder.layers[layer])

    def kl(self, hidden: torch.Tensor) -> float:
        """Return the KL when `hidden` [sequences, length, hidden], in R1's basis, leaves the skipped layers."""
        hidden = hidden if self._back is None else hidden @ self._back
        return kl_to(self._expected, self._last(hidden / self._multiplier), self._head)

    def lm_head_kl(self) -> float:
        """Return the KL with lm_head in 8 bits, in a tied model the embedding too; before any layer is skipped."""
        head = self._head._replace(weight=rounded_rows(self._head.weight))
        embedded = self._decoder.embed_tokens(self._tokens)
        if self._tied:
            embedded = embedded + nn.functional.embedding(self._tokens, head.weight - self._head.weight) * (
                embedding_scale(self._decoder, torch.float32) / self._multiplier
            )
        return kl_to(self._expected, self._last(embedded), head)

    def _last(self, embedded: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)


class _Skipped(nn.Module):
    """Stands for a layer that was run elsewhere."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # some decoders choose a mask by it

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what enters."""
        return hidden


class LayerKL:
    """The KL when some linears of a layer are replaced.

    module: the layer, rotated and unquantized, and what enters it [sequences, length, hidden]
    """

    def __init__(self, module: nn.Module, rotary: Rotary, entering: torch.Tensor, later: LaterLayers):
        self._module, self._rotary, self._entering, self._later = module, rotary, entering, later

    def __call__(self, linears: dict[str, FakeQuantLinear]) -> float:
        """Return the KL with `linears` in place of those of their names inside the layer."""
        before = {name: self._module.get_submodule(name) for name in linears}
        for name, linear in linears.items():
            self._module.set_submodule(name, linear)
        out = self._module(self._entering, position_embeddings=self._rotary)
        for name, plain in before.items():
            self._module.set_submodule(name, plain)
        return self._later.kl(out)


class LayerSite:
    """A site of one layer, with what rounding the layer overwrites of its inputs."""

    def __init__(self, name: str, inputs: LayerInputs, choices: SiteChoices, scheme: LinearScheme | None):
        assert inputs.hessians is not None
        assert scheme is not None  # rounding `none` has no choices
        self.name, self._choices, self._scheme, self._linears = name, choices, scheme, SITES[name]
        first, transform = self._linears[0], scheme.input_transform
        weights = [inputs.state[f"{linear}.weight"] for linear in self._linears]
        self._weight = torch.cat([undo_in_weights(weight, transform, {}) for weight in weights])
        self._rows = [len(weight) for weight in weights]
        self._hessian = transform_hessian(inputs.hessians[first].clone(), transform, {})
        self._sample = transform_input(inputs.samples[first], transform, {})

    def measure(self, tensors: Tensors, layer_kl: LayerKL) -> tuple[list[float], list[float]]:
        """Return the KL of the formats of weights and of inputs; `tensors`: of the layer in the base's formats."""
        local = {linear: local_tensors(tensors, linear) for linear in self._linears}
        plain = {linear: own | {"input_clip_ratio": None} for linear, own in local.items()}
        measured = layer_kl(self._modules(plain, None))
        return scaled(measured, self._weight_errors(), 0), self._measure_inputs(local, layer_kl)

    def _measure_inputs(self, local: dict[str, Tensors], layer_kl: LayerKL) -> list[float]:
        """Measure inputs of 4 bits, the base's where it has them, and scale the other formats."""
        formats = self._choices.activations
        if formats[0].num_bits == 16:
            return [0.0]
        index = next((index for index, args in enumerate(formats) if args.num_bits == 4), 0)
        clips = [self._clips(candidate) for candidate in range(len(formats))]
        rounded = {linear: own | {"input_clip_ratio": clips[index]} for linear, own in local.items()}
        errors = [self._input_error(args, clip) for args, clip in zip(formats, clips, strict=True)]
        return scaled(layer_kl(self._modules(rounded, formats[index])), errors, index)

    def _modules(self, local: dict[str, Any], inputs: ActivationArgs | None) -> dict[str, FakeQuantLinear]:
        """Return the site's linears with their inputs rounded, or with None their weights."""
        scheme = self._scheme if inputs is None else self._scheme.model_copy(update={"input_activations": inputs})
        local = {linear: {name: t for name, t in own.items() if t is not None} for linear, own in local.items()}
        shared = FakeQuantInput(scheme, local[self._linears[0]], FixedClip)
        found = {linear: FakeQuantLinear(shared, scheme, own, False) for linear, own in local.items()}
        if inputs is not None:
            for linear, weight in zip(found.values(), self._weight.split(self._rows), strict=True):
                linear.register_buffer("weight", weight)
        return {name: linear.to(self._weight.device) for name, linear in found.items()}

    def _weight_errors(self) -> list[float]:
        """Return the share of the outputs' energy that each format of the weights loses, rounded to nearest."""
        return [
            output_error(self._weight, round_to_nearest(self._weight, args), self._hessian)
            for args in self._choices.weights
        ]

    def _clips(self, candidate: int) -> torch.Tensor:
        args, ratio = self._choices.activations[candidate], self._choices.with_formats(0, candidate).clip_ratio
        if ratio == "search":
            return search_clips(self._sample, args)
        return torch.full((activation_groups(args, self._sample.shape[1]), 2), ratio, device=self._sample.device)

    def _input_error(self, args: ActivationArgs, clip: torch.Tensor) -> float:
        """Return the energy of the errors of the outputs on the sample."""
        error = fake_quantize(self._sample, clip, args) - self._sample
        return (error @ self._weight.T).square().sum().item()


def scaled(measured: float, errors: list[float], index: int) -> list[float]:
    """Return `measured`, the KL of format `index`, for all formats in proportion to their squared errors."""
    return [measured * error / errors[index] if errors[index] > 0 else 0.0 for error in errors]
