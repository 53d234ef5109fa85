"""What the running kernel does right, where its version is the only way to tell.  Pure."""

import re

# First versions in which a write that bypasses the page cache drops cached pages after it has
# reached the file, too ("fuse: Invalidate the page cache after FOPEN_DIRECT_IO write").  Without,
# a sendfile at the tail that overlaps an append may leave a page in the cache that ends in zeros.
# The stable series have it some releases earlier than said here.
_DIRECT_IO_SINCE = {(6, 6): 130, (6, 12): 75, (6, 18): 10}
_DIRECT_IO_MAINLINE = (6, 19)

_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def drops_pages_after_direct_write(release: str) -> bool:
    """Whether a kernel of this release (`uname -r`) is known to.  Series that are kept alive by a
    distribution alone are not."""
    found = _RELEASE.match(release)
    if found is None:
        return False
    series, patch = (int(found[1]), int(found[2])), int(found[3] or 0)
    if series >= _DIRECT_IO_MAINLINE:
        return True
    return series in _DIRECT_IO_SINCE and patch >= _DIRECT_IO_SINCE[series]
