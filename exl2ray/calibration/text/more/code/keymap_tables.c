/*
 * Key tables of the terminal emulator.
 *
 * One row per key; columns by modifier: none, Shift, Ctrl, Ctrl+Shift.
 * A NULL means "as without modifier". Sequences without ESC in them are sent
 * as they are; CSI and SS3 are spelt out so that 8-bit mode can shorten them.
 *
 * Sorted by keysym: keytab_find() does a binary search.
 */

#include <X11/keysym.h>

#include "keytab.h"

#define CSI "\033["
#define SS3 "\033O"

const struct keyrow keytab_normal[] = {
	/* keysym          none         shift        ctrl          ctrl+shift */
	{ XK_BackSpace,  { "\177",      NULL,        "\010",       NULL } },
	{ XK_Tab,        { "\t",        CSI "Z",     NULL,         CSI "Z" } },
	{ XK_Return,     { "\r",        NULL,        NULL,         NULL } },
	{ XK_Escape,     { "\033",      NULL,        NULL,         NULL } },
	{ XK_Home,       { CSI "H",     CSI "1;2H",  CSI "1;5H",   CSI "1;6H" } },
	{ XK_Left,       { CSI "D",     CSI "1;2D",  CSI "1;5D",   CSI "1;6D" } },
	{ XK_Up,         { CSI "A",     CSI "1;2A",  CSI "1;5A",   CSI "1;6A" } },
	{ XK_Right,      { CSI "C",     CSI "1;2C",  CSI "1;5C",   CSI "1;6C" } },
	{ XK_Down,       { CSI "B",     CSI "1;2B",  CSI "1;5B",   CSI "1;6B" } },
	{ XK_Prior,      { CSI "5~",    KEY_SCROLLUP, CSI "5;5~",  CSI "5;6~" } },
	{ XK_Next,       { CSI "6~",    KEY_SCROLLDN, CSI "6;5~",  CSI "6;6~" } },
	{ XK_End,        { CSI "F",     CSI "1;2F",  CSI "1;5F",   CSI "1;6F" } },
	{ XK_Insert,     { CSI "2~",    KEY_PASTE,   KEY_COPY,     NULL } },
	{ XK_F1,         { SS3 "P",     CSI "1;2P",  CSI "1;5P",   CSI "1;6P" } },
	{ XK_F2,         { SS3 "Q",     CSI "1;2Q",  CSI "1;5Q",   CSI "1;6Q" } },
	{ XK_F3,         { SS3 "R",     CSI "1;2R",  CSI "1;5R",   CSI "1;6R" } },
	{ XK_F4,         { SS3 "S",     CSI "1;2S",  CSI "1;5S",   CSI "1;6S" } },
	{ XK_F5,         { CSI "15~",   CSI "15;2~", CSI "15;5~",  CSI "15;6~" } },
	{ XK_F6,         { CSI "17~",   CSI "17;2~", CSI "17;5~",  CSI "17;6~" } },
	{ XK_F7,         { CSI "18~",   CSI "18;2~", CSI "18;5~",  CSI "18;6~" } },
	{ XK_F8,         { CSI "19~",   CSI "19;2~", CSI "19;5~",  CSI "19;6~" } },
	{ XK_F9,         { CSI "20~",   CSI "20;2~", CSI "20;5~",  CSI "20;6~" } },
	{ XK_F10,        { CSI "21~",   CSI "21;2~", CSI "21;5~",  CSI "21;6~" } },
	{ XK_F11,        { CSI "23~",   CSI "23;2~", CSI "23;5~",  CSI "23;6~" } },
	{ XK_F12,        { CSI "24~",   CSI "24;2~", CSI "24;5~",  CSI "24;6~" } },
	{ XK_Delete,     { CSI "3~",    CSI "3;2~",  CSI "3;5~",   CSI "3;6~" } },
};
const int keytab_normal_len = sizeof keytab_normal / sizeof *keytab_normal;

/* Application cursor keys, DECCKM: only the unmodified column differs. */
const struct keyrow keytab_appcursor[] = {
	{ XK_Home,       { SS3 "H",     NULL, NULL, NULL } },
	{ XK_Left,       { SS3 "D",     NULL, NULL, NULL } },
	{ XK_Up,         { SS3 "A",     NULL, NULL, NULL } },
	{ XK_Right,      { SS3 "C",     NULL, NULL, NULL } },
	{ XK_Down,       { SS3 "B",     NULL, NULL, NULL } },
	{ XK_End,        { SS3 "F",     NULL, NULL, NULL } },
};
const int keytab_appcursor_len = sizeof keytab_appcursor / sizeof *keytab_appcursor;

/* DEC special graphics, 0x5f to 0x7e, chosen by ESC ( 0 */
const unsigned short dec_graphics[32] = {
	0x0020, /* blank */
	0x25c6, /* diamond */
	0x2592, /* checkerboard */
	0x2409, 0x240c, 0x240d, 0x240a, /* HT FF CR LF */
	0x00b0, /* degree */
	0x00b1, /* plus or minus */
	0x2424, 0x240b, /* NL VT */
	0x2518, 0x2510, 0x250c, 0x2514, 0x253c, /* corners, crossing */
	0x23ba, 0x23bb, 0x2500, 0x23bc, 0x23bd, /* scan lines 1 3 5 7 9 */
	0x251c, 0x2524, 0x2534, 0x252c, /* tees */
	0x2502, /* vertical */
	0x2264, 0x2265, /* less, greater or equal */
	0x03c0, /* pi */
	0x2260, /* not equal */
	0x00a3, /* pound sterling */
	0x00b7, /* centred dot */
};

const char *
keytab_find(const struct keyrow *tab, int n, KeySym sym, int mods)
{
	int lo = 0, hi = n;

	while (lo < hi) {
		int mid = (lo + hi) / 2;

		if (tab[mid].sym < sym)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo == n || tab[lo].sym != sym)
		return NULL;
	mods &= MOD_SHIFT | MOD_CTRL;
	return tab[lo].seq[mods] ? tab[lo].seq[mods] : tab[lo].seq[0];
}
