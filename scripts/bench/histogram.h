/* A histogram of durations with a bounded relative error, cheap enough to record every append. */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>
#include <time.h>

enum {
    HISTOGRAM_SUB_BITS = 5, /* 32 buckets for each power of two: off by 3 % at most */
    HISTOGRAM_BUCKETS = (64 - HISTOGRAM_SUB_BITS + 1) << HISTOGRAM_SUB_BITS,
};

struct histogram {
    uint64_t count;
    uint64_t max_ns;
    uint64_t buckets[HISTOGRAM_BUCKETS];
};

void histogram_record(struct histogram *histogram, uint64_t duration_ns);
void histogram_merge(struct histogram *into, const struct histogram *from);

/* The smallest duration that at least `fraction` of the recorded ones do not exceed; 0 if empty. */
uint64_t histogram_quantile_ns(const struct histogram *histogram, double fraction);

uint64_t now_ns(clockid_t clock);

#endif
