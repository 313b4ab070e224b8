"""Learning rates warm up and fall as published."""

import pytest

from offline.algorithms.schedule import floored_warmup_cosine


def test_rate_warms_up_and_ends_at_a_thousandth() -> None:
    factors = [floored_warmup_cosine(step, 16, 160) for step in range(161)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[16] == pytest.approx(1.0, abs=0.03)
    assert factors[160] == pytest.approx(1e-3)
    assert factors[16:] == sorted(factors[16:], reverse=True)
