"""The training loop and what it stands on: recipes, checkpoints, optimizer, several processes,
second stages.
"""
