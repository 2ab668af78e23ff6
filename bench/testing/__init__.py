"""Tests that a method of any package can run on itself, and the tiny checkpoints that they need."""
