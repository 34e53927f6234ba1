"""benchmarks.ablations: plan, rule and table on made-up numbers, and a miniature run on random latents."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import ablations
from benchmarks.ablation_material import Material, source_of
from benchmarks.ablation_table import (
    REAL,
    STUDENT,
    UNTRAINED,
    change,
    key,
    notes,
    spread,
    table,
    total,
    variant_row,
    verdict,
)
from benchmarks.ablation_variants import BASE, BASELINE, VARIANTS, FullAttention, Variant, rate_change
from benchmarks.ablations import Plan, Settings, held_out_loss, load, make, plan, run_all, score, step_seconds
from walt.atomic import write_json
from walt.data.clips import Clip, write_store
from walt.data.latents import encode_latents
from walt.data.loading import make_batch
from walt.errors import WaltError
from walt.evaluate.metrics import frechet_distance
from walt.model.diffusion import Diffusion
from walt.model.transformer import Transformer

SMALL = replace(BASE, layers=2, width=16, heads=2, latent_size=(2, 4, 4), latent_channels=4)
SETTINGS = Settings(minutes=1, seeds=2, clips=6, held_out=3, batch=4, sampling_steps=2, loss_draws=2)
BY_NAME = {key(variant): variant for variant in VARIANTS}
TWO = BASELINE, BY_NAME["latent normalisation: off"]


def random_material(folder: Path) -> Material:
    """Random latents of two classes; the distance is that of their channels."""
    random = torch.Generator().manual_seed(0)

    def encode(video: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(video), 4, 1 + video.shape[2] // 4, 4, 4, generator=random)

    def distance(latent: torch.Tensor) -> dict[str, float]:
        first, second = (x.movedim(1, -1).flatten(0, -2).double().numpy() for x in (latent, held_out))
        return {"frames": frechet_distance(first, second), "motion": 1.0}

    clips = [Clip(f"{('left', 'right')[i % 2]}/{i}", np.zeros((5, 8, 8, 3), np.uint8)) for i in range(12)]
    shape = {"frames": 5, "height": 8, "width": 8}
    store = write_store(folder / "data", clips, 8)
    latents = encode_latents(store, folder / "latents", encode, key="", progress=False, **shape)
    held_out = torch.randn(6, 4, 2, 4, 4, generator=random)
    mean, std = torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([2.0, 0.5, 1.0, 4.0])
    return Material(latents, held_out, torch.arange(6) % 2, mean, std, ("left", "right"), distance, "random latents")


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    return random_material(tmp_path_factory.mktemp("material"))


def results_of(rows: list[dict], seeds: int = 2) -> dict:
    machine = {"hardware": "a machine", "threads": "2", "torch": "2", "commit": "abc", "date": "today"}
    yardsticks = {UNTRAINED: {"frames": 20.0, "motion": 1.5}, REAL: {"frames": 1.0, "motion": 0.5}}
    plan = asdict(Plan(3, seeds, seeds))
    settings = asdict(SETTINGS)
    return {
        "settings": settings,
        "plan": plan,
        "machine": machine,
        "features": "colours",
        "yardsticks": yardsticks,
        "runs": rows,
    }


def row(variant: Variant, seed: int, distance: float, *, rate: float = 1.0, loss: float = 0.5) -> dict:
    measured = {"frames": distance - 1, "motion": 1.0, "loss": loss}
    return {"variant": key(variant), "seed": seed, "steps": 3, "steps_per_second": rate, "parameters": 9, **measured}


class TestVariants:
    def test_directions_are_those_of_the_papers_numbers(self):
        expected = {name: variant.expected for name, variant in BY_NAME.items() if variant is not BASELINE}
        assert expected == {
            "patch size: 2": "worse",
            "patch size: 4": "worse",
            "ST window: 5x2x2": "same",
            "ST window: 5x8x8": "better",
            "ST window: none: full attention in every layer": "same",
            "self-conditioning: p_sc 0": "worse",
            "zero terminal SNR: off": "worse",
            "QK norm: off": "same",
            "latent normalisation: off": "worse",
            "AdaLN: LoRA r = 16": "better",
            "AdaLN: LoRA r = 64": "better",
            "AdaLN: separate": "better",
            "joint training: a quarter of each batch images": "better",
        }
        rates = {name: variant.expected_rate for name, variant in BY_NAME.items() if variant.paper_rate}
        assert list(rates.values()) == ["faster", "slower", "slower"]
        assert BASELINE.expected_rate == ""

    @pytest.mark.parametrize("variant", VARIANTS, ids=key)
    def test_every_variant_makes_a_model_that_differs_in_that_one_thing(self, variant):
        base = replace(BASE, classes=7)
        config = variant.config(base)
        with torch.device("meta"):
            model = Transformer(config)
        changed = {
            name for name, value in config.to_dict().items() if value != BASELINE.config(base).to_dict()[name]
        } - ({"spatial_window", "spacetime_window"} if "patch" in variant.transformer else set())
        assert changed == set(variant.transformer)
        grid = config.grid
        assert all(side <= size for window in config.windows() for side, size in zip(window, grid, strict=True))
        assert config.windows()[0] == (grid if variant.full_attention else (1, *grid[1:]))
        assert [layer.spatial for layer in model.layers[:2]] == [not variant.full_attention, False]
        other = variant.diffusion_config().to_dict(), BASELINE.diffusion_config().to_dict()
        assert {name for name in other[0] if other[0][name] != other[1][name]} == set(variant.diffusion)

    def test_full_attention_sees_the_whole_sample(self):
        """A change in the last frame reaches the first one in a layer of full attention, and not in an S layer."""
        config = replace(SMALL, layers=1, classes=0)
        full = FullAttention(**{name: getattr(config, name) for name in config.to_dict()})
        for chosen, reaches in ((config, False), (full, True)):
            torch.manual_seed(0)
            model = Transformer(chosen)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            z = torch.randn(2, 4, 2, 4, 4)
            z[1] = z[0]
            z[1, :, -1, -1, -1] += 1
            first, second = model(z, torch.tensor([500, 500])).detach()
            assert torch.equal(first[:, 0], second[:, 0]) != reaches


class TestPlan:
    STEP = {key(BASELINE): 0.1, "other": 0.2}  # noqa: RUF012

    def test_more_seeds_only_if_there_are_steps_enough(self):
        long = plan(10_000, self.STEP, 1.0, 3)
        assert (long.seeds, long.baseline_seeds) == (3, 3)
        assert long.steps == int((0.9 * 10_000 - 6) / (3 * 0.3))
        short = plan(150, self.STEP, 1.0, 3)
        assert (short.seeds, short.baseline_seeds) == (1, 3)
        assert short.steps == int((0.9 * 150 - 4) / (3 * 0.1 + 0.2))
        middle = plan(400, self.STEP, 1.0, 3)
        assert (middle.seeds, middle.baseline_seeds) == (2, 3)
        assert middle.steps >= ablations.ENOUGH_STEPS > int((0.9 * 400 - 6) / (3 * 0.3))

    def test_no_more_seeds_than_asked(self):
        assert plan(10_000, self.STEP, 1.0, 1) == Plan(int((9000 - 2) / 0.3), 1, 1)

    def test_too_little_time(self):
        with pytest.raises(WaltError, match="the time left, 9 s, is too short for 20 steps of every variant"):
            plan(9, self.STEP, 1.0, 3)
        with pytest.raises(WaltError, match="the time left, 0 s"):
            plan(-5, self.STEP, 1.0, 3)

    def test_order_of_runs(self):
        other = VARIANTS[1]
        assert Plan(9, 2, 3).runs([BASELINE, other]) == [
            (BASELINE, 0),
            (other, 0),
            (BASELINE, 2),
            (BASELINE, 1),
            (other, 1),
        ]


class TestRule:
    def test_change_is_students_t_test(self):
        """Where SciPy's two-sample t-test with pooled variance finds a difference at 5 %, so do we."""
        random = np.random.default_rng(0)
        found = []
        for _ in range(200):
            ours = random.normal(random.uniform(0, 4), 1, random.integers(1, 5)).tolist()
            base = random.normal(0, 1, random.integers(2, 5)).tolist()
            found.append(change(ours, base))
            test = stats.ttest_ind(ours, base) if len(ours) > 1 else None
            if test is None:  # a single value against a sample: the prediction interval
                deviation = np.std(base, ddof=1) * math.sqrt(1 + 1 / len(base))
                p = 2 * stats.t.sf(abs(ours[0] - np.mean(base)) / deviation, len(base) - 1)
            else:
                p = test.pvalue
            if abs(p - 0.05) > 2e-3:  # the table has two digits
                direction = "worse" if np.mean(ours) > np.mean(base) else "better"
                assert found[-1] == (direction if p < 0.05 else "same")
        assert {"same", "worse"} <= set(found)

    def test_student_is_that_of_the_books(self):
        assert STUDENT[1:] == tuple(pytest.approx(stats.t.ppf(0.975, n), abs=6e-3) for n in range(1, len(STUDENT)))

    def test_one_seed_says_nothing(self):
        assert change([100.0], [1.0]) == ""
        assert verdict("worse", "") == "unknown: one seed"

    @pytest.mark.parametrize(
        ("expected", "found", "text"),
        [
            ("worse", "worse", "holds"),
            ("worse", "same", "within the spread"),
            ("worse", "better", "does not hold: better"),
            ("better", "better", "holds"),
            ("same", "same", "holds: no difference"),
            ("same", "worse", "does not hold: worse"),
        ],
    )
    def test_verdicts(self, expected, found, text):
        assert verdict(expected, found) == text

    def test_rates(self):
        found = [rate_change(ratio) for ratio in (1.2, 1.0, 1.04, 0.97, 0.6)]
        assert found == ["faster", "same", "same", "same", "slower"]

    def test_spread(self):
        assert spread([1.0, 3.0]) == "2 +- 1.4 (2)"
        assert spread([1234.56, 1230.0]) == "1232 +- 3.2 (2)"
        assert spread([0.02]) == "0.02 (one seed)"


class TestTable:
    base = [row(BASELINE, seed, 10 + seed / 10) for seed in (0, 1)]  # noqa: RUF012

    def cells(self, name: str, *distances: float, rate: float = 1.0, loss: float = 0.5) -> list[str]:
        runs = [row(BY_NAME[name], seed, value, rate=rate, loss=loss) for seed, value in enumerate(distances)]
        return variant_row(BY_NAME[name], [*self.base, *runs])

    def test_rows(self):
        assert self.cells("patch size: 2", 20, 20.1, loss=0.6) == [
            "patch size",
            "2",
            "134.4 against 60.7",
            "worse",
            "20.05 +- 0.071 (2)",
            "holds",
            "0.6 +- 0 (2)",
            "holds",
            "1.00",
        ]
        assert variant_row(BASELINE, self.base)[2:] == ["", "", "10.05 +- 0.071 (2)", "", "0.5 +- 0 (2)", "", "1.00"]

    def test_verdicts_by_distance_and_by_loss(self):
        assert self.cells("patch size: 4", 5, 5.1)[5:8:2] == ["does not hold: better", "within the spread"]
        assert self.cells("patch size: 4", 10.1, 10.2, loss=0.7)[5:8:2] == ["within the spread", "holds"]
        assert self.cells("QK norm: off", 10.1, loss=0.4)[5:8:2] == ["holds: no difference", "does not hold: better"]
        assert self.cells("AdaLN: separate", 10.1)[2:4] == ["not printed", "better"]
        assert self.cells("zero terminal SNR: off", 30, 31)[5:8] == ["holds", "of another quantity", ""]

    def test_speed(self):
        full = "ST window: none: full attention in every layer"
        assert self.cells(full, 10.1, rate=0.5)[8] == "0.50 (paper: 1.2 against 2.0), holds"
        assert self.cells(full, 10.1, rate=1.01)[8] == "1.01 (paper: 1.2 against 2.0), does not hold: same"

    def test_whole_table(self):
        text = table(results_of([*self.base, row(VARIANTS[1], 0, 20)]))
        lines = text.splitlines()
        assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[5].count("|") == 10
        assert "| real training clips |  |  |  | 1.5 |  |  |  |  |" in lines
        assert "The baseline went 57% of the way from an untrained model to real clips" in text
        assert any(line.startswith("- 3 training steps of batch 4 in bfloat16 for every variant") for line in lines)
        assert any(line.startswith("- Not run yet: patch size: 4; ST window: 5x2x2;") for line in lines)
        assert not [line for line in notes(results_of(self.base), []) if "Not run yet" in line]


@pytest.fixture(scope="module")
def finished(material) -> tuple[dict, list[int]]:
    results, saved = results_of([]), []
    run_all(results, lambda now: saved.append(len(now["runs"])), material, TWO, SMALL)
    return results, saved


class TestMiniature:
    def test_rows_are_finite_and_saved_one_by_one(self, finished):
        results, saved = finished
        assert saved == [1, 2, 3, 4]
        assert [(entry["variant"], entry["seed"]) for entry in results["runs"]] == [
            (key(BASELINE), 0),
            ("latent normalisation: off", 0),
            (key(BASELINE), 1),
            ("latent normalisation: off", 1),
        ]
        for entry in json.loads(json.dumps(results["runs"])):
            assert entry["steps"] == 3
            values = [entry[name] for name in ("frames", "motion", "loss", "steps_per_second")]
            assert all(math.isfinite(value) and value > 0 for value in values)
        seeds = {total(entry) for entry in results["runs"] if entry["variant"] == key(BASELINE)}
        assert len(seeds) == 2
        assert "latent normalisation | off | 67.9 against 60.7 | worse" in table(results)

    def test_goes_on_where_it_stopped(self, finished, material, tmp_path):
        """The last row, made again from the file, is the same but for its speed."""
        results = copy.deepcopy(finished[0])
        lost = results["runs"].pop()
        write_json(tmp_path / "results.json", results)
        again = load(tmp_path / "results.json", SETTINGS)
        saved = []
        run_all(again, lambda now: saved.append(len(now["runs"])), material, TWO, SMALL)
        assert saved == [4]
        assert {**again["runs"][-1], "steps_per_second": 0} == {**lost, "steps_per_second": 0}

    def test_results_of_other_settings_are_refused(self, tmp_path):
        write_json(tmp_path / "results.json", results_of([]))
        with pytest.raises(WaltError, match="was made with batch 4, now asked 8; give another --json"):
            load(tmp_path / "results.json", replace(SETTINGS, batch=8))
        assert load(tmp_path / "absent.json", SETTINGS) is None

    def test_latents_that_are_not_normalised_come_back(self, material):
        model, diffusion = make(BASELINE, material, SMALL, 0)
        kinds = {"batch": 4, "images": 1}
        plain, raw = (
            make_batch(source_of(material, model.config, diffusion, normalised=kind, **kinds), 0, 0, range(4))
            for kind in (True, False)
        )
        assert torch.allclose(material.normalised(raw["latent"]), plain["latent"], atol=1e-6)
        assert torch.allclose(raw["latent"][:, 3], plain["latent"][:, 3] * 4 + 3)
        assert torch.allclose(raw["latent"][:, 1], plain["latent"][:, 1] * 0.5 - 2)
        assert torch.equal(raw["label"], plain["label"])

    def test_score_of_raw_latents_is_measured_normalised(self, material):
        """A model of zeros samples what its noise says; the distance sees it in the normalised latents' scale."""
        seen = []
        spy = replace(material, distance=lambda latent: seen.append(latent) or {"frames": 0.0, "motion": 0.0})
        for variant in TWO:
            score(variant, *make(variant, spy, SMALL, 0), 0, spy, SETTINGS)
        assert torch.allclose(seen[1], material.normalised(seen[0]), atol=1e-5)

    def test_held_out_loss_is_fixed_and_independent_of_the_seed_of_training(self, material):
        """Of a model that predicts zero, it is the mean square of v: the same for all, on every call."""
        model, diffusion = make(BASELINE, material, SMALL, 0)
        torch.manual_seed(123)
        arguments = material.held_out, material.label, 4
        first = held_out_loss(model, diffusion, *arguments)
        assert first == held_out_loss(make(BASELINE, material, SMALL, 1)[0], diffusion, *arguments)
        never = Diffusion(BY_NAME["self-conditioning: p_sc 0"].diffusion_config())
        assert first == held_out_loss(model, never, *arguments)
        assert first == pytest.approx(1, abs=0.1)

    def test_step_time(self, material, monkeypatch):
        monkeypatch.setattr(ablations, "BASE", SMALL)
        joint = BY_NAME["joint training: a quarter of each batch images"]
        assert 0 < step_seconds(joint, material, SETTINGS) < 10


def test_the_variants_of_an_hour():
    """The baseline, patch sizes and windows; all of them where no group is named."""
    assert [variant.group for variant in ablations.HOUR.variants()] == [
        "baseline",
        *["patch size"] * 2,
        *["ST window"] * 3,
    ]
    assert ablations.ALL.variants() == VARIANTS
    assert ablations.settings_of(json.loads(json.dumps({"settings": asdict(ablations.HOUR)}))) == ablations.HOUR


def test_command_line_refuses(capsys, tmp_path):
    assert ablations.main(["--seeds", "0", "--json", str(tmp_path / "r.json")]) == 2
    assert "--seeds 0, --minutes 60: expected numbers above 0" in capsys.readouterr().err


def test_finished_results_are_only_printed(capsys, tmp_path):
    """Without the simulator, and without training anything."""
    settings = replace(ablations.ALL, seeds=1)
    results = {**results_of([row(variant, 0, 10) for variant in VARIANTS], 1), "settings": asdict(settings)}
    write_json(tmp_path / "r.json", results)
    arguments = ["--all", "--seeds", "1", "--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "t.md")]
    assert ablations.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text() == printed
    assert printed.count("unknown: one seed") == 2 * (len(VARIANTS) - 1) - 2  # two losses are of another quantity
