"""Tests with a real Kafka broker whose log directory is on a pafkafs mount."""
