/*
 * A client of Strongroom's service door for programs with an event loop. C99 and POSIX.1-2008, no dependency: put
 * strongroom.c and strongroom.h into your program. The protocol is in docs/protocol.md.
 *
 * Nothing here blocks, waits or starts a thread. A connection is one file descriptor; your loop watches it:
 *
 *     struct strongroom *s = strongroom_open("/run/user/1000/strongroom/service");
 *     strongroom_sign(s, &request, on_result, argument);
 *     for (;;) {
 *         struct pollfd p = { strongroom_fd(s), 0, 0 };
 *         if (strongroom_events(s) & STRONGROOM_READ) p.events |= POLLIN;
 *         if (strongroom_events(s) & STRONGROOM_WRITE) p.events |= POLLOUT;
 *         poll(&p, 1, strongroom_timeout_ms(s));
 *         if (strongroom_process(s) < 0) break;     // lost: every callback has been called
 *     }
 *     strongroom_close(s);
 *
 * Call strongroom_process() when the descriptor is ready, however your loop learns of that (level-triggered), and when
 * strongroom_timeout_ms() has passed; it does what can be done and returns. Ask for events and timeout again after each
 * call of any function here.
 *
 * Every accepted request ends in exactly one call of its callback: with the result, with the reason why there is none,
 * or with STRONGROOM_DISCONNECTED; unless it is cancelled or the connection closed by yourself, after which it is not
 * called. Callbacks run inside strongroom_process() only. They may call any function here, strongroom_close() included.
 *
 * A connection belongs to one thread at a time. Different connections are independent.
 */
#ifndef STRONGROOM_H
#define STRONGROOM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Requests that one connection can have outstanding: the daemon's limit. */
#define STRONGROOM_MAX_OUTSTANDING 16384
/* Bytes of requests that wait to be sent; what is beyond is refused with ENOBUFS. */
#define STRONGROOM_MAX_UNSENT (1024 * 1024)
/* The longest deadline, in milliseconds: an hour. */
#define STRONGROOM_MAX_DEADLINE_MS 3600000

/* How a request ended. What each reason means and what to do about it is in docs/protocol.md, section 2. */
enum strongroom_code {
    STRONGROOM_OK = 0,
    STRONGROOM_LOCKED,
    STRONGROOM_NOT_LOCKED,
    STRONGROOM_WRONG_PASSWORD,
    STRONGROOM_NO_SUCH_KEY,
    STRONGROOM_PIN_REQUIRED,
    STRONGROOM_PIN_WRONG,
    STRONGROOM_PIN_BLOCKED,
    STRONGROOM_NOT_TOUCHED,
    STRONGROOM_ABSENT,
    STRONGROOM_BUSY,
    STRONGROOM_TIMEOUT,
    STRONGROOM_RESTARTED,
    STRONGROOM_UNSUPPORTED,
    STRONGROOM_TOO_LONG,
    STRONGROOM_DENIED,
    STRONGROOM_CANCELLED,
    STRONGROOM_NOT_PERMITTED,
    STRONGROOM_BAD_REQUEST,
    STRONGROOM_NO_PROMPT,
    STRONGROOM_FULL,
    STRONGROOM_FAILED,
    /* Not the daemon's word: the connection ended or broke the protocol first. What became of the request is unknown. */
    STRONGROOM_DISCONNECTED
};

/* The code's name, as in the protocol ("pin_wrong"); "ok" and "disconnected" for the two that it does not have. */
const char *strongroom_code_name(enum strongroom_code code);

/* What a callback is told. Its memory is valid during the call only; what is secret in it is wiped afterwards. */
struct strongroom_result {
    uint64_t id;                /* what strongroom_sign() and its like returned */
    enum strongroom_code code;
    const unsigned char *data;  /* the signature, plaintext or secret; NULL without one */
    size_t len;
    const char *message;        /* for people; "" with STRONGROOM_OK */
    uint32_t retry_after_ms;    /* when to ask again; 0: nobody knows */
    uint32_t tries_left;        /* PIN tries; UINT32_MAX: not known */
};

struct strongroom;

typedef void strongroom_callback(struct strongroom *s, const struct strongroom_result *result, void *argument);

/*
 * What is asked. Set the rest to zero: struct strongroom_request r = { 0 };
 *
 * `scheme` is a name of docs/protocol.md, section 4. `deadline_ms` counts from here, where the daemon starts to count
 * when the request reaches it; a daemon that does not answer in time is given a quarter of a second more, and then up,
 * with STRONGROOM_TIMEOUT. With 0 the device's default holds, and the daemon alone keeps the time.
 * Nothing here needs to live longer than the call.
 */
struct strongroom_request {
    const unsigned char *key;   /* the public key's blob: what a .pub file has in base64 */
    size_t key_len;
    const char *scheme;
    const unsigned char *data;  /* to sign; the ciphertext; the peer's public key */
    size_t len;
    const unsigned char *label; /* OAEP's, for strongroom_decrypt() */
    size_t label_len;
    uint32_t flags;             /* of the scheme "ssh", for strongroom_sign() */
    int prehashed;              /* the data is the digest, for strongroom_sign() */
    uint32_t deadline_ms;
};

/*
 * Connects. NULL with errno when it cannot: ENOENT and ECONNREFUSED when no daemon is there, EAGAIN when it is too
 * busy to accept one more just now, EACCES, ENAMETOOLONG, EMFILE, ENOMEM, …
 */
struct strongroom *strongroom_open(const char *path);

/*
 * Closes the connection and frees everything. No callback is called any more; what was outstanding is given up. NULL is
 * fine. After a call from inside a callback, the strongroom_process() that runs it returns 0, and `s` is gone by then.
 */
void strongroom_close(struct strongroom *s);

/* The descriptor to watch. It stays the same until strongroom_close(). */
int strongroom_fd(const struct strongroom *s);

#define STRONGROOM_READ 1
#define STRONGROOM_WRITE 2
/* What to watch for; 0 once the connection is lost. */
int strongroom_events(const struct strongroom *s);

/* When to call strongroom_process() at the latest, though nothing is ready, in milliseconds, as poll() takes it; -1: no
   need. */
int strongroom_timeout_ms(const struct strongroom *s);

/*
 * Sends, receives, keeps the deadlines and calls callbacks. 0, or -1 with errno once the connection is lost; by then
 * every callback has been called, and only strongroom_close() is left to do. EPROTO: the daemon broke the protocol;
 * ECONNRESET: it closed the connection.
 */
int strongroom_process(struct strongroom *s);

/*
 * Ask for an operation. The request's id, never 0; or 0 with errno, and the callback is not called:
 * ENOBUFS: STRONGROOM_MAX_OUTSTANDING or STRONGROOM_MAX_UNSENT is reached, try again when some have ended;
 * EMSGSIZE: longer than a message may be (256 KiB); EINVAL: a key, a scheme or a callback is missing, or the
 * deadline is too long; ENOTCONN: the connection is lost; ENOMEM.
 */
uint64_t strongroom_sign(struct strongroom *s, const struct strongroom_request *r, strongroom_callback *callback,
                         void *argument);
uint64_t strongroom_decrypt(struct strongroom *s, const struct strongroom_request *r, strongroom_callback *callback,
                            void *argument);
uint64_t strongroom_derive(struct strongroom *s, const struct strongroom_request *r, strongroom_callback *callback,
                           void *argument);

/*
 * Gives a request up: its callback is not called any more. A device that is at work on it may still finish. -1 when
 * there is no such request (any more).
 */
int strongroom_cancel(struct strongroom *s, uint64_t id);

/* How many requests are outstanding. */
size_t strongroom_outstanding(const struct strongroom *s);

#ifdef __cplusplus
}
#endif
#endif
