"""What a document tells its reader to type, held against what is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click
from pydantic import ValidationError

import analysis.__main__
import bench.cli

ROOT = Path(__file__).parents[1]
SHELL = {"cd", "cp", "curl", "echo", "export", "git", "ls", "mkdir", "sbatch", "source"}
GENERATED = ("results", ".venv")


def commands(text: str) -> Iterator[str]:
    """Yield each command of the ``sh`` blocks of a Markdown text, and of its inline code that begins like one."""
    for block in re.findall(r"^[ ]*```(?:sh|bash|shell)\n(.*?)^[ ]*```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield from _split(line.strip().removeprefix("$ "))
    prose = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.M | re.S)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        if re.match(r"(make|bench|wandb|python -m|\.venv/bin/\w+) [a-z-]", span):
            yield from _split(" ".join(span.split()))


def problem(command: str) -> str | None:
    """Return why a command cannot work in this repository, or ``None``."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return None
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    missing = [word for word in _paths(arguments) if not (ROOT / word).exists()]
    if missing:
        return f"{missing[0]} does not exist"
    if program == "make":
        return _make(arguments)
    if program == "bench":
        return _click(bench.cli.main, arguments)
    if re.fullmatch(r"python3?(\.\d+)?", program):
        return _python(arguments)
    if program == "pip":
        return _pip(arguments)
    if program == "accelerate":
        return _accelerate(arguments)
    if program == "wandb":
        return _wandb(arguments)
    if program == "serve":
        return _serve(arguments)
    return None if program in SHELL else f"unknown program {program}"


def _split(line: str) -> Iterator[str]:
    lexer = shlex.shlex(line, posix=False, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if words:
                yield " ".join(words)
            words = []
        else:
            words.append(word)


def _paths(arguments: list[str]) -> Iterator[str]:
    """Yield the arguments that name something kept in the repository."""
    for word in arguments:
        value = word.partition("=")[2] if word.startswith("--") else word
        first = value.split("/")[0]
        if "/" in value and (ROOT / first).exists() and first not in ("", ".", "..", *GENERATED):
            yield value


def _make(arguments: list[str]) -> str | None:
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, assigned, _ = word.partition("=")
        known = rf"\$\({re.escape(name)}\)" if assigned else rf"^{re.escape(name)}:"
        if not word.startswith("-") and not re.search(known, text, re.M):
            return f"Makefile has no {'variable' if assigned else 'target'} {name}"
    return None


def _click(command: click.Command, arguments: list[str]) -> str | None:
    """Parse as click would, short of converting values and calling anything."""
    context = click.Context(command, info_name="command")
    try:
        given, rest, _ = command.make_parser(context).parse_args(list(arguments))
        if isinstance(command, click.Group):
            if not rest:
                return None if given else "a subcommand is missing"
            name, sub, rest = command.resolve_command(context, rest)
            return _click(sub, rest) if sub else f"no subcommand {name}"
        for parameter in command.get_params(context):
            value = given.get(parameter.name or "")
            if parameter.required and (value is None or parameter.value_is_missing(value)) and "help" not in given:
                return f"{parameter.human_readable_name} is missing"
            if isinstance(parameter.type, click.Choice) and isinstance(value, str):
                parameter.type.convert(value, parameter, context)
    except click.UsageError as error:
        return error.format_message()
    return f"{rest[0]} is one argument too many" if rest else None


def _python(arguments: list[str]) -> str | None:
    match arguments:
        case ["-m", "analysis", *rest]:
            return _click(analysis.__main__.main, rest)
        case ["-m", "bench", *rest]:
            return _click(bench.cli.main, rest)
        case ["-m", "pip", *rest]:
            return _pip(rest)
        case ["-m", "pytest" | "venv", *_]:
            return None
        case ["-m", module, *_]:
            return f"no module {module} here"
        case [script, *_] if script.endswith(".py"):
            return None if (ROOT / script).is_file() else f"{script} does not exist"
    return "a module or a script is missing"


def _pip(arguments: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        if match := re.fullmatch(r"(?:\.|variator-bench)\[(.+)\]", word):
            for extra in match[1].split(","):
                if extra not in extras:
                    return f"no extra {extra}"
    files = [file for flag, file in pairwise(arguments) if flag in ("-c", "-r", "--constraint", "--requirement")]
    return next((f"{file} does not exist" for file in files if not (ROOT / file).is_file()), None)


def _accelerate(arguments: list[str]) -> str | None:
    from accelerate.commands.launch import launch_command_parser

    if arguments[:1] != ["launch"]:
        return None if arguments in (["config"], ["env"]) else "no such command"
    try:
        given = launch_command_parser().parse_args(arguments[1:])
    except SystemExit:
        return "accelerate launch does not take these options"
    return _python(["-m" if given.module else "", given.training_script, *given.training_script_args])


def _wandb(arguments: list[str]) -> str | None:
    known = ("agent", "login", "offline", "online", "sweep", "sync")
    return None if arguments and arguments[0] in known else "no such command"


def _serve(arguments: list[str]) -> str | None:
    """Look at the command line of Ray Serve, and at what an application of this package is given."""
    match arguments:
        case ["run", "bench.serving.ray_serve:app", *given]:
            if bare := [word for word in given if "=" not in word]:
                return f"{bare[0]} is no NAME=VALUE"
            return served_arguments(dict(word.split("=", 1) for word in given))
        case ["deploy", file] if file.endswith(".yaml"):
            return None
        case ["status"]:
            return None
    return "no such command"


def served_arguments(given: Mapping[str, object]) -> str | None:
    """Return why the application for Ray Serve cannot be given these arguments, or ``None``."""
    if not find_spec("ray"):
        return None
    from bench.serving.ray_serve import Arguments

    try:
        Arguments.model_validate(given)
    except ValidationError as error:
        return str(error)
    return None
