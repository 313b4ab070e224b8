"""Functions of tensors on the CPU, run on another device."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def moved(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` for arguments on the CPU: it is given copies on `device`, and what it writes to is copied back.

    Whole storages are copied, each once, so that strides, offsets and aliases stay what they are.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type != "cpu":
                return tensor
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in copies:
                copy = torch.UntypedStorage(storage.nbytes(), device=device)
                copies[storage.data_ptr()] = storage, copy.copy_(storage)
            copy = copies[storage.data_ptr()][1]
            empty = torch.tensor([], dtype=tensor.dtype, device=device)
            return empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

        result = function(*_mapped(args, move), **{name: _mapped(value, move) for name, value in kwargs.items()})
        result = _mapped(result, lambda tensor: tensor.to("cpu", copy=True))
        for storage, copy in copies.values():
            storage.copy_(copy)
        return result

    return call


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same value with every tensor changed; tuples that have names keep them."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(each, change) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, change) for each in value)
    return value
