/* riffls - show the chunk tree of RIFF files (wav, avi, sfbk and relatives)
 *
 * usage: riffls [-q] [-x CHUNK] FILE...
 *    -q          say nothing about good files, only complain
 *    -x CHUNK    write the payload of the first chunk of that name to standard output
 *
 * A chunk is a four-character name, a little-endian length and that many bytes, padded to an even
 * length. RIFF and LIST chunks contain a second name and then chunks. Recorders that lose power leave
 * lengths of 0 or 0xffffffff behind; those are shown with what the file really has.
 */
#define _FILE_OFFSET_BITS 64
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define MAXDEPTH 12

static int qflag;
static const char *xname;
static int xdone;
static int status;

static const char *file;
static FILE *fp;

static void
warn(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "riffls: %s: ", file);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	status = 1;
}

static uint32_t
le32(const unsigned char *p)
{
	return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
}

static unsigned
le16(const unsigned char *p)
{
	return p[0] | p[1] << 8;
}

/* printable copy of a chunk name; two alternating buffers so that one printf can show two names */
static const char *
show(const unsigned char *id)
{
	static char buf[2][20];
	static int which;
	char *s = buf[which ^= 1];
	int i, n = 0;

	for (i = 0; i < 4; i++)
		n += sprintf(s + n, isprint(id[i]) ? "%c" : "\\%03o", id[i]);
	return s;
}

static void
show_format(uint32_t len)
{
	unsigned char b[16];

	if (len < sizeof b || fread(b, 1, sizeof b, fp) != sizeof b) {
		warn("format chunk of %lu bytes is too short", (unsigned long)len);
		return;
	}
	printf("  codec %u, %u channel%s, %lu Hz, %u bit", le16(b), le16(b + 2),
	    le16(b + 2) == 1 ? "" : "s", (unsigned long)le32(b + 4), le16(b + 14));
	/* Bytes per second must agree with the rest for plain PCM. Half the field recorders get it wrong. */
	if (le16(b) == 1 && le32(b + 8) != le32(b + 4) * le16(b + 12))
		printf(" (byte rate %lu is wrong)", (unsigned long)le32(b + 8));
}

static void
extract(uint32_t len)
{
	char buf[8192];
	size_t n;

	while (len > 0) {
		n = len < sizeof buf ? len : sizeof buf;
		if ((n = fread(buf, 1, n, fp)) == 0)
			break;
		if (fwrite(buf, 1, n, stdout) != n) {
			warn("write: %s", strerror(errno));
			exit(2);
		}
		len -= n;
	}
	xdone = 1;
}

static void
walk(off_t pos, off_t end, int depth)
{
	unsigned char h[12];
	uint32_t len;
	off_t body, room;
	int nested;

	while (end - pos >= 8) {
		if (fseeko(fp, pos, SEEK_SET) == -1 || fread(h, 1, 8, fp) != 8) {
			warn("read error at %lld", (long long)pos);
			return;
		}
		len = le32(h + 4);
		body = pos + 8;
		room = end - body;
		nested = memcmp(h, "RIFF", 4) == 0 || memcmp(h, "LIST", 4) == 0;

		if (nested && room >= 4 && fread(h + 8, 1, 4, fp) != 4) {
			warn("read error at %lld", (long long)body);
			return;
		}

		if (!qflag && xname == NULL) {
			printf("%10lld %10lu  %*s%s", (long long)pos, (unsigned long)len, depth * 2, "", show(h));
			if (nested)
				printf(" %s", show(h + 8));
		}
		if (len == 0xffffffff || (len == 0 && depth == 0) || (off_t)len > room) {
			warn("%s at %lld claims %lu bytes, %lld are there", show(h), (long long)pos,
			    (unsigned long)len, (long long)room);
			len = room > 0xfffffffe ? 0xfffffffe : (uint32_t)room;
		}
		if (!qflag && xname == NULL) {
			if (memcmp(h, "fmt ", 4) == 0)
				show_format(len);
			putchar('\n');
		}

		if (xname != NULL && !xdone && memcmp(h, xname, 4) == 0) {
			if (fseeko(fp, body, SEEK_SET) == 0)
				extract(len);
			return;
		}

		if (nested && len >= 4) {
			if (depth == MAXDEPTH)
				warn("lists nested deeper than %d, not followed", MAXDEPTH);
			else
				walk(body + 4, body + len, depth + 1);
			if (xdone)
				return;
		}
		pos = body + len + (len & 1);
	}
	/* one stray byte is the padding of a writer that padded twice; more is worth a word */
	if (end - pos > 1)
		warn("%lld bytes left over at %lld", (long long)(end - pos), (long long)pos);
}

static void
dofile(const char *name)
{
	unsigned char magic[4];
	off_t size;

	file = name;
	if ((fp = fopen(name, "rb")) == NULL) {
		warn("%s", strerror(errno));
		return;
	}
	if (fread(magic, 1, 4, fp) != 4 || memcmp(magic, "RIFF", 4) != 0) {
		warn("not a RIFF file");
	} else if (fseeko(fp, 0, SEEK_END) == -1 || (size = ftello(fp)) == -1) {
		warn("cannot seek: %s", strerror(errno));
	} else {
		walk(0, size, 0);
	}
	fclose(fp);
}

int
main(int argc, char *argv[])
{
	static char padded[5];
	int c;

	while ((c = getopt(argc, argv, "qx:")) != -1) {
		switch (c) {
		case 'q':
			qflag = 1;
			break;
		case 'x':
			if (strlen(optarg) > 4)
				goto usage;
			snprintf(padded, sizeof padded, "%-4s", optarg);
			xname = padded;
			break;
		default:
			goto usage;
		}
	}
	if (optind == argc)
		goto usage;
	for (; optind < argc && !xdone; optind++)
		dofile(argv[optind]);
	if (xname != NULL && !xdone) {
		fprintf(stderr, "riffls: no chunk \"%s\"\n", xname);
		status = 1;
	}
	return status;

usage:
	fputs("usage: riffls [-q] [-x CHUNK] FILE...\n", stderr);
	return 2;
}
