/* leaf: a pager for two columns side by side, as in parallel texts and interlinear translations
 *
 *	leaf left.txt right.txt
 *
 * Line n of one file belongs to line n of the other. Long lines wrap inside their column, and a row is as
 * tall as the taller of the two. Keys: j k space b g G, / to search in both, s to swap, q.
 */
#include <errno.h>
#include <locale.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>
#include <wchar.h>

struct text {
	const char *name;
	char **line;
	size_t n;
};

static struct text side[2];
static struct termios saved;
static volatile sig_atomic_t resized = 1, stop;
static int rows, cols;
static size_t top;
static char needle[80];

static void out(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
}

static void restore(void)
{
	tcsetattr(STDIN_FILENO, TCSAFLUSH, &saved);
	out("\033[?25h\033[?1049l");
	fflush(stdout);
}

static void on_winch(int sig) { (void)sig; resized = 1; }
static void on_term(int sig) { (void)sig; stop = 1; }

static void load(struct text *t, const char *name)
{
	FILE *f = fopen(name, "r");
	char *buf = NULL;
	size_t cap = 0, room = 0;
	ssize_t len;

	if (!f) {
		fprintf(stderr, "leaf: %s: %s\n", name, strerror(errno));
		exit(1);
	}
	t->name = name;
	while ((len = getline(&buf, &cap, f)) > 0) {
		if (buf[len - 1] == '\n')
			buf[len - 1] = '\0';
		if (t->n == room) {
			room = room ? room * 2 : 256;
			t->line = realloc(t->line, room * sizeof *t->line);
		}
		if (!t->line || !(t->line[t->n++] = strdup(buf))) {
			perror("leaf");
			exit(1);
		}
	}
	free(buf);
	fclose(f);
}

/* Cuts one screen line off *s, at most width columns, preferably at a blank. Returns its length in bytes
 * and stores the columns it takes. Combining marks have width 0 and stay with their letter; bytes that are
 * no valid character count as one column and are shown as a question mark by put_piece(). */
static size_t cut(const char *s, int width, int *used)
{
	size_t i = 0, blank = 0;
	int w = 0, blank_w = 0;
	mbstate_t st = {0};

	while (s[i]) {
		wchar_t wc;
		size_t n = mbrtowc(&wc, s + i, MB_CUR_MAX, &st);
		int cw;

		if (n == (size_t)-1 || n == (size_t)-2) {
			memset(&st, 0, sizeof st);
			n = 1;
			cw = 1;
		} else {
			cw = wcwidth(wc);
			if (cw < 0)
				cw = 1;
			if (wc == L' ') {
				blank = i;
				blank_w = w;
			}
		}
		if (w + cw > width) {
			if (blank) {
				*used = blank_w;
				return blank;
			}
			break;
		}
		w += cw;
		i += n;
	}
	*used = w;
	return i;
}

static int height(const char *s, int width)
{
	int h = 0, w;

	do {
		s += cut(s, width, &w);
		while (*s == ' ')
			s++;
		h++;
	} while (*s);
	return h;
}

static void put_piece(const char *s, size_t n)
{
	size_t k = strlen(needle);

	while (n) {
		if (k && n >= k && !memcmp(s, needle, k)) {
			out("\033[7m%.*s\033[27m", (int)k, s);
			s += k;
			n -= k;
			continue;
		}
		putchar((unsigned char)*s < 32 || *s == 127 ? '?' : *s);
		s++;
		n--;
	}
}

static const char *line_of(int which, size_t i)
{
	return i < side[which].n ? side[which].line[i] : "";
}

static size_t count(void)
{
	return side[0].n > side[1].n ? side[0].n : side[1].n;
}

static void draw(void)
{
	int width = (cols - 3) / 2, y = 0;
	size_t i;

	out("\033[H");
	for (i = top; i < count() && y < rows - 1; i++) {
		const char *p[2] = { line_of(0, i), line_of(1, i) };
		int first = 1;

		while ((first || *p[0] || *p[1]) && y < rows - 1) {
			int k;

			out("\033[%d;1H\033[K", y + 1);
			for (k = 0; k < 2; k++) {
				int used;
				size_t n = cut(p[k], width, &used);

				if (k)
					out("\033[%d;%dH\033[2m|\033[22m ", y + 1, width + 2);
				put_piece(p[k], n);
				p[k] += n;
				while (*p[k] == ' ')
					p[k]++;
			}
			first = 0;
			y++;
		}
	}
	for (; y < rows - 1; y++)
		out("\033[%d;1H\033[K\033[2m~\033[22m", y + 1);
	out("\033[%d;1H\033[K\033[7m %s | %s  %zu/%zu \033[27m", rows, side[0].name, side[1].name,
	    top + 1, count());
	fflush(stdout);
}

/* One page back is not a fixed number of lines: walk upwards until the screen would be full. */
static void page_up(void)
{
	int width = (cols - 3) / 2, y = 0;

	while (top > 0) {
		int a = height(line_of(0, top - 1), width), b = height(line_of(1, top - 1), width);

		y += a > b ? a : b;
		if (y > rows - 1)
			break;
		top--;
	}
}

static void page_down(void)
{
	int width = (cols - 3) / 2, y = 0;
	size_t from = top;

	while (top + 1 < count()) {
		int a = height(line_of(0, top), width), b = height(line_of(1, top), width);

		y += a > b ? a : b;
		if (y > rows - 1)
			break;
		top++;
	}
	if (top == from && top + 1 < count())
		top++;			/* a single row taller than the screen must not trap us */
}

static void search(int again)
{
	size_t i, n = count();

	if (!again) {
		out("\033[%d;1H\033[K/\033[?25h", rows);
		fflush(stdout);
		tcsetattr(STDIN_FILENO, TCSAFLUSH, &saved);
		if (!fgets(needle, sizeof needle, stdin))
			needle[0] = '\0';
		needle[strcspn(needle, "\n")] = '\0';
		struct termios raw = saved;
		raw.c_lflag &= ~(ICANON | ECHO);
		tcsetattr(STDIN_FILENO, TCSAFLUSH, &raw);
		out("\033[?25l");
	}
	for (i = 1; needle[0] && i <= n; i++) {
		size_t k = (top + i) % n;

		if (strstr(line_of(0, k), needle) || strstr(line_of(1, k), needle)) {
			top = k;
			return;
		}
	}
	out("\a");
}

int main(int argc, char **argv)
{
	setlocale(LC_ALL, "");
	if (argc != 3) {
		fprintf(stderr, "usage: leaf left right\n");
		return 2;
	}
	load(&side[0], argv[1]);
	load(&side[1], argv[2]);
	if (tcgetattr(STDIN_FILENO, &saved) < 0) {
		perror("leaf: not a terminal");
		return 1;
	}
	signal(SIGWINCH, on_winch);
	signal(SIGTERM, on_term);
	struct termios raw = saved;
	raw.c_lflag &= ~(ICANON | ECHO);
	tcsetattr(STDIN_FILENO, TCSAFLUSH, &raw);
	out("\033[?1049h\033[?25l");
	atexit(restore);

	while (!stop) {
		struct pollfd in = { STDIN_FILENO, POLLIN, 0 };
		char c;

		if (resized) {
			struct winsize ws;

			resized = 0;
			if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &ws) < 0 || ws.ws_col < 20)
				ws.ws_row = 24, ws.ws_col = 80;
			rows = ws.ws_row;
			cols = ws.ws_col;
		}
		draw();
		if (poll(&in, 1, -1) < 0)
			continue;	/* a signal; the flags say which */
		if (read(STDIN_FILENO, &c, 1) != 1)
			break;
		switch (c) {
		case 'q': return 0;
		case 'j': if (top + 1 < count()) top++; break;
		case 'k': if (top) top--; break;
		case ' ': page_down(); break;
		case 'b': page_up(); break;
		case 'g': top = 0; break;
		case 'G': top = count() ? count() - 1 : 0; page_up(); break;
		case '/': search(0); break;
		case 'n': search(1); break;
		case 's': { struct text t = side[0]; side[0] = side[1]; side[1] = t; } break;
		}
	}
	return 0;
}
