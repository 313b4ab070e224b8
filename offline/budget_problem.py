"""The choice of number formats under a budget as an integer program.

The sum of what each site's format costs alone is minimized, in KL (`stages/sensitivity.py`), as HAWQ-V3 minimizes the
sum of a second-order measure of layers (Yao et al., arXiv 2011.10680). The speed class of the base recipe stays: the
mean bits of inputs, weighted by multiplications, are at most the base's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from infoquant_vllm.format import WeightArgs
from offline.algorithms.choose import Amounts, Limit, choose
from offline.choices import SiteChoices, site_choices
from offline.errors import ToolError
from offline.formats import LayerSites, Site, SiteActivations, SiteName
from offline.goal import RESERVE, Budget
from offline.model.source import Source
from offline.output.adapter_basis import basis_bytes
from offline.output.report import BudgetReport, ChosenSite, checkpoint_sizes, kv_bytes_per_token
from offline.output.shards import checkpoint_specs
from offline.recipe import KVCache, Recipe
from offline.stages.sensitivity import CACHE_BITS, Sensitivity

CURVE_POINTS = 12

Choice = list[int]
"""By group: weights and inputs of each site of each layer in turn, lm_head, the cache. 0 is the base's format."""


@dataclass
class _Group:
    """Options of one decision, the base's first: the bytes that each adds to those of the base, and bits of inputs."""

    linear_bytes: list[int]
    total_bytes: list[int]
    input_bits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.input_bits = self.input_bits or [0] * len(self.total_bytes)


class Problem:
    """The options of a model under a budget.

    lm_head and the cache are the base's where the budget does not count them: bits per weight are those of linears, and
    only a budget of memory has a number of tokens.
    """

    def __init__(self, source: Source, base: Recipe, budget: Budget):
        self._source, self._base, self._budget = source, base, budget
        self.choices: Mapping[SiteName, SiteChoices] = site_choices(base, source.shape)
        self._places = [(site, layer) for layer in range(source.shape.num_hidden_layers) for site in self.choices]
        self._sizes = _sizes(source, base)
        self._weights = sum(self.choices[site].weights_count for site, _ in self._places)
        self._heads, self._caches = [base.lm_head_bits], [base.kv_cache]
        if base.lm_head_bits is None and budget.target_bits is None and source.shape.quantizes_lm_head:
            self._heads.append(8)
        if base.kv_cache is not None and budget.fit is not None:
            pairs = ({"key_bits": keys, "value_bits": values} for keys, values in CACHE_BITS)
            others = (base.kv_cache.model_copy(update=pair) for pair in pairs)
            self._caches += [cache for cache in others if cache != base.kv_cache]
        self._groups = self._options()

    def solve(self, found: Sensitivity) -> Choice:
        """Return the choice with the least KL, or the fewest bytes, within the budget; raises ToolError for none."""
        costs, budget = self._costs(found), self._budget
        if budget.max_kl is not None:
            chosen = choose(self._bytes(), [self._speed(), Limit(costs, budget.max_kl)])
            if chosen is None:
                least = choose(costs, [self._speed()])
                assert least is not None  # the base's formats
                raise ToolError(
                    f"--max-kl {budget.max_kl:g}: the least KL that formats of this speed class reach is "
                    f"{_sum(costs, least):.4g}; allow more, or choose a preset with inputs of more bits"
                )
            return chosen
        chosen = choose(costs, [self._speed(), self._room()])
        if chosen is None:
            raise self._too_little()
        return chosen

    def check(self) -> tuple[float, float]:
        """Return the least and the most bits per weight of all choices; raises ToolError where not even they fit.

        Reads no tensor.
        """
        if self._budget.max_kl is None and choose(self._bytes(), [self._speed(), self._room()]) is None:
            raise self._too_little()
        return self._bits(self._least()), self._bits(self._most())

    def recipe(self, chosen: Choice) -> Recipe:
        """Return the base recipe with chosen formats."""
        sites: dict[tuple[SiteName, str], tuple[Site, list[int]]] = {}
        for place, (site, layer) in enumerate(self._places):
            own = self.choices[site].with_formats(*chosen[2 * place : 2 * place + 2])
            if own != self.choices[site].site:
                sites.setdefault((site, own.model_dump_json()), (own, []))[1].append(layer)
        parts = [LayerSites(layers=layers, sites={site: own}) for (site, _), (own, layers) in sites.items()]
        head, cache = self._heads[chosen[-2]], self._caches[chosen[-1]]
        update = {"name": f"{self._base.name}-budget", "layers": parts, "lm_head_bits": head, "kv_cache": cache}
        return self._base.model_copy(update=update)

    def report(self, chosen: Choice, found: Sensitivity) -> BudgetReport:
        """Describe a choice, and the best choices at other sizes."""
        costs = self._costs(found)
        base = [0] * len(self._groups)
        sites: dict[SiteName, list[ChosenSite]] = {site: [] for site in self.choices}
        for place, (site, _) in enumerate(self._places):
            weights, inputs = chosen[2 * place : 2 * place + 2]
            sites[site].append(
                ChosenSite(
                    weights=words(self.choices[site].weights[weights]),
                    inputs=words(self.choices[site].inputs[inputs]),
                    kl=costs[2 * place][weights] + costs[2 * place + 1][inputs],
                )
            )
        cache = self._caches[chosen[-1]]
        return BudgetReport(
            base=self._base.name,
            goal=self._budget.goal,
            kl=_sum(costs, chosen),
            base_kl=_sum(costs, base),
            bits_per_weight=self._bits(chosen),
            base_bits_per_weight=self._bits(base),
            lm_head_bits=self._heads[chosen[-2]] or 16,
            cache_bits=(16, 16) if cache is None else (cache.key_bits, cache.value_bits),
            curve=self._curve(costs),
            uniform=self._uniform(costs),
            sites=sites,
        )

    def _options(self) -> list[_Group]:
        groups = []
        for site, _ in self._places:
            own = self.choices[site]
            weights = [size - own.weight_bytes[0] for size in own.weight_bytes]
            bits = [own.weights_count * args.num_bits for args in own.inputs]
            groups += [_Group(weights, weights), _Group(own.input_bytes, own.input_bytes, bits)]
        heads = [_sizes(self._source, self._base.model_copy(update={"lm_head_bits": bits})) for bits in self._heads]
        groups.append(_Group([0] * len(heads), [size["total_bytes"] - heads[0]["total_bytes"] for size in heads]))
        caches = [self._cache_bytes(cache) * (self._budget.context or 0) for cache in self._caches]
        groups.append(_Group([0] * len(caches), [size - caches[0] for size in caches]))
        return groups

    def _cache_bytes(self, cache: KVCache | None) -> int:
        config = self._base.model_copy(update={"kv_cache": cache}).quantization_config(self._source.shape)
        return kv_bytes_per_token(self._source.shape, config.kv_cache, self._source.unquantized_dtype.itemsize)

    def _costs(self, found: Sensitivity) -> list[list[float]]:
        """Return the KL of each option; those of linears are scaled so that the base's sum up to what was measured."""
        parts = (found.weights, found.inputs)
        alone = [part[site][layer] for site, layer in self._places for part in parts]
        total = sum(own[0] for own in alone)
        scale = found.linears / total if total > 0 else 1.0
        costs = [[scale * kl for kl in own] for own in alone]
        costs.append([0.0, found.lm_head][: len(self._heads)])
        pairs = [None if cache is None else f"{cache.key_bits},{cache.value_bits}" for cache in self._caches]
        return [*costs, [0.0 if pair is None else found.caches[pair] for pair in pairs]]

    def _speed(self) -> Limit:
        amounts = [group.input_bits for group in self._groups]
        return Limit(amounts, sum(own[0] for own in amounts))

    def _room(self) -> Limit:
        """Return the limit of a budget of bits or of memory."""
        if self._budget.target_bits is not None:
            return self._at_most(self._budget.target_bits)
        assert self._budget.fit is not None
        assert self._budget.context is not None
        base = self._sizes["total_bytes"] + self._cache_bytes(self._base.kv_cache) * self._budget.context
        return Limit(self._bytes(), (1 - RESERVE) * self._budget.fit - base)

    def _at_most(self, bits: float) -> Limit:
        amounts = [group.linear_bytes for group in self._groups]
        return Limit(amounts, bits * self._weights / 8 - self._sizes["linear_bytes"])

    def _bytes(self) -> Amounts:
        return [group.total_bytes for group in self._groups]

    def _bits(self, chosen: Choice) -> float:
        added = sum(group.linear_bytes[index] for group, index in zip(self._groups, chosen, strict=True))
        return 8 * (self._sizes["linear_bytes"] + added) / self._weights

    def _least(self) -> Choice:
        chosen = choose(self._bytes(), [self._speed()])
        assert chosen is not None  # the base's formats
        return chosen

    def _most(self) -> Choice:
        chosen = choose([[-size for size in own] for own in self._bytes()], [self._speed()])
        assert chosen is not None
        return chosen

    def _too_little(self) -> ToolError:
        least = self._least()
        if self._budget.target_bits is not None:
            return ToolError(
                f"--target-bits {self._budget.target_bits:g}: the least that these formats reach is "
                f"{self._bits(least):.4f} bits per weight, with multipliers, zero-points and scales"
            )
        assert self._budget.fit is not None
        need = self._budget.fit + (self._room().used(least) - self._room().most) / (1 - RESERVE)
        return ToolError(
            f"--fit {self._budget.fit / 1e9:g} GB: weights and a cache of {self._budget.context} tokens need "
            f"{need / 1e9:.3g} GB at least, of which {RESERVE:.0%} stay free; ask for less context"
        )

    def _curve(self, costs: Amounts) -> list[tuple[float, float]]:
        """Return the best choices from the fewest to the most bits: bits per weight and KL."""
        least, most = self._bits(self._least()), self._bits(self._most())
        found = []
        for point in range(CURVE_POINTS + 1):
            share = (point / CURVE_POINTS) ** 2  # most is gained near the least
            limit = self._at_most(least + share * (most - least) + 1e-9)
            fixed = [own if index < 2 * len(self._places) else own[:1] for index, own in enumerate(costs)]
            chosen = choose(fixed, [_cut(self._speed(), fixed), _cut(limit, fixed)])
            if chosen is not None:
                found.append((self._bits(chosen), _sum(costs, chosen)))
        return found

    def _uniform(self, costs: Amounts) -> dict[str, tuple[float, float]]:
        """Return bits per weight and KL with one format of weights everywhere, and inputs as the base has them."""
        found = {}
        shared: list[WeightArgs] = []
        for args in (args for own in self.choices.values() for args in own.weights):
            if args not in shared and all(args in own.weights for own in self.choices.values()):
                shared.append(args)
        for args in shared:
            chosen = [0] * len(self._groups)
            for place, (site, _) in enumerate(self._places):
                chosen[2 * place] = self.choices[site].weights.index(args)
            found[words(args)] = self._bits(chosen), _sum(costs, chosen)
        return found


def words(args: WeightArgs | SiteActivations) -> str:
    """Return a format in words."""
    groups = "" if args.group_size is None else f", groups of {args.group_size}"
    return f"{args.num_bits} bits{groups}"


def _sizes(source: Source, recipe: Recipe) -> dict[str, int]:
    """Return the sizes of a checkpoint without its basis of adapters, which no server holds."""
    config = recipe.quantization_config(source.shape)
    sizes = checkpoint_sizes(source, recipe, checkpoint_specs(source, config))
    return sizes | {"total_bytes": sizes["total_bytes"] - basis_bytes(recipe, source.shape)}


def _sum(costs: Amounts, chosen: Choice) -> float:
    return Limit(costs, 0).used(chosen)


def _cut(limit: Limit, options: Amounts) -> Limit:
    """Leave out the amounts of options that are left out."""
    return Limit([own[: len(kept)] for own, kept in zip(limit.amounts, options, strict=True)], limit.most)
