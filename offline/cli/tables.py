"""Print results as tables on standard output."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from offline.evaluate.inspect import Inspection, scheme_words
from offline.evaluate.metrics import Evaluation, Figure
from offline.evaluate.page.summary import Summary
from offline.evaluate.saved_scores import score_table
from offline.evaluate.tasks import TaskEvaluation
from offline.evaluate.verify import Verification
from offline.memory import Plan
from offline.output.report import BudgetReport, Report


def print_report(report: Report, output: Path) -> None:
    """Print what `quantize` wrote, or in a dry run would write."""
    table = _sizes_table(
        "would be written" if report.dry_run else str(output),
        {
            "linear layers": (report.linear_bytes, report.source_linear_bytes),
            "whole checkpoint": (report.total_bytes, report.source_bytes),
            "KV cache per token": (report.kv_bytes_per_token, report.source_kv_bytes_per_token),
        },
    )
    console = Console()
    console.print(table)
    console.print(f"recipe {report.recipe}, {report.bits_per_weight:.2f} bits per weight, seed {report.seed}")
    if report.budget is not None:
        _print_budget(console, report.budget)
    if report.plan is not None:
        _print_plan(console, report.plan)
    dealt = [count for counts in report.expert_tokens.values() for count in counts if count[1]]
    if dealt:
        experts = sum(map(len, report.expert_tokens.values()))
        console.print(
            f"{len(dealt)} of {experts} experts saw little of the calibration text, the fewest {min(dealt)[0]} tokens, "
            "and were calibrated on tokens of other experts too"
        )
    if not report.dry_run:
        console.print(f"{report.calibration_tokens} calibration tokens, {sum(report.seconds.values()):.0f} s")


def _print_budget(console: Console, budget: BudgetReport) -> None:
    """Print how many layers have each format, and the predicted KL."""
    table = Table("site", "weights", "inputs", "layers", title=f"chosen for {budget.goal}")
    for site, layers in budget.sites.items():
        for (weights, inputs), count in Counter((own.weights, own.inputs) for own in layers).items():
            table.add_row(site, weights, inputs, str(count))
    console.print(table)
    keys, values = budget.cache_bits
    console.print(
        f"predicted KL {budget.kl:.4g} nats per token at {budget.bits_per_weight:.3f} bits per weight; "
        f"{budget.base} {budget.base_kl:.4g} at {budget.base_bits_per_weight:.3f}; lm_head {budget.lm_head_bits} bits, "
        f"keys {keys}, values {values}"
    )


def _print_plan(console: Console, plan: Plan) -> None:
    """Print the sizes of a layer, the memory of each stage, and the totals."""
    sites = Table("linears", "weights", "MB in bf16", "MB written", "Hessian, MB")
    sites.title = f"each of {plan.layers} decoder layers"
    sites.title += f", with {plan.experts} experts like the first" if plan.experts else ""
    for site in plan.sites.values():
        names = ", ".join(linear.rpartition(".")[2] for linear in site.linears)
        sizes = (f"{size / 1e6:,.1f}" for size in (site.source_bytes, site.bytes, site.hessian_bytes))
        sites.add_row(names, f"{site.rows} x {site.columns}", *sizes)
    console.print(sites)
    stages = Table("stage", "peak memory, GB", title="the whole run")
    for stage in plan.stages:
        stages.add_row(stage.name, f"{stage.memory_bytes / 1e9:.2f}")
    stages.add_row("peak", f"{plan.memory_bytes / 1e9:.2f}", style="bold")
    console.print(stages)
    if plan.bits_per_weight is not None:
        least, most = plan.bits_per_weight
        console.print(
            f"sizes are those of the base; a budget chooses {least:.3f} to {most:.3f} bits per weight, by measured KL"
        )
    where = "on disk" if plan.hidden_states_on_disk else "in memory"
    console.print(
        f"one layer in float32: {plan.layer_float32_bytes / 1e9:.2f} GB; one batch of activations: "
        f"{plan.batch_bytes / 1e9:.2f} GB; hidden states of all calibration text: "
        f"{plan.hidden_states_bytes / 1e9:.2f} GB, {where}; bound, 1.5 x (layer + batch) + 2 GiB: "
        f"{plan.memory_bound_bytes / 1e9:.2f} GB; written: {plan.disk_bytes / 1e9:.2f} GB in {plan.shards} shards"
    )


def print_verification(found: Verification, console: Console | None = None) -> None:
    """Print the checks, errors by layer, and the verdict."""
    console = Console() if console is None else console
    table = Table("check", "", "found", title=found.checkpoint)
    for check in found.checks:
        table.add_row(check.name, "[green]ok[/]" if check.passed else "[red]FAILED[/]", check.detail)
    console.print(table)
    columns = {
        "hidden states' relative error": (found.layer_errors, ".3f"),
        "experts chosen alike": (found.routing_agreement, ".1%"),
        "output energy lost by rounding": (found.rounding_errors, ".2%"),
        "|Q^T Q - I|": (found.orthogonality_errors, ".1e"),
    }
    shown = {title: column for title, column in columns.items() if column[0]}
    if shown:
        layers = Table("after", *shown, title="layer by layer")
        names = dict.fromkeys(name for errors, _ in shown.values() for name in errors)
        for name in names:
            layers.add_row(name, *(format(e[name], form) if name in e else "" for e, form in shown.values()))
        console.print(layers)
    console.print("[green]passed[/]" if found.passed else "[bold red]failed[/]")


def print_inspection(found: Inspection) -> None:
    """Print model, schemes, sizes, recipe and figures."""
    console, shape = Console(), found.shape
    console.print(
        f"{found.checkpoint}: {shape.architecture}, {shape.num_hidden_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads, {shape.num_key_value_heads} KV heads of size {shape.head_dim}, "
        f"format version {found.format_version}",
        soft_wrap=True,
    )
    schemes = Table("linear", "weights", "input", "input transform", title="schemes")
    for name, scheme in found.schemes.items():
        schemes.add_row(name, *scheme_words(scheme))
    console.print(schemes)
    cache = found.kv_cache
    rotation = "online" if found.rotated_residual else "none, or folded into the weights"
    stored = "unquantized"
    if cache is not None:
        stored = f"keys {cache.key_bits} bits (transform: {cache.key_transform}), values {cache.value_bits} bits"
    lm_head = "unquantized" if found.lm_head_bits is None else f"{found.lm_head_bits} bits"
    console.print(f"KV cache: {stored}; R1: {rotation}; lm_head: {lm_head}")
    sizes = {part: (size.bytes, size.bf16_bytes) for part, size in found.sizes.items()}
    sizes["KV cache per token"] = (found.kv_bytes_per_token, found.kv_bf16_bytes_per_token)
    console.print(_sizes_table("sizes", sizes))
    console.print(f"{found.bits_per_weight:.2f} bits per weight of the linear layers")
    if found.recipe is not None:
        console.print(f"recipe: {found.recipe.get('name')}", markup=False)
    for name, value in (found.report or {}).items():
        if isinstance(value, str | int | float):
            console.print(f"{name}: {value}", markup=False, highlight=False)


def print_evaluation(found: Evaluation) -> None:
    """Print figures with their standard errors, and the text that was read."""
    console = Console()
    table = Table("figure", "mean", "standard error", title=f"{found.model}{' (simulated)' if found.simulated else ''}")
    rows = {
        "perplexity": found.perplexity,
        "perplexity of the reference": found.reference_perplexity,
        "KL(reference || model), nats per token": found.kl,
        "top-1 agreement": found.top1_agreement,
        "experts chosen alike": found.routing_agreement,
    }
    for name, figure in rows.items():
        if figure is not None:
            table.add_row(name, f"{figure.mean:.4g}", _error(figure))
    console.print(table)
    console.print(f"text: {found.text}; {found.windows} windows of {found.window} tokens", markup=False)


def print_tasks(found: list[TaskEvaluation]) -> None:
    """Print the scores of models on tasks: a row per task and metric, a column per model."""
    heads, rows = score_table(found)
    table = Table(*heads, title="tasks of lm-eval; ± is one standard error")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_page(found: Summary) -> None:
    """Print where the page is, and the worst errors on it."""
    console = Console()
    for what, worst in (("quantized input", found.worst_input), ("rounded weight", found.worst_weight)):
        if worst is not None:
            console.print(f"worst {what}: layer {worst.layer}, {worst.place}, error {worst.error:.2%} of its energy")
    if found.before is None:
        console.print("the page lacks figures before quantizing; add --source SOURCE")
    console.print(found.page, markup=False, highlight=False, soft_wrap=True)


def _error(figure: Figure) -> str:
    return "unknown (one window)" if figure.standard_error is None else f"{figure.standard_error:.2g}"


def _sizes_table(title: str, sizes: dict[str, tuple[int, int]]) -> Table:
    table = Table("", "bytes", "unquantized", "ratio", title=title)
    for name, (ours, theirs) in sizes.items():
        table.add_row(name, f"{ours:,}", f"{theirs:,}", f"{ours / theirs:.3f}" if theirs else "-")
    return table
