/* holes: find runs of zero blocks in files and give them back to the file system
 *
 * holes [-n] [-v] [-m minimum] file...
 *
 * Works in place with FALLOC_FL_PUNCH_HOLE, which leaves the size of the file alone. Existing holes are
 * skipped with SEEK_DATA, so a second run over a large disk image takes milliseconds.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool dry, verbose;
static off_t minimum = 32 * 1024;

static struct {
	off_t files, runs, bytes, before, after;
} total;

static bool all_zero(const char *p, size_t n)
{
	/* the first byte by hand, the rest by comparing the block with itself one byte later */
	return n == 0 || (p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
}

static off_t parse_size(const char *s)
{
	char *end;
	errno = 0;
	long long v = strtoll(s, &end, 10);
	if (errno || v <= 0 || end == s)
		errx(2, "bad size: %s", s);
	switch (*end) {
	case 'G': v <<= 10; /* fallthrough */
	case 'M': v <<= 10; /* fallthrough */
	case 'k': case 'K': v <<= 10; end++; break;
	}
	if (*end)
		errx(2, "bad size: %s", s);
	return (off_t)v;
}

static int punch(int fd, const char *name, off_t from, off_t to)
{
	if (to - from < minimum)
		return 0;
	if (verbose)
		printf("%s: %jd..%jd (%jd)\n", name, (intmax_t)from, (intmax_t)to, (intmax_t)(to - from));
	total.runs++;
	total.bytes += to - from;
	if (dry)
		return 0;
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from, to - from) == 0)
		return 0;
	warn("%s: cannot punch", name);
	return -1;
}

static int scan(int fd, const char *name, const struct stat *st, char *buf, size_t bufsize)
{
	off_t bs = st->st_blksize, end = st->st_size;
	off_t pos = 0, run = -1;

	while (pos < end) {
		off_t data = lseek(fd, pos, SEEK_DATA);
		if (data < 0) {
			if (errno == ENXIO)
				break;			/* only a hole up to the end */
			if (errno != EINVAL) {
				warn("%s: seek", name);
				return -1;
			}
			data = pos;			/* this file system does not know */
		}
		if (data > pos && run >= 0) {
			if (punch(fd, name, run, pos) < 0)
				return -1;
			run = -1;
		}
		pos = data - data % bs;

		ssize_t got = pread(fd, buf, bufsize, pos);
		if (got < 0) {
			warn("%s: read at %jd", name, (intmax_t)pos);
			return -1;
		}
		if (got == 0)
			break;

		for (ssize_t i = 0; i < got; i += bs) {
			size_t n = got - i < bs ? (size_t)(got - i) : (size_t)bs;
			if (all_zero(buf + i, n)) {
				if (run < 0)
					run = pos + i;
			} else if (run >= 0) {
				if (punch(fd, name, run, pos + i) < 0)
					return -1;
				run = -1;
			}
		}
		pos += got;
	}
	return run >= 0 ? punch(fd, name, run, end) : 0;
}

static int one(const char *name)
{
	struct stat st, after;
	int fd = open(name, (dry ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0) {
		warn("%s", name);
		return -1;
	}
	if (fstat(fd, &st) < 0) {
		warn("%s: stat", name);
		close(fd);
		return -1;
	}
	if (!S_ISREG(st.st_mode)) {
		warnx("%s: not a regular file", name);
		close(fd);
		return -1;
	}

	size_t bufsize = (size_t)st.st_blksize * 256;
	char *buf = malloc(bufsize);
	if (!buf)
		err(1, "malloc");
	int rc = scan(fd, name, &st, buf, bufsize);
	free(buf);

	if (fstat(fd, &after) == 0) {
		total.before += st.st_blocks * 512;
		total.after += after.st_blocks * 512;
		if (!dry && after.st_size != st.st_size) {
			/* somebody is writing to it, and we may just have zeroed what he wrote */
			warnx("%s: size changed while we worked on it!", name);
			rc = -1;
		}
	}
	total.files++;
	close(fd);
	return rc;
}

int main(int argc, char **argv)
{
	int c, bad = 0;

	while ((c = getopt(argc, argv, "nvm:")) != -1)
		switch (c) {
		case 'n': dry = true; break;
		case 'v': verbose = true; break;
		case 'm': minimum = parse_size(optarg); break;
		default:
			fprintf(stderr, "usage: holes [-nv] [-m minimum] file...\n");
			return 2;
		}
	for (; optind < argc; optind++)
		bad |= one(argv[optind]) < 0;

	printf("%jd files, %jd runs, %jd bytes of zeros; on disk %jd -> %jd\n", (intmax_t)total.files,
	       (intmax_t)total.runs, (intmax_t)total.bytes, (intmax_t)total.before, (intmax_t)total.after);
	return bad;
}
