#include "backend.h"

#include <limits.h>

typedef struct Interval {
  int vreg;
  int start, end;
  int reg;
  int slot;
  int weight;
  int hint;
  Class cls;
} Interval;

static Interval *ivs;
static int niv;
static Interval *active[NREG];
static int nactive;
static uint32_t freeregs[NCLASS];
static int nslots;

static int bystart(const void *a, const void *b) {
  const Interval *x = a, *y = b;
  if (x->start != y->start)
    return x->start < y->start ? -1 : 1;
  return x->vreg - y->vreg;
}

static void extend(Interval *iv, int pos, int depth) {
  if (iv->start > pos)
    iv->start = pos;
  if (iv->end < pos)
    iv->end = pos;
  iv->weight += depth > 5 ? 100000 : (int[]){1, 10, 100, 1000, 10000, 50000}[depth];
}

static void build(Fn *fn) {
  niv = fn->nvreg;
  ivs = xcalloc(niv, sizeof(Interval));
  for (int i = 0; i < niv; i++) {
    ivs[i].vreg = i;
    ivs[i].start = INT_MAX;
    ivs[i].end = -1;
    ivs[i].reg = ivs[i].slot = -1;
    ivs[i].hint = -1;
    ivs[i].cls = fn->vregs[i].cls;
  }

  for (Blk *b = fn->start; b; b = b->next) {
    for (int v = bsfirst(b->livein); v >= 0; v = bsnext(b->livein, v + 1))
      extend(&ivs[v], b->first, 0);
    for (int v = bsfirst(b->liveout); v >= 0; v = bsnext(b->liveout, v + 1))
      extend(&ivs[v], b->last + 1, 0);
    for (Ins *i = b->ins; i < b->ins + b->nins; i++) {
      for (int k = 0; k < 2; k++)
        if (isvreg(i->arg[k]))
          extend(&ivs[i->arg[k].v], i->pos, b->loop);
      if (isvreg(i->to))
        extend(&ivs[i->to.v], i->pos + 1, b->loop);
      if (i->op == Ocopy && isvreg(i->to) && ispreg(i->arg[0]))
        ivs[i->to.v].hint = i->arg[0].v;
      if (i->op == Ocopy && ispreg(i->to) && isvreg(i->arg[0]))
        ivs[i->arg[0].v].hint = i->to.v;
    }
  }
}

static int crosses_call(Fn *fn, const Interval *iv) {
  int lo = 0, hi = fn->ncalls;
  while (lo < hi) {
    int mid = (lo + hi) / 2;
    if (fn->calls[mid] < iv->start)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo < fn->ncalls && fn->calls[lo] < iv->end;
}

static void expire(int pos) {
  int kept = 0;
  for (int i = 0; i < nactive; i++) {
    if (active[i]->end <= pos)
      freeregs[active[i]->cls] |= 1u << active[i]->reg;
    else
      active[kept++] = active[i];
  }
  nactive = kept;
}

static int takereg(Interval *iv, uint32_t allowed) {
  uint32_t can = freeregs[iv->cls] & allowed;
  if (!can)
    return -1;
  int r = iv->hint >= 0 && (can >> iv->hint & 1) ? iv->hint : __builtin_ctz(can);
  freeregs[iv->cls] &= ~(1u << r);
  return r;
}

static void spill(Interval *iv) {
  iv->reg = -1;
  iv->slot = nslots++;
}

void regalloc(Fn *fn) {
  nactive = nslots = 0;
  for (int c = 0; c < NCLASS; c++)
    freeregs[c] = target.allocatable[c];

  build(fn);
  Interval **order = xcalloc(niv, sizeof *order);
  Interval *sorted = xcalloc(niv, sizeof *sorted);
  memcpy(sorted, ivs, niv * sizeof *sorted);
  qsort(sorted, niv, sizeof *sorted, bystart);
  for (int i = 0; i < niv; i++)
    order[i] = &ivs[sorted[i].vreg];
  free(sorted);

  for (int i = 0; i < niv; i++) {
    Interval *cur = order[i];
    if (cur->end < 0)
      continue;
    expire(cur->start);

    uint32_t allowed = crosses_call(fn, cur) ? target.calleesaved[cur->cls] : ~0u;
    cur->reg = takereg(cur, allowed);
    if (cur->reg >= 0) {
      active[nactive++] = cur;
      fn->usedregs[cur->cls] |= 1u << cur->reg;
      continue;
    }

    int victim = -1;
    for (int k = 0; k < nactive; k++) {
      Interval *a = active[k];
      if (a->cls != cur->cls || !(allowed >> a->reg & 1))
        continue;
      if (victim < 0 || (long)a->weight * (active[victim]->end - active[victim]->start) <
                            (long)active[victim]->weight * (a->end - a->start))
        victim = k;
    }
    if (victim >= 0 && active[victim]->weight < cur->weight) {
      cur->reg = active[victim]->reg;
      spill(active[victim]);
      active[victim] = cur;
    } else {
      spill(cur);
    }
  }

  for (int i = 0; i < niv; i++) {
    fn->vregs[i].reg = ivs[i].reg;
    fn->vregs[i].slot = ivs[i].slot;
  }
  fn->nslots = nslots;
  free(order);
  free(ivs);
}
