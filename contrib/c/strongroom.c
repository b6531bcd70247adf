/* A client of Strongroom's service door. See strongroom.h for its use and docs/protocol.md for the protocol. */
#define _POSIX_C_SOURCE 200809L

#include "strongroom.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_FRAME (256 * 1024)
#define MAX_MESSAGE 1024
/* Replies that a daemon may owe us before we ask it nothing more: those of a submit and a cancel for each ticket, twice. */
#define MAX_EXPECTED (4 * STRONGROOM_MAX_OUTSTANDING)
/* Buffers' worth of input that one call of strongroom_process() takes: then the loop has its turn. */
#define MAX_READS 4
/* How much longer than its deadline a request is waited for: the daemon's own answer is worth more than ours. */
#define GRACE_MS 250
/* How long to wait before collecting again after that failed, where the daemon does not say. */
#define COLLECT_PAUSE_MS 1000
#define COLLECT_WAIT_MS 3600000
#define NEVER UINT64_MAX

enum { FAILURE = 5, EXTENSION = 27, EXTENSION_FAILURE = 28, EXTENSION_RESPONSE = 29 };

enum kind { SUBMIT, COLLECT, CANCEL };

static const char *const kind_names[] = { "submit@strongroom.alt", "collect@strongroom.alt", "cancel@strongroom.alt" };

static const char *const code_names[] = {
    "ok", "locked", "not_locked", "wrong_password", "no_such_key", "pin_required", "pin_wrong", "pin_blocked",
    "not_touched", "absent", "busy", "timeout", "restarted", "unsupported", "too_long", "denied", "cancelled",
    "not_permitted", "bad_request", "no_prompt", "full", "failed", "disconnected",
};

struct buffer {
    unsigned char *data;
    size_t len;
    size_t room;
};

/* A request that has been sent and whose reply has not come: replies come in the order of requests. */
struct expected {
    enum kind kind;
    uint64_t id;
};

struct ticket {
    uint32_t generation; /* tells the tickets apart that had this place one after another */
    uint32_t next_free;
    uint64_t expires;
    strongroom_callback *callback; /* NULL: the place is free */
    void *argument;
};

struct strongroom {
    int fd;
    int lost; /* an errno, once the connection is of no use */
    int processing;
    int closing;

    struct buffer out;
    size_t sent;
    unsigned char *in;
    size_t in_len;

    struct expected *expected; /* a ring */
    size_t expected_first, expected_len, expected_room;

    struct ticket *tickets;
    uint32_t tickets_room;
    uint32_t first_free; /* tickets_room: none */
    size_t outstanding;
    uint64_t first_expiry; /* no ticket expires before this */

    int collecting;
    uint64_t collect_at; /* not before this */
};

/* Memory. */

static void wipe(void *memory, size_t len)
{
    volatile unsigned char *byte = memory;
    while (len-- > 0)
        *byte++ = 0;
}

static int make_room(struct buffer *b, size_t more)
{
    if (b->room - b->len >= more)
        return 0;
    size_t room = b->room < 1024 ? 1024 : b->room;
    while (room - b->len < more)
        room *= 2;
    unsigned char *data = realloc(b->data, room);
    if (data == NULL)
        return -1;
    b->data = data;
    b->room = room;
    return 0;
}

/* Writing. There is room: the callers have made it. */

static void put(struct buffer *b, const void *bytes, size_t len)
{
    if (len > 0)
        memcpy(b->data + b->len, bytes, len);
    b->len += len;
}

static void put_u8(struct buffer *b, unsigned char n)
{
    b->data[b->len++] = n;
}

static void put_u32(struct buffer *b, uint32_t n)
{
    for (int shift = 24; shift >= 0; shift -= 8)
        put_u8(b, (unsigned char)(n >> shift));
}

static void put_u64(struct buffer *b, uint64_t n)
{
    put_u32(b, (uint32_t)(n >> 32));
    put_u32(b, (uint32_t)n);
}

static void put_string(struct buffer *b, const void *bytes, size_t len)
{
    put_u32(b, (uint32_t)len);
    put(b, bytes, len);
}

static void put_text(struct buffer *b, const char *text)
{
    put_string(b, text, strlen(text));
}

/* Reading. After the first value that is not there, `broken` is set and all others are empty. */

struct reader {
    const unsigned char *next;
    size_t left;
    int broken;
};

static const unsigned char *take(struct reader *r, size_t len)
{
    if (len > r->left) {
        r->broken = 1;
        r->left = 0;
        return NULL;
    }
    const unsigned char *bytes = r->next;
    r->next += len;
    r->left -= len;
    return bytes;
}

static unsigned char take_u8(struct reader *r)
{
    const unsigned char *byte = take(r, 1);
    return byte ? *byte : 0;
}

static uint32_t take_u32(struct reader *r)
{
    const unsigned char *b = take(r, 4);
    return b ? (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3] : 0;
}

static uint64_t take_u64(struct reader *r)
{
    uint64_t high = take_u32(r);
    return high << 32 | take_u32(r);
}

static struct reader take_string(struct reader *r)
{
    struct reader inner = { NULL, 0, 0 };
    uint32_t len = take_u32(r);
    inner.next = take(r, len);
    inner.left = inner.next ? len : 0;
    return inner;
}

static int is_text(const struct reader *r, const char *text)
{
    return r->left == strlen(text) && memcmp(r->next, text, r->left) == 0;
}

/* Time. */

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* The replies that are expected. */

static int make_room_expected(struct strongroom *s)
{
    if (s->expected_len < s->expected_room)
        return 0;
    size_t room = s->expected_room ? 2 * s->expected_room : 64;
    struct expected *ring = malloc(room * sizeof *ring);
    if (ring == NULL)
        return -1;
    for (size_t n = 0; n < s->expected_len; n++)
        ring[n] = s->expected[(s->expected_first + n) % s->expected_room];
    free(s->expected);
    s->expected = ring;
    s->expected_first = 0;
    s->expected_room = room;
    return 0;
}

static struct expected pop_expected(struct strongroom *s)
{
    struct expected first = s->expected[s->expected_first];
    s->expected_first = (s->expected_first + 1) % s->expected_room;
    s->expected_len--;
    return first;
}

/* Begins a frame whose fields have `len` bytes, if there is memory for it. */
static int begin(struct strongroom *s, enum kind kind, uint64_t id, size_t len)
{
    const char *name = kind_names[kind];
    size_t body = 1 + 4 + strlen(name) + len;
    if (make_room_expected(s) < 0 || make_room(&s->out, 4 + body) < 0) {
        errno = ENOMEM;
        return -1;
    }
    struct expected *last = &s->expected[(s->expected_first + s->expected_len++) % s->expected_room];
    last->kind = kind;
    last->id = id;
    put_u32(&s->out, (uint32_t)body);
    put_u8(&s->out, EXTENSION);
    put_text(&s->out, name);
    return 0;
}

/* Tickets. An id is its ticket's generation and its place, counted from 1. */

static struct ticket *find_ticket(struct strongroom *s, uint64_t id)
{
    uint64_t place = (id & UINT32_MAX) - 1; /* far too large where there is none */
    if (place >= s->tickets_room)
        return NULL;
    struct ticket *t = &s->tickets[place];
    return t->callback != NULL && t->generation == id >> 32 ? t : NULL;
}

static int make_room_tickets(struct strongroom *s)
{
    if (s->first_free < s->tickets_room)
        return 0;
    uint32_t room = s->tickets_room ? 2 * s->tickets_room : 64;
    struct ticket *tickets = realloc(s->tickets, room * sizeof *tickets);
    if (tickets == NULL) {
        errno = ENOMEM;
        return -1;
    }
    memset(tickets + s->tickets_room, 0, (room - s->tickets_room) * sizeof *tickets);
    for (uint32_t n = s->tickets_room; n < room; n++)
        tickets[n].next_free = n + 1;
    s->tickets = tickets;
    s->first_free = s->tickets_room;
    s->tickets_room = room;
    return 0;
}

static void release(struct strongroom *s, struct ticket *t)
{
    t->callback = NULL;
    t->generation++;
    t->next_free = s->first_free;
    s->first_free = (uint32_t)(t - s->tickets);
    s->outstanding--;
}

/* Ends a ticket, if it is still there, and tells whoever waits for it. */
static void finish(struct strongroom *s, const struct strongroom_result *result)
{
    struct ticket *t = s->closing ? NULL : find_ticket(s, result->id);
    if (t == NULL)
        return;
    strongroom_callback *callback = t->callback;
    void *argument = t->argument;
    release(s, t);
    callback(s, result, argument);
}

static void finish_plain(struct strongroom *s, uint64_t id, enum strongroom_code code, const char *message)
{
    struct strongroom_result result = { id, code, NULL, 0, message, 0, UINT32_MAX };
    finish(s, &result);
}

static uint64_t id_at(const struct strongroom *s, uint32_t place)
{
    return (uint64_t)s->tickets[place].generation << 32 | (place + 1);
}

/* Gives the connection up. */
static void lose(struct strongroom *s, int why)
{
    if (s->lost)
        return;
    s->lost = why;
    const char *message = why == EPROTO ? "the daemon broke the protocol" : "the connection to the daemon is lost";
    for (uint32_t n = 0; n < s->tickets_room && !s->closing; n++)
        if (s->tickets[n].callback != NULL)
            finish_plain(s, id_at(s, n), STRONGROOM_DISCONNECTED, message);
}

static void expire(struct strongroom *s, uint64_t now)
{
    if (now < s->first_expiry)
        return;
    s->first_expiry = NEVER;
    for (uint32_t n = 0; n < s->tickets_room && !s->closing; n++) {
        if (s->tickets[n].callback == NULL)
            continue;
        if (s->tickets[n].expires <= now) {
            uint64_t id = id_at(s, n);
            /* The callback may use the place anew, so the daemon is told first. Should there be no memory for that,
               the daemon's late answer is ignored. */
            if (begin(s, CANCEL, id, 8) == 0)
                put_u64(&s->out, id);
            finish_plain(s, id, STRONGROOM_TIMEOUT, "the daemon did not answer in time");
        } else if (s->tickets[n].expires < s->first_expiry) {
            s->first_expiry = s->tickets[n].expires;
        }
    }
}

/* Replies. */

/* Reads a status and what follows it, and ends the ticket. `message` is memory for MAX_MESSAGE + 1 bytes. */
static void read_outcome(struct reader *r, struct strongroom_result *result, char *message)
{
    result->message = message;
    message[0] = 0;
    switch (take_u8(r)) {
    case 0: {
        struct reader data = take_string(r);
        result->code = STRONGROOM_OK;
        result->data = data.next;
        result->len = data.left;
        return;
    }
    case 1:
        break;
    default:
        r->broken = 1;
        return;
    }
    struct reader code = take_string(r), text = take_string(r);
    size_t len = text.left < MAX_MESSAGE ? text.left : MAX_MESSAGE;
    result->code = STRONGROOM_FAILED; /* what a newer daemon's code is to us */
    for (int n = STRONGROOM_LOCKED; n <= STRONGROOM_FAILED; n++)
        if (!r->broken && is_text(&code, code_names[n]))
            result->code = (enum strongroom_code)n;
    if (len > 0)
        memcpy(message, text.next, len);
    message[len] = 0;
    result->retry_after_ms = take_u32(r);
    result->tries_left = take_u32(r);
}

static void on_submitted(struct strongroom *s, uint64_t id, struct reader *r)
{
    char message[MAX_MESSAGE + 1];
    struct strongroom_result result = { id, STRONGROOM_OK, NULL, 0, message, 0, UINT32_MAX };
    if (r->left > 0 && r->next[0] == 0)
        return;
    read_outcome(r, &result, message);
    if (!r->broken)
        finish(s, &result);
}

static void on_collected(struct strongroom *s, struct reader *r)
{
    char message[MAX_MESSAGE + 1];
    if (r->left > 0 && r->next[0] != 0) {
        struct strongroom_result failed = { 0, STRONGROOM_OK, NULL, 0, message, 0, UINT32_MAX };
        read_outcome(r, &failed, message);
        uint32_t pause = failed.retry_after_ms ? failed.retry_after_ms : COLLECT_PAUSE_MS;
        s->collect_at = now_ms() + pause;
        return;
    }
    take_u8(r);
    for (uint32_t n = take_u32(r); n > 0 && !r->broken && !s->closing; n--) {
        struct reader entry = take_string(r);
        struct strongroom_result result = { take_u64(&entry), STRONGROOM_OK, NULL, 0, message, 0, UINT32_MAX };
        read_outcome(&entry, &result, message);
        if (entry.broken)
            r->broken = 1;
        else
            finish(s, &result);
    }
    /* `more` need not be read: the next collect follows at once. */
}

static void on_frame(struct strongroom *s, const unsigned char *body, size_t len)
{
    struct reader r = { body, len, 0 };
    unsigned char number = take_u8(&r);
    if (s->expected_len == 0) {
        lose(s, EPROTO);
        return;
    }
    struct expected reply = pop_expected(s);
    if (reply.kind == COLLECT)
        s->collecting = 0;
    if (number == FAILURE || number == EXTENSION_FAILURE) {
        if (reply.kind == SUBMIT && number == FAILURE)
            finish_plain(s, reply.id, STRONGROOM_UNSUPPORTED, "the agent does not speak Strongroom's messages here");
        else if (reply.kind == SUBMIT)
            finish_plain(s, reply.id, STRONGROOM_BAD_REQUEST, "the agent could not read the request");
        else if (reply.kind == COLLECT)
            s->collect_at = now_ms() + COLLECT_PAUSE_MS;
        return;
    }
    struct reader name = take_string(&r);
    if (number != EXTENSION_RESPONSE || r.broken || !is_text(&name, kind_names[reply.kind])) {
        lose(s, EPROTO);
        return;
    }
    if (reply.kind == SUBMIT)
        on_submitted(s, reply.id, &r);
    else if (reply.kind == COLLECT)
        on_collected(s, &r);
    if (r.broken)
        lose(s, EPROTO);
}

static void take_frames(struct strongroom *s)
{
    size_t at = 0;
    while (!s->lost && !s->closing && s->in_len - at >= 4) {
        struct reader head = { s->in + at, 4, 0 };
        size_t len = take_u32(&head);
        if (len == 0 || len > MAX_FRAME) {
            lose(s, EPROTO);
            break;
        }
        if (s->in_len - at - 4 < len)
            break;
        on_frame(s, s->in + at + 4, len);
        at += 4 + len;
    }
    /* They may hold secrets. */
    size_t left = s->in_len - at;
    if (at > 0)
        memmove(s->in, s->in + at, left);
    wipe(s->in + left, at);
    s->in_len = left;
}

static void receive(struct strongroom *s)
{
    for (int reads = 0; reads < MAX_READS && !s->lost && !s->closing; reads++) {
        ssize_t n = recv(s->fd, s->in + s->in_len, 4 + MAX_FRAME - s->in_len, 0);
        if (n > 0) {
            s->in_len += (size_t)n;
            take_frames(s);
        } else if (n == 0) {
            lose(s, ECONNRESET);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return;
        } else if (errno != EINTR) {
            lose(s, errno);
        }
    }
}

static void transmit(struct strongroom *s)
{
    while (!s->lost && s->sent < s->out.len) {
        ssize_t n = send(s->fd, s->out.data + s->sent, s->out.len - s->sent, MSG_NOSIGNAL);
        if (n >= 0) {
            s->sent += (size_t)n;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            break;
        } else if (errno != EINTR) {
            lose(s, errno == EPIPE ? ECONNRESET : errno);
        }
    }
    if (s->sent == 0)
        return;
    s->out.len -= s->sent;
    memmove(s->out.data, s->out.data + s->sent, s->out.len);
    s->sent = 0;
}

/* Keeps one collect outstanding while there is something to collect. Any other frame makes it answer at once, and then
   the next one goes out. */
static void collect(struct strongroom *s, uint64_t now)
{
    if (s->lost || s->collecting || s->outstanding == 0 || now < s->collect_at)
        return;
    if (begin(s, COLLECT, 0, 8) < 0) {
        s->collect_at = now + COLLECT_PAUSE_MS;
        return;
    }
    put_u32(&s->out, COLLECT_WAIT_MS);
    put_u32(&s->out, 0);
    s->collecting = 1;
}

static void destroy(struct strongroom *s)
{
    close(s->fd);
    if (s->in != NULL)
        wipe(s->in, s->in_len);
    free(s->in);
    free(s->out.data);
    free(s->expected);
    free(s->tickets);
    free(s);
}

/* What strongroom.h promises. */

const char *strongroom_code_name(enum strongroom_code code)
{
    size_t n = (size_t)code;
    return n < sizeof code_names / sizeof *code_names ? code_names[n] : "failed";
}

struct strongroom *strongroom_open(const char *path)
{
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return NULL;
    }
    memcpy(address.sun_path, path, strlen(path));
    struct strongroom *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->first_expiry = NEVER;
    s->in = malloc(4 + MAX_FRAME);
    s->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (s->in == NULL || s->fd < 0 || fcntl(s->fd, F_SETFD, FD_CLOEXEC) < 0 || fcntl(s->fd, F_SETFL, O_NONBLOCK) < 0 ||
        connect(s->fd, (struct sockaddr *)&address, sizeof address) < 0) {
        int why = errno;
        destroy(s);
        errno = why;
        return NULL;
    }
    return s;
}

void strongroom_close(struct strongroom *s)
{
    if (s == NULL)
        return;
    if (s->processing)
        s->closing = 1;
    else
        destroy(s);
}

int strongroom_fd(const struct strongroom *s)
{
    return s->fd;
}

int strongroom_events(const struct strongroom *s)
{
    if (s->lost)
        return 0;
    return s->out.len > s->sent ? STRONGROOM_READ | STRONGROOM_WRITE : STRONGROOM_READ;
}

int strongroom_timeout_ms(const struct strongroom *s)
{
    if (s->lost || s->outstanding == 0)
        return -1;
    uint64_t next = s->first_expiry;
    if (!s->collecting && s->collect_at < next)
        next = s->collect_at;
    if (next == NEVER)
        return -1;
    uint64_t now = now_ms();
    if (next <= now)
        return 0;
    return next - now < INT_MAX ? (int)(next - now) : INT_MAX;
}

int strongroom_process(struct strongroom *s)
{
    if (s->processing)
        return 0;
    s->processing = 1;
    receive(s);
    uint64_t now = now_ms();
    if (!s->lost)
        expire(s, now);
    collect(s, now);
    transmit(s);
    s->processing = 0;
    int lost = s->lost;
    if (s->closing) {
        destroy(s);
        return 0;
    }
    if (lost) {
        errno = lost;
        return -1;
    }
    return 0;
}

/* `submit`, its operation and the key, with `len` bytes of further fields to come. */
static uint64_t submit(struct strongroom *s, const char *operation, const struct strongroom_request *r, size_t len,
                       strongroom_callback *callback, void *argument)
{
    if (s->lost) {
        errno = ENOTCONN;
        return 0;
    }
    if (r->key_len == 0 || r->scheme == NULL || callback == NULL || r->deadline_ms > STRONGROOM_MAX_DEADLINE_MS) {
        errno = EINVAL;
        return 0;
    }
    size_t fixed = 8 + 4 + 4 + strlen(operation) + 4 + 4 + strlen(r->scheme);
    /* One by one: sums of what a caller gives may wrap. */
    if (r->key_len > MAX_FRAME || len > MAX_FRAME || 64 + fixed + r->key_len + len > MAX_FRAME) {
        errno = EMSGSIZE;
        return 0;
    }
    if (s->outstanding == STRONGROOM_MAX_OUTSTANDING || s->expected_len >= MAX_EXPECTED ||
        s->out.len - s->sent + fixed + r->key_len + len > STRONGROOM_MAX_UNSENT) {
        errno = ENOBUFS;
        return 0;
    }
    if (make_room_tickets(s) < 0)
        return 0;
    uint64_t id = id_at(s, s->first_free);
    if (begin(s, SUBMIT, id, fixed + r->key_len + len) < 0)
        return 0;
    struct ticket *t = &s->tickets[s->first_free];
    s->first_free = t->next_free;
    s->outstanding++;
    t->callback = callback;
    t->argument = argument;
    t->expires = r->deadline_ms ? now_ms() + r->deadline_ms + GRACE_MS : NEVER;
    if (t->expires < s->first_expiry)
        s->first_expiry = t->expires;
    put_u64(&s->out, id);
    put_u32(&s->out, r->deadline_ms);
    put_text(&s->out, operation);
    put_string(&s->out, r->key, r->key_len);
    put_text(&s->out, r->scheme);
    return id;
}

/* The length of two strings, or one that is refused where they are too long. */
static size_t strings_len(size_t one, size_t other)
{
    return one > MAX_FRAME || other > MAX_FRAME ? SIZE_MAX : 4 + one + 4 + other;
}

uint64_t strongroom_sign(struct strongroom *s, const struct strongroom_request *r, strongroom_callback *callback,
                         void *argument)
{
    /* Flags and a boolean take as much as a string of one byte. */
    uint64_t id = submit(s, "sign", r, strings_len(1, r->len), callback, argument);
    if (id == 0)
        return 0;
    put_u32(&s->out, r->flags);
    put_u8(&s->out, r->prehashed != 0);
    put_string(&s->out, r->data, r->len);
    return id;
}

uint64_t strongroom_decrypt(struct strongroom *s, const struct strongroom_request *r, strongroom_callback *callback,
                            void *argument)
{
    uint64_t id = submit(s, "decrypt", r, strings_len(r->label_len, r->len), callback, argument);
    if (id == 0)
        return 0;
    put_string(&s->out, r->label, r->label_len);
    put_string(&s->out, r->data, r->len);
    return id;
}

uint64_t strongroom_derive(struct strongroom *s, const struct strongroom_request *r, strongroom_callback *callback,
                           void *argument)
{
    size_t len = r->len > MAX_FRAME ? SIZE_MAX : 4 + r->len;
    uint64_t id = submit(s, "derive", r, len, callback, argument);
    if (id == 0)
        return 0;
    put_string(&s->out, r->data, r->len);
    return id;
}

int strongroom_cancel(struct strongroom *s, uint64_t id)
{
    struct ticket *t = find_ticket(s, id);
    if (t == NULL)
        return -1;
    release(s, t);
    /* Without memory for the message the daemon goes on, and its answer is ignored. */
    if (!s->lost && begin(s, CANCEL, id, 8) == 0)
        put_u64(&s->out, id);
    return 0;
}

size_t strongroom_outstanding(const struct strongroom *s)
{
    return s->outstanding;
}
