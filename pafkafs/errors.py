"""The errors that end a command, each with its message for the user and its exit status."""

EXIT_UNHEALTHY = 1
EXIT_USAGE = 2
EXIT_NOT_SYNCED = 3


class PafkafsError(Exception):
    """Something is wrong that the user can mend: the message says what, and what to do."""

    exit_status = EXIT_UNHEALTHY


class UsageError(PafkafsError):
    """An option or argument cannot be used as it was given."""

    exit_status = EXIT_USAGE
