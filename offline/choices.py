"""The number formats that a budget chooses among, and how many bytes each takes."""

import math
from dataclasses import dataclass
from typing import Any, get_args

from infoquant_vllm.format import SITES, ActivationArgs, FormatError, ModelShape, WeightArgs, linear_tensors
from offline.formats import Site, SiteActivations, SiteName
from offline.output.shards import spec_bytes
from offline.recipe import Recipe

GROUPS = (128, 64, 32)
WEIGHTS = (
    WeightArgs(num_bits=4),
    *(WeightArgs(num_bits=4, symmetric=False, strategy="group", group_size=size) for size in GROUPS),
    WeightArgs(num_bits=8),
)
INPUTS = (SiteActivations(strategy="group", group_size=32), SiteActivations(num_bits=8))


@dataclass(frozen=True)
class SiteChoices:
    """Formats for a site of each layer; those of the base recipe come first.

    activations: `inputs` as the checkpoint has them
    weight_bytes: of one layer, with inputs in the base's format
    input_bytes: that another format of the inputs adds in one layer
    weights_count: of one layer
    """

    site: Site
    weights: list[WeightArgs]
    inputs: list[SiteActivations]
    activations: list[ActivationArgs]
    weight_bytes: list[int]
    input_bytes: list[int]
    weights_count: int

    def with_formats(self, weights: int, inputs: int) -> Site:
        """Return the site in chosen formats; inputs in another format than the base's have their clips searched."""
        update: dict[str, Any] = {"weights": self.weights[weights], "input_activations": self.inputs[inputs]}
        if inputs:
            update["clip_ratio"] = "search"
        return self.site.model_copy(update=update)


def site_choices(recipe: Recipe, shape: ModelShape) -> dict[SiteName, SiteChoices]:
    """Return the formats for each site that suit a model of that shape; raises FormatError where the base's do not."""
    return {name: _choices(name, recipe, shape) for name in get_args(SiteName)}


def _choices(name: SiteName, recipe: Recipe, shape: ModelShape) -> SiteChoices:
    base: Site = getattr(recipe.sites, name)
    own = base.input_activations
    inputs = [own]
    if own.num_bits != 16:
        inputs += [args.model_copy(update={"mean": own.mean}) for args in INPUTS]
    of_weights = _that_suit(name, recipe, shape, {"weights": [base.weights, *WEIGHTS]})
    of_inputs = _that_suit(name, recipe, shape, {"input_activations": inputs})
    least = of_inputs[0][1]
    return SiteChoices(
        site=base,
        weights=[site.weights for site, _, _ in of_weights],
        inputs=[site.input_activations for site, _, _ in of_inputs],
        activations=[args for _, _, args in of_inputs],
        weight_bytes=[size for _, size, _ in of_weights],
        input_bytes=[size - least for _, size, _ in of_inputs],
        weights_count=sum(math.prod(shape.layer_linears[linear]) for linear in SITES[name]),
    )


def _that_suit(
    name: str, recipe: Recipe, shape: ModelShape, formats: dict[str, list[Any]]
) -> list[tuple[Site, int, ActivationArgs]]:
    """Return the site with each different value of a field that suits the model, its bytes and inputs in a layer."""
    found: list[tuple[Site, int, ActivationArgs]] = []
    ((field, values),) = formats.items()
    for value in values:
        site: Site = getattr(recipe.sites, name).model_copy(update={field: value})
        if any(site == other for other, _, _ in found):
            continue
        try:
            found.append((site, *_sizes(name, site, recipe, shape)))
        except FormatError:
            if not found:  # the base's own
                raise
    return found


def _sizes(name: str, site: Site, recipe: Recipe, shape: ModelShape) -> tuple[int, ActivationArgs]:
    sites = recipe.sites.model_copy(update={name: site})
    group = recipe.model_copy(update={"sites": sites}).quantization_config(shape).config_groups[name]
    tensors = [linear_tensors(group, *shape.layer_linears[linear]) for linear in SITES[name]]
    return sum(spec_bytes(spec) for own in tensors for spec in own.values()), group.input_activations
