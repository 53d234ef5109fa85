/*
 * copy: the contents of a file to another device, past the page cache.
 *
 * Steps of whole blocks with O_DIRECT, at low priority; where a filesystem has
 * no O_DIRECT they go through the page cache, and are dropped from it.
 */
#ifndef PAFKAFS_COPY_H
#define PAFKAFS_COPY_H

#include <stdbool.h>
#include <sys/types.h>

struct copy_request {
	int from_fd, to_fd;
	off_t offset, end;
	bool keep_holes; /* leaves them out: the target has nothing there yet */
	bool urgent;     /* others wait for it: ordinary priority */
};

/*
 * Copies [offset, end) to the same place, as far as the source goes.  0, or
 * -errno; *at_source tells whose it is.
 *
 * The target may become longer than end, by zeros up to a whole block: the
 * caller sets its size.  The block around each end is copied as a whole: it is
 * what the source has there by now.  Nothing is durable when it returns.
 */
int copy_data(const struct copy_request *request, bool *at_source);

#endif
