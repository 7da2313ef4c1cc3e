"""The command ease-run."""
