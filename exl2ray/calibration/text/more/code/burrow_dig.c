/* dig.c	level builder for the tape edition of BURROW	*/

#define ROWS 22
#define COLS 78
#define ROCK '#'
#define FLOOR '.'
#define DOOR '+'
#define DOWN '>'
#define NROOM 9

char	lev[ROWS][COLS];
struct room { int r, c, h, w; } rooms[NROOM];
int	nroom;
extern int depth;
extern long seed;

/* the classic generator; 31 bits is all the machine has */
rnd(n)
{
	seed = (seed * 16807L) % 2147483647L;
	if (seed < 0)
		seed += 2147483647L;
	return (int)(seed % n);
}

fill()
{
	register char *p;

	for (p = &lev[0][0]; p < &lev[ROWS][0]; )
		*p++ = ROCK;
	nroom = 0;
}

/* try to carve; returns 0 if the place is taken or touches another room */
carve(r, c, h, w)
{
	register int i, j;

	if (r < 1 || c < 1 || r + h >= ROWS-1 || c + w >= COLS-1)
		return(0);
	for (i = r-1; i <= r+h; i++)
		for (j = c-1; j <= c+w; j++)
			if (lev[i][j] != ROCK)
				return(0);
	for (i = r; i < r+h; i++)
		for (j = c; j < c+w; j++)
			lev[i][j] = FLOOR;
	return(1);
}

/*
 * one room for each cell of a 3 by 3 board.  deep levels leave cells
 * empty more often, the caves there are meant to feel lonely.
 */
mkrooms()
{
	int cell, r, c, h, w, tries;
	struct room *rp;

	for (cell = 0; cell < NROOM; cell++) {
		if (cell != 4 && rnd(20) < depth)
			continue;
		for (tries = 0; tries < 6; tries++) {
			h = 2 + rnd(4);
			w = 4 + rnd(16);
			r = 1 + (cell/3) * 7 + rnd(3);
			c = 1 + (cell%3) * 26 + rnd(6);
			if (carve(r, c, h, w))
				goto got;
		}
		continue;
	got:
		rp = &rooms[nroom++];
		rp->r = r; rp->c = c; rp->h = h; rp->w = w;
	}
}

/* walk from one point to another, bending once in the middle */
tunnel(r, c, tr, tc)
{
	int bend, dc;

	bend = c + (tc - c) / 2;
	dc = tc > c ? 1 : -1;
	while (c != tc) {
		if (c == bend)
			while (r != tr) {
				dig(r, c);
				r += tr > r ? 1 : -1;
			}
		dig(r, c);
		c += dc;
	}
	while (r != tr) {
		dig(r, c);
		r += tr > r ? 1 : -1;
	}
}

dig(r, c)
{
	register char *p;

	p = &lev[r][c];
	if (*p == ROCK)
		*p = isdoor(r, c) && rnd(3) == 0 ? DOOR : FLOOR;
}

/* rock on two opposite sides, floor on one of the others */
isdoor(r, c)
{
	if (lev[r-1][c] == ROCK && lev[r+1][c] == ROCK)
		return(lev[r][c-1] == FLOOR || lev[r][c+1] == FLOOR);
	if (lev[r][c-1] == ROCK && lev[r][c+1] == ROCK)
		return(lev[r-1][c] == FLOOR || lev[r+1][c] == FLOOR);
	return(0);
}

spot(rp, pr, pc)
struct room *rp;
int *pr, *pc;
{
	*pr = rp->r + rnd(rp->h);
	*pc = rp->c + rnd(rp->w);
}

newlevel(pr, pc)
int *pr, *pc;	/* where the player starts */
{
	int i, r1, c1, r2, c2;

	do {
		fill();
		mkrooms();
	} while (nroom < 3);
	for (i = 1; i < nroom; i++) {
		spot(&rooms[i-1], &r1, &c1);
		spot(&rooms[i], &r2, &c2);
		tunnel(r1, c1, r2, c2);
	}
	/* now and then a loop, otherwise every chase ends at a wall */
	if (rnd(2)) {
		spot(&rooms[0], &r1, &c1);
		spot(&rooms[nroom-1], &r2, &c2);
		tunnel(r1, c1, r2, c2);
	}
	spot(&rooms[rnd(nroom)], &r1, &c1);
	lev[r1][c1] = DOWN;
	do
		spot(&rooms[rnd(nroom)], pr, pc);
	while (*pr == r1 && *pc == c1);
}
