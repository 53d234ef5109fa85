"""Run a real Kafka broker and prove its data: download, start, stop, kill, produce, check.

Knows Kafka and nothing of pafkafs, so the same code works on any log directory.
"""
