#ifndef DNS_PEEK_H
#define DNS_PEEK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* INET6_ADDRSTRLEN without dragging <netinet/in.h> into every file that logs. */
#define DNS_ADDR_TEXT		46
#define DNS_SUMMARY_ADDRS	4

enum dns_verdict {
	DNS_OK = 0,
	DNS_SHORT,		/* not even a header */
	DNS_NOT_QUERY,		/* notify, update, or some private opcode */
	DNS_ODD_COUNT,		/* question count is not one; only fuzzers send this */
	DNS_ODD_CLASS,
	DNS_MALFORMED
};

/*
 * Filled in as far as parsing got, whatever the verdict. Strings are always terminated.
 * About 1.3 kB: keep it off small stacks.
 */
struct dns_summary {
	uint16_t id;
	uint16_t qtype;
	uint8_t rcode;
	bool is_reply;
	bool truncated;
	bool more;		/* there were addresses beyond the ones kept in addr[] */
	unsigned n_addr;
	unsigned n_cname;
	uint32_t min_ttl;	/* UINT32_MAX when the answer section was empty */
	char qname[1021];	/* 255 wire bytes, each at worst \ddd */
	char addr[DNS_SUMMARY_ADDRS][DNS_ADDR_TEXT];
};

/* Never allocates, never blocks, reads at most len bytes. Returns enum dns_verdict. */
int dns_peek(const uint8_t *msg, size_t len, struct dns_summary *s);

/* "NXDOMAIN" and so on; unknown codes give "RCODE?" */
const char *dns_rcode_name(unsigned rcode);

#endif
