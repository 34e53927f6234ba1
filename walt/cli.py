"""The command line: `walt demo`, `train`, `sample`, `evaluate` and `info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from walt import commands
from walt.config import PRESETS
from walt.demo import Demo, DemoConfig, summary
from walt.errors import WaltError
from walt.simulator import SCENARIOS

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """An argument error is one line, like any other error of the user's."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 for a mistake of the user's (one line on stderr), 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except WaltError as error:
        print(f"walt: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as interruption:
        what = f": {interruption}" if str(interruption) else ""
        again = "; run the same command again to go on" if arguments.command in ("demo", "train") else ""
        print(f"\nwalt: interrupted{what}{again}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="walt", description="W.A.L.T video diffusion: train small, sample, look inside.")
    group = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    demo = _command(
        group,
        "demo",
        _demo,
        "train a small model on rendered and filmed clips, sample it, write a report",
        "walt demo --out runs/demo --minutes 12",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for all output (default: %(default)s)"
    )
    demo.add_argument(
        "--scenarios", nargs="+", metavar="NAME", default=SCENARIOS, help="ViZDoom scenarios, each one a class"
    )
    demo.add_argument(
        "--preset", default="tiny", choices=tuple(PRESETS), help="sizes of the models (default: %(default)s)"
    )
    helps = {
        "minutes": "budget of wall-clock time",
        "clips": "training clips a class",
        "samples": "held-out and generated clips a class",
        "frames": "frames a clip, 1 + 4k",
        "size": "height and width in pixels, a multiple of 8",
        "tokenizer_steps": "training steps of the tokenizer, at most",
        "transformer_steps": "training steps of the transformer, at most",
        "sampling_steps": "DDIM steps",
        "seed": "of data, weights, batches and samples",
    }
    for field in fields(DemoConfig):
        if field.name in helps:
            kind = _positive_float if field.name == "minutes" else _natural if field.name == "seed" else _positive
            option = "--" + field.name.replace("_", "-")
            text = f"{helps[field.name]} (default: %(default)s)"
            demo.add_argument(option, type=kind, default=field.default, metavar="N", help=text)

    train = _command(
        group,
        "train",
        _train,
        "train a tokenizer, or a transformer on its latents, on a folder of videos",
        "walt train tokenizer --data videos --out runs/mine && walt train base --data videos --out runs/mine",
    )
    train.add_argument("stage", choices=("tokenizer", "base"), help="base needs the tokenizer of the same --out")
    train.add_argument("--data", type=Path, required=True, help="folder of videos; subfolders are classes")
    train.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    train.add_argument(
        "--preset", default="tiny", help="sizes of the model (default: %(default)s); see walt info --all"
    )
    train.add_argument(
        "--steps", type=_positive, default=1000, metavar="N", help="training steps (default: %(default)s)"
    )
    train.add_argument("--batch", type=_positive, default=4, metavar="N", help="clips a step (default: %(default)s)")
    train.add_argument("--lr", type=_positive_float, default=1e-3, metavar="X", help="peak (default: %(default)s)")
    train.add_argument("--frames", type=_positive, default=17, metavar="N", help="1 + 4k (default: %(default)s)")
    train.add_argument("--size", type=_positive, default=64, metavar="N", help="in pixels (default: %(default)s)")
    train.add_argument("--seed", type=_natural, default=0, metavar="N", help="(default: %(default)s)")

    sample = _command(
        group,
        "sample",
        commands.sample,
        "sample clips or pictures from a trained model",
        "walt sample --from runs/demo --class basic --num 4 --out basic.mp4",
    )
    sample.add_argument("--from", dest="source", type=Path, required=True, help="folder of a trained model")
    sample.add_argument("--class", dest="label", help="name or number (default: one sample of each class)")
    sample.add_argument(
        "--num", type=_positive, default=None, metavar="N", help="samples (default: one, or one a class)"
    )
    sample.add_argument("--images", action="store_true", help="independent pictures instead of clips")
    sample.add_argument("--steps", type=_positive, default=50, metavar="N", help="DDIM steps (default: %(default)s)")
    sample.add_argument("--seed", type=_natural, default=0, metavar="N", help="(default: %(default)s)")
    sample.add_argument(
        "--out", type=Path, default=None, help=".mp4, .gif, or .png for pictures (default: samples.mp4)"
    )

    evaluate = _command(
        group,
        "evaluate",
        commands.evaluate,
        "PSNR of a tokenizer on a video file",
        "walt evaluate --from runs/demo --video film.mp4 --frames 17",
    )
    evaluate.add_argument("--from", dest="source", type=Path, required=True, help="folder of a trained model")
    evaluate.add_argument("--video", type=Path, required=True, help="video file; its centre square is used")
    evaluate.add_argument("--frames", type=_positive, default=17, metavar="N", help="1 + 4k (default: %(default)s)")
    evaluate.add_argument("--size", type=_positive, default=64, metavar="N", help="in pixels (default: %(default)s)")

    info = _command(
        group,
        "info",
        commands.info,
        "shapes, parameters and FLOPs of the configurations",
        "walt info L    walt info --all",
    )
    info.add_argument("name", nargs="?", default="tiny", help="a preset (default: %(default)s)")
    info.add_argument("--all", action="store_true", help="every preset")
    return top


def _command(
    group: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, example: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = group.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _positive(text: str) -> int:
    value = _number(text, int, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(value)


def _natural(text: str) -> int:
    value = _number(text, int, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return int(value)


def _positive_float(text: str) -> float:
    value = _number(text, float, "a number")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _number(text: str, kind: type[int] | type[float], what: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def _demo(arguments: argparse.Namespace) -> None:
    given = {field.name: getattr(arguments, field.name) for field in fields(DemoConfig) if field.name in arguments}
    metrics = Demo(DemoConfig(**given), arguments.out).run()
    print("\n".join(summary(metrics, arguments.out)))


def _train(arguments: argparse.Namespace) -> None:
    (commands.train_tokenizer if arguments.stage == "tokenizer" else commands.train_base)(arguments)
