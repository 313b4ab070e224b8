"""What a run would do, hold and take, before it begins: `infoquant quantize --dry-run`.

Times come from counts of operations and this machine's own rates. Memory is what stages hold at
their fullest, in main memory; a GPU's is not accounted for.
"""

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from infoquant_vllm.format import SITES, ModelShape, TensorSpec
from offline.algorithms.gptq import FACTOR_BLOCK, ROWS_SEEN
from offline.memory import SELF_BATCH, distillation_bytes, parameters, sampling_bytes
from offline.model.hidden_states import TOKENS_PER_BATCH
from offline.model.scratch import goes_to_disk
from offline.model.source import Source
from offline.output.shards import plan_shards, spec_bytes
from offline.progress import held_bytes
from offline.rates import Rates, measure
from offline.recipe import Recipe

BOUND_FACTOR, BOUND_REST = 1.5, 2 * 2**30
"""Of a decoder layer and a batch of activations in float32, what a run should stay within."""
OF_A_PRODUCT = 1 / 6
"""Of K^3 multiply-adds in float64: what a Cholesky factor takes beside its diagonal blocks."""
OF_A_CALL = 2e-3
"""Seconds that a decoder layer takes for one token beside its products."""
MATRICES_OF_A_STEP = 15
"""Of hidden x hidden float32 that `learn_rotation` holds."""
ELEMENTWISE = {"attention": 8, "descent": 40, "distillation": 60}
"""Numbers read and written for each one that a step works on."""


class SitePlan(BaseModel):
    """Linears that share an input, in one layer; seconds are of rounding them."""

    model_config = ConfigDict(frozen=True)

    linears: list[str]
    rows: int
    columns: int
    source_bytes: int
    bytes: int
    hessian_bytes: int
    seconds: float


class StagePlan(BaseModel):
    """A stage of the whole run, and the most that is held while it runs."""

    model_config = ConfigDict(frozen=True)

    name: str
    seconds: float
    memory_bytes: int


class Plan(BaseModel):
    """All of it; every decoder layer has the same `sites`."""

    model_config = ConfigDict(frozen=True)

    layers: int
    layer_float32_bytes: int
    batch_bytes: int
    hidden_states_bytes: int
    hidden_states_on_disk: bool
    sites: dict[str, SitePlan]
    stages: list[StagePlan]
    shards: int
    disk_bytes: int
    seconds: float
    memory_bytes: int
    memory_bound_bytes: int


def make_plan(
    source: Source,
    recipe: Recipe,
    specs: Mapping[str, TensorSpec],
    calibration: str,
    shard_bytes: int,
    disk_bytes: int,
) -> Plan:
    """The plan of a run that writes `disk_bytes`; measures this machine, which takes some seconds."""
    account = _Account(source, recipe, specs, measure(source.shape.intermediate_size))
    stages = account.stages(calibration)
    return Plan(
        layers=account.layers,
        layer_float32_bytes=4 * account.weights,
        batch_bytes=account.batch,
        hidden_states_bytes=account.hidden,
        hidden_states_on_disk=goes_to_disk(account.hidden),
        sites=account.sites,
        stages=stages,
        shards=len(plan_shards(specs, shard_bytes)),
        disk_bytes=disk_bytes,
        seconds=sum(stage.seconds for stage in stages),
        memory_bytes=max(stage.memory_bytes for stage in stages),
        memory_bound_bytes=int(BOUND_FACTOR * (4 * account.weights + account.batch)) + BOUND_REST,
    )


class _Account:
    """The numbers that stages are made of."""

    def __init__(self, source: Source, recipe: Recipe, specs: Mapping[str, TensorSpec], rates: Rates):
        self.source, self.recipe, self.shape, self._rates = source, recipe, source.shape, rates
        self.layers, self._specs = source.shape.num_hidden_layers, specs
        size, first = recipe.calibration, "model.layers.0."
        self._tokens = size.sequences * size.sequence_length if recipe.needs_calibration else 0
        linears = {n.removeprefix(first): s for n, s in self.shape.linears().items() if n.startswith(first)}
        self.weights = sum(map(math.prod, linears.values()))
        self.batch = batch_bytes(self.shape, min(self._tokens, max(TOKENS_PER_BATCH, size.sequence_length)))
        self.hidden = 4 * self._tokens * self.shape.hidden_size if recipe.rounding == "gptq" else 0
        self._resident = held_bytes() + (0 if goes_to_disk(self.hidden) else self.hidden)
        self.sites = {name: self._site(name, [linears[linear] for linear in names]) for name, names in SITES.items()}

    def _site(self, name: str, sizes: list[tuple[int, int]]) -> SitePlan:
        rows, columns = sum(size[0] for size in sizes), sizes[0][1]
        names = [f"model.layers.0.{linear}." for linear in SITES[name]]
        own = [spec for key, spec in self._specs.items() if key.startswith(tuple(names))]
        return SitePlan(
            linears=list(SITES[name]),
            rows=rows,
            columns=columns,
            source_bytes=2 * rows * columns,
            bytes=sum(map(spec_bytes, own)),
            hessian_bytes=4 * columns**2 if self.recipe.rounding == "gptq" else 0,
            seconds=self._rounding(name, rows, columns),
        )

    def _rounding(self, name: str, n: int, k: int) -> float:
        rates, passes = self._rates, self.recipe.gptq.refinements
        seconds = n * k * (rates.search + 20 * rates.element)
        online = self.recipe.input_transform(name, self.shape).type
        if online == "hadamard":
            seconds += n * k * rates.hadamard
        if self.recipe.rounding != "gptq":
            return seconds
        block = min(k, FACTOR_BLOCK)
        seconds += rates.factor * k * block**2 + rates.float64 * OF_A_PRODUCT * (k**3 - k * block**2)
        seconds += n * k * rates.row + n * k**2 / 2 * rates.float32
        seconds += min(n, len(SITES[name]) * ROWS_SEEN) * k**2 * rates.float32  # the errors
        seconds += passes * (n * k * rates.row + 3 * n * k**2 * rates.float32)
        if online == "hadamard":
            seconds += 2 * k**2 * rates.hadamard
        if online == "blocks":
            seconds += 2 * k**3 / self.recipe.psot_layer.blocks * rates.float64
        return seconds

    def stages(self, calibration: str) -> list[StagePlan]:
        """In the order of the run."""
        found = []
        if self._tokens and calibration == "self":
            found.append(self._stage("calibration text", self._sampling(), held_bytes() + self._sampling_bytes()))
        if self.recipe.transform.startswith("psot"):
            found.append(self._rotation())
        found.append(self._stage("vocabulary and ends", *self._ends()))
        if self.recipe.rounding == "gptq":
            seconds = self.layers * self._advance(self._tokens)
            hessians = sum(site.hessian_bytes for site in self.sites.values())
            found.append(self._stage("activations", seconds, self._resident + 4 * self.weights + hessians + self.batch))
        seconds = self.layers * (self._fold() + sum(site.seconds for site in self.sites.values()))
        found.append(self._stage("weights", seconds, self._resident + self._rounding_bytes()))
        if self.recipe.learned_clips is not None:
            clips, length = self.recipe.learned_clips, self.recipe.calibration.sequence_length
            trained = clips.epochs * clips.sequences * length
            seconds = self.layers * (3 * self._forward(trained) + self._elementwise("distillation", trained))
            held = 4 * length * clips.batch_sequences * (self.shape.hidden_size + self.shape.intermediate_size) * 20
            found.append(self._stage("clips", seconds, self._resident + 8 * self.weights + held))
        if self.recipe.distillation is not None:
            needed = distillation_bytes(self.source, self.recipe)
            found.append(self._stage("distillation", self._distillation(), self._resident + needed))
        return found

    def _stage(self, name: str, seconds: float, memory: int) -> StagePlan:
        return StagePlan(name=name, seconds=round(seconds, 2), memory_bytes=memory)

    def _forward(self, tokens: int) -> float:
        """Seconds of one layer."""
        length = self.recipe.calibration.sequence_length
        products = tokens * (self.weights + length * self.shape.num_attention_heads * self.shape.head_dim)
        return products * self._rates.float32 + self._elementwise("attention", tokens)

    def _elementwise(self, kind: str, tokens: int) -> float:
        width = 4 * self.shape.hidden_size + 2 * self.shape.intermediate_size
        return ELEMENTWISE[kind] * tokens * width * self._rates.element

    def _advance(self, tokens: int) -> float:
        products = sum(site.columns**2 / 2 for site in self.sites.values()) * tokens
        return self._forward(tokens) + products * self._rates.float32

    def _fold(self) -> float:
        turned = self.recipe.transform in ("hadamard", "psot-shared")
        products = self.weights * self.shape.hidden_size * self._rates.float64 if turned else 0.0
        return products + 8 * self.weights * self._rates.element

    def _sampling(self) -> float:
        """Token after token every weight is read, however few sequences there are."""
        size, rates = self.recipe.calibration, self._rates
        steps, rows = size.sequence_length * -(-size.sequences // SELF_BATCH), min(SELF_BATCH, size.sequences)
        step = parameters(self.source) * max(rows * rates.few, rates.element) + self.layers * OF_A_CALL
        return steps * step + self._tokens * 8 * self.shape.vocab_size * rates.element

    def _sampling_bytes(self) -> int:
        return sampling_bytes(self.source, self.recipe.calibration)

    def _rotation(self) -> StagePlan:
        shape, rates, hidden = self.shape, self._rates, self.shape.hidden_size
        layer = 4 * self.weights + self.batch
        if self.recipe.transform == "psot-shared":
            pool = 4 * self.recipe.psot.pool_tokens * hidden
            seen = min(self._tokens, 4 * max(1, self.recipe.psot.pool_tokens // (2 * self.layers)))
            seconds = self.layers * (self._forward(seen) + self._fold_plainly())
            seconds += self.recipe.psot.steps * (
                rates.turn * hidden**3 + 6 * self.recipe.psot.batch_tokens * hidden**2 * rates.float32
            )
            steps = MATRICES_OF_A_STEP * 4 * hidden**2
            in_memory = 0 if goes_to_disk(pool) else pool
            return self._stage("rotation", seconds, self._resident + in_memory + max(layer, steps))
        args, width = self.recipe.psot_layer, shape.num_key_value_heads * shape.head_dim
        size, features = hidden // args.blocks, 3 * hidden + width
        step = 3 * 2 * hidden * size * rates.float32 + ELEMENTWISE["descent"] * features * rates.element
        turns = -(-self.recipe.calibration.sequences // args.batch_sequences) * args.epochs
        descent = turns * 2 * args.blocks * 14 * size**3 * rates.float32
        seconds = self.layers * (self._forward(self._tokens) + args.epochs * self._tokens * step + descent)
        seen = 4 * self._tokens * features
        return self._stage("rotation", seconds, self._resident + layer + (0 if goes_to_disk(seen) else seen))

    def _fold_plainly(self) -> float:
        return 4 * self.weights * self._rates.element

    def _ends(self) -> tuple[float, int]:
        shape = self.shape
        rows = shape.vocab_size * shape.hidden_size
        turned = self.recipe.transform in ("hadamard", "psot-shared") and not shape.tie_word_embeddings
        products = 2 * rows * shape.hidden_size * self._rates.float64 if turned else 0.0
        return products + 8 * rows * self._rates.element, self._resident + 4 * rows + 16 * shape.hidden_size**2

    def _rounding_bytes(self) -> int:
        """The fullest moment of a layer: Hessian, half of its factor in float64, two copies of the site's weights."""
        most, left = 0, list(self.sites.values())
        while left:
            site = left[0]
            later = sum(4 * other.rows * other.columns + other.hessian_bytes for other in left[1:])
            factor = site.hessian_bytes + site.hessian_bytes * min(FACTOR_BLOCK, site.columns) // site.columns
            most = max(most, later + site.hessian_bytes + factor + 2 * 4 * site.rows * site.columns)
            left = left[1:]
        return most

    def _distillation(self) -> float:
        args, length = self.recipe.distillation, self.recipe.calibration.sequence_length
        assert args is not None  # it is asked for where there is one
        trained = args.steps * args.batch_sequences * length
        vocabulary = self.shape.vocab_size * self.shape.hidden_size * self._rates.float32
        layers = self.layers * (self._forward(self._tokens) + 3 * self._forward(trained))
        return layers + self.layers * self._elementwise("distillation", trained) + 3 * trained * vocabulary


def batch_bytes(shape: ModelShape, tokens: int) -> int:
    """Activations of a decoder layer in float32: the inputs and outputs of its linears."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    outputs = queries + 2 * keys + 2 * shape.hidden_size + 2 * shape.intermediate_size
    inputs = shape.hidden_size + queries + shape.intermediate_size
    return 4 * tokens * (outputs + inputs)
