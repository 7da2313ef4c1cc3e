"""Models of other projects in, and back out."""
