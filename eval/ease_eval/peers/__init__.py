"""The same weights in other runtimes."""
