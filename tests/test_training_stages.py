"""Both stages of training, on clips in memory: resumed to the bit, and the pipeline read back from their folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from on_ranks import TRANSFORMER
from test_training import same

from walt.checkpoint import fingerprint, save_checkpoint
from walt.data.clips import write_store
from walt.data.latents import encode_latents
from walt.errors import WaltError
from walt.model.config import TokenizerConfig
from walt.presets import PRESETS
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline
from walt.settings import DataConfig, Settings, TokenizerLossConfig, TrainingConfig
from walt.train.denoiser import train_denoiser
from walt.train.losses import DecorrelationTerm, Reconstruction, ReconstructionTerm
from walt.train.run import Run
from walt.train.tokenizer import train_tokenizer
from walt.train.trainer import Trainer

TINY_TOKENIZER = TokenizerConfig(
    channels=4, multipliers=(1, 1, 2, 2), blocks=1, middle_blocks=0, latent_channels=4, groups=2
)
CLASSES = ("left", "right")


def test_decorrelation_loss():
    def decorrelation(latent: torch.Tensor) -> torch.Tensor:
        return DecorrelationTerm()(Reconstruction(latent, latent, latent))

    one, other = torch.randn(2, 3, 1, 4, 4, 4)
    apart = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]]).view(1, 2, 1, 1, 4)
    assert decorrelation(apart).item() == pytest.approx(0, abs=1e-6)
    assert decorrelation(torch.cat([one, -3 * one + 5], 1)).item() == pytest.approx(1, abs=1e-3)
    correlation = torch.corrcoef(torch.cat([one, other], 1).transpose(0, 1).flatten(1))[0, 1].item()
    assert decorrelation(torch.cat([one, other], 1)).item() == pytest.approx(correlation**2, abs=1e-3)


def test_reconstruction_loss():
    video = torch.zeros(1, 3, 1, 2, 2)
    loss = ReconstructionTerm(absolute=0.2)
    assert loss(Reconstruction(video, video, video + 0.5)).item() == pytest.approx(0.25 + 0.2 * 0.5)
    with pytest.raises(ValueError, match=r"output has shape \[1, 3, 1, 2, 2\], expected that of video, \[1\]"):
        loss(Reconstruction(torch.zeros(1), video, video))


def moving_bars(out: Path, count: int = 6, speed: int = 2):
    """A prepared folder of bars that move left (class 0) or right (class 1)."""
    clips = []
    for i in range(count):
        column = np.arange(16)[None, :] + (speed, -speed)[i % 2] * np.arange(5)[:, None]
        video = (((column + 3 * (i // 2)) % 16) * 15).astype(np.uint8)
        video = np.broadcast_to(video[:, None, :, None], (5, 16, 16, 3))
        clips.append((f"{CLASSES[i % 2]}/{i}", video))
    return write_store(out / "bars", clips, 12)


def run(stage: str, out: Path, steps: int = 6, **bars: int) -> Run:
    data = DataConfig(5, 16, 16, **({"batch": 2, "images": 0} if stage == "tokenizer" else {"batch": 4, "images": 1}))
    losses = TokenizerLossConfig(1.0, perceptual=0.0, adversarial=0.0)
    training = TrainingConfig(steps, save_every=2, log_every=1)
    settings = Settings("tiny", TINY_TOKENIZER, TRANSFORMER, losses=losses, data=data, training=training)
    return Run(stage, settings, moving_bars(out, **bars), out, torch.device("cpu"))


def train_both(out: Path, stop: int | None = None) -> WaltPipeline:
    """Both stages; with `stop`, each is first run with a crash after that many steps and then resumed."""
    for stage, train in (("tokenizer", train_tokenizer), ("base", train_denoiser)):
        if stop is not None:
            crash_after(stop, lambda stage=stage, train=train: train(run(stage, out)))
        train(run(stage, out))
    return WaltPipeline.from_pretrained(out)


def crash_after(steps: int, stage) -> None:
    original = Trainer._step

    def step(self, *args):
        if self.step == steps:
            raise RuntimeError("the power went out")
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
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


def test_latents_are_normalised(trained, tmp_path):
    tokenizer = trained[1].tokenizer
    clip = {"frames": 5, "height": 16, "width": 16}
    latents = encode_latents(
        moving_bars(tmp_path),
        tmp_path / "latents",
        tokenizer.encode,
        key=fingerprint(tokenizer),
        dtype="float32",
        **clip,
    )
    video, image = torch.tensor(latents.video), torch.tensor(latents.image)
    assert video.shape == (6, 4, 2, 2, 2)
    assert video.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-4
    assert (video.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-3
    # Frame 0 of a clip is coded on its own, so it is also an image: the first one of each clip.
    assert latents.image_rows.tolist() == [[item, frame] for item in range(6) for frame in (0, 4)]
    assert (image[::2] - video[:, :, 0]).abs().amax(dim=(1, 2, 3)).max() < 1e-4


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


def test_another_data_set_is_refused(trained, tmp_path):
    with pytest.raises(WaltError, match=r"was trained on other data than .* holds \(6 files changed: left/0, "):
        train_tokenizer(replace(run("tokenizer", tmp_path, speed=1), out=trained[0]))


def test_the_tiny_preset_is_the_demo_shape():
    tokenizer, transformer = PRESETS["tiny"]
    assert tokenizer.latent_shape(17, 64, 64) == (transformer.latent_channels, *transformer.latent_size)
