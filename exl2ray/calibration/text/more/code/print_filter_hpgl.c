#include <cups-lite/filter.h>
#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define UNITS_PER_MM    40.0
#define PT_PER_MM       (72.0 / 25.4)
#define MAX_PENS        8

typedef struct
{
  double        width;                  /* Line width in mm */
  float         rgb[3];                 /* Colour */
} pen_t;

static pen_t    Pens[MAX_PENS + 1];     /* Pen 0 means no pen */
static int      Pen = 1,
                PenDown = 0,
                Relative = 0,
                PageOpen = 0,
                PageCount = 0;
static double   X, Y,                   /* Where we are, plotter units */
                P1[2] = { 0, 0 },
                P2[2] = { 16158, 11040 },
                Scale[4];               /* xmin, xmax, ymin, ymax */
static int      Scaled = 0;
static char     Terminator = 3;         /* Label terminator, ETX */


/*
 * 'begin_page()' - Emit the page header unless a page is open already.
 */

static void
begin_page(void)
{
  if (PageOpen)
    return;

  PageOpen = 1;
  printf("%%%%Page: %d %d\n", ++ PageCount, PageCount);
  puts("gsave 1 setlinecap 1 setlinejoin");
  fprintf(stderr, "PAGE: %d 1\n", PageCount);
}


/*
 * 'stroke_to()' - Move or draw to a point given in user or plotter units.
 */

static void
stroke_to(double ux,                    /* I - X */
          double uy)                    /* I - Y */
{
  double nx = ux, ny = uy;


  if (Scaled && !Relative)
  {
    nx = P1[0] + (ux - Scale[0]) * (P2[0] - P1[0]) / (Scale[1] - Scale[0]);
    ny = P1[1] + (uy - Scale[2]) * (P2[1] - P1[1]) / (Scale[3] - Scale[2]);
  }
  else if (Relative)
  {
    nx += X;
    ny += Y;
  }

  if (PenDown && Pen > 0)
  {
    begin_page();
    printf("%.3f %.3f moveto %.3f %.3f lineto stroke\n",
           X / UNITS_PER_MM * PT_PER_MM, Y / UNITS_PER_MM * PT_PER_MM,
           nx / UNITS_PER_MM * PT_PER_MM, ny / UNITS_PER_MM * PT_PER_MM);
  }

  X = nx;
  Y = ny;
}


/*
 * 'select_pen()' - SP n;
 */

static void
select_pen(int n)                       /* I - Pen number */
{
  if (n < 0 || n > MAX_PENS)
  {
    fprintf(stderr, "DEBUG: Pen %d not in the carousel, using pen 1.\n", n);
    n = 1;
  }

  Pen = n;
  if (n)
  {
    begin_page();
    printf("%.3f setlinewidth %.2f %.2f %.2f setrgbcolor\n",
           Pens[n].width * PT_PER_MM,
           Pens[n].rgb[0], Pens[n].rgb[1], Pens[n].rgb[2]);
  }
}


/*
 * 'draw_arc()' - AA x,y,sweep[,chord]; and AR.
 */

static void
draw_arc(double cx,                     /* I - Centre */
         double cy,
         double sweep,                  /* I - Degrees, positive is anticlockwise */
         double chord)                  /* I - Degrees per segment */
{
  double start, radius, a;
  int    i, n;
  int    saved = Relative, savedscale = Scaled;


  if (Relative)
  {
    cx += X;
    cy += Y;
  }

  radius = hypot(X - cx, Y - cy);
  start  = atan2(Y - cy, X - cx);
  n      = (int)ceil(fabs(sweep) / (chord > 0 ? chord : 5.0));

  Relative = Scaled = 0;
  for (i = 1; i <= n; i ++)
  {
    a = start + sweep * M_PI / 180.0 * i / n;
    stroke_to(cx + radius * cos(a), cy + radius * sin(a));
  }
  Relative = saved;
  Scaled   = savedscale;
}


/*
 * 'get_numbers()' - Read numbers up to the next instruction.
 *
 * Old software leaves out the semicolon between instructions, so any letter
 * ends the list as well.
 */

static int                              /* O - How many there were */
get_numbers(FILE   *fp,                 /* I - Job */
            double *v,                  /* O - Values */
            int    max)                 /* I - Room */
{
  int  ch, n = 0;
  char num[64], *p;


  for (;;)
  {
    while ((ch = getc(fp)) == ',' || isspace(ch));

    if (ch != '-' && ch != '+' && ch != '.' && !isdigit(ch))
    {
      if (ch != ';' && ch != EOF)
        ungetc(ch, fp);
      return (n);
    }

    for (p = num; (ch == '-' && p == num) || ch == '+' || ch == '.' || isdigit(ch); ch = getc(fp))
      if (p < num + sizeof(num) - 1)
        *p++ = (char)ch;
    *p = '\0';

    if (ch != EOF)
      ungetc(ch, fp);

    if (n < max)
      v[n ++] = atof(num);
  }
}


int                                     /* O - Exit status */
convert_hpgl(FILE *fp)                  /* I - Job */
{
  int    a, b, i, n;
  double v[512];


  while ((a = getc(fp)) != EOF)
  {
    if (!isalpha(a) || (b = getc(fp)) == EOF)
      continue;

    a = toupper(a);
    b = toupper(b);

#define CMD(s) (a == s[0] && b == s[1])

    if (CMD("LB"))
    {
      begin_page();
      fputs("(", stdout);
      while ((i = getc(fp)) != EOF && i != Terminator)
        printf(strchr("()\\", i) ? "\\%c" : "%c", i);
      puts(") L");
      continue;
    }
    if (CMD("DT"))
    {
      Terminator = (char)getc(fp);
      continue;
    }

    n = get_numbers(fp, v, 512);

    if (CMD("PU") || CMD("PD") || CMD("PA") || CMD("PR"))
    {
      if (a == 'P' && (b == 'U' || b == 'D'))
        PenDown = b == 'D';
      else
        Relative = b == 'R';
      for (i = 0; i + 1 < n; i += 2)
        stroke_to(v[i], v[i + 1]);
    }
    else if (CMD("SP"))
      select_pen(n ? (int)v[0] : 0);
    else if (CMD("AA") || CMD("AR"))
    {
      if (n >= 3)
        draw_arc(v[0], v[1], v[2], n > 3 ? v[3] : 5.0);
    }
    else if (CMD("SC"))
    {
      Scaled = n == 4 && v[0] != v[1] && v[2] != v[3];
      if (Scaled)
        memcpy(Scale, v, sizeof(Scale));
    }
    else if (CMD("PG") || CMD("AF"))
    {
      if (PageOpen)
        puts("grestore showpage");
      PageOpen = 0;
    }
    else
      fprintf(stderr, "DEBUG: Ignoring %c%c with %d parameters.\n", a, b, n);
  }

  if (PageOpen)
    puts("grestore showpage");

  return (PageCount ? 0 : 1);
}
