/*
 * An event loop with a tick every 10 ms, over poll(2), that has many requests in flight at once.
 *
 *     loop SOCKET KEY COUNT DEADLINE_MS
 *
 * KEY is a public key's blob in hexadecimal. Request n asks for an Ed25519 signature over "data n". A line for each request
 * that ended: its number, its code, and the signature in hexadecimal where there is one. The last line has the ticks while
 * requests were in flight, then how late they came in microseconds: half of them, 99 of 100, the latest.
 */
#define _POSIX_C_SOURCE 200809L

#include "strongroom.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TICK_US 10000
#define MAX_TICKS 100000

static int64_t late_us[MAX_TICKS];
static size_t ticks, ended;

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void on_end(struct strongroom *s, const struct strongroom_result *result, void *argument)
{
    (void)s;
    printf("%zu %s ", (size_t)(uintptr_t)argument, strongroom_code_name(result->code));
    for (size_t i = 0; i < result->len; i++)
        printf("%02x", result->data[i]);
    putchar('\n');
    ended++;
}

static int later(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Waits for the next tick or for the daemon, whichever is first. */
static int turn(struct strongroom *s, int64_t *next_us)
{
    int64_t now = now_us();
    if (now >= *next_us) {
        if (ticks < MAX_TICKS)
            late_us[ticks++] = now - *next_us;
        /* Ticks that were missed are not made up for. */
        *next_us += ((now - *next_us) / TICK_US + 1) * TICK_US;
    }
    int events = strongroom_events(s), own_ms = strongroom_timeout_ms(s);
    struct pollfd fd = { strongroom_fd(s), 0, 0 };
    fd.events = (short)((events & STRONGROOM_READ ? POLLIN : 0) | (events & STRONGROOM_WRITE ? POLLOUT : 0));
    /* poll(2) counts in milliseconds: the last one is waited for in turns of no time. */
    int wait_ms = (int)((*next_us - now_us()) / 1000);
    if (wait_ms < 0)
        wait_ms = 0;
    if (own_ms >= 0 && own_ms < wait_ms)
        wait_ms = own_ms;
    int ready = poll(&fd, 1, wait_ms);
    if (ready < 0 && errno != EINTR) {
        perror("poll");
        return -1;
    }
    if (ready > 0 || own_ms == 0 || own_ms == wait_ms)
        return strongroom_process(s);
    return 0;
}

int main(int argc, char **argv)
{
    static unsigned char key[4096];
    size_t key_len = 0;
    if (argc != 5)
        return 2;
    for (const char *hex = argv[2]; key_len < sizeof key && sscanf(hex, "%2hhx", &key[key_len]) == 1; hex += 2)
        key_len++;
    size_t count = strtoul(argv[3], NULL, 10);
    static char line_buffer[1 << 20];
    /* Nobody may hold up the loop by not reading. */
    setvbuf(stdout, line_buffer, _IOFBF, sizeof line_buffer);

    struct strongroom *s = strongroom_open(argv[1]);
    if (s == NULL) {
        perror("open");
        return 1;
    }
    int64_t next_us = now_us() + TICK_US;
    for (size_t n = 0; n < count;) {
        char data[32];
        struct strongroom_request request = { 0 };
        request.key = key;
        request.key_len = key_len;
        request.scheme = "ed25519";
        request.data = (const unsigned char *)data;
        request.len = (size_t)snprintf(data, sizeof data, "data %zu", n);
        request.deadline_ms = (uint32_t)strtoul(argv[4], NULL, 10);
        if (strongroom_sign(s, &request, on_end, (void *)(uintptr_t)n) != 0)
            n++;
        else if (errno != ENOBUFS || turn(s, &next_us) < 0) {
            perror("sign");
            return 1;
        }
    }
    while (ended < count) {
        if (turn(s, &next_us) < 0) {
            perror("process");
            return 1;
        }
    }
    strongroom_close(s);
    qsort(late_us, ticks, sizeof *late_us, later);
    if (ticks == 0)
        ticks = 1;
    printf("ticks %zu late %" PRId64 " %" PRId64 " %" PRId64 "\n", ticks, late_us[ticks / 2], late_us[ticks * 99 / 100],
           late_us[ticks - 1]);
    return 0;
}
