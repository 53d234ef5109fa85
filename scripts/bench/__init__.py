"""Benchmarks of a log directory: raw fast device, mergerfs and pafkafs over the same devices."""
