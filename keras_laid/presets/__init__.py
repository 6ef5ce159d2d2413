"""Paths of the embedded presets, for `PaliGemmaCausalLM.from_preset`."""

import pathlib

_HERE = pathlib.Path(__file__).parent

TEACHER = str(_HERE / "digits_teacher")
STUDENT = str(_HERE / "digits_student")
SINGLE_IMAGE_STUDENT = str(_HERE / "digits_single_image")
