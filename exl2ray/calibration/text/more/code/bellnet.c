/*	bellnet.c: tell every workstation in the workshop that it is time for tea	*/

/*
 * A datagram of eight bytes goes out on the broadcast address once a minute for
 * ten minutes before each break.  Clients that want to nag their users listen on
 * port 4477; clients that do not are free to ignore it.  There is no reply.
 *
 *	0	'B' 'N'		magic
 *	2	version		currently 1
 *	3	kind		0 warning, 1 now, 2 over
 *	4	minutes		until the break (big endian, 16 bit)
 *	6	sequence	so a client can tell a duplicate from a second bell
 */

#include <sys/types.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <netinet/in.h>
#include <arpa/inet.h>

#include <err.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#define BN_PORT		4477
#define BN_VERSION	1
#define BN_LEAD		10		/* minutes of warning */
#define MAXBREAKS	8

enum { BN_WARN, BN_NOW, BN_OVER };

struct teabreak {
	int	tb_start;		/* minutes after midnight, local time */
	int	tb_len;
};

static struct teabreak	breaks[MAXBREAKS];
static int		nbreaks;
static volatile sig_atomic_t quit, reread;
static const char	*conf = "/etc/bellnet.conf";

static void
handler(int sig)
{
	if (sig == SIGHUP)
		reread = 1;
	else
		quit = 1;
}

/*
 * One break a line: "10:30 15" starts at half past ten and lasts a quarter of
 * an hour.  Anything after a # is a remark.  A bad line is skipped with a
 * complaint, because losing all the breaks over one typo caused ill feeling.
 */
static void
readconf(void)
{
	FILE *fp;
	char line[128], *p;
	int h, m, len, lineno = 0, n = 0;

	if ((fp = fopen(conf, "r")) == NULL) {
		syslog(LOG_ERR, "%s: %m; keeping the old table", conf);
		return;
	}
	while (fgets(line, sizeof(line), fp) != NULL) {
		lineno++;
		if ((p = strpbrk(line, "#\n")) != NULL)
			*p = '\0';
		if (line[strspn(line, " \t")] == '\0')
			continue;
		if (sscanf(line, "%d:%d %d", &h, &m, &len) != 3 ||
		    h < 0 || h > 23 || m < 0 || m > 59 || len < 1 || len > 120) {
			syslog(LOG_WARNING, "%s:%d: not a break", conf, lineno);
			continue;
		}
		if (n == MAXBREAKS) {
			syslog(LOG_WARNING, "%s:%d: nobody needs more than %d breaks",
			    conf, lineno, MAXBREAKS);
			break;
		}
		breaks[n].tb_start = h * 60 + m;
		breaks[n].tb_len = len;
		n++;
	}
	(void)fclose(fp);
	nbreaks = n;
	syslog(LOG_INFO, "%d breaks loaded", nbreaks);
}

static void
ring(int s, const struct sockaddr_in *to, int kind, int minutes)
{
	static uint16_t seq;
	unsigned char pkt[8];

	pkt[0] = 'B';
	pkt[1] = 'N';
	pkt[2] = BN_VERSION;
	pkt[3] = kind;
	pkt[4] = minutes >> 8;
	pkt[5] = minutes & 0xff;
	pkt[6] = seq >> 8;
	pkt[7] = seq & 0xff;
	seq++;
	if (sendto(s, pkt, sizeof(pkt), 0, (const struct sockaddr *)to,
	    sizeof(*to)) == -1) {
		/* the switch reboots on Sunday nights; not worth a page */
		if (errno == ENETUNREACH || errno == ENETDOWN)
			syslog(LOG_DEBUG, "sendto: %m");
		else
			syslog(LOG_ERR, "sendto: %m");
	}
}

static void
minute(int s, const struct sockaddr_in *to)
{
	time_t now;
	struct tm *tm;
	int i, t, d;

	(void)time(&now);
	tm = localtime(&now);
	if (tm->tm_wday == 0 || tm->tm_wday == 6)
		return;
	t = tm->tm_hour * 60 + tm->tm_min;
	for (i = 0; i < nbreaks; i++) {
		d = breaks[i].tb_start - t;
		if (d > 0 && d <= BN_LEAD)
			ring(s, to, BN_WARN, d);
		else if (d == 0)
			ring(s, to, BN_NOW, 0);
		else if (d == -breaks[i].tb_len)
			ring(s, to, BN_OVER, 0);
	}
}

int
main(int argc, char *argv[])
{
	struct sockaddr_in to;
	struct sigaction sa;
	struct timespec ts;
	int ch, on = 1, s, foreground = 0;
	const char *bcast = "255.255.255.255";

	while ((ch = getopt(argc, argv, "b:c:d")) != -1) {
		switch (ch) {
		case 'b':
			bcast = optarg;
			break;
		case 'c':
			conf = optarg;
			break;
		case 'd':
			foreground = 1;
			break;
		default:
			(void)fprintf(stderr,
			    "usage: bellnet [-d] [-b broadcast] [-c conf]\n");
			exit(1);
		}
	}

	memset(&to, 0, sizeof(to));
	to.sin_family = AF_INET;
	to.sin_port = htons(BN_PORT);
	if (inet_pton(AF_INET, bcast, &to.sin_addr) != 1)
		errx(1, "%s: not an address", bcast);
	if ((s = socket(AF_INET, SOCK_DGRAM, 0)) == -1)
		err(1, "socket");
	if (setsockopt(s, SOL_SOCKET, SO_BROADCAST, &on, sizeof(on)) == -1)
		err(1, "SO_BROADCAST");
	if (!foreground && daemon(0, 0) == -1)
		err(1, "daemon");
	openlog("bellnet", LOG_PID | (foreground ? LOG_PERROR : 0), LOG_DAEMON);

	memset(&sa, 0, sizeof(sa));
	sa.sa_handler = handler;
	sigemptyset(&sa.sa_mask);
	(void)sigaction(SIGHUP, &sa, NULL);
	(void)sigaction(SIGTERM, &sa, NULL);
	(void)sigaction(SIGINT, &sa, NULL);

	readconf();
	while (!quit) {
		(void)clock_gettime(CLOCK_REALTIME, &ts);
		ts.tv_sec = 60 - ts.tv_sec % 60;
		ts.tv_nsec = 0;
		if (nanosleep(&ts, NULL) == -1) {
			if (reread) {
				reread = 0;
				readconf();
			}
			continue;
		}
		minute(s, &to);
	}
	syslog(LOG_INFO, "going home");
	return 0;
}
