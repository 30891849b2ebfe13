/* tarlist -- print the members of a ustar archive without extracting them.

   Usage: tarlist [-0] [-s] [ARCHIVE]

   Reads standard input if no ARCHIVE is given.  Does not seek, so it works on pipes; that is the
   whole reason for its existence, since the tape robot at the far end of the pipe cannot.  */

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 512 };

struct ustar_header
{
  char name[100];
  char mode[8];
  char uid[8];
  char gid[8];
  char size[12];
  char mtime[12];
  char chksum[8];
  char typeflag;
  char linkname[100];
  char magic[6];
  char version[2];
  char uname[32];
  char gname[32];
  char devmajor[8];
  char devminor[8];
  char prefix[155];
  char pad[12];
};

_Static_assert (sizeof (struct ustar_header) == BLOCK, "header must fill a block");

static const char *progname = "tarlist";
static char terminator = '\n';
static bool show_sizes;

/* Numbers are octal text, padded with blanks or zeros and ended by a blank or a NUL, unless the top
   bit of the first byte is set: then the rest is a big-endian binary number.  */
static bool
parse_number (const char *field, size_t width, uint64_t *result)
{
  uint64_t n = 0;

  if ((unsigned char) field[0] & 0x80)
    {
      if ((unsigned char) field[0] & 0x40)
        return false;           /* negative; only mtimes before 1970 do that */
      n = (unsigned char) field[0] & 0x3f;
      for (size_t i = 1; i < width; i++)
        {
          if (n >> 56)
            return false;
          n = n << 8 | (unsigned char) field[i];
        }
      *result = n;
      return true;
    }

  size_t i = 0;
  while (i < width && field[i] == ' ')
    i++;
  for (; i < width && field[i] >= '0' && field[i] <= '7'; i++)
    n = n << 3 | (uint64_t) (field[i] - '0');
  if (i < width && field[i] != ' ' && field[i] != '\0')
    return false;
  *result = n;
  return true;
}

/* The checksum is computed as if its own field held blanks.  Some ancient writers summed signed
   characters, and their archives are still about.  */
static bool
checksum_ok (const struct ustar_header *h)
{
  const unsigned char *p = (const unsigned char *) h;
  size_t from = offsetof (struct ustar_header, chksum);
  size_t to = from + sizeof h->chksum;
  long usum = 0, ssum = 0;
  uint64_t want;

  for (size_t i = 0; i < BLOCK; i++)
    {
      unsigned char c = i >= from && i < to ? ' ' : p[i];
      usum += c;
      ssum += (signed char) c;
    }
  if (!parse_number (h->chksum, sizeof h->chksum, &want))
    return false;
  return (long) want == usum || (long) want == ssum;
}

static bool
all_zero (const void *block)
{
  const unsigned char *p = block;
  for (size_t i = 0; i < BLOCK; i++)
    if (p[i])
      return false;
  return true;
}

static bool
skip (FILE *in, uint64_t bytes)
{
  char junk[16 * BLOCK];
  uint64_t left = (bytes + BLOCK - 1) / BLOCK * BLOCK;

  while (left > 0)
    {
      size_t want = left < sizeof junk ? (size_t) left : sizeof junk;
      size_t got = fread (junk, 1, want, in);
      if (got == 0)
        return false;
      left -= got;
    }
  return true;
}

static void
print_member (const struct ustar_header *h, uint64_t size)
{
  if (show_sizes)
    printf ("%12" PRIu64 "  ", size);
  if (memcmp (h->magic, "ustar", 5) == 0 && h->prefix[0])
    printf ("%.*s/", (int) sizeof h->prefix, h->prefix);
  printf ("%.*s", (int) sizeof h->name, h->name);
  if (h->typeflag == '2')
    printf (" -> %.*s", (int) sizeof h->linkname, h->linkname);
  putchar (terminator);
}

static int
list (FILE *in, const char *label)
{
  struct ustar_header h;
  int zero_blocks = 0;
  uint64_t blockno = 0;

  for (;; blockno++)
    {
      size_t got = fread (&h, 1, BLOCK, in);
      if (got == 0 && !ferror (in))
        {
          /* Truncated right at a member boundary: GNU tar warns, and so do we.  */
          fprintf (stderr, "%s: %s: no end-of-archive marker\n", progname, label);
          return EXIT_FAILURE;
        }
      if (got != BLOCK)
        {
          fprintf (stderr, "%s: %s: %s\n", progname, label,
                   ferror (in) ? strerror (errno) : "partial block at end");
          return EXIT_FAILURE;
        }
      if (all_zero (&h))
        {
          if (++zero_blocks == 2)
            return EXIT_SUCCESS;
          continue;
        }
      zero_blocks = 0;

      uint64_t size;
      if (!checksum_ok (&h) || !parse_number (h.size, sizeof h.size, &size))
        {
          fprintf (stderr, "%s: %s: block %" PRIu64 ": this does not look like a header\n",
                   progname, label, blockno);
          return EXIT_FAILURE;
        }
      /* 'x', 'g', 'L' carry metadata for the next member.  FIXME: honour the long names.  */
      if (!strchr ("xgLK", h.typeflag) || h.typeflag == '\0')
        print_member (&h, size);
      if (strchr ("123456", h.typeflag) && h.typeflag != '\0')
        size = 0;
      if (!skip (in, size))
        {
          fprintf (stderr, "%s: %s: member data cut short\n", progname, label);
          return EXIT_FAILURE;
        }
      blockno += (size + BLOCK - 1) / BLOCK;
    }
}

int
main (int argc, char **argv)
{
  int c;

  while ((c = getopt (argc, argv, "0s")) != -1)
    switch (c)
      {
      case '0':
        terminator = '\0';
        break;
      case 's':
        show_sizes = true;
        break;
      default:
        fprintf (stderr, "Usage: %s [-0] [-s] [ARCHIVE]\n", progname);
        return 2;
      }

  if (optind == argc)
    return list (stdin, "(stdin)");

  FILE *in = fopen (argv[optind], "rb");
  if (!in)
    {
      fprintf (stderr, "%s: %s: %s\n", progname, argv[optind], strerror (errno));
      return EXIT_FAILURE;
    }
  int status = list (in, argv[optind]);
  fclose (in);
  return status;
}
