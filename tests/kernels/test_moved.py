"""What runs the kernels' tests on a GPU, with other memory of the CPU in a GPU's place."""

from typing import Any

import pytest
import torch

from infoquant_vllm.kernels.operands import InputQuant
from infoquant_vllm.kernels.triton.rotate_quantize import Codes
from tests.common.moved import moved


def test_strides_offsets_and_aliases_are_kept_and_what_is_written_comes_back() -> None:
    whole = torch.arange(24.0).view(4, 6)
    columns, row = whole[:, 1:3].t(), whole[2]

    def launcher(columns: torch.Tensor, rows: list[torch.Tensor], *, factor: float) -> torch.Tensor:
        assert columns.data_ptr() != whole[:, 1:].data_ptr()
        assert (columns.stride(), columns.storage_offset()) == ((1, 6), 1)
        assert columns.untyped_storage().data_ptr() == rows[0].untyped_storage().data_ptr()
        columns[0] = factor
        rows[0][5] = -1.0
        return rows[0]

    found = moved(launcher, "cpu")(columns, [row], factor=7.0)
    assert (whole[:, 1] == 7).all()
    assert whole[2].tolist() == found.tolist() == [12, 7, 14, 15, 16, -1]


def test_tuples_with_names_come_and_go_and_other_values_are_left_alone() -> None:
    codes = Codes.empty(2, InputQuant([], 0, None, 4, symmetric=True), 4, False, torch.device("cpu"))

    def launcher(given: Codes, nothing: None, sizes: tuple[int, int]) -> tuple[Any, ...]:
        assert given.values.data_ptr() != codes.values.data_ptr()
        return given._replace(values=given.values.fill_(3)), nothing, sizes

    found, nothing, sizes = moved(launcher, "cpu")(codes, None, (4, 4))
    assert isinstance(found, Codes)
    assert found.zp_offset is None
    assert (nothing, sizes) == (None, (4, 4))
    assert (codes.values == 3).all()
    assert (found.values == 3).all()


def test_tensors_that_are_on_a_device_stay_there_and_errors_come_through() -> None:
    there = torch.empty(3, device="meta")
    assert moved(lambda tensor: (tensor is there,), "cpu")(there) == (True,)
    with pytest.raises(ZeroDivisionError):
        moved(lambda _: 1 / 0, "cpu")(torch.ones(2))
