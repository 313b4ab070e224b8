"""Calibrate how keys are stored: the mean that is subtracted from them, and the feedback of their rounding errors."""

import torch

from infoquant_vllm.format import ModelShape
from offline.algorithms.key_feedback import feedback_matrix, log_spaced_positions, mean_rotated_moment
from offline.algorithms.key_mean import mean_rotated_key
from offline.model.hidden_states import HiddenStates
from offline.recipe import KVCache

ROWS_AT_A_TIME = 1024


class QueryMoments:
    """Second moments of the queries that read each KV head, before RoPE: sums [kv_heads, head_dim, head_dim]."""

    def __init__(self, shape: ModelShape):
        self._heads, self._tokens = shape.num_key_value_heads, 0
        self._sums = torch.zeros(shape.num_key_value_heads, shape.head_dim, shape.head_dim)

    def observe(self, x: torch.Tensor) -> None:
        """Add queries x [tokens, heads * head_dim] float32."""
        if not self._tokens:
            self._sums = self._sums.to(x.device)
        self._tokens += len(x)
        for rows in x.split(ROWS_AT_A_TIME):
            by_head = rows.view(len(rows), self._heads, -1, self._sums.shape[-1]).transpose(0, 1).flatten(1, 2)
            self._sums += by_head.mT @ by_head

    def scale(self, scale: torch.Tensor) -> None:
        """Multiply the queries by `scale` [kv_heads * head_dim], as those of each KV head were."""
        factor = scale.view(self._heads, -1)
        self._sums *= factor[:, :, None] * factor[:, None, :]

    def mean(self) -> torch.Tensor:
        """Return the second moments per token."""
        return self._sums / self._tokens


def calibrate_keys(
    args: KVCache, hidden: HiddenStates, mean: torch.Tensor, queries: QueryMoments, transformed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the mean key after RoPE [kv_heads, head_dim], and the feedback if there is one (see `KVCache`).

    Layers without RoPE have the same mean and moments at all positions.

    mean: of keys before RoPE, [kv_heads, head_dim]; transformed: keys go through R3
    """
    assert args.key_mean_positions is not None
    if not hidden.rotates_keys:
        return mean, feedback_matrix(queries.mean(), transformed) if args.key_feedback else None
    if not args.key_feedback:
        return mean_rotated_key(mean, *hidden.rotary(args.key_mean_positions)), None
    count = min(args.key_mean_positions, hidden.max_positions)
    where = log_spaced_positions(count)
    cos, sin = (part[:, where.to(part.device)] for part in hidden.rotary(count))
    moment = mean_rotated_moment(queries.mean(), cos[0], sin[0])
    return mean_rotated_key(mean, cos, sin), feedback_matrix(moment, transformed)
