"""Presets that are compared with each other differ in method alone."""

import pytest

from infoquant_vllm.format import SITES
from offline.presets import PRESETS


@pytest.mark.parametrize("preset", ["quarot", "paper", "fast"])
def test_presets_that_are_compared_have_the_formats_of_rtn(preset: str) -> None:
    ours, theirs = PRESETS[preset], PRESETS["rtn"]
    for site in SITES:
        assert ours.site(site, 0).weights == theirs.site(site, 0).weights
        activations = ours.site(site, 0).input_activations.model_copy(update={"mean": False})
        assert activations == theirs.site(site, 0).input_activations
    assert ours.calibration == theirs.calibration
    assert ours.kv_cache is not None
    assert (ours.kv_cache.key_bits, ours.kv_cache.value_bits) == (4, 4)
