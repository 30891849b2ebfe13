/*
 * trackfs - mount a long recording and its cue list as a directory of WAV files
 *
 *	trackfs concert.raw concert.cue /mnt/concert
 *
 * The raw file is 48 kHz, 24 bit, stereo, little endian. A line of the cue list is "mm:ss.mmm title"; a track
 * ends where the next one begins. Nothing is copied: headers are made up when asked for, samples are read
 * from the raw file at the right place.
 */
#define FUSE_USE_VERSION 31
#include <fuse3/fuse.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RATE	48000
#define FRAME	6
#define HDR	44

struct track {
	char	*file;		/* "03 Andante.wav" */
	off_t	 first;		/* byte in the raw file */
	off_t	 len;
};

static struct track *tracks;
static size_t ntracks;
static int raw_fd;
static struct stat raw_st;

static void put(uint8_t **p, uint64_t v, int n)
{
	for (; n > 0; n--, v >>= 8)
		*(*p)++ = (uint8_t)v;
}

static void make_header(const struct track *t, uint8_t h[HDR])
{
	/* A WAV file cannot be longer than 4 GiB. Players cope with a size that is capped. */
	uint32_t n = t->len > 0xffffff00 ? 0xffffff00 : (uint32_t)t->len;
	uint8_t *p = h;

	memcpy(p, "RIFF", 4); p += 4;
	put(&p, n + HDR - 8, 4);
	memcpy(p, "WAVEfmt ", 8); p += 8;
	put(&p, 16, 4);
	put(&p, 1, 2);
	put(&p, 2, 2);
	put(&p, RATE, 4);
	put(&p, RATE * FRAME, 4);
	put(&p, FRAME, 2);
	put(&p, 24, 2);
	memcpy(p, "data", 4); p += 4;
	put(&p, n, 4);
}

static const struct track *lookup(const char *path)
{
	size_t i;

	if (*path++ != '/')
		return NULL;
	for (i = 0; i < ntracks; i++)
		if (!strcmp(tracks[i].file, path))
			return &tracks[i];
	return NULL;
}

static int t_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	const struct track *t;

	(void)fi;
	memset(st, 0, sizeof *st);
	st->st_uid = raw_st.st_uid;
	st->st_gid = raw_st.st_gid;
	st->st_atim = st->st_mtim = st->st_ctim = raw_st.st_mtim;
	if (!strcmp(path, "/")) {
		st->st_mode = S_IFDIR | 0555;
		st->st_nlink = 2;
		return 0;
	}
	if (!(t = lookup(path)))
		return -ENOENT;
	st->st_mode = S_IFREG | (raw_st.st_mode & 0444);
	st->st_nlink = 1;
	st->st_size = HDR + t->len;
	st->st_blocks = 0;		/* honest: du counts nothing */
	return 0;
}

static int t_readdir(const char *path, void *buf, fuse_fill_dir_t fill, off_t off,
		     struct fuse_file_info *fi, enum fuse_readdir_flags flags)
{
	size_t i;

	(void)off; (void)fi; (void)flags;
	if (strcmp(path, "/"))
		return -ENOTDIR;
	fill(buf, ".", NULL, 0, 0);
	fill(buf, "..", NULL, 0, 0);
	for (i = 0; i < ntracks; i++)
		if (fill(buf, tracks[i].file, NULL, 0, 0))
			return -ENOMEM;
	return 0;
}

static int t_open(const char *path, struct fuse_file_info *fi)
{
	const struct track *t = lookup(path);

	if (!t)
		return -ENOENT;
	if ((fi->flags & O_ACCMODE) != O_RDONLY)
		return -EROFS;
	fi->fh = (uint64_t)(t - tracks);
	fi->keep_cache = 1;
	return 0;
}

static int t_read(const char *path, char *buf, size_t size, off_t off, struct fuse_file_info *fi)
{
	const struct track *t = &tracks[fi->fh];
	size_t done = 0;

	(void)path;
	if (off >= HDR + t->len)
		return 0;
	if ((off_t)size > HDR + t->len - off)
		size = (size_t)(HDR + t->len - off);

	if (off < HDR) {
		uint8_t h[HDR];
		size_t n = (size_t)(HDR - off);

		make_header(t, h);
		if (n > size)
			n = size;
		memcpy(buf, h + off, n);
		done = n;
	}
	while (done < size) {
		ssize_t n = pread(raw_fd, buf + done, size - done, t->first + off + (off_t)done - HDR);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return done ? (int)done : -errno;
		if (n == 0) {
			/* the raw file has been cut behind our back; silence is kinder than an error */
			memset(buf + done, 0, size - done);
			return (int)size;
		}
		done += (size_t)n;
	}
	return (int)done;
}

static int read_cues(const char *name)
{
	FILE *f = fopen(name, "r");
	char line[512], clean[256];
	size_t room = 0;
	off_t end = raw_st.st_size - raw_st.st_size % FRAME;
	int no = 0;

	if (!f) {
		perror(name);
		return -1;
	}
	while (fgets(line, sizeof line, f)) {
		unsigned m, s, ms;
		int title;
		char *p, *q;

		no++;
		line[strcspn(line, "\r\n")] = '\0';
		if (!line[0] || line[0] == '#')
			continue;
		if (sscanf(line, "%u:%u.%3u %n", &m, &s, &ms, &title) != 3 || s > 59) {
			fprintf(stderr, "%s:%d: want mm:ss.mmm and a title\n", name, no);
			goto fail;
		}
		for (p = line + title, q = clean; *p && q < clean + sizeof clean - 1; p++)
			*q++ = *p == '/' ? '-' : *p;
		*q = '\0';

		if (ntracks == room) {
			room = room ? room * 2 : 16;
			tracks = realloc(tracks, room * sizeof *tracks);
			if (!tracks)
				goto fail;
		}
		struct track *t = &tracks[ntracks++];
		t->first = ((off_t)(m * 60 + s) * 1000 + ms) * (RATE / 1000) * FRAME;
		if (t->first >= end || (ntracks > 1 && t->first <= t[-1].first)) {
			fprintf(stderr, "%s:%d: cue is out of order or past the end\n", name, no);
			goto fail;
		}
		if (asprintf(&t->file, "%02zu %s.wav", ntracks, clean) < 0)
			goto fail;
		if (ntracks > 1)
			t[-1].len = t->first - t[-1].first;
		t->len = end - t->first;
	}
	fclose(f);
	return ntracks ? 0 : -1;
fail:
	fclose(f);
	return -1;
}

static const struct fuse_operations ops = {
	.getattr = t_getattr,
	.readdir = t_readdir,
	.open	 = t_open,
	.read	 = t_read,
};

int main(int argc, char **argv)
{
	if (argc < 4) {
		fprintf(stderr, "usage: trackfs RAW CUES MOUNTPOINT [fuse options]\n");
		return 2;
	}
	raw_fd = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (raw_fd < 0 || fstat(raw_fd, &raw_st) < 0) {
		perror(argv[1]);
		return 1;
	}
	if (read_cues(argv[2]) < 0)
		return 1;
	argv[2] = argv[0];
	return fuse_main(argc - 2, argv + 2, &ops, NULL);
}
