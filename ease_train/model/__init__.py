"""The decoder with exits."""
