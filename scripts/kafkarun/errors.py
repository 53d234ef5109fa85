"""The exceptions of this package: their text is a single line a user can act on."""


class KafkaRunError(Exception):
    """Something outside this program failed: a tool, a download, a broker, a deadline."""


class DeadlinePassed(KafkaRunError):
    """What was waited for did not come in time."""
