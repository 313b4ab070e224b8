"""The built-in recipes by name."""

from infoquant_vllm.format import WeightArgs
from offline.errors import ToolError
from offline.formats import Site, SiteActivations, Sites
from offline.recipe import CalibrationSize, Distillation, Gptq, KVCache, LearnedClips, Psot, Recipe

WEIGHTS = WeightArgs(num_bits=4, symmetric=False, strategy="group", group_size=64)
"""Weights of the distilled presets: a fifth less KL than one symmetric scale per row, for 0.25 bits per weight more."""

FOUR = Site(weights=WEIGHTS, input_activations=SiteActivations(strategy="group", group_size=32), clip_ratio="search")
EIGHT = Site(weights=WEIGHTS, input_activations=SiteActivations(num_bits=8), clip_ratio="search")
BY_TOKEN = Site(clip_ratio="search")
BY_HEAD = Site(input_activations=SiteActivations(strategy="head"), clip_ratio="search")
CENTERED = Site(input_activations=SiteActivations(mean=True), clip_ratio="search")
COMPENSATED_KEYS = KVCache(key_mean_positions=32_768, key_feedback=True)
SIXTEEN = Site(weights=WEIGHTS, input_activations=SiteActivations(num_bits=16))


def _distilled(name: str, sites: Sites) -> Recipe:
    """Return the recipe of `best` with the number formats of `sites`."""
    return Recipe(
        name=name,
        transform="psot-shared",
        equalize=True,
        rounding="gptq",
        gptq=Gptq(refinements=2, guided=True),
        sites=sites,
        kv_cache=COMPENSATED_KEYS,
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
        Recipe(
            name="fast",
            transform="psot-shared",
            equalize=True,
            rounding="gptq",
            gptq=Gptq(sink_weight=16),
            sites=Sites(qkv=CENTERED, o=BY_HEAD, gate_up=CENTERED, down=BY_TOKEN),
            kv_cache=COMPENSATED_KEYS,
        ),
        _distilled("best", Sites(qkv=FOUR, o=FOUR, gate_up=FOUR, down=FOUR)),
        _distilled("balanced", Sites(qkv=FOUR, o=FOUR, gate_up=FOUR, down=EIGHT)),
        _distilled("w4a8kv4", Sites(qkv=EIGHT, o=EIGHT, gate_up=EIGHT, down=EIGHT)),
        _distilled("w4a16kv4", Sites(qkv=SIXTEEN, o=SIXTEEN, gate_up=SIXTEEN, down=SIXTEEN)),
        Recipe(
            name="kv4",
            transform="heads",
            rounding="none",
            kv_cache=COMPENSATED_KEYS,
            calibration=CalibrationSize(sequences=4),
        ),
    )
}
"""`rtn`, `quarot`, `paper` and `fast` can be compared: they have the same bits, groups and calibration text."""


def preset_named(name: str) -> Recipe:
    """Return a preset by name; raises ToolError listing the known ones."""
    if name not in PRESETS:
        raise ToolError(f"no preset is named {name!r}; choose one of {', '.join(PRESETS)}, or write a recipe file")
    return PRESETS[name]
