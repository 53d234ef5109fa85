/*
 * media: touching mapped persistent memory that may have gone bad.
 *
 * A load or a store of a page with a media error is a SIGBUS.
 */
#ifndef PAFKAFS_MEDIA_H
#define PAFKAFS_MEDIA_H

/* From now on a SIGBUS within media_touch ends it; any other goes where it went
 * before.  Once is enough; 0 or -errno. */
int media_catch_errors(void);

/* What touch returns, or -EIO when it met a media error: any part of what it
 * does may have been done then.  touch takes no lock and allocates nothing. */
int media_touch(int (*touch)(void *), void *arg);

#endif
