"""pafkafs: a FUSE filesystem that gives stock Kafka a fast and a slow tier in one directory."""

from importlib.metadata import version

__version__ = version("pafkafs")
