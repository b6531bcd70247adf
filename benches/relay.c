/* The floor under benches/pkcs11.rs: eight clients, an event loop and lanes, as many sockets and wake-ups as a signature needs,
 * and nothing done on the way. A lane computes for so many microseconds of its own time, as long as C_Sign takes.
 *
 *   gcc -O2 -o relay benches/relay.c -lpthread && ./relay LANES MICROSECONDS */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CLIENTS = 8, MAX_LANES = 64, REQUEST = 660, ANSWER = 100, SECONDS = 3 };

static int clients[CLIENTS][2], lanes[MAX_LANES][2], lane_count;
static double work;
static atomic_long done;

static double seconds(clockid_t clock) {
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int takes(int fd, int len) {
	char buffer[REQUEST];
	return read(fd, buffer, REQUEST) == len;
}

static int gives(int fd, int len) {
	static const char buffer[REQUEST];
	return write(fd, buffer, len) == len;
}

static void *client(void *n) {
	int fd = clients[(long)n][0];
	while (gives(fd, REQUEST) && takes(fd, ANSWER))
		done++;
	return NULL;
}

static void *lane(void *n) {
	int fd = lanes[(long)n][1];
	while (takes(fd, REQUEST)) {
		double end = work > 0 ? seconds(CLOCK_THREAD_CPUTIME_ID) + work : 0;
		while (work > 0 && seconds(CLOCK_THREAD_CPUTIME_ID) < end)
			;
		if (!gives(fd, ANSWER))
			break;
	}
	return NULL;
}

static void watch(int epoll, int fd, int id) {
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = id};
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

/* Hands requests to idle lanes in their order, and answers back. */
static void *loop(void *unused) {
	int epoll = epoll_create1(0), owner[MAX_LANES], idle[MAX_LANES], idles = 0, waiting[CLIENTS], waits = 0;
	for (int n = 0; n < CLIENTS; n++)
		watch(epoll, clients[n][1], n);
	for (int n = 0; n < lane_count; n++)
		watch(epoll, lanes[idle[idles++] = n][0], CLIENTS + n);
	for (;;) {
		struct epoll_event events[32];
		int count = epoll_wait(epoll, events, 32, -1);
		for (int at = 0; at < count; at++) {
			int n = events[at].data.u32, fd = n < CLIENTS ? clients[n][1] : lanes[n - CLIENTS][0];
			if (!takes(fd, n < CLIENTS ? REQUEST : ANSWER))
				exit(1);
			if (n < CLIENTS) {
				waiting[waits++] = n;
			} else {
				gives(clients[owner[n - CLIENTS]][1], ANSWER);
				idle[idles++] = n - CLIENTS;
			}
			while (waits && idles) {
				int free = idle[--idles];
				owner[free] = waiting[0];
				memmove(waiting, waiting + 1, --waits * sizeof *waiting);
				gives(lanes[free][0], REQUEST);
			}
		}
	}
	return unused;
}

static void start(void *(*run)(void *), long n) {
	pthread_t thread;
	pthread_create(&thread, NULL, run, (void *)n);
}

int main(int argc, char **argv) {
	lane_count = argc > 1 ? atoi(argv[1]) : 4;
	work = argc > 2 ? atof(argv[2]) / 1e6 : 0;
	if (lane_count < 1 || lane_count > MAX_LANES)
		return 2;
	for (int n = 0; n < CLIENTS; n++)
		socketpair(AF_UNIX, SOCK_STREAM, 0, clients[n]);
	for (long n = 0; n < lane_count; n++) {
		socketpair(AF_UNIX, SOCK_STREAM, 0, lanes[n]);
		start(lane, n);
	}
	start(loop, 0);
	double begun = seconds(CLOCK_MONOTONIC);
	for (long n = 0; n < CLIENTS; n++)
		start(client, n);
	sleep(SECONDS);
	double rate = done / (seconds(CLOCK_MONOTONIC) - begun);
	double each = seconds(CLOCK_PROCESS_CPUTIME_ID) / done * 1e6;
	printf("%.0f/s, %.1f us of processor time each, %.1f of them on the way\n", rate, each, each - work * 1e6);
	return 0;
}
