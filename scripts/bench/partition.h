/*
 * One Kafka partition directory as a broker treats it: a growing segment with two mapped indexes,
 * rolled at a fixed size, the oldest segments deleted. One thread appends; any number read the tail
 * through cursors. Every failure ends the process with one line on stderr.
 */
#ifndef BENCH_PARTITION_H
#define BENCH_PARTITION_H

#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdint.h>
#include <sys/types.h>

struct partition_options {
    size_t segment_bytes;
    unsigned retained_segments; /* the active one included */
    bool fsync_on_roll;
};

/* A file that is mapped shared while its descriptor is already closed. */
struct mapped_index {
    uint8_t *map;
    size_t used_bytes;
};

struct segment {
    uint64_t base_offset;
    int fd; /* appends and fetches share it, as they do in a broker */
    unsigned refs;
    bool deleted;
    off_t size; /* appended and visible to readers */
    struct segment *next;
    struct mapped_index offsets;
    struct mapped_index times;
};

struct partition {
    char directory[PATH_MAX];
    struct partition_options options;
    uint64_t next_offset;
    size_t bytes_since_index_entry;
    uint64_t create_ns; /* of the active segment's file */
    pthread_mutex_t lock; /* guards all that follows, and each segment's refs, deleted, size, next */
    pthread_cond_t appended;
    struct segment *oldest;
    struct segment *active;
    unsigned segment_count;
    bool finished;
};

/* Where a tail reader stands; zeroed to begin at the oldest segment. */
struct cursor {
    struct segment *segment;
    off_t position;
};

void partition_create(struct partition *partition, const char *parent, unsigned number,
                      const struct partition_options *options);
/* Where the time of an append went. */
struct append_times {
    uint64_t roll_ns;   /* all that comes before the write; 0 if it did not roll */
    uint64_t create_ns; /* in roll_ns: of the segment's own file */
    uint64_t write_ns;
};

struct append_times partition_append(struct partition *partition, const void *batch,
                                     size_t batch_bytes);

/* Waits for data behind the cursor; returns how many bytes there are, 0 once finished. */
size_t partition_await(struct partition *partition, struct cursor *cursor);
void partition_release(struct partition *partition, struct cursor *cursor);

/* No more appends: readers that wait are let go. */
void partition_finish(struct partition *partition);
void partition_remove(struct partition *partition);

#endif
