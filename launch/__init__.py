"""Launchers (torchrun, DeepSpeed) and the packaged configs."""
