"""Options that several commands which run a bundle share."""

from pathlib import Path
from typing import Any

import click

from ease_runtime.bundle.names import find_bundle
from ease_runtime.ort.device import DEVICES
from ease_runtime.policies.thresholds import Thresholds

DEVICE_FLAG = click.option(
    "--device",
    default="auto",
    show_default=True,
    help=f"One of: {', '.join(DEVICES)}; auto is what the bundle was made for, where that works.",
)

EXACT_FLAG = click.option(
    "--exact",
    is_flag=True,
    help="The same bits however tokens are divided into passes: verify's, in int4 at full depth, too.",
)


class BundleName(click.ParamType[Path]):
    """A bundle's directory, the name of one that comes with this package, or its id on the hub."""

    name = "bundle"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return find_bundle(value)


class ThresholdFlag(click.ParamType[Thresholds]):
    """One threshold for every early exit, or one each: 0.5 or off,0.7."""

    name = "X[,X...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Thresholds:
        return Thresholds.of(value)


class ThresholdRows(click.ParamType[tuple[Thresholds, ...]]):
    """Several settings, each one threshold for every early exit: 0.5,0.7,0.9."""

    name = "X[,X...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Thresholds, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(ThresholdFlag().convert(part, param, ctx) for part in str(value).split(","))
