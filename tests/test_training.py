"""walt.training and walt.checkpoint: resume to the bit, checkpoints whole or absent, one-line errors for bad ones."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from walt import checkpoint
from walt.checkpoint import load_description, load_weights, read_tensors, save_checkpoint
from walt.config import PRESETS, TokenizerConfig, TransformerConfig
from walt.data import Clips
from walt.errors import WaltError
from walt.files import replacing, replacing_folder, settled, write_json
from walt.losses import decorrelation_loss, reconstruction_loss
from walt.pipeline import ClipShape, WaltPipeline, load_tokenizer
from walt.stages import new_transformer, prepare_latents, train_tokenizer, train_transformer
from walt.training import Trainer, TrainingConfig, learning_rate, read_log

TINY_TOKENIZER = TokenizerConfig(
    channels=4, multipliers=(1, 1, 2, 2), blocks=1, middle_blocks=0, latent_channels=4, groups=2
)
TINY_TRANSFORMER = TransformerConfig(
    layers=2,
    width=16,
    heads=2,
    latent_channels=4,
    latent_size=(2, 2, 2),
    spatial_window=(1, 2, 2),
    spacetime_window=(2, 2, 2),
    classes=2,
)
CLIP = ClipShape(frames=5, height=16, width=16, fps=12)
CLASSES = ("left", "right")


def line_fit(folder: Path, steps: int, crash_at: int | None = None, **settings) -> Trainer:
    """A small regression that draws from the generator and from torch's own, and may crash."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    slope = torch.tensor([[1.0, -2.0, 0.5]])

    def step(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        if crash_at is not None and trainer.step == crash_at:
            raise RuntimeError("the power went out")
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x @ slope.T + 0.01 * torch.randn(8, 1)).square().mean()

    config = TrainingConfig(steps, lr=0.05, warmup=3, log_every=1, **{"save_every": 5, **settings})
    trainer = Trainer(model, step, config, folder, kind="line", description={"config": {"inputs": 3}})
    return trainer


def same(first: Path, second: Path) -> bool:
    names = ("model", "ema", "optimizer", "random")
    pairs = [[read_tensors(folder / f"{name}.safetensors") for folder in (first, second)] for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_learns(tmp_path):
    trainer = line_fit(tmp_path / "a", 120)
    trainer.run()
    rows = read_log(tmp_path / "a.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert rows[-1]["loss"] < 0.01 * rows[0]["loss"]
    assert trainer.finished


def test_resume_after_a_crash_equals_no_crash(tmp_path):
    line_fit(tmp_path / "whole", 23).run()
    crashed = line_fit(tmp_path / "parts", 23, crash_at=13)
    with pytest.raises(RuntimeError, match="power"):
        crashed.run()
    resumed = line_fit(tmp_path / "parts", 23)
    assert resumed.resume()
    assert resumed.step == 10
    torch.manual_seed(999)  # whatever happens between the two runs must not matter
    resumed.resume()
    resumed.run()
    assert same(tmp_path / "whole", tmp_path / "parts")
    losses = [[row["loss"] for row in read_log(tmp_path / f"{name}.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_new_run_does_not_resume(tmp_path):
    assert not line_fit(tmp_path / "a", 5).resume()


def test_a_finished_run_stays_finished(tmp_path):
    line_fit(tmp_path / "a", 7).run()
    again = line_fit(tmp_path / "a", 7)
    assert again.resume()
    assert again.finished
    again.run()
    assert again.step == 7


def test_time_limit_ends_with_a_small_rate(tmp_path):
    trainer = line_fit(tmp_path / "a", 10**9, save_every=10**9)
    trainer.run(seconds=0.5)
    assert trainer.finished
    assert 0.5 <= trainer.elapsed < 5
    assert read_log(tmp_path / "a.jsonl")[-1]["lr"] < 0.1 * 0.05


def test_learning_rate():
    config = TrainingConfig(100, lr=2.0, warmup=10)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(config, 9, 0.0) == pytest.approx(2.0)
    assert learning_rate(config, 50, 0.5) == pytest.approx(2.0 * 0.51)
    assert learning_rate(config, 99, 1.0) == pytest.approx(0.04)


def test_ema_is_the_warmed_up_average(tmp_path):
    trainer = line_fit(tmp_path / "a", 30, ema_decay=0.6)
    weights: list[torch.Tensor] = []
    trainer.optimizer.register_step_post_hook(lambda *_: weights.append(trainer.model.weight.detach().double()))
    trainer.run()
    expected = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(trainer.averaged.weight.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(trainer.averaged.weight, trainer.model.weight, rtol=1e-3, atol=1e-4)


def test_other_settings_are_refused(tmp_path):
    line_fit(tmp_path / "a", 7).run()
    with pytest.raises(WaltError, match=r"training.steps is 7 there, 8 here\); give the same ones, or another --out"):
        line_fit(tmp_path / "a", 8).resume()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = line_fit(tmp_path / "a", 9)
    trainer.step_function = lambda model, _: model.weight.sum() * float("nan")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(WaltError, match=r"the loss of the line became nan at step 0"):
        trainer.run()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert not (tmp_path / "a").exists()


# Saving


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = line_fit(tmp_path / "a", 20)
    trainer.save()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    original = checkpoint.write_tensors

    def full_on_the_second_file(path, tensors):
        if path.name == "ema.safetensors":
            path.write_bytes(b"half")
            no_space()
        original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full_on_the_second_file)
    with pytest.raises(WaltError, match=r"cannot write .*/a: No space left on device"):
        trainer.save()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert line_fit(tmp_path / "a", 20).resume()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("this environment cannot mount a tmpfs")
    try:
        big = {"model": {"weight": torch.zeros(100_000)}}
        save_checkpoint(disk / "a", "line", {}, {"model": {"weight": torch.zeros(10)}})
        with pytest.raises(WaltError, match=r"cannot write .*/a: .*No space left on device"):
            save_checkpoint(disk / "a", "line", {}, big)
        assert sorted(path.name for path in disk.iterdir()) == ["a"]
        assert len(read_tensors(disk / "a" / "model.safetensors")["weight"]) == 10
        with pytest.raises(WaltError, match=r"No space left on device"):
            write_json(disk / "b.json", {"text": "x" * 100_000})
        assert sorted(path.name for path in disk.iterdir()) == ["a"]
    finally:
        os.system(f"umount {disk}")


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    save_checkpoint(tmp_path / "a", "line", {"number": 1}, {})
    (tmp_path / "a").rename(tmp_path / "a.old")  # where a kill can strike: the old one moved, the new one not yet there
    assert settled(tmp_path / "a") == tmp_path / "a.old"
    assert load_description(tmp_path / "a", "line")[1]["number"] == 1
    save_checkpoint(tmp_path / "a", "line", {"number": 2}, {})
    assert load_description(tmp_path / "a", "line")[1]["number"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_failing_writer_leaves_nothing(tmp_path):
    def half_a_file():
        with replacing(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    def half_a_folder():
        with replacing_folder(tmp_path / "y") as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    for write in (half_a_file, half_a_folder):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []


# Loading


@pytest.fixture
def saved(tmp_path) -> Path:
    save_checkpoint(tmp_path / "a", "line", {}, {"model": nn.Linear(3, 1).state_dict()})
    return tmp_path / "a"


def test_missing_checkpoint(tmp_path):
    with pytest.raises(WaltError, match=r"no such checkpoint: .*nowhere"):
        load_description(tmp_path / "nowhere", "line")


def test_foreign_checkpoints(saved):
    with pytest.raises(WaltError, match="holds a line, expected a tokenizer"):
        load_description(saved, "tokenizer")
    config = saved / "config.json"
    config.write_text('{"architectures": ["Other"]}')
    with pytest.raises(WaltError, match=r'config\.json is not a checkpoint of walt \(its "format" is None\)'):
        load_description(saved, "line")
    config.write_text('{"format": "walt-checkpoint", "version": 99, "kind": "line"}')
    with pytest.raises(WaltError, match="has version 99; this walt reads version 1"):
        load_description(saved, "line")
    config.write_text('{"format": ')
    with pytest.raises(WaltError, match=r"config\.json is not JSON"):
        load_description(saved, "line")
    config.write_text("[]")
    with pytest.raises(WaltError, match="holds a list, expected an object"):
        load_description(saved, "line")
    config.unlink()
    with pytest.raises(WaltError, match=r"is not a checkpoint: it has no config\.json"):
        load_description(saved, "line")


class Trap:
    """Unpickling this would leave a mark."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_broken_weights_and_no_unpickling(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:-3], whole[: len(whole) // 2], os.urandom(200), pickle.dumps(Trap())):
        path.write_bytes(content)
        with pytest.raises(WaltError, match=r"model\.safetensors is broken: "):
            read_tensors(path)
    torch.save({"weight": Trap()}, path)
    with pytest.raises(WaltError, match=r"model\.safetensors is broken: "):
        read_tensors(path)
    assert not (tmp_path / "unpickled").exists()
    path.unlink()
    with pytest.raises(WaltError, match=r"is not a complete checkpoint: model\.safetensors is missing"):
        read_tensors(path)


def test_weights_of_another_model(saved):
    path = saved / "model.safetensors"
    tensors = read_tensors(path)
    with pytest.raises(WaltError, match=r"'weight' has shape \[1, 3\], expected \[1, 4\]"):
        load_weights(nn.Linear(4, 1), tensors, path)
    with pytest.raises(WaltError, match=r"has 'bias', which the model does not"):
        load_weights(nn.Linear(3, 1, bias=False), tensors, path)
    with pytest.raises(WaltError, match=r"lacks '0.weight'"):
        load_weights(nn.Sequential(nn.Linear(3, 1)), tensors, path)


def test_a_broken_trainer_state_is_one_error(tmp_path):
    line_fit(tmp_path / "a", 7).run()
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    del state["step"]
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    with pytest.raises(WaltError, match=r"a is broken: 'step'"):
        line_fit(tmp_path / "a", 7).resume()


# Both stages


def test_decorrelation_loss():
    one, other = torch.randn(2, 3, 1, 4, 4, 4)
    apart = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]]).view(1, 2, 1, 1, 4)
    assert decorrelation_loss(apart).item() == pytest.approx(0, abs=1e-6)
    assert decorrelation_loss(torch.cat([one, -3 * one + 5], 1)).item() == pytest.approx(1, abs=1e-3)
    correlation = torch.corrcoef(torch.cat([one, other], 1).transpose(0, 1).flatten(1))[0, 1].item()
    assert decorrelation_loss(torch.cat([one, other], 1)).item() == pytest.approx(correlation**2, abs=1e-3)


def test_reconstruction_loss():
    target = torch.zeros(1, 3, 1, 2, 2)
    assert reconstruction_loss(target + 0.5, target, absolute=0.2).item() == pytest.approx(0.25 + 0.2 * 0.5)
    with pytest.raises(ValueError, match=r"output has shape \[1, 3, 1, 2, 2\], expected that of target, \[1\]"):
        reconstruction_loss(target, torch.zeros(1))


def moving_bars(count: int = 6) -> Clips:
    """Bars that move left (class 0) or right (class 1)."""
    column = np.arange(16)[None, :] + 2 * np.arange(5)[:, None]
    right = np.arange(16)[None, :] - 2 * np.arange(5)[:, None]
    video = np.stack([(((c + 3 * i) % 16) * 15) for i in range(count // 2) for c in (column, right)]).astype(np.uint8)
    video = np.broadcast_to(video[:, :, None, :, None], (count, 5, 16, 16, 3)).copy()
    source = tuple(f"bars/{i}" for i in range(count))
    return Clips(video, np.arange(count) % 2, source, CLASSES)


def train_both(out: Path, steps: int = 6, stop: int | None = None) -> WaltPipeline:
    """Both stages; with `stop`, each is first run with a crash after that many steps and then resumed."""
    clips = moving_bars()
    training = TrainingConfig(steps, save_every=2, log_every=1)

    def tokenizer_stage():
        return train_tokenizer(
            clips, TINY_TOKENIZER, training, out / "tokenizer", batch=2, frames=5, data={"name": "bars"}
        )[0]

    def transformer_stage(tokenizer):
        transformer, diffusion = new_transformer(TINY_TRANSFORMER, 0)
        latents = prepare_latents(tokenizer, clips)
        trained, _ = train_transformer(
            transformer,
            diffusion,
            latents,
            training,
            out / "transformer",
            batch=4,
            images=1,
            clip=CLIP,
            classes=CLASSES,
            data={"name": "bars"},
        )
        return WaltPipeline(tokenizer, trained, diffusion, clip=CLIP, classes=CLASSES)

    if stop is None:
        return transformer_stage(tokenizer_stage())
    crash_after(stop, tokenizer_stage)
    tokenizer = tokenizer_stage()
    crash_after(stop, lambda: transformer_stage(tokenizer))
    return transformer_stage(tokenizer)


def crash_after(steps: int, stage) -> None:
    original = Trainer._one_step

    def one_step(self, *args):
        if self.step == steps:
            raise RuntimeError("the power went out")
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", one_step)
        with pytest.raises(RuntimeError, match="power"):
            stage()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, WaltPipeline]:
    out = tmp_path_factory.mktemp("trained")
    return out, train_both(out)


def test_both_stages_resume_to_the_bit(trained, tmp_path):
    train_both(tmp_path, stop=5)  # the last save was at step 4
    for stage in ("tokenizer", "transformer"):
        assert same(trained[0] / stage, tmp_path / stage)


def test_latents_are_normalised(trained):
    latents = prepare_latents(trained[1].tokenizer, moving_bars())
    assert latents.video.shape == (6, 4, 2, 2, 2)
    assert latents.video.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-4
    assert (latents.video.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-3
    # Frame 0 of a clip is coded on its own, so it is also an image: the first one of each clip.
    assert latents.image_label.tolist() == sorted(latents.image_label.tolist())
    first = latents.video[latents.video_label == 1][0, :, 0]
    images = latents.image[latents.image_label == 1]
    assert (images - first).abs().amax(dim=(1, 2, 3)).min() < 1e-4


def test_a_pipeline_from_its_folder_samples_the_same(trained, tmp_path):
    out, pipeline = trained
    expected = pipeline.generate(["left", "right"], 2, steps=3, seed=5, progress=False)
    assert expected.shape == (2, 5, 16, 16, 3)
    assert expected.dtype == np.uint8
    loaded = WaltPipeline.from_pretrained(out)
    assert np.array_equal(loaded.generate(["left", 1], 2, steps=3, seed=5, progress=False), expected)
    assert not np.array_equal(loaded.generate(["left", 1], 2, steps=3, seed=6, progress=False), expected)
    pipeline.save_pretrained(tmp_path / "export")
    again = WaltPipeline.from_pretrained(tmp_path / "export")
    assert np.array_equal(again.generate(["left", "right"], 2, steps=3, seed=5, progress=False), expected)
    assert again.classes == CLASSES


def test_pictures(trained):
    _, pipeline = trained
    pictures = pipeline.generate(["left", "right", "left"], 3, steps=2, images=True, progress=False)
    assert pictures.shape == (3, 16, 16, 3)
    assert np.array_equal(
        pictures, pipeline.generate(["left", "right", "left"], 3, steps=2, images=True, progress=False)
    )


def test_generate_bad_values(trained):
    _, pipeline = trained
    with pytest.raises(WaltError, match="unknown class 'up'; the classes are left, right"):
        pipeline.generate("up")
    with pytest.raises(WaltError, match="2 labels for num=3"):
        pipeline.generate(["left", "right"], 3)
    with pytest.raises(WaltError, match=r"steps.*1001"):
        pipeline.generate("left", steps=1001)


def test_a_config_that_is_not_ours(trained, tmp_path):
    save_checkpoint(tmp_path / "tokenizer", "tokenizer", {"config": {"channels": 4, "depth": 9}}, {})
    with pytest.raises(WaltError, match=r"config\.json: .*depth"):
        load_tokenizer(tmp_path / "tokenizer")


def test_another_data_set_is_refused(trained):
    config = replace(TINY_TOKENIZER)
    with pytest.raises(WaltError, match=r"data\.name is 'bars' there, 'balls' here"):
        train_tokenizer(
            moving_bars(),
            config,
            TrainingConfig(6, save_every=2, log_every=1),
            trained[0] / "tokenizer",
            batch=2,
            frames=5,
            data={"name": "balls"},
        )


def test_the_tiny_preset_is_the_demo_shape():
    tokenizer, transformer = PRESETS["tiny"]
    assert tokenizer.latent_shape(17, 64, 64) == (transformer.latent_channels, *transformer.latent_size)
