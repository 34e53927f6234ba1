"""Options of a command: fields of a dataclass, each with the comment beside it as help, read by tyro.

Every error is a WaltError of one line, in place of tyro's boxes: it names the option, and the nearest one to an unknown
one; sections of settings are checked as those of a file are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.conf import UseAppendAction
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from walt.errors import WaltError, as_user_error, did_you_mean
from walt.model.config import Config
from walt.rates import RATES, as_float, is_rate
from walt.settings import SECTIONS, Settings, section

C = TypeVar("C", bound="Command")
Value = PrimitiveConstructorSpec

# Settings that also have a short name.
SHORT = {
    "--training.steps": "--steps",
    "--training.lr": "--lr",
    "--training.seed": "--seed",
    "--data.batch": "--batch",
    "--data.frames": "--frames",
    "--data.fps": "--fps",
}


class Command:
    """A command: a dataclass of its options, with a method `run`."""

    examples: ClassVar[tuple[str, ...]]

    @classmethod
    def default(cls, arguments: Sequence[str]) -> Command | None:
        """The command with its defaults, if some of them depend on other options."""
        return None

    @classmethod
    def parse(cls, program: str, text: str, arguments: Sequence[str]) -> Command:
        """The command with its options from the command line. --help prints `text` and them, and raises SystemExit(0).

        Raises WaltError for what is unknown, missing or bad.
        """
        try:
            return read(cls, arguments, program, f"{text[0].upper()}{text[1:]}.", cls.default(arguments))
        except SystemExit:
            print("\nexample:  " + "\n          ".join(cls.examples))
            raise

    def run(self) -> None:
        raise NotImplementedError


def value(read: Callable[[str], Any], metavar: str, show: Callable[[Any], str] = str) -> Value:
    """An option of one word. `read` raises ValueError for a bad one; its sentence follows the option's name."""
    return Value(1, metavar, lambda words: read(words[0]), lambda _: True, lambda default: [show(default)])


def words(metavar: str, choices: Iterable[str] = ()) -> Value:
    """An option of one word or more."""

    def read(values: list[str]) -> tuple[str, ...]:
        if not values:
            raise ValueError("expected a value")
        return tuple(map(one_of(*choices), values) if choices else values)

    return Value("*", metavar, read, lambda _: True, list)


def one_of(*choices: Any) -> Callable[[str], Any]:
    """The choice of this name."""

    def read(text: str) -> Any:
        for choice in choices:
            if text == str(choice):
                return choice
        raise ValueError(f"got {text!r}; expected {' or '.join(map(str, choices))}")

    return read


def number(text: str, kind: Callable[[str], Any], what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {what}") from None


def positive(text: str) -> int:
    result = number(text, int, "a whole number")
    if result < 1:
        raise ValueError(f"{text} must be at least 1")
    return int(result)


def natural(text: str) -> int:
    result = number(text, int, "a whole number")
    if result < 0:
        raise ValueError(f"{text} must not be negative")
    if result >= 2**63:
        raise ValueError(f"{text} must be below 2^63")
    return int(result)


def positive_float(text: str) -> float:
    result = number(text, float, "a number")
    if not 0 < result < float("inf"):
        raise ValueError(f"{text} must be above 0")
    return float(result)


def rate(text: str) -> float:
    """ "24", "23.976" or "24000/1001"."""
    result = number(text, as_float, "a number")
    if not is_rate(result):
        raise ValueError(f"{text} must be from {RATES[0]} to {RATES[1]}")
    return float(result)


def size(text: str) -> tuple[int, int]:
    """ "64" or "64x96", height by width."""
    height, _, width = text.partition("x")
    return positive(height), positive(width or height)


def yaml_value(word: str) -> Any:
    """A value as a YAML file has it."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _show(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default)


def share(text: str) -> float:
    result = number(text, float, "a number")
    if not 0 <= result < 1:
        raise ValueError(f"{text} must be {'below 1' if result >= 1 else 'at least 0'}")
    return float(result)


Positive = Annotated[int, value(positive, "N")]
Natural = Annotated[int, value(natural, "N")]
Real = Annotated[float, value(positive_float, "X", "{:g}".format)]
Rate = Annotated[float, value(rate, "X", "{:g}".format)]
Share = Annotated[float, value(share, "X", "{:g}".format)]
Size = Annotated[tuple[int, int], value(size, "H[xW]", lambda pair: f"{pair[0]}x{pair[1]}")]
Repeated = UseAppendAction[list[str]]
PLAIN = {Path: value(Path, "PATH"), str: value(str, "TEXT")}


@dataclass
class _Seen:
    """The options that tyro was told of."""

    required: set[str] = field(default_factory=set)
    valued: set[str] = field(default_factory=set)
    flags: set[str] = field(default_factory=set)


def read(
    command: type[C],
    arguments: Sequence[str],
    program: str = "",
    text: str = "",
    default: Any = None,
    rest: bool = False,
) -> C:
    """See `Command.parse`; with `rest`, unknown options are ignored."""
    seen, printed = _Seen(), io.StringIO()
    try:
        # tyro's help is plain text where it does not go to a terminal. Its errors are boxes, and dropped.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            made, unknown = tyro.cli(
                command,
                prog=program,
                description=text,
                args=["--help"] if not rest and {"-h", "--help"} & {*arguments} else arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
                add_help=not rest,
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=_registry(seen),
            )
    except SystemExit as stop:
        if not stop.code:
            print("\n".join(line.rstrip() for line in printed.getvalue().rstrip().splitlines()))
            raise
        raise WaltError(_missing(arguments, seen)) from None
    if unknown and not rest:
        raise WaltError(_unknown(unknown, seen))
    return made


def _missing(arguments: Sequence[str], seen: _Seen) -> str:
    """The message for tyro's other errors: a required option is missing, or an option's value."""
    known = {*seen.valued, *seen.flags}
    if unknown := [word for word in arguments if word.startswith("--") and _option(word) not in known]:
        return _unknown(unknown, seen)
    if missing := sorted(seen.required - {_option(word) for word in arguments}):
        return f"required: {', '.join(missing)}"
    for word, after in zip(arguments, [*arguments[1:], "--"], strict=True):
        if word.replace("_", "-") in seen.valued and after.startswith("-"):
            return f"{word}: expected a value"
    return "expected a value after each option"


def _unknown(unknown: Sequence[str], seen: _Seen) -> str:
    options = [word for word in unknown if word.startswith("-")]
    for option, after in zip(unknown, [*unknown[1:], "SECTION.FIELD=VALUE"], strict=True):
        if option in ("-s", "--set") or option.startswith("--set="):
            name, _, setting = (option.removeprefix("--set=") if "=" in option else after).partition("=")
            return f"{option.partition('=')[0]} {name}={setting} is now an option of its own: --{name} {setting}"
    if not options:
        return f"unknown argument {unknown[0]!r}"
    option = _option(options[0])
    return f"unknown option {option}{did_you_mean(option, {*seen.valued, *seen.flags})}"


def _option(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _registry(seen: _Seen) -> ConstructorRegistry:
    """tyro's rules, with the option's name in errors about values, and sections of settings checked as in a file."""
    registry = ConstructorRegistry()
    busy = set()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        kind: Any = info.type
        ours = isinstance(kind, type) and issubclass(kind, (Command, Config, Settings))
        if kind in busy or not ours:
            return None
        busy.add(kind)
        spec = ConstructorRegistry.get_struct_spec(info)
        busy.remove(kind)
        assert isinstance(spec, StructConstructorSpec)
        hints = get_type_hints(kind, include_extras=True)
        fields = [dataclasses.replace(old, type=_field(old, hints[old.name], kind, seen)) for old in spec.fields]
        instantiate = (lambda **values: section(kind, values, "--")) if kind in SECTIONS else spec.instantiate
        return StructConstructorSpec(instantiate, tuple(fields))

    return registry


def _field(field: StructFieldSpec, hint: Any, kind: type, seen: _Seen) -> Any:
    """The type of a field, with how tyro reads and shows it."""
    optional = get_origin(hint) in (Union, UnionType)  # None is a default, and no value
    base = get_args(hint)[0] if optional else hint
    base, *extra = get_args(base) if get_origin(base) is Annotated else (base,)
    if kind is Settings:
        return hint if base in SECTIONS else Annotated[hint, tyro.conf.Suppress]  # the preset was chosen before
    if base is Settings or tyro.conf.Positional in extra:
        return hint
    name = field.name.rstrip("_")  # names that are Python keywords end in one
    option = (f"--{SECTIONS[kind]}." if kind in SECTIONS else "--") + name.replace("_", "-")
    aliases = (SHORT[option],) if option in SHORT else ()
    default, hint_of_default, markers = field.default, None, [tyro.conf.FlagConversionOff]
    if kind in SECTIONS:
        spec: Value | None = _setting(base)
    elif base is bool:
        seen.flags.add(f"--no-{option[2:]}" if default else option)
        return Annotated[base, tyro.conf.arg(help_behavior_hint="")]
    else:
        spec = next((item for item in extra if isinstance(item, Value)), PLAIN.get(base))
        markers = [item for item in extra if not isinstance(item, Value)]
        if default in (None, []):
            hint_of_default = ""  # the comment has it
    seen.valued.update((option, *aliases))
    if default in (tyro.MISSING, tyro.MISSING_NONPROP):
        seen.required.add(option)
    argument = tyro.conf.arg(name=name, aliases=aliases, help_behavior_hint=hint_of_default)
    annotated = (base | None if optional else base, argument, *markers, *([_named(option, spec)] if spec else []))
    return Annotated[annotated]


def _named(option: str, spec: Value) -> Value:
    """The value's reader with the option's name in its errors."""

    def read(words: list[str]) -> Any:
        with as_user_error(option):
            return spec.instance_from_str(words)

    def show(default: Any) -> list[str]:
        return ["null"] if default is None else spec.str_from_instance(default)

    return dataclasses.replace(spec, instance_from_str=read, str_from_instance=show)


def _setting(kind: Any) -> Value:
    """A setting's words as a YAML file has them; the section checks what they may be."""
    if get_origin(kind) is tuple:

        def read(words: list[str]) -> Any:
            values = [yaml_value(word) for word in words]
            return values[0] if len(values) == 1 and isinstance(values[0], list) else values

        return Value("*", f"{get_args(kind)[0].__name__.upper()} ...", read, lambda _: True, lambda v: [*map(_show, v)])
    metavar = "TEXT" if kind is str else kind.__name__.upper()
    reads: dict[Any, Callable[[str], Any]] = {int: _whole, float: str, str: str}
    return value(reads.get(kind, yaml_value), metavar, _show)


def _whole(word: str) -> Any:
    """In Python's form: YAML's has octal numbers, such as 010, and base 60."""
    try:
        return int(word)
    except ValueError:
        return None if word == "null" else word
