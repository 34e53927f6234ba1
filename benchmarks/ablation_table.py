"""Does it hold? The rule, and the table beside the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from .ablation_variants import BASELINE, PAPER_TIE, VARIANTS, Variant, rate_change, variants_of
from .machine import sentence

Runs = Sequence[dict[str, Any]]  # one for each variant and seed: what `ablations.run` returns

# Two-sided 95 % points of Student's t by degrees of freedom (the last for more): few seeds make for wide limits.
STUDENT = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)

HEAD = ("ablation", "change", "FVD in the paper", "so it is", "distance here", "says", "v-loss here", "says", "steps/s")
UNTRAINED, REAL = "the baseline before training", "real training clips"  # the yardsticks of the distance


def change(ours: Sequence[float], baseline: Sequence[float]) -> str:
    """Where a distance went from the baseline's seeds to ours: "better" (lower), "worse", or "same" within the spread.

    The spread is Student's: 95 % of the difference of means, with the deviation over seeds pooled from both. "" if
    neither has two seeds, since then nothing is known of it.
    """
    freedom = len(ours) + len(baseline) - 2
    if freedom < 1:
        return ""
    squares = sum((value - fmean(values)) ** 2 for values in (ours, baseline) for value in values)
    error = math.sqrt(squares / freedom * (1 / len(ours) + 1 / len(baseline)))
    difference = fmean(ours) - fmean(baseline)
    if abs(difference) <= STUDENT[min(freedom, len(STUDENT) - 1)] * error:
        return "same"
    return "worse" if difference > 0 else "better"


def verdict(expected: str, found: str) -> str:
    """What our runs say of the paper's direction."""
    if not found:
        return "unknown: one seed"
    if found == expected:
        return "holds" if found != "same" else "holds: no difference"
    return "within the spread" if found == "same" else f"does not hold: {found}"


def variant_row(variant: Variant, runs: Runs) -> list[str]:
    """The cells of HEAD for one variant."""
    ours = [run for run in runs if run["variant"] == key(variant)]
    base = [run for run in runs if run["variant"] == key(BASELINE)]
    distances, losses, rates = ([what(run) for run in ours] for what in (total, loss, rate))
    if variant is BASELINE:
        return [variant.group, variant.name, "", "", spread(distances), "", spread(losses), "", f"{fmean(rates):.2f}"]
    paper = "not printed" if variant.paper is None else f"{variant.paper[0]} against {variant.paper[1]}"
    by_distance = verdict(variant.expected, change(distances, [total(run) for run in base]))
    by_loss = verdict(variant.expected, change(losses, [loss(run) for run in base]))
    speed = f"{fmean(rates):.2f}"
    if variant.paper_rate is not None:
        here = rate_change(fmean(rates) / fmean(rate(run) for run in base))
        said = "holds" if here == variant.expected_rate else f"does not hold: {here}"
        speed += f" (paper: {variant.paper_rate[0]} against {variant.paper_rate[1]}), {said}"
    measured = [spread(losses), by_loss] if variant.same_loss else ["of another quantity", ""]
    return [variant.group, variant.name, paper, variant.expected, spread(distances), by_distance, *measured, speed]


def key(variant: Variant) -> str:
    return f"{variant.group}: {variant.name}"


def total(run: dict[str, Any]) -> float:
    return float(run["frames"] + run["motion"])


def loss(run: dict[str, Any]) -> float:
    return float(run["loss"])


def rate(run: dict[str, Any]) -> float:
    return float(run["steps_per_second"])


def spread(values: Sequence[float]) -> str:
    """Mean, and deviation over seeds where there are two."""
    if len(values) < 2:
        return f"{fmean(values):.4g} (one seed)"
    return f"{fmean(values):.4g} +- {stdev(values):.2g} ({len(values)})"


def table(results: dict[str, Any]) -> str:
    """All of it as Markdown; variants without a run are left out, and said to be."""
    runs: Runs = results["runs"]
    done = {run["variant"] for run in runs}
    rows = [variant_row(variant, runs) for variant in VARIANTS if key(variant) in done]
    for name, value in results["yardsticks"].items():
        rows.append([name, "", "", "", f"{total(value):.4g}", "", "", "", ""])
    lines = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
    planned = variants_of(results["settings"]["groups"])
    return "\n".join([*lines, "", *notes(results, [variant for variant in planned if key(variant) not in done])])


def notes(results: dict[str, Any], missing: Sequence[Variant]) -> list[str]:
    settings, plan = results["settings"], results["plan"]
    base = [total(run) for run in results["runs"] if run["variant"] == key(BASELINE)]
    untrained, real = (total(results["yardsticks"][name]) for name in (UNTRAINED, REAL))
    learned = (untrained - fmean(base)) / (untrained - real)
    lines = [
        f"{plan['steps']} training steps of batch {settings['batch']} in {settings['precision']} for every variant;"
        f" seeds in brackets (planned: {plan['seeds']}, baseline {plan['baseline_seeds']}). The paper: 35k steps of"
        " batch 256.",
        f"Distance: {results['features']}; lower is better. The baseline went {learned:.0%} of the way from an"
        " untrained model to real clips: the less, the less the distances say.",
        "v-loss: mean squared error on held-out clips at fixed draws of noise, with the model's own estimate if it"
        " takes one; lower is better.",
        f"The paper's direction: differences of FVD up to {PAPER_TIE:g} count as the same, since its runs differ by 2.",
        f"A difference counts if it is beyond Student's 95 % limits from the deviation over seeds ({len(base)} of the"
        " baseline); if not, it is within the spread. So one verdict in twenty is wrong by chance.",
        f"{sentence(results['machine'])}.",
    ]
    if missing:
        lines.append(f"Not run yet: {'; '.join(key(variant) for variant in missing)}.")
    return [f"- {line}" for line in lines]
