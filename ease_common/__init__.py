"""What every package of EASE stands on: errors, settings, lists on the command line, whole-or-nothing files.

Imports nothing of EASE.
"""
