/*
 * TCP latency as a client sees it.
 *
 *   latency serve ADDRESS PORT...
 *       echo on every port; prints "up" when it listens
 *   latency ask
 *       reads lines "connect ADDRESS PORT COUNT" and "rr ADDRESS PORT COUNT", and answers each with
 *       "P50 P99 MEAN" in nanoseconds: of COUNT connects, or of COUNT request/response turns of one
 *       byte over one connection, whose own connect and first tenth of turns are not counted
 *
 * One process answers all lines, so what is compared differs in nothing but the destination.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST_SAMPLES 1000000
#define BACKLOG	     4096

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static int by_size(const void *left, const void *right)
{
	long a = *(const long *)left, b = *(const long *)right;

	return (a > b) - (a < b);
}

static struct sockaddr_in destination(const char *address, const char *port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};

	if (inet_pton(AF_INET, address, &to.sin_addr) != 1) {
		fprintf(stderr, "not an IPv4 address: %s\n", address);
		exit(2);
	}
	return to;
}

static int new_socket(void)
{
	/* Closing resets, so that no port waits in TIME_WAIT. */
	struct linger reset = {.l_onoff = 1};
	int one = 1, s = socket(AF_INET, SOCK_STREAM, 0);

	if (s < 0 || setsockopt(s, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)) ||
	    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		fail("socket");
	return s;
}

static void serve(int count, char **arguments)
{
	int where = epoll_create1(0);

	for (int i = 1; i < count; i++) {
		struct sockaddr_in at = destination(arguments[0], arguments[i]);
		struct epoll_event event = {.events = EPOLLIN};
		int one = 1, s = socket(AF_INET, SOCK_STREAM, 0);

		if (s < 0 || setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
		    bind(s, (struct sockaddr *)&at, sizeof(at)) || listen(s, BACKLOG))
			fail("listen");
		event.data.u64 = (unsigned long)s << 1 | 1;
		if (epoll_ctl(where, EPOLL_CTL_ADD, s, &event))
			fail("epoll_ctl");
	}
	puts("up");
	fflush(stdout);
	for (;;) {
		struct epoll_event events[64];
		int ready = epoll_wait(where, events, 64, -1);

		for (int i = 0; i < ready; i++) {
			int fd = events[i].data.u64 >> 1;
			char byte;

			if (events[i].data.u64 & 1) {
				struct epoll_event event = {.events = EPOLLIN};
				int one = 1, s = accept(fd, NULL, NULL);

				if (s < 0)
					continue;
				setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
				event.data.u64 = (unsigned long)s << 1;
				if (epoll_ctl(where, EPOLL_CTL_ADD, s, &event))
					fail("epoll_ctl");
			} else if (read(fd, &byte, 1) != 1 || write(fd, &byte, 1) != 1) {
				close(fd);
			}
		}
	}
}

static void time_connects(const struct sockaddr_in *to, long *samples, int count)
{
	for (int i = 0; i < count; i++) {
		int s = new_socket();
		long start = now();

		if (connect(s, (const struct sockaddr *)to, sizeof(*to)))
			fail("connect");
		samples[i] = now() - start;
		close(s);
	}
}

static void time_turns(const struct sockaddr_in *to, long *samples, int count)
{
	int s = new_socket(), warm = count / 10;
	char byte = 0;

	if (connect(s, (const struct sockaddr *)to, sizeof(*to)))
		fail("connect");
	for (int i = -warm; i < count; i++) {
		long start = now();

		if (write(s, &byte, 1) != 1 || read(s, &byte, 1) != 1)
			fail("turn");
		if (i >= 0)
			samples[i] = now() - start;
	}
	close(s);
}

static int ask(void)
{
	static long samples[MOST_SAMPLES];
	char what[16], address[64], port[16];
	int count;

	while (scanf("%15s %63s %15s %d", what, address, port, &count) == 4) {
		struct sockaddr_in to = destination(address, port);
		double sum = 0;

		if (count < 1 || count > MOST_SAMPLES)
			return 2;
		if (strcmp(what, "rr"))
			time_connects(&to, samples, count);
		else
			time_turns(&to, samples, count);
		for (int i = 0; i < count; i++)
			sum += samples[i];
		qsort(samples, count, sizeof(*samples), by_size);
		printf("%ld %ld %.0f\n", samples[count / 2], samples[(int)(count * 0.99)],
		       sum / count);
		fflush(stdout);
	}
	return 0;
}

int main(int count, char **arguments)
{
	if (count > 3 && !strcmp(arguments[1], "serve"))
		serve(count - 2, arguments + 2);
	if (count == 2 && !strcmp(arguments[1], "ask"))
		return ask();
	fprintf(stderr, "usage: latency serve ADDRESS PORT... | latency ask\n");
	return 2;
}
