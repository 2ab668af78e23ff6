"""What a person writes to choose a load or a policy: ``bursty``, ``static:4``, ``queue:up=24,down=4``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bench.errors import ConfigError, first_fault, suggest, unknown
from bench.serving.policies import Policy, policies

Choice = TypeVar("Choice")


def read(text: str, what: str, known: Mapping[str, type[Choice]]) -> Choice:
    """Build what ``text`` names.

    Parameters
    ----------
    text
        A name, and behind a colon values of its fields: ``field=value``, commas between; the first may go without its
        name.
    what
        What kind of thing is named, for errors.
    known
        Name -> frozen dataclass.

    Raises
    ------
    ConfigError
        If the name, a field or a value is none.
    """
    name, _, rest = text.partition(":")
    if name not in known:
        raise unknown(what, name, known)
    cls = known[name]
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    given: dict[str, str] = {}
    for index, part in enumerate(rest.split(",") if rest else []):
        field, equals, value = part.partition("=")
        if not equals:
            if index or not fields:
                raise ConfigError(f"{what} '{text}': '{part}' is no field=value.{_fields(name, fields)}")
            field, value = fields[0], part
        if field not in fields:
            raise ConfigError(
                f"{what} '{text}': unknown field '{field}'.{suggest(field, fields)}{_fields(name, fields)}"
            )
        if field in given:
            raise ConfigError(f"{what} '{text}': '{field}' is given twice")
        given[field] = value
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        raise ConfigError(f"{what} '{text}': {first_fault(error)}") from None


def read_policy(text: str) -> Policy:
    """Build the policy that ``text`` names; see `read`."""
    return read(text, "policy", policies())


def written(name: str, choice: Any) -> str:
    """Return the text that `read` would build ``choice`` from, every field named."""
    fields = ",".join(f"{key}={_value(value)}" for key, value in vars(choice).items())
    return f"{name}:{fields}" if fields else name


def defaults(cls: type[Any]) -> str:
    """Return the fields of a load or a policy with their defaults, as they are written behind its name."""
    fields = [
        field.name if field.default is dataclasses.MISSING else f"{field.name}={_value(field.default)}"
        for field in dataclasses.fields(cls)
    ]
    return ",".join(fields)


def _value(value: object) -> str:
    # not rounded: results are found by this text, and another number is another choice
    return str(value).removesuffix(".0")


def _fields(name: str, fields: list[str]) -> str:
    return f" Fields of {name}: {', '.join(fields)}." if fields else f" {name} has no fields."
