// The read side of a TFTP server (RFC 1350, with the blksize option of RFC 2348) for net-booting the
// exhibits of a science museum. No threads, no heap: the sockets belong to the caller, who calls
// tftp_input() for every datagram and tftp_poll() ten times a second.

#include "tftp_core.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

enum : uint16_t { OP_RRQ = 1, OP_WRQ, OP_DATA, OP_ACK, OP_ERROR, OP_OACK };
enum : uint16_t { E_UNDEFINED, E_NOT_FOUND, E_ACCESS, E_FULL, E_ILLEGAL, E_UNKNOWN_TID, E_EXISTS, E_OPTION };

static constexpr unsigned retry_ticks = 10;
static constexpr unsigned max_retries = 6;

static void put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }

static void send_error(struct tftp *t, const struct endpoint *to, uint16_t code, const char *text)
{
    uint8_t pkt[64];
    size_t n = strlen(text);

    if (n > sizeof pkt - 5)
        n = sizeof pkt - 5;
    put16(pkt, OP_ERROR);
    put16(pkt + 2, code);
    memcpy(pkt + 4, text, n);
    pkt[4 + n] = 0;
    t->ops->send(t->ctx, to, pkt, 5 + n);
}

static struct session *session_for(struct tftp *t, const struct endpoint *ep)
{
    for (size_t i = 0; i < TFTP_SESSIONS; i++)
        if (t->session[i].active && endpoint_equal(&t->session[i].peer, ep))
            return &t->session[i];
    return nullptr;
}

static void finish(struct tftp *t, struct session *s, const char *how)
{
    if (t->ops->log)
        t->ops->log(t->ctx, &s->peer, how, s->blocks_sent, s->resends);
    t->ops->close(t->ctx, s->file);
    *s = (struct session){};
}

static void transmit(struct tftp *t, struct session *s)
{
    t->ops->send(t->ctx, &s->peer, s->packet, s->packet_len);
    s->timer = retry_ticks;
}

static void next_block(struct tftp *t, struct session *s)
{
    long n = t->ops->read(t->ctx, s->file, s->packet + 4, s->blksize);

    if (n < 0) {
        send_error(t, &s->peer, E_UNDEFINED, "read failed");
        finish(t, s, "read error");
        return;
    }
    s->block++;                 // wraps at 65536, and every client worth serving lets it
    put16(s->packet, OP_DATA);
    put16(s->packet + 2, s->block);
    s->packet_len = 4 + (size_t)n;
    s->last = (size_t)n < s->blksize;
    s->retries = 0;
    s->blocks_sent++;
    transmit(t, s);
}

// Walks over zero-terminated strings; gives up on anything not terminated inside the packet.
static const char *take_string(const uint8_t **p, const uint8_t *end)
{
    const uint8_t *start = *p;
    const uint8_t *nul = memchr(start, 0, (size_t)(end - start));

    if (!nul)
        return nullptr;
    *p = nul + 1;
    return (const char *)start;
}

static bool name_is_safe(const char *name)
{
    if (*name == '/' || *name == 0 || strstr(name, ".."))
        return false;
    for (; *name; name++)
        if ((unsigned char)*name < ' ' || strchr("\\:*?\"<>|", *name))
            return false;
    return true;
}

static unsigned parse_number(const char *s)
{
    unsigned v = 0;

    for (; *s; s++) {
        if (*s < '0' || *s > '9' || v > 100'000)
            return 0;
        v = v * 10 + (unsigned)(*s - '0');
    }
    return v;
}

static void read_request(struct tftp *t, const struct endpoint *from, const uint8_t *p, const uint8_t *end)
{
    const char *name = take_string(&p, end);
    const char *mode = name ? take_string(&p, end) : nullptr;

    if (!mode)
        return send_error(t, from, E_ILLEGAL, "malformed request");
    if (strcasecmp(mode, "octet") != 0)
        return send_error(t, from, E_ILLEGAL, "only octet mode");
    if (!name_is_safe(name))
        return send_error(t, from, E_ACCESS, "no such name here");

    // The same client asking again: our answer was lost. Start over rather than hold two sessions.
    struct session *s = session_for(t, from);
    if (s)
        finish(t, s, "restarted");
    for (size_t i = 0; !s && i < TFTP_SESSIONS; i++)
        if (!t->session[i].active)
            s = &t->session[i];
    if (!s)
        return;                 // silence: the client will try again in a second, and then there may be room

    uint64_t size;
    void *file = t->ops->open(t->ctx, name, &size);
    if (!file)
        return send_error(t, from, E_NOT_FOUND, "no such file");

    *s = (struct session){ .active = true, .peer = *from, .file = file, .blksize = 512 };

    size_t n = 2;
    put16(s->packet, OP_OACK);
    for (const char *opt; (opt = take_string(&p, end)) != nullptr;) {
        const char *val = take_string(&p, end);
        if (!val)
            break;
        char reply[24];
        if (strcasecmp(opt, "blksize") == 0) {
            unsigned want = parse_number(val);
            if (want < 8)
                continue;       // nonsense is ignored as if the option were unknown
            s->blksize = want < TFTP_MAX_BLOCK ? (uint16_t)want : TFTP_MAX_BLOCK;
            snprintf(reply, sizeof reply, "%u", (unsigned)s->blksize);
        } else if (strcasecmp(opt, "tsize") == 0) {
            snprintf(reply, sizeof reply, "%llu", (unsigned long long)size);
        } else {
            continue;
        }
        size_t a = strlen(opt) + 1, b = strlen(reply) + 1;
        if (n + a + b > sizeof s->packet)
            break;
        memcpy(s->packet + n, opt, a);
        memcpy(s->packet + n + a, reply, b);
        n += a + b;
    }

    if (n > 2) {
        s->packet_len = n;
        transmit(t, s);         // the client acknowledges an OACK with block 0
    } else {
        next_block(t, s);
    }
}

static void acknowledged(struct tftp *t, struct session *s, uint16_t block)
{
    // An old acknowledgement must not make us resend: answering every duplicate with a duplicate doubles
    // the traffic for the rest of the transfer. Only the timer repeats a packet.
    if (block != s->block)
        return;
    if (s->last)
        finish(t, s, "complete");
    else
        next_block(t, s);
}

void tftp_input(struct tftp *t, const struct endpoint *from, const void *data, size_t len)
{
    const uint8_t *p = data;

    if (len < 4)
        return;
    struct session *s = session_for(t, from);
    switch (get16(p)) {
    case OP_RRQ:
        read_request(t, from, p + 2, p + len);
        break;
    case OP_WRQ:
        send_error(t, from, E_ACCESS, "this server only gives");
        break;
    case OP_ACK:
        if (s)
            acknowledged(t, s, get16(p + 2));
        else
            send_error(t, from, E_UNKNOWN_TID, "unknown transfer");
        break;
    case OP_ERROR:
        if (s)
            finish(t, s, "client gave up");
        break;
    default:
        if (s)
            send_error(t, from, E_ILLEGAL, "unexpected packet");
    }
}

void tftp_poll(struct tftp *t)
{
    for (size_t i = 0; i < TFTP_SESSIONS; i++) {
        struct session *s = &t->session[i];

        if (!s->active || --s->timer > 0)
            continue;
        if (s->retries++ == max_retries) {
            // After the last block the client may simply have left without a word; that is not a failure.
            finish(t, s, s->last ? "complete, unacknowledged" : "timed out");
            continue;
        }
        s->resends++;
        transmit(t, s);
    }
}
