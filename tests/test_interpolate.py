"""Position tables resampled for another latent size and other windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformer_cases import EVERYTHING, SMALL, inputs, make

from walt.model.convert import interpolate
from walt.presets import PRESETS

TALL = replace(SMALL, latent_size=(5, 8, 8), spatial_window=(1, 8, 8), spacetime_window=(5, 4, 4))
WIDE = replace(TALL, latent_size=(5, 8, 14), spatial_window=(1, 8, 14), spacetime_window=(5, 4, 7))


@pytest.mark.parametrize("config", [SMALL, EVERYTHING], ids=["small", "everything"])
def test_the_same_configuration_gives_the_same_bits(config) -> None:
    model = make(config)
    again = interpolate(model, config).requires_grad_(False)
    assert again is not model
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].data_ptr() != tensor.data_ptr()
    assert torch.equal(again(**inputs(2, config)), model(**inputs(2, config)))


def test_wider_clips_run_and_offset_0_stays() -> None:
    model = make(TALL).train()
    wide = interpolate(model, WIDE)
    assert wide.training
    assert wide.project_in.weight.dtype == torch.float64
    assert wide.layers[1].attention.bias_table.shape == (2, 9, 7, 13)
    out = wide(**inputs(2, WIDE))
    assert out.shape == (2, 4, 5, 8, 14)
    assert out.isfinite().all()
    for old, new in zip(model.layers, wide.layers, strict=True):
        before, after = old.attention.bias_table, new.attention.bias_table
        for place in (lambda n: n // 2, lambda n: 0, lambda n: n - 1):  # offset 0, the largest both ways
            ends = [table[(slice(None), *map(place, table.shape[1:]))] for table in (before, after)]
            torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)
        # Only the width changed: the table's rows are those of before, resampled along the last axis alone.
        column = after[..., after.shape[3] // 2]
        torch.testing.assert_close(column, before[..., before.shape[3] // 2], rtol=0, atol=1e-12)
    assert torch.equal(wide.time_table, model.time_table)


def test_linear_tables_stay_linear() -> None:
    """A slope over offsets stays a slope: half as steep where there are twice as many offsets."""
    model = make(TALL)
    table = model.layers[1].attention.bias_table
    offsets = torch.arange(-3, 4, dtype=torch.float64)
    table.copy_((offsets * 6).expand_as(table))
    model.space_table.copy_(torch.arange(8, dtype=torch.float64)[:, None, None].expand_as(model.space_table))
    wide = interpolate(model, WIDE)
    expected = (torch.arange(-6, 7, dtype=torch.float64) * 3).expand(2, 9, 7, 13)
    torch.testing.assert_close(wide.layers[1].attention.bias_table, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(wide.space_table, model.space_table[:, :1].expand(8, 14, -1), rtol=0, atol=1e-12)


def test_space_is_bicubic() -> None:
    """The cubic overshoots on both sides of an edge; a linear one would not."""
    model = make(TALL)
    model.space_table.copy_((torch.arange(8) >= 4).double()[None, :, None].expand_as(model.space_table))
    row = interpolate(model, WIDE).space_table[0, :, 0]
    assert row.max() > 1.01
    assert row.min() < -0.01
    torch.testing.assert_close(row, 1 - row.flip(0), rtol=0, atol=1e-12)


def test_windows_of_one_frame_keep_what_is_at_offset_0() -> None:
    model = make(TALL)
    short = interpolate(model, replace(TALL, latent_size=(3, 8, 8), spacetime_window=(1, 4, 4)))
    assert torch.equal(short.layers[1].attention.bias_table, model.layers[1].attention.bias_table[:, 4:5])
    assert torch.equal(short.time_table[0], model.time_table[0])
    torch.testing.assert_close(short.time_table[1], model.time_table[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(short.time_table[2], model.time_table[4], rtol=0, atol=1e-12)


def test_only_sizes_may_change() -> None:
    with pytest.raises(ValueError, match=r"config\.width: got 48; expected 32, as the model has"):
        interpolate(make(), replace(SMALL, width=48))


def test_the_paper_s_aspect_ratio() -> None:
    """128x128 -> 128x224: spatial windows 1x16x28, spacetime windows 5x8x14."""
    base = replace(PRESETS["L"][1], layers=2, width=32, heads=2)
    wide = replace(base, latent_size=(5, 16, 28), spatial_window=(1, 16, 28), spacetime_window=(5, 8, 14))
    model = interpolate(make(base), wide)
    assert [layer.attention.bias_table.shape[1:] for layer in model.layers] == [(1, 31, 55), (9, 15, 27)]
    assert model.space_table.shape[:2] == (16, 28)
