/*
 * check: the smallest test runner that keeps tests apart.
 *
 * Each test runs in a process of its own, with a directory of its own and a
 * deadline, and must end with as many descriptors as it began with.
 */
#ifndef PAFKAFS_TEST_CHECK_H
#define PAFKAFS_TEST_CHECK_H

#include <stdbool.h>
#include <stdint.h>

struct test {
	const char *name;
	void (*run)(void);
};

#define TEST(function) {#function, function}
/* Runs those named in argv, or all; the exit status of the program. */
int check_main(const struct test *tests, unsigned count, int argc, char **argv);
#define CHECK_MAIN(...)                                                                        \
	int main(int argc, char **argv)                                                        \
	{                                                                                      \
		static const struct test tests[] = {__VA_ARGS__};                              \
		return check_main(tests, sizeof(tests) / sizeof(tests[0]), argc, argv);        \
	}

/* Ends the test, with what was expected. */
void check_failed(const char *file, int line, const char *format, ...)
	__attribute__((noreturn, format(printf, 3, 4)));

#define CHECK(condition)                                                                       \
	do {                                                                                   \
		if (!(condition))                                                              \
			check_failed(__FILE__, __LINE__, "%s", #condition);                    \
	} while (0)

#define CHECK_EQ(a, b)                                                                         \
	do {                                                                                   \
		int64_t a_ = (int64_t)(a), b_ = (int64_t)(b);                                  \
		if (a_ != b_)                                                                  \
			check_failed(__FILE__, __LINE__, "%s == %s: %lld != %lld", #a, #b,     \
				     (long long)a_, (long long)b_);                            \
	} while (0)

/* Until the condition holds; the deadline is far beyond what it ever takes. */
#define CHECK_SOON(condition)                                                                  \
	do {                                                                                   \
		uint64_t end_ = check_deadline();                                              \
		while (!(condition))                                                           \
			if (!check_pause(end_))                                                \
				check_failed(__FILE__, __LINE__, "in time: %s", #condition);   \
	} while (0)

uint64_t check_deadline(void);
bool check_pause(uint64_t deadline); /* false when it has passed */

/* Of the running test; removed after it. */
const char *check_dir(void);
/* A name below it, as a string that lives as long as the test. */
const char *check_path(const char *name);

#endif
