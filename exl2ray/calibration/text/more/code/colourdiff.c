/* colourdiff: compare two scans of the same cloth against a tolerance.
   Copyright status: see AUTHORS.  This program tries to behave like a proper GNU utility.  */

#include <config.h>

#include <errno.h>
#include <getopt.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "gettext.h"
#include "netpbm-lite.h"
#include "progname.h"
#include "xalloc.h"

#define _(msgid) gettext (msgid)

/* Exit statuses, as for cmp and diff.  */
enum { EXIT_SAME = 0, EXIT_DIFFER = 1, EXIT_TROUBLE = 2 };

struct lab { double L, a, b; };

/* Block size in pixels.  Single pixels differ by the weave; the eye averages over about 1.5 mm,
   which is 18 pixels at 300 dpi.  */
static unsigned int block = 18;
static double tolerance = 1.8;
static int verbosity;

static char const short_options[] = "b:qt:v";

enum { HELP_OPTION = 256, VERSION_OPTION };

static struct option const long_options[] =
{
  { "block",     required_argument, NULL, 'b' },
  { "quiet",     no_argument,       NULL, 'q' },
  { "tolerance", required_argument, NULL, 't' },
  { "verbose",   no_argument,       NULL, 'v' },
  { "help",      no_argument,       NULL, HELP_OPTION },
  { "version",   no_argument,       NULL, VERSION_OPTION },
  { NULL, 0, NULL, 0 }
};

static _Noreturn void
usage (int status)
{
  if (status != EXIT_SUCCESS)
    fprintf (stderr, _("Try '%s --help' for more information.\n"), program_name);
  else
    {
      printf (_("Usage: %s [OPTION]... REFERENCE SAMPLE\n"), program_name);
      fputs (_("\
Compare two PPM images block by block and report colour differences.\n\
\n\
  -b, --block=PIXELS      average over squares of this size (default 18)\n\
  -q, --quiet             print nothing, only set the exit status\n\
  -t, --tolerance=DELTA   largest acceptable CIE76 difference (default 1.8)\n\
  -v, --verbose           print every block, not just the bad ones\n\
      --help              display this help and exit\n\
      --version           output version information and exit\n\
\n\
Exit status is 0 if all blocks are within tolerance, 1 if some are not, 2 if trouble.\n\
"), stdout);
    }
  exit (status);
}

static double
linear (double v)
{
  return v <= 0.04045 ? v / 12.92 : pow ((v + 0.055) / 1.055, 2.4);
}

static double
lab_f (double t)
{
  return t > 216.0 / 24389.0 ? cbrt (t) : (24389.0 / 27.0 * t + 16.0) / 116.0;
}

/* From mean linear RGB to CIELAB, white point D65.  */
static struct lab
to_lab (double const rgb[3])
{
  double x = (0.4124564 * rgb[0] + 0.3575761 * rgb[1] + 0.1804375 * rgb[2]) / 0.95047;
  double y = 0.2126729 * rgb[0] + 0.7151522 * rgb[1] + 0.0721750 * rgb[2];
  double z = (0.0193339 * rgb[0] + 0.1191920 * rgb[1] + 0.9503041 * rgb[2]) / 1.08883;
  double fy = lab_f (y);
  struct lab result = { 116 * fy - 16, 500 * (lab_f (x) - fy), 200 * (fy - lab_f (z)) };
  return result;
}

static struct lab
block_colour (struct pixmap const *pm, unsigned int x0, unsigned int y0)
{
  static double table[256];
  double sum[3] = { 0, 0, 0 };
  unsigned int n = 0;

  if (table[255] == 0)
    for (int i = 0; i < 256; i++)
      table[i] = linear (i / 255.0);

  for (unsigned int y = y0; y < y0 + block && y < pm->height; y++)
    for (unsigned int x = x0; x < x0 + block && x < pm->width; x++, n++)
      for (int c = 0; c < 3; c++)
        sum[c] += table[pm->data[3 * ((size_t) y * pm->width + x) + c]];

  /* Averaging must happen in linear light: a fine black and white check is a mid grey to the eye
     only if the mean is taken before the cube root.  */
  for (int c = 0; c < 3; c++)
    sum[c] /= n;
  return to_lab (sum);
}

static int
compare (struct pixmap const *ref, struct pixmap const *sample)
{
  unsigned long bad = 0, total = 0;
  double worst = 0;

  for (unsigned int y = 0; y < ref->height; y += block)
    for (unsigned int x = 0; x < ref->width; x += block)
      {
        struct lab p = block_colour (ref, x, y);
        struct lab q = block_colour (sample, x, y);
        double dL = q.L - p.L, da = q.a - p.a, db = q.b - p.b;
        double delta = sqrt (dL * dL + da * da + db * db);

        total++;
        if (delta > worst)
          worst = delta;
        if (delta > tolerance)
          bad++;
        if (verbosity > 0 || (verbosity == 0 && delta > tolerance))
          /* TRANSLATORS: "dL" and so on are mathematical symbols, leave them alone.  */
          printf (_("%u,%u: %.2f (dL %+.2f, da %+.2f, db %+.2f)\n"), x, y, delta, dL, da, db);
      }

  if (verbosity >= 0 && bad > 0)
    printf (ngettext ("%lu of %lu block out of tolerance, worst %.2f\n",
                      "%lu of %lu blocks out of tolerance, worst %.2f\n", bad),
            bad, total, worst);
  return bad > 0 ? EXIT_DIFFER : EXIT_SAME;
}

int
main (int argc, char **argv)
{
  int c;
  char *end;

  set_program_name (argv[0]);
  setlocale (LC_ALL, "");
  bindtextdomain (PACKAGE, LOCALEDIR);
  textdomain (PACKAGE);

  while ((c = getopt_long (argc, argv, short_options, long_options, NULL)) != -1)
    switch (c)
      {
      case 'b':
        {
          unsigned long n = strtoul (optarg, &end, 10);
          if (*end || n == 0 || n > 4096)
            error (EXIT_TROUBLE, 0, _("invalid block size '%s'"), optarg);
          block = n;
        }
        break;

      case 'q':
        verbosity = -1;
        break;

      case 't':
        errno = 0;
        tolerance = strtod (optarg, &end);
        if (errno || end == optarg || *end || !(tolerance >= 0))
          error (EXIT_TROUBLE, errno, _("invalid tolerance '%s'"), optarg);
        break;

      case 'v':
        verbosity = 1;
        break;

      case HELP_OPTION:
        usage (EXIT_SUCCESS);

      case VERSION_OPTION:
        printf ("%s (%s) %s\n", "colourdiff", PACKAGE_NAME, VERSION);
        return EXIT_SUCCESS;

      default:
        usage (EXIT_TROUBLE);
      }

  if (argc - optind != 2)
    {
      error (0, 0, argc - optind < 2 ? _("missing operand") : _("extra operand '%s'"),
             argv[argc - 1]);
      usage (EXIT_TROUBLE);
    }

  struct pixmap *ref = pixmap_read (argv[optind]);
  struct pixmap *sample = pixmap_read (argv[optind + 1]);
  if (!ref || !sample)
    error (EXIT_TROUBLE, errno, "%s", argv[optind + (ref != NULL)]);
  if (ref->width != sample->width || ref->height != sample->height)
    error (EXIT_TROUBLE, 0, _("sizes differ: %ux%u and %ux%u"),
           ref->width, ref->height, sample->width, sample->height);

  int status = compare (ref, sample);
  if (fclose (stdout) != 0)
    error (EXIT_TROUBLE, errno, _("write error"));
  pixmap_free (ref);
  pixmap_free (sample);
  return status;
}
