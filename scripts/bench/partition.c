#define _GNU_SOURCE
#include "histogram.h"
#include "partition.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    INDEX_BYTES = 10 << 20,        /* segment.index.bytes */
    INDEX_INTERVAL_BYTES = 4096,   /* index.interval.bytes: at most one entry for each append */
    OFFSET_ENTRY_BYTES = 8,
    TIME_ENTRY_BYTES = 12,
    RECORD_BYTES = 1024,
};

static void segment_path(char path[PATH_MAX], const struct partition *partition,
                         const struct segment *segment, const char *suffix)
{
    int length = snprintf(path, PATH_MAX, "%s/%020llu%s", partition->directory,
                          (unsigned long long)segment->base_offset, suffix);
    if (length >= PATH_MAX)
        errx(1, "%s: path too long", partition->directory);
}

static void index_create(struct mapped_index *index, const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);

    if (fd < 0)
        err(1, "%s: open", path);
    if (ftruncate(fd, INDEX_BYTES) != 0)
        err(1, "%s: ftruncate", path);
    index->map = mmap(NULL, INDEX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (index->map == MAP_FAILED)
        err(1, "%s: mmap", path);
    index->used_bytes = 0;
    close(fd);
}

static void index_add(struct mapped_index *index, const void *entry, size_t entry_bytes)
{
    if (index->used_bytes + entry_bytes > INDEX_BYTES)
        return;
    memcpy(index->map + index->used_bytes, entry, entry_bytes);
    index->used_bytes += entry_bytes;
}

/* The file is cut while it is still mapped, as a broker does when it rolls. */
static void index_trim(struct mapped_index *index, const char *path)
{
    if (truncate(path, (off_t)index->used_bytes) != 0)
        err(1, "%s: truncate", path);
    munmap(index->map, INDEX_BYTES);
    index->map = NULL;
}

static void add_index_entries(struct partition *partition, struct segment *segment, off_t position)
{
    uint32_t offset_entry[2] = {(uint32_t)(partition->next_offset - segment->base_offset),
                                (uint32_t)position};
    uint8_t time_entry[TIME_ENTRY_BYTES];
    struct timespec now;

    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    uint64_t now_ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    memcpy(time_entry, &now_ms, sizeof now_ms);
    memcpy(time_entry + sizeof now_ms, offset_entry, sizeof offset_entry[0]);
    index_add(&segment->offsets, offset_entry, OFFSET_ENTRY_BYTES);
    index_add(&segment->times, time_entry, TIME_ENTRY_BYTES);
}

static struct segment *segment_create(struct partition *partition)
{
    struct segment *segment = calloc(1, sizeof *segment);
    char path[PATH_MAX];

    if (segment == NULL)
        err(1, "calloc");
    segment->base_offset = partition->next_offset;
    segment->refs = 1;
    segment_path(path, partition, segment, ".log");
    uint64_t begin_ns = now_ns(CLOCK_MONOTONIC);
    segment->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    partition->create_ns = now_ns(CLOCK_MONOTONIC) - begin_ns;
    if (segment->fd < 0)
        err(1, "%s: open", path);
    segment_path(path, partition, segment, ".index");
    index_create(&segment->offsets, path);
    segment_path(path, partition, segment, ".timeindex");
    index_create(&segment->times, path);
    return segment;
}

static void segment_seal(const struct partition *partition, struct segment *segment)
{
    char path[PATH_MAX];

    segment_path(path, partition, segment, ".index");
    index_trim(&segment->offsets, path);
    segment_path(path, partition, segment, ".timeindex");
    index_trim(&segment->times, path);
    segment_path(path, partition, segment, ".log");
    if (partition->options.fsync_on_roll && fsync(segment->fd) != 0)
        err(1, "%s: fsync", path);
}

/* The caller holds the partition's lock. */
static void segment_unref(struct segment *segment)
{
    if (--segment->refs > 0)
        return;
    close(segment->fd);
    free(segment);
}

/* Kafka renames first and deletes later, so that fetches still running keep their file. */
static void delete_file(const struct partition *partition, const struct segment *segment,
                        const char *suffix)
{
    char path[PATH_MAX], renamed[PATH_MAX + sizeof ".deleted"];

    segment_path(path, partition, segment, suffix);
    snprintf(renamed, sizeof renamed, "%s.deleted", path);
    if (rename(path, renamed) != 0)
        err(1, "%s: rename", path);
    if (unlink(renamed) != 0)
        err(1, "%s: unlink", renamed);
}

static void delete_oldest(struct partition *partition)
{
    struct segment *segment = partition->oldest;

    delete_file(partition, segment, ".log");
    delete_file(partition, segment, ".index");
    delete_file(partition, segment, ".timeindex");
    pthread_mutex_lock(&partition->lock);
    partition->oldest = segment->next;
    partition->segment_count--;
    segment->deleted = true;
    segment_unref(segment);
    pthread_mutex_unlock(&partition->lock);
}

static void roll(struct partition *partition)
{
    struct segment *previous = partition->active;

    if (previous != NULL)
        segment_seal(partition, previous);
    struct segment *segment = segment_create(partition);
    pthread_mutex_lock(&partition->lock);
    if (previous != NULL)
        previous->next = segment;
    else
        partition->oldest = segment;
    partition->active = segment;
    partition->segment_count++;
    pthread_mutex_unlock(&partition->lock);
    if (partition->segment_count > partition->options.retained_segments)
        delete_oldest(partition);
}

void partition_create(struct partition *partition, const char *parent, unsigned number,
                      const struct partition_options *options)
{
    memset(partition, 0, sizeof *partition);
    partition->options = *options;
    pthread_mutex_init(&partition->lock, NULL);
    pthread_cond_init(&partition->appended, NULL);
    int length = snprintf(partition->directory, PATH_MAX, "%s/load-%u", parent, number);
    if (length >= PATH_MAX)
        errx(1, "%s: path too long", parent);
    if (mkdir(partition->directory, 0755) != 0)
        err(1, "%s: mkdir", partition->directory);
    roll(partition);
}

static void write_fully(const struct partition *partition, int fd, const uint8_t *data,
                        size_t remaining_bytes)
{
    while (remaining_bytes > 0) {
        ssize_t written = write(fd, data, remaining_bytes);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            err(1, "%s: write", partition->directory);
        if (written == 0)
            errx(1, "%s: write accepted nothing", partition->directory);
        data += written;
        remaining_bytes -= (size_t)written;
    }
}

struct append_times partition_append(struct partition *partition, const void *batch,
                                     size_t batch_bytes)
{
    bool full = (size_t)partition->active->size + batch_bytes > partition->options.segment_bytes;
    struct append_times times = {0};
    uint64_t begin_ns = now_ns(CLOCK_MONOTONIC);

    if (full) {
        roll(partition);
        times.roll_ns = now_ns(CLOCK_MONOTONIC) - begin_ns;
        times.create_ns = partition->create_ns;
        begin_ns += times.roll_ns;
    }
    struct segment *segment = partition->active;
    write_fully(partition, segment->fd, batch, batch_bytes);
    times.write_ns = now_ns(CLOCK_MONOTONIC) - begin_ns;
    if (partition->bytes_since_index_entry > INDEX_INTERVAL_BYTES) {
        add_index_entries(partition, segment, segment->size);
        partition->bytes_since_index_entry = 0;
    }
    partition->bytes_since_index_entry += batch_bytes;
    partition->next_offset += (batch_bytes + RECORD_BYTES - 1) / RECORD_BYTES;

    pthread_mutex_lock(&partition->lock);
    segment->size += (off_t)batch_bytes;
    pthread_cond_broadcast(&partition->appended);
    pthread_mutex_unlock(&partition->lock);
    return times;
}

/* A reader that fell behind retention goes on at the oldest segment there is. */
static struct segment *segment_after(const struct partition *partition,
                                     const struct segment *segment)
{
    if (segment == NULL || segment->deleted)
        return partition->oldest;
    return segment->next;
}

static void cursor_advance(const struct partition *partition, struct cursor *cursor)
{
    struct segment *next = segment_after(partition, cursor->segment);

    next->refs++;
    if (cursor->segment != NULL)
        segment_unref(cursor->segment);
    cursor->segment = next;
    cursor->position = 0;
}

size_t partition_await(struct partition *partition, struct cursor *cursor)
{
    size_t available_bytes = 0;

    pthread_mutex_lock(&partition->lock);
    while (!partition->finished) {
        if (cursor->segment != NULL && cursor->position < cursor->segment->size) {
            available_bytes = (size_t)(cursor->segment->size - cursor->position);
            break;
        }
        if (segment_after(partition, cursor->segment) != NULL)
            cursor_advance(partition, cursor);
        else
            pthread_cond_wait(&partition->appended, &partition->lock);
    }
    pthread_mutex_unlock(&partition->lock);
    return available_bytes;
}

void partition_release(struct partition *partition, struct cursor *cursor)
{
    if (cursor->segment == NULL)
        return;
    pthread_mutex_lock(&partition->lock);
    segment_unref(cursor->segment);
    pthread_mutex_unlock(&partition->lock);
    cursor->segment = NULL;
}

void partition_finish(struct partition *partition)
{
    pthread_mutex_lock(&partition->lock);
    partition->finished = true;
    pthread_cond_broadcast(&partition->appended);
    pthread_mutex_unlock(&partition->lock);
}

void partition_remove(struct partition *partition)
{
    segment_seal(partition, partition->active);
    while (partition->oldest != NULL)
        delete_oldest(partition);
    if (rmdir(partition->directory) != 0)
        err(1, "%s: rmdir", partition->directory);
}
