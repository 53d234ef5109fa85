#define _GNU_SOURCE
#include "events.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct events {
	pthread_mutex_t lock;
	struct event *head, **tail;
	int fd;
};

struct events *events_new(void)
{
	struct events *e = calloc(1, sizeof(*e));

	if (e == NULL)
		return NULL;
	e->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (e->fd < 0) {
		free(e);
		return NULL;
	}
	pthread_mutex_init(&e->lock, NULL);
	e->tail = &e->head;
	return e;
}

void events_free(struct events *e)
{
	struct event *next;

	for (struct event *ev = e->head; ev != NULL; ev = next) {
		next = ev->next;
		free(ev);
	}
	close(e->fd);
	pthread_mutex_destroy(&e->lock);
	free(e);
}

int events_fd(const struct events *e)
{
	return e->fd;
}

void events_put(struct events *e, enum event_kind kind, uint64_t ino, int64_t value)
{
	struct event *ev = malloc(sizeof(*ev));

	if (ev == NULL)
		abort(); /* an untold NO_ROOM would park its writer for ever */
	*ev = (struct event){.kind = kind, .ino = ino, .value = value};
	pthread_mutex_lock(&e->lock);
	*e->tail = ev;
	e->tail = &ev->next;
	pthread_mutex_unlock(&e->lock);
	(void)eventfd_write(e->fd, 1);
}

struct event *events_take(struct events *e)
{
	eventfd_t ignored;

	/* Emptied before the queue is: an event put in between wakes again. */
	(void)eventfd_read(e->fd, &ignored);
	pthread_mutex_lock(&e->lock);
	struct event *all = e->head;
	e->head = NULL;
	e->tail = &e->head;
	pthread_mutex_unlock(&e->lock);
	return all;
}
