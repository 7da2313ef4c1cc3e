"""The one error of exporting; what concerns checkpoints and bundles is raised by the packages that own them."""

from ease_runtime.errors import EaseError


class ExportError(EaseError):
    """A bundle that cannot be written, or that does not match its checkpoint."""
