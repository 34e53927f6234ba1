"""Does the paper hold, in the small? Tiny models on rendered clips, one change at a time, beside the paper's numbers.

``python -m benchmarks.ablations`` takes an hour on two cores for patch sizes and windows, with three seeds; ``--all``
takes four for every change. All train on the latents of one tokenizer, that of the model in the package. A run that was
stopped goes on from the JSON file, which is written after every model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from walt.atomic import atomic_write, read_json, write_json
from walt.data.loading import Source, make_batch
from walt.errors import WaltError
from walt.model.config import TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.randoms import sample_noise
from walt.model.transformer import Transformer
from walt.pretrained import PACKAGED, TINY_DOOM
from walt.settings import TrainingConfig
from walt.train.losses import DenoiserLoss
from walt.train.objective import Objective
from walt.train.trainer import Trainer

from .ablation_material import Material, prepare, source_of
from .ablation_table import REAL, UNTRAINED, key, table, total
from .ablation_variants import BASE, BASELINE, Variant, variants_of
from .machine import machine
from .say import say

ENOUGH_STEPS, FEWEST_STEPS = 400, 20  # for more seeds rather than more steps; for anything to be said
BASELINE_SEEDS = 3  # whatever the others get: they are what the spread is known from
SAFETY = 0.9  # of the time is planned for


@dataclass(frozen=True)
class Settings:
    """What a results file belongs to."""

    minutes: float
    seeds: int
    clips: int  # a class
    held_out: int  # a class, and as many are generated
    batch: int = 8
    lr: float = 1e-3
    precision: str = "bfloat16"  # as tiny-doom was trained
    sampling_steps: int = 20
    loss_draws: int = 8
    groups: tuple[str, ...] = ()  # of the variants; (): all

    def variants(self) -> tuple[Variant, ...]:
        return variants_of(self.groups)

    def training(self, steps: int) -> TrainingConfig:
        return TrainingConfig(steps, lr=self.lr, precision=self.precision)


HOUR = Settings(minutes=60, seeds=3, clips=128, held_out=12, groups=("patch size", "ST window"))
ALL = Settings(minutes=240, seeds=3, clips=256, held_out=24, sampling_steps=50)


@dataclass(frozen=True)
class Plan:
    steps: int
    seeds: int
    baseline_seeds: int

    def runs(self, variants: Sequence[Variant]) -> list[tuple[Variant, int]]:
        """Seed by seed, so that a run cut short has every variant; the baseline's further seeds follow the first."""
        more = [(BASELINE, seed) for seed in range(self.seeds, self.baseline_seeds)]
        first, *others = [[(variant, seed) for variant in variants] for seed in range(self.seeds)]
        return [*first, *more, *(pair for row in others for pair in row)]


def plan(seconds: float, step: dict[str, float], score: float, seeds: int) -> Plan:
    """Equal steps for all within the time: for as many seeds as leave ENOUGH_STEPS, or else for one.

    `step`: seconds a training step by variant; `score`: seconds to score a model. WaltError if the time is too short.
    """
    for count in range(seeds, 0, -1):
        base = max(count, min(BASELINE_SEEDS, seeds))
        models = {name: base if name == key(BASELINE) else count for name in step}
        left = SAFETY * seconds - score * sum(models.values())
        steps = int(left / sum(step[name] * number for name, number in models.items()))
        if steps >= ENOUGH_STEPS or (count == 1 and steps >= FEWEST_STEPS):
            return Plan(steps, count, base)
    raise WaltError(f"the time left, {max(seconds, 0):.0f} s, is too short for {FEWEST_STEPS} steps of every variant")


def make(variant: Variant, material: Material, base: TransformerConfig, seed: int) -> tuple[Transformer, Diffusion]:
    torch.manual_seed(seed)
    shape = material.held_out.shape
    fitted = replace(base, latent_channels=shape[1], latent_size=tuple(shape[2:]), classes=len(material.classes))
    return Transformer(variant.config(fitted)).eval(), Diffusion(variant.diffusion_config())


def training_of(
    variant: Variant, material: Material, base: TransformerConfig, settings: Settings, training: TrainingConfig
) -> tuple[Diffusion, Objective, Source]:
    """A new model's, as `walt train base` has them."""
    model, diffusion = make(variant, material, base, training.seed)
    source = source_of(
        material,
        model.config,
        diffusion,
        batch=settings.batch,
        images=settings.batch // 4 if variant.images else 0,
        normalised=variant.normalised,
    )
    return diffusion, Objective(model, DenoiserLoss(diffusion), training, average=True), source


def run(
    variant: Variant, seed: int, material: Material, settings: Settings, steps: int, base: TransformerConfig = BASE
) -> dict[str, Any]:
    """Train one model for `steps` and score it; a row of the results."""
    training = replace(settings.training(steps), warmup=min(50, steps // 4 + 1), save_every=steps, seed=seed)
    diffusion, objective, source = training_of(variant, material, base, settings, training)
    with tempfile.TemporaryDirectory(prefix="walt-ablation-") as folder:
        trainer: Trainer[Transformer] = Trainer(
            [objective], source, Path(folder) / "transformer", batch=settings.batch, kind="transformer", description={}
        )
        trainer.run()
    model = trainer.averaged.eval()
    return {
        "variant": key(variant),
        "seed": seed,
        "steps": trainer.step,
        "steps_per_second": trainer.step / trainer.elapsed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **score(variant, model, diffusion, seed, material, settings),
    }


@torch.inference_mode()
def score(
    variant: Variant, model: nn.Module, diffusion: Diffusion, seed: int, material: Material, settings: Settings
) -> dict[str, float]:
    """Frechet distances of as many samples as clips are held out, and the loss on those at fixed draws of noise.

    The loss is that of sampling: a model with self-conditioning always sees its estimate.
    """
    noise = sample_noise(seed, [(i,) for i in range(len(material.label))], material.held_out.shape[1:])
    parts = zip(noise.split(32), material.label.split(32), strict=True)
    sampled = torch.cat([diffusion.sample(model, x, steps=settings.sampling_steps, label=label) for x, label in parts])
    distances = material.distance(sampled if variant.normalised else material.normalised(sampled))
    truth = material.held_out if variant.normalised else material.raw(material.held_out)
    return {**distances, "loss": held_out_loss(model, diffusion, truth, material.label, settings.loss_draws)}


@torch.inference_mode()
def held_out_loss(model: nn.Module, diffusion: Diffusion, latent: Tensor, label: Tensor, draws: int) -> float:
    always = Diffusion(replace(diffusion.config, self_condition_probability=1.0, drop_probability=0.0))
    generator = torch.Generator().manual_seed(0)
    losses = [
        float(always.loss(model, x0, generator=generator, label=y)) * len(y)
        for _ in range(draws)
        for x0, y in zip(latent.split(32), label.split(32), strict=True)
    ]
    return sum(losses) / (draws * len(latent))


def step_seconds(variant: Variant, material: Material, settings: Settings) -> float:
    """The faster of two training steps after a first one."""
    training = settings.training(3)
    _, objective, source = training_of(variant, material, BASE, settings, training)
    objective.network.train()
    times = []
    for step in range(training.steps):
        started = time.perf_counter()
        objective.backward([make_batch(source, 0, step, range(settings.batch))])
        objective.step(training.lr)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def measured_plan(material: Material, settings: Settings, seconds: float) -> tuple[Plan, dict[str, Any]]:
    """The plan, from the time that steps and a score take, and the score's two yardsticks."""
    started = time.perf_counter()
    untrained = score(BASELINE, *make(BASELINE, material, BASE, 0), 0, material, settings)
    scoring = time.perf_counter() - started
    chosen = np.linspace(0, len(material.latents.video) - 1, len(material.held_out)).astype(int)
    real = material.distance(torch.tensor(material.latents.video[chosen]).float())
    yardsticks = {UNTRAINED: untrained, REAL: real}
    step = {key(variant): step_seconds(variant, material, settings) for variant in settings.variants()}
    left = seconds - (time.perf_counter() - started)
    return plan(left, step, scoring, settings.seeds), yardsticks


def left_to_run(results: dict[str, Any], variants: Sequence[Variant]) -> list[tuple[Variant, int]]:
    have = {(row["variant"], row["seed"]) for row in results["runs"]}
    return [pair for pair in Plan(**results["plan"]).runs(variants) if (key(pair[0]), pair[1]) not in have]


def run_all(
    results: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
    material: Material,
    variants: Sequence[Variant],
    base: TransformerConfig = BASE,
) -> None:
    """Every run of the plan that `results` does not have yet; `save` is called after each."""
    settings, todo = settings_of(results), left_to_run(results, variants)
    for number, (variant, seed) in enumerate(todo, 1):
        row = run(variant, seed, material, settings, results["plan"]["steps"], base)
        results["runs"].append(row)
        save(results)
        say(
            f"{number}/{len(todo)}  {key(variant)}, seed {seed}: distance {total(row):.1f}, loss {row['loss']:.4f},"
            f" {row['steps_per_second']:.2f} steps/s"
        )


def settings_of(results: dict[str, Any]) -> Settings:
    return Settings(**{**results["settings"], "groups": tuple(results["settings"]["groups"])})


def load(path: Path, settings: Settings) -> dict[str, Any] | None:
    """Results to go on with; WaltError if they are those of other settings."""
    if not path.is_file():
        return None
    results = read_json(path)
    found, asked = results.get("settings", {}), {**asdict(settings), "groups": list(settings.groups)}
    for name, value in asked.items():
        if found.get(name) != value:
            raise WaltError(f"{path} was made with {name} {found.get(name)}, now asked {value}; give another --json")
    return results


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--all", action="store_true", help="every change, not only patch sizes and windows")
    top.add_argument("--minutes", type=float, help=f"for everything ({HOUR.minutes:g}, or {ALL.minutes:g} with --all)")
    top.add_argument("--seeds", type=int, help="at most; fewer where the time is short (3)")
    top.add_argument("--json", type=Path, default=Path("runs/ablations/results.json"), help="(%(default)s)")
    top.add_argument("--markdown", type=Path, help="write the table here, too")
    top.add_argument(
        "--tokenizer",
        type=Path,
        default=PACKAGED / TINY_DOOM / "tokenizer",
        help="folder of a trained tokenizer, such as runs/mine/tokenizer (that of tiny-doom)",
    )
    return top


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All results, those that the JSON file has already among them."""
    started = time.monotonic()
    given = {name: value for name in ("minutes", "seeds") if (value := getattr(options, name)) is not None}
    settings = replace(ALL if options.all else HOUR, **given)
    if settings.seeds < 1 or settings.minutes <= 0:
        raise WaltError(f"--seeds {settings.seeds}, --minutes {settings.minutes:g}: expected numbers above 0")
    results = load(options.json, settings)
    variants = settings.variants()
    if results is not None and not left_to_run(results, variants):
        return results
    seconds = settings.minutes * 60
    with tempfile.TemporaryDirectory(prefix="walt-ablations-") as work:
        material = prepare(settings.clips, settings.held_out, options.tokenizer, Path(work))
        if results is None:
            planned, yardsticks = measured_plan(material, settings, seconds - (time.monotonic() - started))
            results = {
                "settings": asdict(settings),
                "plan": asdict(planned),
                "machine": machine("cpu"),
                "features": material.features,
                "yardsticks": yardsticks,
                "runs": [],
            }
        say(f"{results['plan']['steps']} steps for each of {len(variants)} variants, {results['plan']['seeds']} seeds")
        run_all(results, lambda now: write_json(options.json, now), material, variants)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        text = table(measure(options))
        if options.markdown:
            with atomic_write(options.markdown) as temporary:
                temporary.write_text(text + "\n")
    except WaltError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last model that was finished")
        return 130
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
