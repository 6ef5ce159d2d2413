"""Compiles whole training steps for chips that are not there."""
