/*
 * events: what C threads tell Python, through a queue and an eventfd that
 * trio waits on.  A C thread never waits for Python to take an event.
 */
#ifndef PAFKAFS_EVENTS_H
#define PAFKAFS_EVENTS_H

#include <stdint.h>

enum event_kind {
	EVENT_NO_ROOM = 1,      /* ino: a request of this file is parked for room */
	EVENT_QUIET = 2,        /* ino: the gate is closed and no change is under way */
	EVENT_OBJECT_ERROR = 3, /* ino, value: errno met when opening the object */
	EVENT_RECONCILED = 4,   /* ino: the object differed from its shadow and won */
	EVENT_IO_ERROR = 5,     /* ino, value: errno of a failed read, write or fsync */
	EVENT_READY = 6,        /* the session has answered INIT */
	EVENT_ENDED = 7,        /* the kernel has ended the connection */
	EVENT_SEAL = 9,         /* ino: a request is parked until the file is sealed */
	EVENT_WRITTEN = 8,      /* ino: first write to a plain file that could grow in PMem */
};

struct event {
	struct event *next;
	enum event_kind kind;
	uint64_t ino;
	int64_t value;
};

struct events;

struct events *events_new(void);
void events_free(struct events *e);
int events_fd(const struct events *e);
void events_put(struct events *e, enum event_kind kind, uint64_t ino, int64_t value);
/* All that came since the last call, oldest first; the caller frees each. */
struct event *events_take(struct events *e);

#endif
