#ifndef lint
static char sccsid[] = "@(#)esc.c	4.7 (Millrace)	11/2/87";
#endif

/*
 * dtx - tell what a formatter document would do, one event per line.
 * This file: the escapes.
 */

#include <stdio.h>
#include <ctype.h>
#include "dtx.h"

extern	FILE	*ifp;
extern	int	lineno, copymode;
extern	char	escchar;
extern	int	npeek, peekbuf[];

char	*getname(), *strsave();
struct	strg	*findstr();
long	getexpr();

#define	next()	(npeek ? peekbuf[--npeek] : getc(ifp))
#define	back(c)	(peekbuf[npeek++] = (c))

/*
 * Called with the escape character already read.  Returns a character,
 * or 0 if the escape stands for nothing that prints.
 */
escape()
{
	register int c;
	register char *s;
	struct strg *sp;
	int delim;

	switch (c = next()) {

	case EOF:
		return (EOF);

	case '\n':		/* joined line */
		lineno++;
		return (0);

	case '\\':
		return (copymode ? '\\' : 0);

	case '"':		/* comment, newline stays */
		while ((c = next()) != '\n' && c != EOF)
			;
		back(c);
		return (0);

	case 'e':
		return (escchar);

	case '-':
	case '\'':
	case '`':
		return (c);

	case '&':
	case '|':
	case '^':
	case '/':
	case ',':
		return (0);

	case ' ':
	case '0':
	case '~':
		return (' ');

	case '(':
		c = next() << 8;
		c |= next() & 0377;
		return (special(c));

	case '*':
		s = getname();
		if ((sp = findstr(s)) == NULL) {
			warn("string %s is not defined", s);
			return (0);
		}
		pushstr(sp->text);
		return (0);

	case 'n':
		if ((c = next()) == '+' || c == '-')
			stepreg(s = getname(), c);
		else {
			back(c);
			s = getname();
		}
		pushnum(regval(s));
		return (0);

	case 'f':
		s = getname();
		setfont(s);
		return (0);

	case 's':
		ptsize();
		return (0);

	case 'h':
	case 'v':
	case 'w':
		delim = next();
		event(c, getexpr(delim));
		return (0);

	case 'o':		/* overstrike: the widest wins, we take the first */
		delim = next();
		c = next();
		while (delim != next())
			;
		return (c);

	case 'k':
	case 'z':
		(void) next();
		return (0);

	case '{':
	case '}':
		nest(c);
		return (0);

	default:
		if (isprint(c))
			warn("unknown escape %c", c);
		else
			warn("unknown escape \\%03o", c);
		return (c);
	}
	/* NOTREACHED */
}

/*
 * \s0  \sN  \sNN  \s+N  \s-N  \s(NN
 * Two digits are taken only if the first is 1, 2 or 3: \s36 is 36 point,
 * \s45 is 4 point and a 5.  Nobody can change that now.
 */
ptsize()
{
	register int c, n, sign = 0;

	c = next();
	if (c == '+' || c == '-') {
		sign = c;
		c = next();
	}
	if (c == '(') {
		n = (next() - '0') * 10;
		n += next() - '0';
	} else if (isdigit(c)) {
		n = c - '0';
		if (sign == 0 && n >= 1 && n <= 3) {
			c = next();
			if (isdigit(c))
				n = n * 10 + c - '0';
			else
				back(c);
		}
	} else {
		back(c);
		warn("bad size");
		return;
	}
	setsize(n, sign);
}
