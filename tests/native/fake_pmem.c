#include "fake_pmem.h"

#include <libpmem.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { RANGES = 4, NOTES = 4096 };

static struct range {
	char *start;
	size_t len;
	char *durable, *image;
} ranges[RANGES];

static struct note {
	char *start;
	size_t len;
	char *bytes;
} notes[NOTES];

static unsigned note_count;
static void (*at_each_step)(void);
static bool checking;

void model_step(void)
{
	if (at_each_step == NULL || checking)
		return;
	checking = true;
	at_each_step();
	checking = false;
}

static struct range *range_of(const void *p)
{
	for (struct range *r = ranges; r < ranges + RANGES; r++)
		if (r->start != NULL && (const char *)p >= r->start &&
		    (const char *)p < r->start + r->len)
			return r;
	return NULL;
}

void model_watch(void *start, size_t len)
{
	struct range *r = ranges;

	while (r < ranges + RANGES && r->start != NULL && r->start != start)
		r++;
	CHECK(r < ranges + RANGES);
	size_t known = r->start == NULL ? 0 : r->len;
	CHECK(known <= len && len % 8 == 0);
	r->durable = realloc(r->durable, len);
	r->image = realloc(r->image, len);
	CHECK(r->durable != NULL && r->image != NULL);
	memcpy(r->durable + known, (char *)start + known, len - known);
	r->start = start;
	r->len = len;
}

void model_at_each_step(void (*check)(void))
{
	at_each_step = check;
}

const char *model_crash(const void *start, enum crash how)
{
	struct range *r = range_of(start);

	CHECK(r != NULL);
	memcpy(r->image, how == CRASH_EVERYTHING ? r->start : r->durable, r->len);
	uint64_t *image = (void *)r->image;
	const uint64_t *stored = (void *)r->start;
	for (size_t i = 0; how == CRASH_SOMETHING && i < r->len / 8; i++)
		if (image[i] != stored[i] && rand() & 1)
			image[i] = stored[i];
	return r->image + ((const char *)start - r->start);
}

static void note(const void *start, size_t len)
{
	CHECK(note_count < NOTES && range_of(start) != NULL);
	struct note *n = &notes[note_count++];
	n->start = (char *)start;
	n->len = len;
	n->bytes = malloc(len);
	CHECK(n->bytes != NULL || len == 0);
	memcpy(n->bytes, start, len);
}

void *pmem_memcpy(void *to, const void *from, size_t len, unsigned flags)
{
	CHECK(flags & PMEM_F_MEM_NODRAIN);
	model_step();
	/* A crash in the middle: some of it was stored. */
	memcpy(to, from, len / 2);
	model_step();
	memcpy(to, from, len);
	if (!(flags & (PMEM_F_MEM_NOFLUSH | PMEM_F_MEM_TEMPORAL)))
		note(to, len);
	model_step();
	return to;
}

void pmem_flush(const void *start, size_t len)
{
	model_step();
	note(start, len);
	model_step();
}

void pmem_drain(void)
{
	model_step();
	for (struct note *n = notes; n < notes + note_count; n++) {
		struct range *r = range_of(n->start);
		memcpy(r->durable + (n->start - r->start), n->bytes, n->len);
		free(n->bytes);
	}
	note_count = 0;
	model_step();
}

int pmem_has_auto_flush(void)
{
	return 0;
}
