"""The one exception of the benchmarks: its text is a single line a user can act on."""


class BenchError(Exception):
    """A tool is missing or failed, or the machine cannot hold the benchmark."""
