/*
 * wicket -- a very small TCP gatekeeper.
 *
 * Listens on one port and forwards each connection to a backend, but only if the peer address is on
 * the list and the backend is not saturated. One process, one epoll set, no threads.
 *
 * Half-closed connections matter here: the label printers behind it send "EOT" by shutting down
 * their sending side and then expect the answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define BUFSZ     16384
#define MAX_PAIRS 256

struct pair;

/* One direction's source. What is read from .fd waits in .buf until the peer's .fd accepts it. */
struct side {
    int fd;
    struct pair *pair;
    struct side *peer;
    size_t off, len;
    bool eof;           /* read side finished */
    bool shut;          /* we have passed that on */
    unsigned char buf[BUFSZ];
};

struct pair {
    struct side client, server;
    bool connecting;
    struct pair *next_dead;
};

static int ep;
static int npairs;
static struct pair *graveyard;
static struct sockaddr_in backend;

struct rule { uint32_t net, mask; };
static struct rule rules[64];
static int nrules;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static bool allowed(struct in_addr a)
{
    uint32_t ip = ntohl(a.s_addr);

    for (int i = 0; i < nrules; i++)
        if ((ip & rules[i].mask) == rules[i].net)
            return true;
    return false;
}

static void add_rule(const char *text)
{
    char host[32];
    const char *slash = strchr(text, '/');
    int bits = slash ? atoi(slash + 1) : 32;
    size_t n = slash ? (size_t)(slash - text) : strlen(text);
    struct in_addr a;

    if (n >= sizeof host || bits < 0 || bits > 32 || nrules == 64)
        goto bad;
    memcpy(host, text, n);
    host[n] = '\0';
    if (inet_pton(AF_INET, host, &a) != 1)
        goto bad;
    rules[nrules].mask = bits == 0 ? 0 : ~0u << (32 - bits);
    rules[nrules].net = ntohl(a.s_addr) & rules[nrules].mask;
    nrules++;
    return;
bad:
    fprintf(stderr, "wicket: bad network \"%s\"\n", text);
    exit(2);
}

/* Interest follows the buffers: read only into an empty buffer, wait for writability only when there
 * is something to write. Level-triggered, so forgetting an event costs time, never data. */
static void update(struct side *s)
{
    struct epoll_event ev = { .data.ptr = s };

    if (s->pair->connecting) {
        ev.events = s == &s->pair->server ? EPOLLOUT : 0;
    } else {
        if (!s->eof && s->len == 0)
            ev.events |= EPOLLIN;
        if (s->peer->len > 0)
            ev.events |= EPOLLOUT;
    }
    if (epoll_ctl(ep, EPOLL_CTL_MOD, s->fd, &ev) < 0)
        die("epoll_ctl(MOD)");
}

static void bury(struct pair *p)
{
    if (p->client.fd < 0)
        return;             /* already dead, second event of the same batch */
    close(p->client.fd);
    close(p->server.fd);
    p->client.fd = p->server.fd = -1;
    /* Later events in this batch may still point here; free after the batch. */
    p->next_dead = graveyard;
    graveyard = p;
    npairs--;
}

static bool flush_to_peer(struct side *s)
{
    while (s->len > 0) {
        ssize_t n = send(s->peer->fd, s->buf + s->off, s->len, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return errno == EAGAIN;
        }
        s->off += (size_t)n;
        s->len -= (size_t)n;
    }
    s->off = 0;
    if (s->eof && !s->shut) {
        shutdown(s->peer->fd, SHUT_WR);
        s->shut = true;
    }
    return true;
}

static bool fill(struct side *s)
{
    ssize_t n;

    assert(s->len == 0);
    do
        n = recv(s->fd, s->buf, BUFSZ, 0);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EAGAIN;
    if (n == 0)
        s->eof = true;
    s->len = (size_t)n;
    return flush_to_peer(s);
}

static void on_event(struct side *s, uint32_t events)
{
    struct pair *p = s->pair;

    if (s->fd < 0)
        return;
    if (p->connecting) {
        int err = 0;
        socklen_t sz = sizeof err;
        if (s != &p->server) {
            bury(p);        /* client gave up before the backend answered */
            return;
        }
        getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &err, &sz);
        if (err) {
            fprintf(stderr, "wicket: backend: %s\n", strerror(err));
            bury(p);
            return;
        }
        p->connecting = false;
    } else {
        if ((events & EPOLLOUT) && !flush_to_peer(s->peer)) {
            bury(p);
            return;
        }
        if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && !s->eof && s->len == 0 && !fill(s)) {
            bury(p);
            return;
        }
        if (p->client.shut && p->server.shut) {
            bury(p);
            return;
        }
    }
    update(&p->client);
    update(&p->server);
}

static void on_accept(int lfd)
{
    struct sockaddr_in from;
    socklen_t sz = sizeof from;
    struct epoll_event ev = { 0 };
    struct pair *p;
    int fd = accept4(lfd, (struct sockaddr *)&from, &sz, SOCK_NONBLOCK | SOCK_CLOEXEC);

    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE)
            usleep(10000);  /* level-triggered listener would spin otherwise */
        return;
    }
    if (!allowed(from.sin_addr) || npairs >= MAX_PAIRS || !(p = calloc(1, sizeof *p))) {
        close(fd);
        return;
    }
    p->client.fd = fd;
    p->server.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (p->server.fd < 0) {
        close(fd);
        free(p);
        return;
    }
    p->client.pair = p->server.pair = p;
    p->client.peer = &p->server;
    p->server.peer = &p->client;
    p->connecting = true;
    npairs++;

    ev.data.ptr = &p->client;
    if (epoll_ctl(ep, EPOLL_CTL_ADD, p->client.fd, &ev) < 0)
        die("epoll_ctl(ADD)");
    ev.data.ptr = &p->server;
    if (epoll_ctl(ep, EPOLL_CTL_ADD, p->server.fd, &ev) < 0)
        die("epoll_ctl(ADD)");

    if (connect(p->server.fd, (struct sockaddr *)&backend, sizeof backend) < 0 && errno != EINPROGRESS) {
        bury(p);
        return;
    }
    update(&p->client);
    update(&p->server);
}

int main(int argc, char **argv)
{
    struct sockaddr_in any = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY) };
    struct epoll_event ev = { .events = EPOLLIN }, batch[64];
    int lfd, on = 1;

    if (argc < 5) {
        fprintf(stderr, "usage: wicket PORT BACKEND-IP BACKEND-PORT NETWORK...\n");
        return 2;
    }
    any.sin_port = htons((uint16_t)atoi(argv[1]));
    backend.sin_family = AF_INET;
    backend.sin_port = htons((uint16_t)atoi(argv[3]));
    if (inet_pton(AF_INET, argv[2], &backend.sin_addr) != 1)
        return 2;
    for (int i = 4; i < argc; i++)
        add_rule(argv[i]);

    if ((ep = epoll_create1(EPOLL_CLOEXEC)) < 0)
        die("epoll_create1");
    if ((lfd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)) < 0)
        die("socket");
    setsockopt(lfd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(lfd, (struct sockaddr *)&any, sizeof any) < 0 || listen(lfd, 64) < 0)
        die("bind");
    if (epoll_ctl(ep, EPOLL_CTL_ADD, lfd, &ev) < 0)     /* data.ptr NULL marks the listener */
        die("epoll_ctl(listener)");

    for (;;) {
        int n = epoll_wait(ep, batch, 64, -1);
        for (int i = 0; i < n; i++) {
            if (batch[i].data.ptr)
                on_event(batch[i].data.ptr, batch[i].events);
            else
                on_accept(lfd);
        }
        while (graveyard) {
            struct pair *p = graveyard;
            graveyard = p->next_dead;
            free(p);
        }
    }
}
