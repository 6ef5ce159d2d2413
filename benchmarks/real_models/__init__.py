"""Real pretrained decoders that are packages of PyPI, as KerasHub presets."""
