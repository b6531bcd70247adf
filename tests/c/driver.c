/*
 * Drives contrib/c/strongroom.c for tests/c_client.rs: makes requests, and prints how each ended.
 *
 *     driver SOCKET MODE COUNT DEADLINE_MS
 */
#define _POSIX_C_SOURCE 200809L

#include "strongroom.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATIENCE_S 60

static const char *mode;
static int count, begun, closed;
static unsigned deadline_ms;

static void on_result(struct strongroom *s, const struct strongroom_result *result, void *argument);

static uint64_t ask(struct strongroom *s, int index)
{
    char data[32];
    snprintf(data, sizeof data, "data %d", index);
    struct strongroom_request r = { 0 };
    r.key = (const unsigned char *)"key";
    r.key_len = 3;
    r.data = (const unsigned char *)data;
    r.len = strlen(data);
    r.deadline_ms = deadline_ms;
    begun++;
    uint64_t id = 0;
    void *argument = (void *)(intptr_t)index;
    if (strcmp(mode, "mixed") != 0 || index % 3 == 0) {
        r.scheme = "ssh";
        r.flags = 4;
        id = strongroom_sign(s, &r, on_result, argument);
    } else if (index % 3 == 1) {
        r.scheme = "rsa-oaep-sha256";
        r.label = (const unsigned char *)"label";
        r.label_len = 5;
        id = strongroom_decrypt(s, &r, on_result, argument);
    } else {
        r.scheme = "x25519";
        id = strongroom_derive(s, &r, on_result, argument);
    }
    if (id == 0)
        printf("%d refused %s\n", index, strerror(errno));
    return id;
}

static void on_result(struct strongroom *s, const struct strongroom_result *result, void *argument)
{
    printf("%d %s ", (int)(intptr_t)argument, strongroom_code_name(result->code));
    if (result->code == STRONGROOM_OK)
        printf("%.*s\n", (int)result->len, (const char *)result->data);
    else
        printf("%s (retry %u, tries %d)\n", result->message, (unsigned)result->retry_after_ms, (int)result->tries_left);
    if (strcmp(mode, "chain") == 0 && begun < count)
        ask(s, begun);
    /* It is over: there is nothing to cancel. */
    if (strongroom_cancel(s, result->id) == 0)
        printf("cancelled what had ended\n");
    if (strcmp(mode, "close") == 0) {
        strongroom_close(s);
        closed = 1;
    }
}

/* What is refused before anything is sent. */
static void limits(struct strongroom *s)
{
    static unsigned char data[256 * 1024];
    struct strongroom_request r = { 0 };
    r.key = (const unsigned char *)"key";
    r.key_len = 3;
    r.scheme = "ssh";
    r.data = data;
    r.len = sizeof data;
    printf("too long: %d", strongroom_sign(s, &r, on_result, NULL) == 0 && errno == EMSGSIZE);
    r.len = SIZE_MAX;
    printf(" %d", strongroom_sign(s, &r, on_result, NULL) == 0 && errno == EMSGSIZE);
    printf(" %d", strongroom_decrypt(s, &r, on_result, NULL) == 0 && errno == EMSGSIZE);
    printf(" %d", strongroom_derive(s, &r, on_result, NULL) == 0 && errno == EMSGSIZE);
    r.len = 0;
    r.label_len = SIZE_MAX - 2;
    printf(" %d\n", strongroom_decrypt(s, &r, on_result, NULL) == 0 && errno == EMSGSIZE);
    r.label_len = 0;
    r.deadline_ms = STRONGROOM_MAX_DEADLINE_MS + 1;
    printf("invalid: %d", strongroom_sign(s, &r, on_result, NULL) == 0 && errno == EINVAL);
    r.deadline_ms = 0;
    r.scheme = NULL;
    printf(" %d", strongroom_sign(s, &r, on_result, NULL) == 0 && errno == EINVAL);
    r.scheme = "ssh";
    printf(" %d", strongroom_sign(s, &r, NULL, NULL) == 0 && errno == EINVAL);
    r.key_len = 0;
    printf(" %d\n", strongroom_sign(s, &r, on_result, NULL) == 0 && errno == EINVAL);
    r.key_len = 3;
    r.len = 200 * 1024;
    int large = 0, small = 0;
    while (strongroom_sign(s, &r, on_result, NULL) != 0)
        large++;
    printf("%d large ones until %s\n", large, errno == ENOBUFS ? "ENOBUFS" : strerror(errno));
    r.len = 0;
    while (strongroom_sign(s, &r, on_result, NULL) != 0)
        small++;
    printf("%s small ones until %s\n", small > 100 && small < STRONGROOM_MAX_OUTSTANDING ? "many" : "few",
           errno == ENOBUFS ? "ENOBUFS" : strerror(errno));
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    alarm(PATIENCE_S);
    mode = argv[2];
    count = atoi(argv[3]);
    deadline_ms = (unsigned)strtoul(argv[4], NULL, 10);
    struct strongroom *s = strongroom_open(argv[1]);
    if (s == NULL) {
        printf("open: %s\n", strerror(errno));
        return 1;
    }
    if (strcmp(mode, "limits") == 0) {
        limits(s);
        strongroom_close(s);
        return 0;
    }
    do {
        uint64_t id = ask(s, begun);
        if (strcmp(mode, "cancel") == 0 && begun % 2 == 0 && strongroom_cancel(s, id) != 0)
            printf("cannot cancel\n");
    } while (strcmp(mode, "chain") != 0 && begun < count);

    while (strongroom_outstanding(s) > 0 || (strongroom_events(s) & STRONGROOM_WRITE)) {
        struct pollfd p = { strongroom_fd(s), 0, 0 };
        int events = strongroom_events(s);
        p.events = (short)((events & STRONGROOM_READ ? POLLIN : 0) | (events & STRONGROOM_WRITE ? POLLOUT : 0));
        poll(&p, 1, strongroom_timeout_ms(s));
        int result = strongroom_process(s);
        if (closed) {
            printf("closed\n");
            return 0;
        }
        if (result < 0) {
            printf("lost: %s\n", errno == EPROTO ? "EPROTO" : errno == ECONNRESET ? "ECONNRESET" : strerror(errno));
            if (ask(s, begun) != 0 || strongroom_events(s) != 0 || strongroom_process(s) != -1)
                printf("it goes on\n");
            break;
        }
    }
    strongroom_close(s);
    printf("end\n");
    return 0;
}
