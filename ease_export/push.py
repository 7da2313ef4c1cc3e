"""A bundle goes to the Hugging Face hub, where `OWNER/NAME` then is its name for every command."""

from pathlib import Path

from ease_common.errors import ExportError
from ease_common.hub import hub_failure, is_hub_id
from ease_runtime.bundle.manifest import MANIFEST_FILE, Manifest, load_manifest

CARD_FILE = "README.md"


def push_bundle(bundle: Path, name: str, *, private: bool = False, card: Path | None = None) -> str:
    """Put a bundle's files and a card on the hub, in one commit; returns the commit's address.

    The repository is made where there is none. Raises BundleError for a bundle that is damaged, ExportError
    when the hub does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not is_hub_id(name):
        raise ExportError(f"{name} is no name on the hub; expected OWNER/NAME")
    manifest = load_manifest(bundle)
    text = card.read_bytes() if card else model_card(manifest, name).encode()
    files: dict[str, bytes | Path] = {CARD_FILE: text, MANIFEST_FILE: bundle / MANIFEST_FILE}
    files |= {file: bundle / file for file in manifest.files}
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.create_commit(
            name,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=f"EASE bundle, {manifest.precision}",
        )
    except Exception as error:  # the hub's client lets through whatever its transport raises
        said = f"{name} was not taken by the Hugging Face hub: {hub_failure(error)}"
        raise ExportError(said) from None
    return commit.commit_url


def model_card(manifest: Manifest, name: str) -> str:
    """What the hub shows of a bundle: what it is, and how it is run."""
    layers = ", ".join(str(leave.layer) for leave in manifest.exits)
    return f"""---
library_name: onnx
pipeline_tag: text-generation
tags: [ease, early-exit, onnx]
---
# {name.partition("/")[2]}

A language model whose tokens may leave early, as graphs of ONNX Runtime: {manifest.num_layers} layers of
width {manifest.dim}, exits after layers {layers}, weights in {manifest.precision}, context
{manifest.max_positions}.

```
pip install ease-lm
ease-run generate {name} --prompt "..." --show-exits
```
"""
