"""The study of what really extends a student's window.

See `benchmarks/window_extension.md` for the results, and
`python -m benchmarks.window_extension --help`.
"""
