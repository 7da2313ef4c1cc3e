"""From what a user calls a bundle to the directory that holds it.

find_bundle("runs/demo/bundle")    # what is there wins
find_bundle("ease:code")           # comes with this package
find_bundle("OWNER/NAME")          # from the Hugging Face hub, or from its cache
"""

import json
from pathlib import Path

from ease_common.errors import BundleError, did_you_mean
from ease_common.hub import hub_failure, is_hub_id
from ease_runtime.bundle.manifest import MANIFEST_FILE

SHIPPED = Path(__file__).parent.parent / "shipped"
SCHEME = "ease:"


def find_bundle(name: str | Path) -> Path:
    """The directory of a bundle by its name; a path that is not there is returned as it stands.

    Raises BundleError for a shipped bundle that does not exist and a hub that does not give it.
    """
    path = Path(name)
    text = str(name)
    if path.exists():
        return path
    if text.startswith(SCHEME):
        return shipped_bundle(text.removeprefix(SCHEME))
    if is_hub_id(text) and not path.parent.is_dir():
        return download_bundle(text)
    return path


def shipped_bundle(name: str) -> Path:
    """A bundle that comes with this package. Raises BundleError."""
    known = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) if SHIPPED.is_dir() else []
    if name not in known:
        raise BundleError(f"no bundle {SCHEME}{name} comes with this package; {did_you_mean(name, known)}")
    return SHIPPED / name


def download_bundle(name: str) -> Path:
    """A bundle's files from the hub, those alone that its manifest names. Raises BundleError."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        manifest = Path(hf_hub_download(name, MANIFEST_FILE))
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        wanted = [MANIFEST_FILE, *files]
        return Path(snapshot_download(name, revision=manifest.parent.name, allow_patterns=wanted))
    except Exception as error:  # the hub's client lets through whatever its transport raises
        raise BundleError(
            f"no bundle at {name}, and {name} did not come from the Hugging Face hub: {hub_failure(error)}; "
            f"make one: ease-export build CHECKPOINT {name}"
        ) from None
