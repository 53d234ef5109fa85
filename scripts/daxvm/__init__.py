"""Run a command in a VM with real DAX persistent memory, and cut the power of the VM.

Needs no persistent memory and no hardware virtualisation: QEMU emulates both. The guest's root
is the host's, under an overlay in memory. The standard library is all it uses, so that it runs
before a venv exists.

A cut loses the guest's page cache and journals, but not stores that were never flushed: QEMU
emulates no CPU caches. So it proves ordering and fsync, and cannot find a missing cache flush.
"""
