/* tally - count how often each input line occurs
   Part of the Mereside text utilities.  */

#include <config.h>

#include <getopt.h>
#include <stdio.h>
#include <sys/types.h>

#include "system.h"
#include "die.h"
#include "error.h"
#include "hash.h"
#include "linebuffer.h"
#include "quote.h"
#include "stdio--.h"
#include "xalloc.h"
#include "xstrtol.h"

/* The official name of this program.  */
#define PROGRAM_NAME "tally"
#define AUTHORS proper_name ("Ottoline Quaife")

struct counter
{
  char *text;
  size_t len;
  uintmax_t count;
  uintmax_t first;		/* number of the line where it was first seen */
};

/* If true, lines end in NUL rather than newline.  */
static bool zero_terminated;

/* If true, compare without regard to case.  */
static bool ignore_case;

/* Print only lines that occur at least this often.  */
static uintmax_t minimum = 1;

enum order
{
  by_count,
  by_text,
  by_appearance
};

static enum order order = by_count;

enum
{
  SORT_OPTION = CHAR_MAX + 1
};

static struct option const long_options[] =
{
  {"ignore-case", no_argument, NULL, 'i'},
  {"minimum", required_argument, NULL, 'm'},
  {"sort", required_argument, NULL, SORT_OPTION},
  {"zero-terminated", no_argument, NULL, 'z'},
  {GETOPT_HELP_OPTION_DECL},
  {GETOPT_VERSION_OPTION_DECL},
  {NULL, 0, NULL, 0}
};

static char const *const order_args[] = { "count", "text", "appearance", NULL };
static enum order const order_types[] = { by_count, by_text, by_appearance };

void
usage (int status)
{
  if (status != EXIT_SUCCESS)
    emit_try_help ();
  else
    {
      printf (_("Usage: %s [OPTION]... [FILE]...\n"), program_name);
      fputs (_("\
Print each distinct line of the FILEs once, preceded by the number of times\n\
that it occurs. The input need not be sorted.\n\
"), stdout);
      emit_stdin_note ();
      emit_mandatory_arg_note ();
      fputs (_("\
  -i, --ignore-case       do not distinguish capital and small letters;\n\
                            the spelling seen first is printed\n\
  -m, --minimum=N         print only lines that occur N times or more\n\
      --sort=WORD         order of the output: count (the default),\n\
                            text, or appearance\n\
  -z, --zero-terminated   line delimiter is NUL, not newline\n\
"), stdout);
      fputs (HELP_OPTION_DESCRIPTION, stdout);
      fputs (VERSION_OPTION_DESCRIPTION, stdout);
      emit_ancillary_info (PROGRAM_NAME);
    }
  exit (status);
}

static size_t
counter_hash (void const *entry, size_t n_buckets)
{
  struct counter const *c = entry;
  size_t h = 5381;

  for (size_t i = 0; i < c->len; i++)
    h = h * 33 + (ignore_case ? toupper (to_uchar (c->text[i]))
		  : to_uchar (c->text[i]));
  return h % n_buckets;
}

static bool
counter_equal (void const *e1, void const *e2)
{
  struct counter const *a = e1;
  struct counter const *b = e2;

  return a->len == b->len
	 && (ignore_case ? memcasecmp (a->text, b->text, a->len)
	     : memcmp (a->text, b->text, a->len)) == 0;
}

static int
compare (void const *p, void const *q)
{
  struct counter const *a = *(struct counter *const *) p;
  struct counter const *b = *(struct counter *const *) q;

  if (order == by_count && a->count != b->count)
    return a->count < b->count ? 1 : -1;
  if (order == by_text)
    return memcoll0 (a->text, a->len + 1, b->text, b->len + 1);
  return a->first < b->first ? -1 : a->first > b->first;
}

/* Count the lines of FILE, "-" being standard input.  Return true if
   successful.  */

static bool
tally_file (char const *file, Hash_table *table, uintmax_t *lineno)
{
  struct linebuffer lb;
  char delim = zero_terminated ? '\0' : '\n';
  bool is_stdin = STREQ (file, "-");
  FILE *stream = is_stdin ? stdin : fopen (file, "r");

  if (!stream)
    {
      error (0, errno, "%s", quotef (file));
      return false;
    }

  initbuffer (&lb);
  while (readlinebuffer_delim (&lb, stream, delim))
    {
      struct counter key = { lb.buffer, lb.length - 1, 0, 0 };
      struct counter *c = hash_lookup (table, &key);

      ++*lineno;
      if (!c)
	{
	  c = xmalloc (sizeof *c);
	  c->text = xmemdup (lb.buffer, lb.length);
	  c->text[lb.length - 1] = '\0';
	  c->len = lb.length - 1;
	  c->count = 0;
	  c->first = *lineno;
	  if (!hash_insert (table, c))
	    xalloc_die ();
	}
      c->count++;
    }
  freebuffer (&lb);

  if (ferror (stream) || (!is_stdin && fclose (stream) != 0))
    {
      error (0, errno, _("error reading %s"), quoteaf (file));
      return false;
    }
  return true;
}
