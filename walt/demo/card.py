"""The card of a model that is shipped: of what and how it was made, what it measures, and what is known to be wrong."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from walt.atomic import read_json, write_json
from walt.data.simulator import FILM
from walt.errors import WaltError, one_line

CARD = "card.json"


def processor() -> str:
    """The name of this machine's processor, as well as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


def machine(device: torch.device) -> str:
    """What trains on the device."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save_card(folder: Path, card: dict[str, Any]) -> None:
    write_json(folder / CARD, card)


def describe_model(folder: Path) -> str:
    """The card of the model in the folder, as `walt info` prints it; WaltError for one that is broken."""
    card = read_json(folder / CARD)
    try:
        return "\n".join(_lines(folder, card))
    except KeyError as error:
        raise WaltError(f"{folder / CARD} has no {error}: it is no card, or one of another version of walt") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise WaltError(f"{folder / CARD} is broken: {one_line(error)}") from error


def _lines(folder: Path, card: dict[str, Any]) -> list[str]:
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    minutes = sum(stage["seconds"] for stage in card["stages"].values()) / 60
    return [
        f"{folder.name}: {card['what']}",
        f"  {'classes':<16} {', '.join(card['classes'])}",
        *(
            f"  {name:<16} {stage['parameters'] / 1e6:.2f} M parameters, {stage['done']:,} steps,"
            f" {stage['seconds'] / 60:.0f} minutes"
            for name, stage in card["stages"].items()
        ),
        f"  {'files':<16} {size / 1e6:.1f} MB, safetensors, float16",
        f"  {'made by':<16} {card['command']}",
        f"  {'on':<16} {card['machine']}: {minutes / 60:.1f} hours of training",
        *(f"  {name:<16} {text}" for name, text in card["data"].items()),
        f"held-out clips, by {card['evaluation']}",
        *_figures(card["held_out"]),
        "known faults",
        *(f"  - {fault}" for fault in card["faults"]),
    ]


def _figures(held_out: dict[str, Any]) -> list[str]:
    coded = held_out["reconstructions"]
    by_class = coded["by_class"]
    doom = [value for name, value in by_class["psnr"].items() if name != FILM]
    larger = {"super-resolution": held_out["upscaled"]["values"], "bicubic instead": held_out["bicubic"]["values"]}
    distances = {name: result["values"]["frechet_image_distance"] for name, result in held_out.items()}
    return [
        f"  {'PSNR':<16} {sum(doom) / len(doom):.2f} dB over the scenarios, {by_class['psnr'][FILM]:.2f} of the film",
        *(f"    {name:<20} {value:.2f} dB" for name, value in by_class["psnr"].items()),
        f"  {'SSIM':<16} {coded['values']['ssim']:.4f}",
        f"  {'colour error':<16} {coded['values']['colour']:.4f} of a range of 2",
        "  Frechet distance of frames to them",
        *(f"    {name:<20} {distances[name]:.0f}" for name in ("reference", "reconstructions", "samples", "untrained")),
        f"    untrained / samples  {distances['untrained'] / distances['samples']:.1f}",
        *(
            f"  {title:<16} PSNR {made['psnr']:.2f} dB, SSIM {made['ssim']:.4f}, colour error {made['colour']:.4f},"
            f" Frechet distance {made['frechet_image_distance']:.0f} (reference {distances['large_reference']:.0f})"
            for title, made in larger.items()
        ),
    ]
