"""An older bundle is built again from the checkpoint that its manifest records: the runtime reads one format
only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ease_common.errors import ExportError, RequestError
from ease_export.build import export_bundle, is_bundle
from ease_runtime.bundle.manifest import (
    CACHE_LAYOUTS,
    FORMAT_VERSION,
    MANIFEST_FILE,
    PRECISIONS,
    Manifest,
    sha256_of,
)
from ease_runtime.policies.thresholds import Thresholds

SUMS = {"checkpoint_config_sha256": "config.json", "weights_sha256": "model.safetensors"}


@dataclass(frozen=True)
class Upgrade:
    """What became of a bundle. `manifest` None: it was of this format and of its target's layout already."""

    manifest: Manifest | None
    checkpoint: Path
    lost_calibration: bool = False


def upgrade_bundle(bundle: Path, checkpoint: Path | None = None) -> Upgrade:
    """Build a bundle again in the same precision, whole or not at all; its calibration stays, since model and
    precision do.

    Without `checkpoint`, it is looked for beside the bundle, by the name that the manifest records. Raises
    ExportError when it is not there or is another, CheckpointError when it cannot be read.
    """
    if not is_bundle(bundle):
        raise ExportError(f"no bundle at {bundle}; make one: ease-export build CHECKPOINT {bundle}")
    values: dict[str, Any] = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
    source = values.get("source") or {}
    path = checkpoint or bundle.parent / str(source.get("checkpoint"))
    target = str(values.get("target") or "")
    if values["format_version"] == FORMAT_VERSION and values["cache_layout"] == CACHE_LAYOUTS.get(target):
        return Upgrade(None, path)
    if not path.is_dir():
        raise ExportError(
            f"{bundle} was built from the checkpoint {str(source.get('checkpoint'))!r}, which is not at "
            f"{path}; "
            f"say where it is: ease-export upgrade {bundle} --checkpoint CHECKPOINT"
        )
    for key, name in SUMS.items():
        if key in source and (not (path / name).is_file() or sha256_of(path / name) != source[key]):
            raise ExportError(
                f"{path} is not what {bundle} was built from: its {name} differs; "
                f"give that one with --checkpoint, or build from this: ease-export build {path} {bundle}"
            )
    precision = values.get("precision")
    if precision not in PRECISIONS:
        raise ExportError(
            f"{bundle} is of the precision {precision!r}, expected one of: {', '.join(PRECISIONS)}"
        )
    calibration = _calibration(values)
    exits = [leave["layer"] for leave in values["exits"]]
    manifest = export_bundle(path, bundle, precision, calibration, target or None, exits)
    return Upgrade(manifest, path, lost_calibration=bool(values.get("calibration")) and not calibration)


def _calibration(values: dict[str, Any]) -> dict[str, Any]:
    """An older bundle's calibration in the notation of this format; nothing where it is not one of
    its exits.
    """
    found: dict[str, Any] = values.get("calibration") or {}
    try:
        thresholds = Thresholds.of(found["thresholds"]).for_exits(len(values["exits"]) - 1)
        tested = [
            {**one, "thresholds": Thresholds.of(one["thresholds"]).to_json()} for one in found["tested"]
        ]
    except (KeyError, TypeError, RequestError):
        return {}
    return {**found, "thresholds": thresholds.to_json(), "tested": tested}
