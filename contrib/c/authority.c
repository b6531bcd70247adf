/*
 * An example: a daemon in the style of a tor directory authority. Its event loop ticks, and must go on ticking, while it has a
 * vote signed on a schedule by a key that it does not hold. A device that is dead, slow or unplugged costs it a vote and not
 * a tick.
 *
 *     authority SOCKET KEY.pub DIRECTORY [VOTES [INTERVAL_MS [DEADLINE_MS]]]
 *
 * Each vote goes to DIRECTORY/vote-N, its signature to DIRECTORY/vote-N.sig: RSA with PKCS#1 v1.5 padding around the bare
 * SHA-256 digest, as tor signs. `openssl pkeyutl -verify -pkeyopt rsa_padding_mode:pkcs1` checks it against the digest. The
 * last line says how late the loop's ticks came at worst. Exits with 0 when every vote was signed, else with 1.
 */
#define _POSIX_C_SOURCE 200809L

#include "strongroom.h"

#include <errno.h>
#include <event2/event.h>
#include <inttypes.h>
#include <limits.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TICK_MS 10

struct authority {
    struct event_base *base;
    const char *socket, *directory;
    unsigned char key[4096];
    size_t key_len;
    uint32_t deadline_ms;
    int votes, begun, ended, signed_well;

    struct strongroom *strongroom; /* NULL: not connected */
    struct event *io;              /* what the descriptor and the client's own timer want */

    int64_t last_tick_us, worst_us;
    unsigned long ticks;
};

struct vote {
    struct authority *authority;
    int number;
    int64_t begun_us;
};

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static struct timeval interval(int ms)
{
    struct timeval t = { ms / 1000, ms % 1000 * 1000 };
    return t;
}

static void write_file(const struct authority *a, int number, const char *suffix, const void *data, size_t len)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/vote-%d%s", a->directory, number, suffix);
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(data, 1, len, file) != len || fclose(file) != 0) {
        perror(path);
        exit(2);
    }
}

/* The connection to the vault. */

static void on_io(evutil_socket_t fd, short what, void *argument);

static void disconnect(struct authority *a)
{
    if (a->io != NULL)
        event_free(a->io);
    a->io = NULL;
    strongroom_close(a->strongroom);
    a->strongroom = NULL;
}

/* Asks libevent for what the client wants next. To be called after each use of the client. */
static void watch(struct authority *a)
{
    int events = strongroom_events(a->strongroom), timeout = strongroom_timeout_ms(a->strongroom);
    short what = (short)((events & STRONGROOM_READ ? EV_READ : 0) | (events & STRONGROOM_WRITE ? EV_WRITE : 0));
    struct timeval at = interval(timeout);
    if (a->io != NULL)
        event_free(a->io);
    a->io = event_new(a->base, strongroom_fd(a->strongroom), what, on_io, a);
    if (a->io == NULL || event_add(a->io, timeout < 0 ? NULL : &at) < 0) {
        fprintf(stderr, "authority: out of memory\n");
        exit(2);
    }
}

static void on_io(evutil_socket_t fd, short what, void *argument)
{
    struct authority *a = argument;
    (void)fd, (void)what;
    if (strongroom_process(a->strongroom) < 0) {
        fprintf(stderr, "authority: the vault is gone: %s\n", strerror(errno));
        disconnect(a); /* the next vote connects again */
    } else {
        watch(a);
    }
}

/* Votes. */

static void end_vote(struct authority *a)
{
    if (++a->ended == a->votes)
        event_base_loopexit(a->base, NULL);
}

static void on_signature(struct strongroom *s, const struct strongroom_result *result, void *argument)
{
    struct vote *vote = argument;
    struct authority *a = vote->authority;
    double took_ms = (double)(now_us() - vote->begun_us) / 1000;
    (void)s;
    if (result->code == STRONGROOM_OK) {
        write_file(a, vote->number, ".sig", result->data, result->len);
        a->signed_well++;
        printf("vote %d: signed in %.1f ms\n", vote->number, took_ms);
    } else {
        printf("vote %d: %s after %.1f ms: %s\n", vote->number, strongroom_code_name(result->code), took_ms,
               result->message);
    }
    fflush(stdout);
    free(vote);
    end_vote(a);
}

static void on_vote(evutil_socket_t fd, short what, void *argument)
{
    struct authority *a = argument;
    (void)fd, (void)what;
    if (a->begun == a->votes)
        return;
    int number = ++a->begun;
    char text[128];
    int len = snprintf(text, sizeof text, "network-status-version 3\nvote-status vote\nvote %d\n", number);
    unsigned char digest[SHA256_DIGEST_LENGTH];
    SHA256((const unsigned char *)text, (size_t)len, digest);
    write_file(a, number, "", text, (size_t)len);

    if (a->strongroom == NULL)
        a->strongroom = strongroom_open(a->socket);
    struct vote *vote = malloc(sizeof *vote);
    struct strongroom_request request = { 0 };
    request.key = a->key;
    request.key_len = a->key_len;
    request.scheme = "rsa-pkcs1v15-raw";
    request.data = digest;
    request.len = sizeof digest;
    request.deadline_ms = a->deadline_ms;
    if (vote != NULL) {
        vote->authority = a;
        vote->number = number;
        vote->begun_us = now_us();
    }
    if (vote == NULL || a->strongroom == NULL || strongroom_sign(a->strongroom, &request, on_signature, vote) == 0) {
        printf("vote %d: cannot ask: %s\n", number, strerror(errno));
        fflush(stdout);
        free(vote);
        end_vote(a);
    }
    if (a->strongroom != NULL)
        watch(a);
}

/* What the loop is for: here, to see that it is never held up. */
static void on_tick(evutil_socket_t fd, short what, void *argument)
{
    struct authority *a = argument;
    int64_t now = now_us(), late = now - a->last_tick_us - TICK_MS * 1000;
    (void)fd, (void)what;
    if (a->ticks++ > 0 && late > a->worst_us)
        a->worst_us = late;
    a->last_tick_us = now;
}

/* The second word of a .pub file, in base64. */
static int read_key(struct authority *a, const char *path)
{
    char line[8192], base64[sizeof a->key / 3 * 4 + 1];
    FILE *file = fopen(path, "r");
    if (file == NULL || fgets(line, sizeof line, file) == NULL) {
        perror(path);
        return -1;
    }
    fclose(file);
    char *end, *begin = strchr(line, ' ');
    if (begin == NULL)
        return -1;
    begin++;
    end = begin + strcspn(begin, " \r\n");
    size_t len = (size_t)(end - begin);
    if (len >= sizeof base64 || len % 4 != 0 || len == 0)
        return -1;
    int decoded = EVP_DecodeBlock(a->key, (const unsigned char *)begin, (int)len);
    if (decoded < 0)
        return -1;
    a->key_len = (size_t)decoded - (end[-1] == '=') - (end[-2] == '=');
    return 0;
}

int main(int argc, char **argv)
{
    static struct authority a;
    if (argc < 4 || argc > 7) {
        fprintf(stderr, "usage: authority SOCKET KEY.pub DIRECTORY [VOTES [INTERVAL_MS [DEADLINE_MS]]]\n");
        return 2;
    }
    a.socket = argv[1];
    a.directory = argv[3];
    a.votes = argc > 4 ? atoi(argv[4]) : 3;
    int interval_ms = argc > 5 ? atoi(argv[5]) : 1000;
    a.deadline_ms = argc > 6 ? (uint32_t)strtoul(argv[6], NULL, 10) : 2000;
    if (read_key(&a, argv[2]) < 0) {
        fprintf(stderr, "authority: %s has no public key\n", argv[2]);
        return 2;
    }
    if (a.votes < 1 || interval_ms < 1) {
        fprintf(stderr, "authority: VOTES and INTERVAL_MS are at least 1\n");
        return 2;
    }
    a.base = event_base_new();
    struct event *tick = a.base ? event_new(a.base, -1, EV_PERSIST, on_tick, &a) : NULL;
    struct event *schedule = a.base ? event_new(a.base, -1, EV_PERSIST, on_vote, &a) : NULL;
    struct timeval tick_every = interval(TICK_MS), vote_every = interval(interval_ms);
    if (tick == NULL || schedule == NULL || event_add(tick, &tick_every) < 0 || event_add(schedule, &vote_every) < 0) {
        fprintf(stderr, "authority: out of memory\n");
        return 2;
    }
    event_base_dispatch(a.base);
    printf("%d of %d votes signed; %lu ticks, the latest by %.1f ms\n", a.signed_well, a.votes, a.ticks,
           (double)a.worst_us / 1000);
    disconnect(&a);
    event_free(schedule);
    event_free(tick);
    event_base_free(a.base);
    libevent_global_shutdown();
    return a.signed_well == a.votes ? 0 : 1;
}
