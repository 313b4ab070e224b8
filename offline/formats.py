"""Number formats of linears, by site and layer: parts of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infoquant_vllm.format import ActivationArgs, ModelShape, StrictModel, WeightArgs

ClipRatio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Layer = Annotated[int, Field(ge=0, le=100_000)]
SiteName = Literal["qkv", "o", "gate_up", "down"]


class SiteActivations(StrictModel):
    """Quantization of an input: `ActivationArgs` of the format, where strategy "head" takes its size from the model.

    mean: subtract the mean of the calibration text's inputs, whose product with the weights becomes a constant
    """

    num_bits: Literal[4, 8, 16] = 4
    symmetric: bool = False
    strategy: Literal["token", "head", "group"] = "token"
    group_size: Count | None = None
    mean: bool = False

    @model_validator(mode="after")
    def _group_size_needs_strategy(self) -> "SiteActivations":
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(f"group_size {self.group_size} does not go with strategy '{self.strategy}'")
        if self.strategy != "token" and self.num_bits != 4:
            raise ValueError(f"strategy '{self.strategy}' needs num_bits 4, found {self.num_bits}")
        if self.mean and self.num_bits == 16:
            raise ValueError("mean does not go with num_bits 16")
        return self

    def for_model(self, shape: ModelShape) -> ActivationArgs:
        """Return the format's arguments for a model of that shape."""
        size = shape.head_dim if self.strategy == "head" else self.group_size
        return ActivationArgs.model_validate(self.model_dump() | {"group_size": size})


class Site(StrictModel):
    """Quantization of the linears that share an input: weights, input activations, and the input's clip ratio.

    clip_ratio: one number, or "search" for the best one of each layer and group (see `algorithms/clip_search.py`)
    """

    weights: WeightArgs = WeightArgs(num_bits=4)
    input_activations: SiteActivations = SiteActivations()
    clip_ratio: ClipRatio | Literal["search"] = 0.9


class Sites(StrictModel):
    """Quantization of the four inputs of a decoder layer and their linears (see SITES of the format)."""

    qkv: Site = Site()
    o: Site = Site(input_activations=SiteActivations(strategy="head"))
    gate_up: Site = Site()
    down: Site = Site()


class LayerSites(StrictModel):
    """Sites of some layers that have other formats than those of `Recipe.sites`."""

    layers: Annotated[list[Layer], Field(min_length=1, max_length=100_000)]
    sites: Annotated[dict[SiteName, Site], Field(min_length=1)]
