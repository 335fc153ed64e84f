"""Strict mapping <-> dataclasses: every error names a dotted path and the nearest known key."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from orchestrator.errors import ConfigError, nearest

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ConfigError: no such file, not YAML, not a mapping.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(
            "--config", "a YAML file", f"none at {path}", nearest(path.name, near)
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(str(path), "YAML", reason, "repair the file") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(str(path), "a mapping", type(document).__name__, "see jobs/configs/")
    return document


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping. A duration replaces the one below it whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and not _duration(value):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _duration(value: Mapping[str, Any]) -> bool:
    return bool(value) and set(value) <= {"epochs", "steps"}


def nest(path: str, value: Any) -> dict[str, Any]:
    """`a.b.c`, v -> {"a": {"b": {"c": v}}}"""
    nested: Any = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return cast("dict[str, Any]", nested)


def decode(cls: type[T], mapping: Mapping[str, Any], path: str = "") -> T:
    """A dataclass from a mapping; fields left out keep their defaults.

    Raises:
        ConfigError: unknown key, wrong type, value outside a Literal.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            known = sorted(hints)
            raise ConfigError(where, "a known key", repr(str(key)), nearest(str(key), known))
        values[key] = _value(hints[key], value, where)
    return cls(**values)


def encode(value: Any) -> Any:
    """Dataclasses -> plain mappings that `decode` reads back equal."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def flatten(mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted path -> leaf."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            flat |= flatten(value, where)
        else:
            flat[where] = value
    return flat


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [arg for arg in get_args(hint) if arg is not type(None)]
        return _value(inner, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            keys = ", ".join(f.name for f in dataclasses.fields(hint))
            raise ConfigError(where, f"a mapping with {keys}", _show(value))
        return decode(hint, value, where)
    if origin is Literal:
        return _literal(get_args(hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(where, "a list", _show(value))
        return tuple(_value(get_args(hint)[0], item, where) for item in value)
    return _scalar(hint, value, where)


def _literal(choices: tuple[str, ...], value: Any, where: str) -> str:
    if isinstance(value, bool):  # YAML 1.1 reads yes and no as booleans
        value = "yes" if value else "no"
    text = str(value)
    if text in choices:
        return text
    listed = ", ".join(choices)
    raise ConfigError(where, f"one of {listed}", _show(value), nearest(text, choices))


def _scalar(hint: type[Any], value: Any, where: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(where, "true or false", _show(value))
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ConfigError(where, "a whole number", _show(value))
    if hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                pass
        raise ConfigError(where, "a number", _show(value))
    if hint is str:
        if isinstance(value, str):
            return value
        raise ConfigError(where, "text", _show(value))
    raise TypeError(f"{where}: no codec for {hint}")


def _show(value: Any) -> str:
    return repr(value) if not isinstance(value, Mapping) else "a mapping"
