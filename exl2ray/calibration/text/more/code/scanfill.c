/* scanfill.c: antialiased polygon filling by signed area, for the plotter preview
 *
 * Every edge adds, to each pixel it crosses, the area to its right inside that pixel and the change of cover.
 * A running sum along the row then is the coverage. There is no sorting and no list of active edges, only one
 * float per pixel; for the small outlines that plotters draw this beats the clever methods.
 */
#include "scanfill.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct raster {
    int w, h;
    int y0, y1;             /* rows touched since the last resolve */
    float *acc;             /* w + 2 cells per row: the slope of an edge on the border spills over */
};

struct raster *raster_new(int w, int h)
{
    struct raster *r = malloc(sizeof *r);

    if (!r)
        return NULL;
    r->w = w;
    r->h = h;
    r->y0 = h;
    r->y1 = 0;
    r->acc = calloc((size_t)(w + 2) * (size_t)h, sizeof *r->acc);
    if (!r->acc) {
        free(r);
        return NULL;
    }
    return r;
}

void raster_free(struct raster *r)
{
    if (r) {
        free(r->acc);
        free(r);
    }
}

/* x is clamped, not clipped: what lies to the left must still count as cover, what lies to the right must
 * not. Steep cuts at the border thus need an extra point where the edge meets it, see raster_line. */
static void row_edge(float *row, int w, float x0, float x1, float dy)
{
    int i0, i1, i;
    float inv, area_before;

    if (x0 > x1) {
        float t = x0;
        x0 = x1;
        x1 = t;
    }
    i0 = (int)floorf(x0);
    i1 = (int)ceilf(x1);
    if (i1 <= i0 + 1) {
        float mid = 0.5f * (x0 + x1) - (float)i0;
        row[i0] += dy * (1.0f - mid);
        row[i0 + 1] += dy * mid;
        return;
    }
    inv = 1.0f / (x1 - x0);
    {
        float part = (float)(i0 + 1) - x0;
        area_before = 0.5f * inv * part * part;
        row[i0] += dy * area_before;
    }
    if (i1 == i0 + 2) {
        float tail = x1 - (float)(i1 - 1);
        float last = 0.5f * inv * tail * tail;
        row[i0 + 1] += dy * (1.0f - area_before - last);
        row[i0 + 2] += dy * last;
        return;
    }
    {
        float second = inv * (1.5f - (x0 - (float)i0));
        float tail = x1 - (float)(i1 - 1);
        float last = 0.5f * inv * tail * tail;

        row[i0 + 1] += dy * (second - area_before);
        for (i = i0 + 2; i < i1 - 1; i++)
            row[i] += dy * inv;
        row[i1 - 1] += dy * (1.0f - (second + (float)(i1 - i0 - 3) * inv) - last);
        row[i1] += dy * last;
    }
    (void)w;
}

static void inside_line(struct raster *r, float x0, float y0, float x1, float y1)
{
    float dir = 1.0f, dxdy;
    int y, top, bottom;

    if (y0 == y1)
        return;
    if (y0 > y1) {
        float t;
        t = x0; x0 = x1; x1 = t;
        t = y0; y0 = y1; y1 = t;
        dir = -1.0f;
    }
    if (y1 <= 0 || y0 >= (float)r->h)
        return;
    dxdy = (x1 - x0) / (y1 - y0);
    if (y0 < 0) {
        x0 -= y0 * dxdy;
        y0 = 0;
    }
    if (y1 > (float)r->h)
        y1 = (float)r->h;

    top = (int)y0;
    bottom = (int)ceilf(y1);
    if (top < r->y0) r->y0 = top;
    if (bottom > r->y1) r->y1 = bottom;

    for (y = top; y < bottom; y++) {
        float *row = r->acc + (size_t)y * (size_t)(r->w + 2);
        float ya = y0 > (float)y ? y0 : (float)y;
        float yb = y1 < (float)(y + 1) ? y1 : (float)(y + 1);
        float xn = x0 + dxdy * (yb - ya);
        float lim = (float)r->w;

        row_edge(row, r->w, fminf(fmaxf(x0, 0), lim), fminf(fmaxf(xn, 0), lim), dir * (yb - ya));
        x0 = xn;
    }
}

void raster_line(struct raster *r, float x0, float y0, float x1, float y1)
{
    float cut[2], t[4];
    int i, n = 0;

    if (!isfinite(x0) || !isfinite(y0) || !isfinite(x1) || !isfinite(y1))
        return;
    t[n++] = 0;
    if (x0 != x1) {
        cut[0] = (0 - x0) / (x1 - x0);
        cut[1] = ((float)r->w - x0) / (x1 - x0);
        if (cut[0] > cut[1]) {
            float s = cut[0]; cut[0] = cut[1]; cut[1] = s;
        }
        for (i = 0; i < 2; i++)
            if (cut[i] > 0 && cut[i] < 1)
                t[n++] = cut[i];
    }
    t[n] = 1;
    for (i = 0; i < n; i++)
        inside_line(r, x0 + (x1 - x0) * t[i], y0 + (y1 - y0) * t[i],
                    x0 + (x1 - x0) * t[i + 1], y0 + (y1 - y0) * t[i + 1]);
}

/* Flattening by forward differences. The number of chords follows from the second difference: the distance
 * of a quadratic from its chord is an eighth of it over n squared. */
void raster_quad(struct raster *r, float x0, float y0, float cx, float cy, float x1, float y1)
{
    float ddx = x0 - 2 * cx + x1, ddy = y0 - 2 * cy + y1;
    float dev = sqrtf(ddx * ddx + ddy * ddy);
    int n = 1 + (int)sqrtf(dev * (0.25f / 0.1f)), i;
    float px = x0, py = y0;

    if (n > 64)
        n = 64;
    for (i = 1; i <= n; i++) {
        float t = (float)i / (float)n, u = 1 - t;
        float qx = u * u * x0 + 2 * u * t * cx + t * t * x1;
        float qy = u * u * y0 + 2 * u * t * cy + t * t * y1;

        raster_line(r, px, py, qx, qy);
        px = qx;
        py = qy;
    }
}

/* Turns sums into 8-bit coverage and leaves the accumulator empty for the next shape. */
void raster_resolve(struct raster *r, enum fill_rule rule, unsigned char *out, size_t stride)
{
    int x, y;

    for (y = r->y0; y < r->y1; y++) {
        float *row = r->acc + (size_t)y * (size_t)(r->w + 2);
        unsigned char *o = out + (size_t)y * stride;
        float sum = 0;

        for (x = 0; x < r->w; x++) {
            float c;

            sum += row[x];
            c = fabsf(sum);
            if (rule == FILL_EVEN_ODD) {
                c = fmodf(c, 2.0f);
                if (c > 1)
                    c = 2 - c;
            } else if (c > 1) {
                c = 1;
            }
            o[x] = (unsigned char)(c * 255.0f + 0.5f);
        }
        memset(row, 0, (size_t)(r->w + 2) * sizeof *row);
    }
    r->y0 = r->h;
    r->y1 = 0;
}
