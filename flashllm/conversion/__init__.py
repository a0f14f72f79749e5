"""Checkpoint to container (`convert.convert`), and what can be made of either on the way."""
