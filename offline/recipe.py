"""Recipes: the transforms, the rounding and the number formats of a quantized model, as one frozen value."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from infoquant_vllm.format import (
    FORMAT_VERSION,
    ROW_PARALLEL_SITES,
    SITE_NORMS,
    SITES,
    ActivationArgs,
    ConfigGroup,
    FormatError,
    InputTransform,
    KVCacheArgs,
    ModelShape,
    QuantizationConfigData,
    StrictModel,
    check_tp_divisible,
)
from offline.errors import ToolError
from offline.formats import ClipRatio, Count, LayerSites, Site, Sites
from offline.tensor_parallel import common_shard_size, tp_sizes

Rate = Annotated[float, Field(ge=0, le=1)]


class KVCache(StrictModel):
    """Bits of keys and values in the cache, and their clip ratios.

    key_mean_positions: subtract the mean key over that many positions before keys are quantized (see
        `offline/algorithms/key_mean.py`), which RoPE rotates; None subtracts nothing, nor does a model with soft caps
    key_feedback: round keys with error feedback, by what queries at these positions see of errors (see
        `offline/algorithms/key_feedback.py`); positions, at most those that the model has, are logarithmic then
    """

    key_bits: Literal[4, 8] = 4
    value_bits: Literal[4, 8] = 4
    key_clip_ratio: ClipRatio = 1.0
    value_clip_ratio: ClipRatio = 0.95
    key_mean_positions: Annotated[int, Field(ge=1, le=131_072)] | None = None
    key_feedback: bool = False

    @model_validator(mode="after")
    def _feedback_needs_positions(self) -> "KVCache":
        if self.key_feedback and self.key_mean_positions is None:
            raise ValueError("key_feedback needs key_mean_positions")
        return self


class CalibrationSize(StrictModel):
    """Size of the calibration text: `sequences` of `sequence_length` tokens."""

    sequences: Count = 64
    sequence_length: Annotated[int, Field(ge=8, le=131_072)] = 512


class Gptq(StrictModel):
    """Rounding of the weights.

    dampening_frac: added to the Hessian's diagonal, as a share of its mean
    refinements: passes over codes and scales after GPTQ (see `offline/algorithms/refine.py`)
    guided: weigh tokens by gradients of the loss, which holds the whole model (see `offline/stages/weigh_tokens.py`)
    sink_weight: above 0, weights make up for the rounding of each sequence's first token (see
        `offline/algorithms/sinks.py`); its errors count this many times at qkv, and once at other sites
    """

    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    refinements: Annotated[int, Field(ge=0, le=100)] = 0
    guided: bool = False
    sink_weight: Annotated[float, Field(ge=0, le=1000)] = 0


class Psot(StrictModel):
    """Optimization of the shared R1 (see `offline/algorithms/psot.py`): Adam with a cosine schedule."""

    steps: Count = 500
    batch_tokens: Count = 1024
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-3
    pool_tokens: Count = 120_000


class PsotLayer(StrictModel):
    """Optimization of each layer's own rotations (PSOT): gradient descent over orthogonal matrices.

    As published: 15 epochs over 128 sequences of 2048 tokens, which takes a GPU.

    blocks: diagonal blocks in the rotation of a hidden-size input
    epochs: passes over the calibration text; the learning rate falls linearly to `last_learning_rate`
    temperature: of the softmax that weights a token's peaks
    outlier_weight: weight of outlier tokens in the loss; ordinary tokens have 1
    """

    blocks: Count = 2
    epochs: Count = 6
    batch_sequences: Count = 4
    learning_rate: Annotated[float, Field(gt=0)] = 2.0
    last_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    temperature: Annotated[float, Field(gt=0)] = 2.0
    outlier_weight: Annotated[float, Field(gt=0)] = 30.0


class LearnedClips(StrictModel):
    """Optimization of clip ratios, in place of the sites' fixed ones, layer by layer: AdamW.

    As published: 128 sequences, 4 at a time.

    sequences: number of sequences of the calibration text that are used
    """

    sequences: Count = 8
    epochs: Count = 5
    batch_sequences: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 0.05
    warmup_steps: Count = 16


class Distillation(StrictModel):
    """Distillation of a factor per row of weights and of the KV cache's clip ratios: Adam, warm-up and cosine.

    The learning rate is relative for scales and absolute for clip ratios; 0 leaves them as they are.
    """

    steps: Count = 100
    batch_sequences: Count = 1
    warmup_steps: Count = 10
    scale_learning_rate: Rate = 2e-3
    clip_learning_rate: Rate = 3e-3


class ExpertCalibration(StrictModel):
    """Calibration of a mixture's experts from the tokens that its router sends to each.

    least_share: of the tokens that each would get if all got the same number; an expert with fewer is calibrated on
        others too, those that its router scores highest for it
    unseen: number of experts, over all layers, that may get no token at all
    """

    least_share: Rate = 0.25
    unseen: Annotated[int, Field(ge=0)] = 0


class Recipe(StrictModel):
    """Everything that determines the output, except for the source, the calibration text and the seed."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    transform: Literal["none", "heads", "hadamard", "psot-shared", "psot-layer"]
    rounding: Literal["none", "rtn", "gptq"]
    """Of weights; with `none` all linears of the decoder stay unquantized, inputs too, and `sites` is not read."""
    equalize: bool = False
    sites: Sites = Sites()
    layers: Annotated[list[LayerSites], Field(max_length=100_000)] = Field(default_factory=list)
    """Sites of named layers that have other formats than `sites` says; the shared rotation is learned for `sites`."""
    kv_cache: KVCache | None = KVCache()
    lm_head_bits: Literal[8] | None = None
    """Bits of lm_head, in a tied model of the embedding too; None leaves it unquantized."""
    calibration: CalibrationSize = CalibrationSize()
    gptq: Gptq = Gptq()
    experts: ExpertCalibration = ExpertCalibration()
    psot: Psot = Psot()
    psot_layer: PsotLayer = PsotLayer()
    learned_clips: LearnedClips | None = None
    distillation: Distillation | None = None
    max_tp_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Largest tensor-parallel size that may serve the checkpoint: rotations and ranges stay within a rank's shard."""

    @model_validator(mode="after")
    def _statistics_need_gptq(self) -> "Recipe":
        readers = {
            "equalize": self.equalize,
            "gptq.refinements": self.gptq.refinements > 0,
            "gptq.guided": self.gptq.guided,
            "gptq.sink_weight": self.gptq.sink_weight > 0,
            "kv_cache.key_mean_positions": self.rounding == "rtn" and self.reads_keys,
            "learned_clips": self.learned_clips is not None,
        }
        for name, site in self._named_sites().items():
            readers[f"{name}.clip_ratio 'search'"] = site.clip_ratio == "search"
            readers[f"{name}.input_activations.mean"] = site.input_activations.mean
        if self.gptq.sink_weight and self.learned_clips is not None:
            raise ValueError(
                "gptq.sink_weight makes up for the rounding of inputs, which learned_clips change afterwards; "
                "leave out gptq.sink_weight"
            )
        used = first_used(readers)
        if used is not None and self.rounding != "gptq":
            raise ValueError(f"{used} reads the statistics of GPTQ; it does not go with rounding '{self.rounding}'")
        return self

    @model_validator(mode="after")
    def _each_site_of_a_layer_is_named_once(self) -> "Recipe":
        names = Counter((layer, site) for part in self.layers for layer in part.layers for site in part.sites)
        (layer, site), count = max(names.items(), key=lambda item: item[1], default=((0, ""), 0))
        if count > 1:
            raise ValueError(f"layers names site '{site}' of layer {layer} more than once")
        if self.layers and self.rounding == "none":
            raise ValueError("layers sets formats of linears; it does not go with rounding 'none'")
        return self

    def _named_sites(self) -> dict[str, Site]:
        """Return all sites by the places where the recipe has them."""
        found = {f"sites.{name}": getattr(self.sites, name) for name in SITES}
        for index, part in enumerate(self.layers):
            found |= {f"layers[{index}].sites.{name}": site for name, site in part.sites.items()}
        return found

    @model_validator(mode="after")
    def _unquantized_linears_need_no_transform(self) -> "Recipe":
        if self.rounding != "none":
            return self
        if self.transform not in ("none", "heads"):
            raise ValueError(
                f"transform '{self.transform}' is for quantized linears; rounding 'none' goes with 'heads'"
            )
        if self.distillation is not None:
            raise ValueError("distillation trains the scales of weights; it does not go with rounding 'none'")
        if self.kv_cache is None and self.lm_head_bits is None:
            raise ValueError("rounding 'none' without kv_cache and lm_head_bits quantizes nothing")
        return self

    @property
    def reads_keys(self) -> bool:
        """Return whether the KV cache is calibrated on the keys of the calibration text."""
        return self.kv_cache is not None and self.kv_cache.key_mean_positions is not None

    @property
    def reads_layers(self) -> bool:
        """Return whether the calibration text runs through the layers while they are quantized."""
        return self.rounding == "gptq" or self.reads_keys

    @property
    def needs_calibration(self) -> bool:
        """Return whether any stage reads activations."""
        return self.reads_layers or self.transform.startswith("psot") or self.distillation is not None

    @property
    def rotates_stream(self) -> bool:
        """Return whether R1 rotates the residual stream, of a class whose norms let it."""
        return self.transform in ("hadamard", "psot-shared")

    def site(self, site: str, layer: int | None) -> Site:
        """Return how a site of a model (see `ModelShape.sites`) is quantized; those of all experts are alike.

        layer: index of the decoder layer; None: the format of layers that `layers` does not name
        """
        kind = site.rpartition(".")[2]
        for part in self.layers:
            if layer in part.layers and kind in part.sites:
                return part.sites[kind]
        found: Site = getattr(self.sites, kind)
        return found

    def input_transform(self, site: str, shape: ModelShape) -> InputTransform:
        """Return the transform of the inputs of a site (see `ModelShape.sites`) at run time; that of `down` is R4.

        Where R1 folds into no weights, the inputs that read the residual stream get a Hadamard transform in its place.
        """
        kind = site.rpartition(".")[2]
        if kind == "down" and self.transform not in ("none", "heads"):
            block = common_shard_size(shape.features(site), shape, self.max_tp_size)
            return InputTransform(type="hadamard", block_size=block)
        if kind in SITE_NORMS and self.transform == "psot-layer":
            blocks = self.psot_layer.blocks
            if shape.hidden_size % blocks:
                raise FormatError(f"psot_layer.blocks {blocks} does not divide the hidden size {shape.hidden_size}")
            return InputTransform(type="blocks", block_size=shape.hidden_size // blocks)
        if kind in SITE_NORMS and self.rotates_stream and not shape.folds_r1:
            return InputTransform(type="hadamard", block_size=shape.hidden_size)
        return InputTransform()

    def centered_sites(self, shape: ModelShape, layer: int | None) -> set[str]:
        """Return the sites of a layer (see `site`) that subtract the mean of their inputs."""
        return {site for site in shape.sites if self.input_activations(site, shape, layer).mean}

    def input_activations(self, site: str, shape: ModelShape, layer: int | None) -> ActivationArgs:
        """Return the number format of the inputs of a layer's site (see `site`).

        A scale per token becomes one per shard where TP shards the features. A mixture of experts subtracts no means:
        each expert sees other tokens, and means at qkv alone do harm.
        """
        args = self.site(site, layer).input_activations.for_model(shape)
        if shape.experts is not None:
            args = args.model_copy(update={"mean": False})
        if site.rpartition(".")[2] not in ROW_PARALLEL_SITES or args.num_bits == 16:
            return args
        features = shape.features(site)
        shard = common_shard_size(features, shape, self.max_tp_size)
        return args if shard == features else args.model_copy(update={"segment_size": shard})

    def quantization_config(self, shape: ModelShape) -> QuantizationConfigData:
        """Return `quantization_config` of the checkpoint that this recipe makes of a model of that shape.

        Raises FormatError where the sizes of blocks or groups do not suit the model or one of the TP sizes.
        """
        self._check_experts(shape)
        rotated = self.transform != "none"
        rotated_stream = self.rotates_stream and shape.folds_r1
        plain = [linear for linears in SITES.values() for linear in linears] if self.rounding == "none" else []
        groups = {} if plain else self._groups(shape)
        kv_cache = None
        if self.kv_cache is not None:
            kv_cache = KVCacheArgs(
                key_bits=self.kv_cache.key_bits,
                value_bits=self.kv_cache.value_bits,
                key_transform="hadamard" if rotated else "none",
                key_mean=self.reads_keys and shape.attn_logit_softcapping is None,
                key_feedback=self.kv_cache.key_feedback,
            )
        return QuantizationConfigData(
            quant_method="infoquant",
            format_version=FORMAT_VERSION,
            config_groups=groups,
            ignore=[*plain, *shape.gates, *(["lm_head"] if self.lm_head_bits is None else [])],
            kv_cache=kv_cache,
            rotated_hidden_states=rotated_stream,
            online_r1=rotated_stream and shape.tie_word_embeddings,
            lm_head_bits=self.lm_head_bits,
        )

    def _groups(self, shape: ModelShape) -> dict[str, ConfigGroup]:
        """Return a group for each kind of sites, and one for each that an entry of `layers` names."""
        unknown = [layer for part in self.layers for layer in part.layers if layer >= shape.num_hidden_layers]
        if unknown:
            raise FormatError(f"layers names layer {unknown[0]}, the model has {shape.num_hidden_layers}, from 0 on")
        groups = {}
        for name, site in shape.kinds_of_sites.items():
            targets = [linear.rpartition(".experts.0.")[2] for linear in shape.sites[site]]
            groups[name] = self._group(site, shape, None, targets)
            for index, part in enumerate(self.layers):
                if site.rpartition(".")[2] in part.sites:
                    linears = [linear for other in shape.sites_like(site) for linear in shape.sites[other]]
                    targets = [f"model.layers.{layer}.{linear}" for layer in part.layers for linear in linears]
                    groups[f"{name}.{index}"] = self._group(site, shape, part.layers[0], targets)
        return groups

    def _group(self, site: str, shape: ModelShape, layer: int | None, targets: list[str]) -> ConfigGroup:
        try:
            group = ConfigGroup(
                targets=targets,
                weights=self.site(site, layer).weights,
                input_activations=self.input_activations(site, shape, layer),
                input_transform=self.input_transform(site, shape),
            )
        except ValidationError as error:
            raise FormatError.from_validation(f"{targets[0]} with max_tp_size {self.max_tp_size}", error) from None
        if site.rpartition(".")[2] in ROW_PARALLEL_SITES:
            for tp_size in tp_sizes(shape, self.max_tp_size)[1:]:
                try:
                    check_tp_divisible(group, shape.features(site), tp_size)
                except FormatError as error:
                    raise FormatError(f"{targets[0]} with max_tp_size {self.max_tp_size}: {error}") from None
        return group

    def _check_experts(self, shape: ModelShape) -> None:
        """Raise FormatError where a mixture of experts meets a stage that does not know experts."""
        wanted = {
            "rounding 'none'": self.rounding == "none",
            "transform 'psot-layer'": self.transform == "psot-layer",
            "learned_clips": self.learned_clips is not None,
            "distillation": self.distillation is not None,
            "gptq.guided": self.gptq.guided,
        }
        found = first_used(wanted)
        if shape.experts is not None and found is not None:
            raise FormatError(f"{found} is not made for mixtures of experts yet; use preset fast, or leave it out")

    def dump(self) -> str:
        """Return the recipe as YAML, which `load_recipe` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def first_used(keys: dict[str, bool]) -> str | None:
    """Return the first of some keys of a recipe that it uses, or None."""
    return next((name for name, used in keys.items() if used), None)


def load_recipe(file: str | Path) -> Recipe:
    """Read a recipe from YAML; raises ToolError naming the file and every wrong field."""
    try:
        data: Any = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ToolError(f"{file}: not readable as YAML ({error})") from None
    if not isinstance(data, dict):
        raise ToolError(f"{file}: a YAML mapping was expected, found {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ToolError(str(FormatError.from_validation(str(file), error))) from None
