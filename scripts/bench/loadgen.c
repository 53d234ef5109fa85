/*
 * Loads a directory the way a Kafka broker does and reports what that cost: writer threads append
 * batches to a partition each, tail readers fetch with fstat and sendfile. The sink is /dev/null,
 * which takes the pages without a copy, as a network card with scatter-gather would.
 *
 * Prints one JSON object. Without --rate-mib an append's latency is the time it took; with it, the
 * time since the append was due, so that a stall is not hidden by the appends it kept from starting.
 */
#define _GNU_SOURCE
#include "histogram.h"
#include "partition.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <time.h>

enum {
    THREADS_MAX = 64,
    FETCH_BYTES_MAX = 1 << 20, /* max.partition.fetch.bytes */
    /*
     * A producer closes a batch when the next record does not fit, so batches end anywhere in a
     * page. That matters: a page written in two parts costs some file systems more than its share.
     */
    BATCH_SHORTFALL_BYTES = 307,
    NS_PER_S = 1000000000,
};

struct options {
    const char *directory;
    unsigned writers;
    unsigned readers;
    size_t batch_bytes;
    double seconds;
    double rate_mib_per_s; /* of each writer; 0 for as fast as it goes */
    struct partition_options partition;
};

/* What appends take by themselves, however late they began. */
struct roll_costs {
    struct histogram write; /* of appends that did not roll */
    struct histogram first_write; /* to a new segment */
    struct histogram first_append; /* the same, and the creation of its file */
    struct histogram roll; /* all of an append that rolled */
};

struct writer {
    pthread_t thread;
    const struct options *options;
    struct partition partition;
    uint64_t first_due_ns;
    uint64_t deadline_ns;
    uint64_t bytes;
    struct histogram latency;
    struct roll_costs costs;
};

struct reader {
    pthread_t thread;
    struct partition *partition;
    int sink_fd;
    uint64_t bytes;
    struct histogram latency;
};

struct totals {
    uint64_t bytes;
    struct histogram latency;
    struct roll_costs costs; /* of writers */
};

static void sleep_until(uint64_t due_ns)
{
    struct timespec due = {.tv_sec = (time_t)(due_ns / NS_PER_S),
                           .tv_nsec = (long)(due_ns % NS_PER_S)};

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
        ;
}

static uint8_t *make_batch(size_t batch_bytes)
{
    uint8_t *batch = malloc(batch_bytes);
    uint64_t state = 0x9e3779b97f4a7c15u;

    if (batch == NULL)
        err(1, "malloc");
    for (size_t i = 0; i < batch_bytes; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        batch[i] = (uint8_t)(state >> 56);
    }
    return batch;
}

static void record_costs(struct roll_costs *costs, const struct append_times *times)
{
    if (times->roll_ns == 0) {
        histogram_record(&costs->write, times->write_ns);
        return;
    }
    histogram_record(&costs->first_write, times->write_ns);
    histogram_record(&costs->first_append, times->create_ns + times->write_ns);
    histogram_record(&costs->roll, times->roll_ns + times->write_ns);
}

static void merge_costs(struct roll_costs *into, const struct roll_costs *from)
{
    histogram_merge(&into->write, &from->write);
    histogram_merge(&into->first_write, &from->first_write);
    histogram_merge(&into->first_append, &from->first_append);
    histogram_merge(&into->roll, &from->roll);
}

static void *write_batches(void *argument)
{
    struct writer *writer = argument;
    const struct options *options = writer->options;
    uint8_t *batch = make_batch(options->batch_bytes);
    double rate_bytes_per_s = options->rate_mib_per_s * (1 << 20);
    uint64_t interval_ns = 0;
    uint64_t begin_ns = writer->first_due_ns;

    if (rate_bytes_per_s > 0)
        interval_ns = (uint64_t)((double)options->batch_bytes / rate_bytes_per_s * NS_PER_S);
    prctl(PR_SET_TIMERSLACK, 1);
    sleep_until(begin_ns);
    while (now_ns(CLOCK_MONOTONIC) < writer->deadline_ns) {
        struct append_times times =
            partition_append(&writer->partition, batch, options->batch_bytes);
        record_costs(&writer->costs, &times);
        uint64_t end_ns = now_ns(CLOCK_MONOTONIC);
        histogram_record(&writer->latency, end_ns - begin_ns);
        writer->bytes += options->batch_bytes;
        if (interval_ns > 0) {
            begin_ns += interval_ns;
            sleep_until(begin_ns);
        } else {
            begin_ns = end_ns;
        }
    }
    free(batch);
    return NULL;
}

/* Kafka asks for the file's size before each transfer, so a fetch is these two calls. */
static size_t fetch(const struct reader *reader, const struct cursor *cursor, size_t bytes)
{
    struct stat status;
    off_t position = cursor->position;

    if (fstat(cursor->segment->fd, &status) != 0)
        err(1, "%s: fstat", reader->partition->directory);
    if (status.st_size < position + (off_t)bytes)
        errx(1, "%s: a segment is shorter than what was appended to it",
             reader->partition->directory);
    ssize_t sent = sendfile(reader->sink_fd, cursor->segment->fd, &position, bytes);
    if (sent < 0)
        err(1, "%s: sendfile", reader->partition->directory);
    if (sent == 0)
        errx(1, "%s: sendfile found no data below the size", reader->partition->directory);
    return (size_t)sent;
}

static void *read_tail(void *argument)
{
    struct reader *reader = argument;
    struct cursor cursor = {0};
    size_t available_bytes;

    while ((available_bytes = partition_await(reader->partition, &cursor)) > 0) {
        size_t bytes = available_bytes < FETCH_BYTES_MAX ? available_bytes : FETCH_BYTES_MAX;
        uint64_t begin_ns = now_ns(CLOCK_MONOTONIC);
        size_t sent = fetch(reader, &cursor, bytes);
        histogram_record(&reader->latency, now_ns(CLOCK_MONOTONIC) - begin_ns);
        reader->bytes += sent;
        cursor.position += (off_t)sent;
    }
    partition_release(reader->partition, &cursor);
    return NULL;
}

static void start(pthread_t *thread, void *(*body)(void *), void *argument)
{
    int failure = pthread_create(thread, NULL, body, argument);

    if (failure != 0) {
        errno = failure;
        err(1, "pthread_create");
    }
}

static void print_latency(const char *name, const struct histogram *latency)
{
    printf("\"%s\": {\"count\": %llu, \"p50\": %.2f, \"p99\": %.2f, \"p999\": %.2f, \"max\": %.2f}",
           name, (unsigned long long)latency->count,
           (double)histogram_quantile_ns(latency, 0.5) / 1000,
           (double)histogram_quantile_ns(latency, 0.99) / 1000,
           (double)histogram_quantile_ns(latency, 0.999) / 1000, (double)latency->max_ns / 1000);
}

static void print_report(const struct totals *written, const struct totals *read, double seconds,
                         double cpu_seconds)
{
    printf("{\"seconds\": %.4f, \"written_bytes\": %llu, \"write_mb_per_s\": %.2f, "
           "\"read_bytes\": %llu, \"read_mb_per_s\": %.2f, \"cpu_seconds\": %.4f, ",
           seconds, (unsigned long long)written->bytes, (double)written->bytes / 1e6 / seconds,
           (unsigned long long)read->bytes, (double)read->bytes / 1e6 / seconds, cpu_seconds);
    print_latency("append_us", &written->latency);
    printf(", ");
    print_latency("tail_read_us", &read->latency);
    printf(", ");
    print_latency("write_us", &written->costs.write);
    printf(", ");
    print_latency("first_write_us", &written->costs.first_write);
    printf(", ");
    print_latency("first_append_us", &written->costs.first_append);
    printf(", ");
    print_latency("roll_us", &written->costs.roll);
    printf("}\n");
}

static void start_writers(struct writer *writers, const struct options *options, uint64_t begin_ns)
{
    uint64_t stagger_ns = 0;

    if (options->rate_mib_per_s > 0)
        stagger_ns = (uint64_t)((double)options->batch_bytes / options->rate_mib_per_s /
                                (1 << 20) / options->writers * NS_PER_S);
    for (unsigned i = 0; i < options->writers; i++) {
        writers[i].options = options;
        writers[i].first_due_ns = begin_ns + i * stagger_ns;
        writers[i].deadline_ns = begin_ns + (uint64_t)(options->seconds * NS_PER_S);
        start(&writers[i].thread, write_batches, &writers[i]);
    }
}

static void run(const struct options *options, struct writer *writers, struct reader *readers)
{
    static struct totals written, read;
    int sink_fd = open("/dev/null", O_WRONLY | O_CLOEXEC);

    if (sink_fd < 0)
        err(1, "/dev/null");
    for (unsigned i = 0; i < options->writers; i++)
        partition_create(&writers[i].partition, options->directory, i, &options->partition);
    uint64_t begin_cpu_ns = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t begin_ns = now_ns(CLOCK_MONOTONIC);
    for (unsigned i = 0; i < options->readers; i++) {
        readers[i].sink_fd = sink_fd;
        readers[i].partition = &writers[i % options->writers].partition;
        start(&readers[i].thread, read_tail, &readers[i]);
    }
    start_writers(writers, options, begin_ns);
    for (unsigned i = 0; i < options->writers; i++) {
        pthread_join(writers[i].thread, NULL);
        partition_finish(&writers[i].partition);
        written.bytes += writers[i].bytes;
        histogram_merge(&written.latency, &writers[i].latency);
        merge_costs(&written.costs, &writers[i].costs);
    }
    double seconds = (double)(now_ns(CLOCK_MONOTONIC) - begin_ns) / NS_PER_S;
    for (unsigned i = 0; i < options->readers; i++) {
        pthread_join(readers[i].thread, NULL);
        read.bytes += readers[i].bytes;
        histogram_merge(&read.latency, &readers[i].latency);
    }
    double cpu_seconds = (double)(now_ns(CLOCK_PROCESS_CPUTIME_ID) - begin_cpu_ns) / NS_PER_S;
    for (unsigned i = 0; i < options->writers; i++)
        partition_remove(&writers[i].partition);
    print_report(&written, &read, seconds, cpu_seconds);
}

static double number(const char *text, const char *name, double min, double max)
{
    char *end;
    double value = strtod(text, &end);

    if (end == text || *end != '\0' || !(value >= min && value <= max))
        errx(2, "--%s: expected a number from %g to %g, not '%s'", name, min, max, text);
    return value;
}

static size_t batch_bytes_below(double limit_kib)
{
    return (size_t)(limit_kib * 1024) - BATCH_SHORTFALL_BYTES;
}

static const char USAGE[] =
    "usage: loadgen [--writers N] [--readers N] [--batch-kib N] [--segment-mib N] [--retain N]\n"
    "               [--rate-mib N] [--seconds S] [--fsync-on-roll] DIRECTORY\n";

static void parse(int argc, char **argv, struct options *options)
{
    static const struct option NAMES[] = {
        {"writers", required_argument, NULL, 'w'},   {"readers", required_argument, NULL, 'r'},
        {"batch-kib", required_argument, NULL, 'b'}, {"segment-mib", required_argument, NULL, 's'},
        {"retain", required_argument, NULL, 'n'},    {"rate-mib", required_argument, NULL, 'l'},
        {"seconds", required_argument, NULL, 't'},   {"fsync-on-roll", no_argument, NULL, 'f'},
        {"help", no_argument, NULL, 'h'},            {NULL, 0, NULL, 0}};
    int choice, which = 0;

    while ((choice = getopt_long(argc, argv, "", NAMES, &which)) != -1) {
        const char *name = choice == '?' ? "" : NAMES[which].name;
        switch (choice) {
        case 'w': options->writers = (unsigned)number(optarg, name, 1, THREADS_MAX); break;
        case 'r': options->readers = (unsigned)number(optarg, name, 0, THREADS_MAX); break;
        case 'b': options->batch_bytes = batch_bytes_below(number(optarg, name, 1, 4096)); break;
        case 's':
            options->partition.segment_bytes = (size_t)number(optarg, name, 4, 2047) << 20;
            break;
        case 'n':
            options->partition.retained_segments = (unsigned)number(optarg, name, 1, 1000);
            break;
        case 'l': options->rate_mib_per_s = number(optarg, name, 0, 1e6); break;
        case 't': options->seconds = number(optarg, name, 0.01, 86400); break;
        case 'f': options->partition.fsync_on_roll = true; break;
        case 'h': fputs(USAGE, stdout); exit(0);
        default: fputs(USAGE, stderr); exit(2);
        }
    }
    if (optind != argc - 1) {
        fputs(USAGE, stderr);
        exit(2);
    }
    options->directory = argv[optind];
}

int main(int argc, char **argv)
{
    static struct writer writers[THREADS_MAX];
    static struct reader readers[THREADS_MAX];
    struct options options = {
        .writers = 1,
        .readers = 1,
        .batch_bytes = (16 << 10) - BATCH_SHORTFALL_BYTES,
        .seconds = 3,
        .partition = {.segment_bytes = 64 << 20, .retained_segments = 4},
    };

    parse(argc, argv, &options);
    run(&options, writers, readers);
    if (fflush(stdout) != 0)
        err(1, "standard output");
    return 0;
}
