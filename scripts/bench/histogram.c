#define _GNU_SOURCE
#include "histogram.h"

static unsigned bucket_of(uint64_t value)
{
    const uint64_t sub_count = 1u << HISTOGRAM_SUB_BITS;

    if (value < sub_count)
        return (unsigned)value;
    unsigned shift = 63u - (unsigned)__builtin_clzll(value) - HISTOGRAM_SUB_BITS;
    return (unsigned)(((uint64_t)(shift + 1) << HISTOGRAM_SUB_BITS) + (value >> shift) - sub_count);
}

static uint64_t highest_value_in(unsigned bucket)
{
    const uint64_t sub_count = 1u << HISTOGRAM_SUB_BITS;

    if (bucket < sub_count)
        return bucket;
    unsigned shift = (bucket >> HISTOGRAM_SUB_BITS) - 1;
    uint64_t lowest = (sub_count + (bucket & (sub_count - 1))) << shift;
    return lowest + ((uint64_t)1 << shift) - 1;
}

void histogram_record(struct histogram *histogram, uint64_t duration_ns)
{
    histogram->count++;
    histogram->buckets[bucket_of(duration_ns)]++;
    if (duration_ns > histogram->max_ns)
        histogram->max_ns = duration_ns;
}

void histogram_merge(struct histogram *into, const struct histogram *from)
{
    into->count += from->count;
    if (from->max_ns > into->max_ns)
        into->max_ns = from->max_ns;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
        into->buckets[i] += from->buckets[i];
}

uint64_t histogram_quantile_ns(const struct histogram *histogram, double fraction)
{
    uint64_t seen = 0;

    if (histogram->count == 0)
        return 0;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += histogram->buckets[i];
        if ((double)seen >= fraction * (double)histogram->count) {
            uint64_t value_ns = highest_value_in(i);
            return value_ns < histogram->max_ns ? value_ns : histogram->max_ns;
        }
    }
    return histogram->max_ns;
}

uint64_t now_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
