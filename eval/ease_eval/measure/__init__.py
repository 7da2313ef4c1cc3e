"""Perplexity, depth, speed and agreement of a bundle, and what they are shown as."""
