"""Integer programming finds what trying everything finds, and keeps limits exactly."""

from itertools import product

import pytest
import torch

from offline.algorithms.choose import Limit, choose


def drawn(seed: int, groups: int, options: int) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """Costs, bytes and bits of options, the more of both the cheaper."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 10**9, (groups, options), generator=generator).sort(1).values
    costs = 1e-3 * torch.rand(groups, options, generator=generator).sort(1, descending=True).values
    bits = torch.randint(4, 9, (groups, options), generator=generator)
    return costs.tolist(), sizes.tolist(), bits.tolist()


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    costs, sizes, bits = drawn(seed, 5, 4)
    everything = list(product(range(4), repeat=5))
    total = sorted(sum(own[i] for own, i in zip(sizes, chosen, strict=True)) for chosen in everything)
    most, speed = total[len(total) // 4], 30  # the first to the byte
    limits = [Limit(sizes, most), Limit(bits, speed)]
    allowed = [chosen for chosen in everything if all(limit.used(chosen) <= limit.most for limit in limits)]
    best = min((Limit(costs, 0).used(chosen) for chosen in allowed), default=None)
    found = choose(costs, limits)
    assert (found is None) == (best is None)
    if found is None:
        return
    assert tuple(found) in allowed
    assert Limit(costs, 0).used(found) == pytest.approx(best, rel=1e-4)


def test_a_limit_that_one_choice_fills_to_the_byte_is_kept_and_one_byte_less_refuses_it() -> None:
    costs, sizes, _ = drawn(0, 30, 4)
    all_first = [0] * 30
    least = Limit(sizes, 0).used(all_first)
    assert choose(costs, [Limit(sizes, least)]) == all_first
    assert choose(costs, [Limit(sizes, least - 1)]) is None


def test_groups_may_have_other_numbers_of_options() -> None:
    assert choose([[3.0, 1.0, 2.0], [5.0]], [Limit([[0, 9, 1], [1]], 5)]) == [2, 0]


def test_without_limits_each_group_has_its_cheapest_option() -> None:
    costs, _, _ = drawn(1, 50, 5)
    assert choose(costs, []) == [min(range(5), key=own.__getitem__) for own in costs]


def test_nothing_is_written_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        costs, sizes, bits = drawn(seed, 200, 4)
        most = sum(own[1] for own in sizes)
        assert choose(costs, [Limit(sizes, most), Limit(bits, 1150)]) is not None
    assert capfd.readouterr().out == ""
