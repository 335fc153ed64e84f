"""From a sample to a training job, and back to the YAML that trains it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config.codec import decode, encode, merge, nest
from orchestrator.config.schema import TrainJob
from orchestrator.records.secrets import without_secret
from orchestrator.search.space import APART

KEY_LENGTH = 12  # hexadecimal digits; the chance that two of 10,000 arms meet is 2e-7


def apply(base: TrainJob, sample: Mapping[str, Any]) -> TrainJob:
    """`sample` laid on `base`; only the sections that it touches are decoded again.

    Raises:
        ConfigError: see `orchestrator.config.codec.decode`.
    """
    asked: dict[str, Any] = {}
    for path, value in sample.items():
        asked = merge(asked, nest(path, value))
    sections = {}
    for name, given in asked.items():
        section = getattr(base, name)
        sections[name] = decode(type(section), merge(encode(section), given), name)
    return replace(base, **sections)


def with_seed(job: TrainJob, number: int) -> TrainJob:
    """The job of an arm's seed `number`, counted from 0."""
    return replace(job, train=replace(job.train, seed=job.train.seed + number))


def public(job: TrainJob) -> TrainJob:
    """Without a password, for files that others read; the environment gives it again."""
    uri = job.tracking.uri
    clean = None if uri is None else without_secret(uri)
    return replace(job, tracking=replace(job.tracking, uri=clean))


def changed(config: Any) -> dict[str, Any]:
    """What of a dataclass differs from its defaults, as `decode` reads it back equal.

    A section that is named loses the default its owner gave it, so inside one the section's own
    defaults count.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            found[field.name] = changed(value) if dataclasses.is_dataclass(value) else encode(value)
    return found


def arm_key(job: TrainJob) -> str:
    """The same for whatever is trained alike, the seed aside.

    It is made of the job and not of the sample, and of what differs from the defaults: a point that
    is done stays known when a knob is added at the value it had, or the program gets new settings.
    """
    same = changed(replace(job, train=replace(job.train, seed=0)))
    for path in APART:
        *above, name = path.split(".")
        section = same
        for key in above:
            section = section.get(key, {})
        section.pop(name, None)
    same = {key: value for key, value in same.items() if value != {}}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
