"""The exceptions of this package: their text is a single line a user can act on."""


class VmError(Exception):
    """The VM, or what is needed to make one, failed: not the command in it."""


class TimePassed(VmError):
    """The command in the VM did not end in time."""
