"""KerasHub presets of real pretrained decoders, from packages on PyPI."""
