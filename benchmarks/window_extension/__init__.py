"""The study of what really extends a student's window.

See `benchmarks/window_extension.md` for what came out, and
`python -m benchmarks.window_extension --help`.
"""
