"""The command ease-eval."""
