/*
 * Decode a DNS message far enough to log "who asked for what and got which addresses".
 *
 * The packet comes straight off the wire and is hostile until proven otherwise. Every read goes
 * through struct cur, which can only move forward and only inside the message; a failed read sets
 * the error flag and yields zeros, so the callers check once at the end instead of after each field.
 */
#include <arpa/inet.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "dns_peek.h"

#define DNS_HDR_LEN	12
#define DNS_NAME_MAX	255
#define DNS_LABEL_MAX	63
#define DNS_MAX_JUMPS	32	/* a legal name has at most 127 labels, nobody sane chains 32 pointers */

#define T_A	1
#define T_CNAME	5
#define T_AAAA	28
#define C_IN	1

struct cur {
	const uint8_t *base;
	size_t len;
	size_t off;
	bool bad;
};

static uint8_t get8(struct cur *c)
{
	if (c->bad || c->off >= c->len) {
		c->bad = true;
		return 0;
	}
	return c->base[c->off++];
}

static uint16_t get16(struct cur *c)
{
	uint16_t hi = get8(c);

	return (uint16_t)(hi << 8 | get8(c));
}

static uint32_t get32(struct cur *c)
{
	uint32_t hi = get16(c);

	return hi << 16 | get16(c);
}

static const uint8_t *take(struct cur *c, size_t n)
{
	const uint8_t *p = c->base + c->off;

	if (c->bad || n > c->len - c->off) {
		c->bad = true;
		return NULL;
	}
	c->off += n;
	return p;
}

/*
 * Expand a possibly compressed name into dotted text. Bytes that would confuse a log reader (dots
 * inside labels, control characters, anything above 0x7e) come out as \ddd. The cursor ends behind
 * the name as it stands in the record, not where the last pointer led.
 */
static void get_name(struct cur *c, char *out, size_t outsz)
{
	struct cur at = *c;
	size_t o = 0, wire = 0;
	int jumps = 0;

	for (;;) {
		uint8_t n = get8(&at);

		if (at.bad)
			goto bad;
		if ((n & 0xc0) == 0xc0) {
			size_t target = (size_t)(n & 0x3f) << 8 | get8(&at);

			if (jumps++ == 0)
				c->off = at.off;
			/* Pointers may only go backwards; that alone rules out most loops. */
			if (at.bad || target >= at.off - 2 || jumps > DNS_MAX_JUMPS)
				goto bad;
			at.off = target;
			continue;
		}
		if (n & 0xc0)		/* 01 and 10 were experiments, long dead */
			goto bad;
		if (n == 0)
			break;
		wire += n + 1u;
		if (n > DNS_LABEL_MAX || wire > DNS_NAME_MAX - 1)
			goto bad;

		const uint8_t *p = take(&at, n);
		if (!p)
			goto bad;
		for (uint8_t i = 0; i < n; i++) {
			bool plain = p[i] > ' ' && p[i] < 0x7f && p[i] != '.' && p[i] != '\\';

			if (o + 6 > outsz)
				goto bad;
			if (plain)
				out[o++] = (char)p[i];
			else
				o += (size_t)snprintf(out + o, outsz - o, "\\%03u", p[i]);
		}
		out[o++] = '.';
	}
	if (o == 0)
		out[o++] = '.';
	out[o] = '\0';
	if (jumps == 0)
		c->off = at.off;
	return;
bad:
	c->bad = true;
	snprintf(out, outsz, "?");
}

int dns_peek(const uint8_t *msg, size_t len, struct dns_summary *s)
{
	struct cur c = { .base = msg, .len = len };
	char name[DNS_NAME_MAX * 4 + 1];
	uint16_t flags, qd, an;

	memset(s, 0, sizeof(*s));
	s->id = get16(&c);
	flags = get16(&c);
	qd = get16(&c);
	an = get16(&c);
	(void)get32(&c);		/* authority and additional counts: not interested */
	if (c.bad)
		return DNS_SHORT;

	s->is_reply = flags >> 15;
	s->rcode = flags & 0xf;
	s->truncated = flags >> 9 & 1;
	if ((flags >> 11 & 0xf) != 0)
		return DNS_NOT_QUERY;
	if (qd != 1)
		return DNS_ODD_COUNT;

	get_name(&c, s->qname, sizeof(s->qname));
	s->qtype = get16(&c);
	if (get16(&c) != C_IN && !c.bad)
		return DNS_ODD_CLASS;
	if (c.bad)
		return DNS_MALFORMED;
	if (!s->is_reply)
		return DNS_OK;

	s->min_ttl = UINT32_MAX;
	while (an-- > 0) {
		uint16_t type, class, rdlen;
		uint32_t ttl;
		const uint8_t *rd;

		get_name(&c, name, sizeof(name));
		type = get16(&c);
		class = get16(&c);
		ttl = get32(&c);
		rdlen = get16(&c);
		rd = take(&c, rdlen);
		if (!rd)
			/* A truncated reply is allowed to stop in the middle of a record. */
			return s->truncated ? DNS_OK : DNS_MALFORMED;
		if (class != C_IN)
			continue;
		if (ttl > INT32_MAX)
			ttl = 0;
		if (ttl < s->min_ttl)
			s->min_ttl = ttl;

		if (type == T_CNAME) {
			s->n_cname++;
		} else if ((type == T_A && rdlen == 4) || (type == T_AAAA && rdlen == 16)) {
			if (s->n_addr == DNS_SUMMARY_ADDRS) {
				s->more = true;
				continue;
			}
			inet_ntop(type == T_A ? AF_INET : AF_INET6, rd, s->addr[s->n_addr],
				  sizeof(s->addr[0]));
			s->n_addr++;
		}
	}
	return DNS_OK;
}
