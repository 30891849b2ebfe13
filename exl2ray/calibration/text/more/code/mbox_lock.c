/*
 * Locking of mailbox files.
 *
 * Nobody has ever agreed how to lock a mailbox.  We know of:
 *
 *   dotlock   create "mbox.lock" with O_EXCL; works over old NFS only by
 *             way of link(2); needs write permission on the spool directory
 *   fcntl     POSIX record locks; dropped the moment *any* descriptor for
 *             the file is closed by this process
 *   flock     BSD; on some systems it is fcntl in disguise, and taking both
 *             makes us wait for ourselves for ever
 *
 * The order of acquisition matters as soon as two programs use more than one
 * kind. The delivery agent on most hosts takes dotlock first, so do we.
 */

#include "config.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#ifdef HAVE_FLOCK
# include <sys/file.h>
#endif
#include <time.h>
#include <unistd.h>

#include "lib/intl.h"
#include "mx.h"

#define MAXLOCKATTEMPT	5
#define STALE_SECONDS	(5 * 60)

enum { GOT_DOT = 1, GOT_FCNTL = 2, GOT_FLOCK = 4 };

static int lock_dot(const char *path)
{
	char lockname[PATH_MAX], unique[PATH_MAX], host[128];
	struct stat sb;
	int fd, attempt, rc = -1;

	if (gethostname(host, sizeof host) < 0)
		strcpy(host, "localhost");
	host[sizeof host - 1] = '\0';

	if (snprintf(lockname, sizeof lockname, "%s.lock", path) >= (int)sizeof lockname ||
	    snprintf(unique, sizeof unique, "%s.%s.%ld", path, host, (long)getpid()) >= (int)sizeof unique) {
		errno = ENAMETOOLONG;
		return -1;
	}

	fd = open(unique, O_WRONLY | O_CREAT | O_EXCL, 0600);
	if (fd < 0)
		return -1;
	close(fd);

	for (attempt = 0; ; attempt++) {
		/*
		 * The return value of link() may lie if the reply was lost and
		 * the server saw the request twice.  The link count does not.
		 */
		(void)link(unique, lockname);
		if (stat(unique, &sb) == 0 && sb.st_nlink == 2) {
			rc = 0;
			break;
		}

		if (stat(lockname, &sb) == 0 &&
		    time(NULL) - sb.st_mtime > STALE_SECONDS) {
			mx_message(_("Removing stale lock on %s"), path);
			unlink(lockname);
			continue;
		}

		if (attempt == MAXLOCKATTEMPT) {
			errno = EAGAIN;
			break;
		}
		mx_message(ngettext("Mailbox is in use, trying again (%d time so far)",
		                    "Mailbox is in use, trying again (%d times so far)", attempt + 1),
		           attempt + 1);
		sleep(1);
	}

	unlink(unique);
	return rc;
}

static void unlock_dot(const char *path)
{
	char lockname[PATH_MAX];

	snprintf(lockname, sizeof lockname, "%s.lock", path);
	unlink(lockname);
}

static int lock_fcntl(int fd, int excl)
{
	struct flock fl;
	int attempt;

	memset(&fl, 0, sizeof fl);
	fl.l_type = excl ? F_WRLCK : F_RDLCK;
	fl.l_whence = SEEK_SET;

	for (attempt = 0; fcntl(fd, F_SETLK, &fl) < 0; attempt++) {
		if (errno != EAGAIN && errno != EACCES)
			return -1;
		if (attempt == MAXLOCKATTEMPT)
			return -1;
		sleep(1);
	}
	return 0;
}

/*
 * Returns a set of GOT_ bits to be handed to mx_unlock_file(), or -1.
 * On failure nothing stays locked.
 */
int mx_lock_file(const char *path, int fd, int excl, int use_dot)
{
	int got = 0, saved;

	if (use_dot) {
		if (lock_dot(path) == 0) {
			got |= GOT_DOT;
		} else if (errno != EACCES && errno != EROFS) {
			mx_error(_("Could not lock %s: %s"), path, strerror(errno));
			goto fail;
		}
		/* A spool directory that is not ours: the kernel locks must do. */
	}

	if (lock_fcntl(fd, excl) < 0) {
		mx_perror(_("Somebody else keeps the mailbox locked (fcntl)"));
		goto fail;
	}
	got |= GOT_FCNTL;

#if defined(HAVE_FLOCK) && !defined(FLOCK_IS_FCNTL)
	if (flock(fd, (excl ? LOCK_EX : LOCK_SH) | LOCK_NB) < 0) {
		mx_perror(_("Somebody else keeps the mailbox locked (flock)"));
		goto fail;
	}
	got |= GOT_FLOCK;
#endif
	return got;

fail:
	saved = errno;
	mx_unlock_file(path, fd, got);
	errno = saved;
	return -1;
}

void mx_unlock_file(const char *path, int fd, int got)
{
#if defined(HAVE_FLOCK) && !defined(FLOCK_IS_FCNTL)
	if (got & GOT_FLOCK)
		flock(fd, LOCK_UN);
#endif
	if (got & GOT_FCNTL) {
		struct flock fl;

		memset(&fl, 0, sizeof fl);
		fl.l_type = F_UNLCK;
		fl.l_whence = SEEK_SET;
		fcntl(fd, F_SETLK, &fl);
	}
	if (got & GOT_DOT)
		unlock_dot(path);
}
