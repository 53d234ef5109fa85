#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "subject.h"

/* Makes one random operation, on the file and on its copy, and checks what it tells. */
void operation_make(struct writer *w);

/* Closes all that the writers of a subject have open, and opens it again. */
void reopen_all(struct writer *writers, unsigned count);

/* Fails unless the whole file is its copy, read through every handle. */
void check_whole(struct writer *w);

/* Stores of the mapping reach the daemon. */
void sync_stores(struct writer *w);

#endif
