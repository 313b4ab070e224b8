"""The recipes that have a name."""

from offline.errors import ToolError
from offline.recipe import (
    CalibrationSize,
    Distillation,
    LearnedClips,
    Psot,
    Recipe,
    Site,
    SiteActivations,
    Sites,
)

GROUPS = Site(input_activations=SiteActivations(strategy="group", group_size=64))
EIGHT = Site(input_activations=SiteActivations(num_bits=8), clip=1.0)
EIGHT_BY_HEAD = Site(input_activations=SiteActivations(num_bits=8, strategy="head"), clip=1.0)
SIXTEEN = Site(input_activations=SiteActivations(num_bits=16))


def _distilled(name: str, sites: Sites) -> Recipe:
    """What `best` does, with the codes of `sites`."""
    return Recipe(
        name=name,
        transform="psot-shared",
        balance=True,
        rounding="gptq",
        sites=sites,
        calibration=CalibrationSize(sequences=96),
        psot=Psot(steps=1000),
        distillation=Distillation(),
    )


PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="rtn", transform="none", rounding="rtn"),
        Recipe(name="quarot", transform="hadamard", rounding="gptq"),
        Recipe(name="paper", transform="psot-layer", rounding="gptq", learned_clips=LearnedClips()),
        Recipe(name="fast", transform="psot-shared", balance=True, rounding="gptq"),
        _distilled("best", Sites(qkv=GROUPS, gate_up=GROUPS, down=GROUPS)),
        _distilled("balanced", Sites(qkv=GROUPS, gate_up=GROUPS, down=EIGHT)),
        _distilled("w4a8kv4", Sites(qkv=EIGHT, o=EIGHT_BY_HEAD, gate_up=EIGHT, down=EIGHT)),
        _distilled("w4a16kv4", Sites(qkv=SIXTEEN, o=SIXTEEN, gate_up=SIXTEEN, down=SIXTEEN)),
    )
}
"""`rtn`, `quarot`, `paper` and `fast` are on equal terms: the same codes and calibration text."""


def preset_named(name: str) -> Recipe:
    """A preset by name; raises ToolError listing the known ones."""
    if name not in PRESETS:
        raise ToolError(f"no preset is named {name!r}; choose one of {', '.join(PRESETS)}, or write a recipe file")
    return PRESETS[name]
