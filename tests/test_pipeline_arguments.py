"""What WaltPipeline asks of its denoisers: conditions, noise of its own for every sample, and levels of noise."""

from __future__ import annotations

import pytest
import torch
from test_pipeline import CLIP, QUICK, SR1, build, video

from walt.model.config import ClipShape
from walt.model.diffusion import Diffusion
from walt.model.transformer import Transformer
from walt.sample.denoiser import Denoiser

SPOKEN = {"text_width": 8, "text_vocabulary": 256}  # of a stage that reads text


@pytest.fixture(scope="module")
def pipeline():
    config = type(SR1).from_dict({**SR1.to_dict(), **SPOKEN})
    return build(upscalers=[Denoiser(Transformer(config), Diffusion(), ClipShape(9, 32, 32, 8))])


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """Every call of sample_batches, which is answered with zeros."""
    calls: list[dict] = []

    def answer(stage, given, keys, shape, sampling, desc):
        assert all(len(tensor) == len(keys) for tensor in given.values())
        calls.append({"given": given, "keys": [tuple(key) for key in keys]})
        return torch.zeros(len(keys), *shape)

    monkeypatch.setattr("walt.sample.pipeline.sample_batches", answer)
    return calls


def test_every_sample_has_noise_of_its_own(pipeline, asked) -> None:
    pipeline.generate_latents(num=2, **QUICK)
    pipeline.extend(video(9, 2), chunks=3, **QUICK)
    pipeline.upscale(video(14, 2), **QUICK)
    keys = [key for call in asked for key in call["keys"]]
    assert len(keys) == 2 + 3 * 2 + 3 * 2
    # Compared as they are used: to a seed sequence, zeros at the end are as good as absent.
    assert len({key + (0,) * (6 - len(key)) for key in keys}) == len(keys)


def test_extending_gives_the_last_frames(pipeline, asked) -> None:
    pipeline.extend(video(9, 2), **QUICK)
    given = asked[0]["given"]
    assert given["known"].tolist() == [2, 2]
    with torch.no_grad():
        pixels = torch.from_numpy(video(9, 2)[:, -5:]).permute(0, 4, 1, 2, 3) / 127.5 - 1
        expected = pipeline.tokenizer.encode(pixels)
    torch.testing.assert_close(given["frames"][:, :, :2], expected)
    assert not given["frames"][:, :, 2:].any()


@pytest.mark.parametrize(("noise", "level"), [(0.0, 0), (0.1, 99), (0.3, 299)])
def test_noise_on_the_low_resolution(pipeline, asked, noise, level) -> None:
    pipeline.upscale(video(9), noise=noise, **QUICK)
    given = asked[0]["given"]
    assert given["noise_level"].tolist() == [level]  # training drew 0 .. 299
    with torch.no_grad():
        clean = pipeline.tokenizer.encode(torch.from_numpy(video(9, 1)).permute(0, 4, 1, 2, 3) / 127.5 - 1)
    alpha_bar = pipeline.upscalers[0].diffusion.alpha_bar[level]
    added = (given["low_resolution"] - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
    assert 0.7 < added.std() < 1.3


def test_the_clips_of_a_video_share_its_text(pipeline, asked) -> None:
    pipeline.upscale(video(14, 2), text=["a", "b"], **QUICK)
    assert asked[0]["given"]["text"][:, 0].tolist() == [ord("a")] * 3 + [ord("b")] * 3
    assert [key[0] for key in asked[0]["keys"]] == [0, 0, 0, 1, 1, 1]
    assert CLIP.frames == 9  # clips at 0, 4 and 5
