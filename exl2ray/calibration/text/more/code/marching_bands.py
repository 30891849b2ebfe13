from __future__ import print_function, division

import math
import random
import itertools

try:
    xrange
except NameError:
    xrange = range


def hungarian(cost):
    """Minimum-cost perfect matching, O(n^3).

    cost: square list of lists.  Returns a list p with p[row] = column.
    Potentials u, v and the shortest augmenting path, all 1-based because that
    is how I learned it and every zero-based version I tried had a bug.
    """
    n = len(cost)
    INF = float('inf')
    u = [0] * (n + 1)
    v = [0] * (n + 1)
    match = [0] * (n + 1)         # match[col] = row
    way = [0] * (n + 1)
    for i in xrange(1, n + 1):
        match[0] = i
        j0 = 0
        minv = [INF] * (n + 1)
        used = [False] * (n + 1)
        while True:
            used[j0] = True
            i0, delta, j1 = match[j0], INF, 0
            for j in xrange(1, n + 1):
                if used[j]:
                    continue
                cur = cost[i0 - 1][j - 1] - u[i0] - v[j]
                if cur < minv[j]:
                    minv[j], way[j] = cur, j0
                if minv[j] < delta:
                    delta, j1 = minv[j], j
            for j in xrange(n + 1):
                if used[j]:
                    u[match[j]] += delta
                    v[j] -= delta
                else:
                    minv[j] -= delta
            j0 = j1
            if match[j0] == 0:
                break
        while j0:
            j1 = way[j0]
            match[j0] = match[j1]
            j0 = j1
    p = [0] * n
    for j in xrange(1, n + 1):
        p[match[j] - 1] = j - 1
    return p


def block(rows, cols, spacing=1.5):
    return [(c * spacing, r * spacing) for r in range(rows) for c in range(cols)]


def ring(n, radius, centre=(0.0, 0.0)):
    return [(centre[0] + radius * math.cos(2 * math.pi * k / n),
             centre[1] + radius * math.sin(2 * math.pi * k / n)) for k in range(n)]


class Drill(object):
    """A sequence of pictures with the number of counts to get from one to the next."""

    max_step = 0.75     # metres per count, comfortable with a sousaphone

    def __init__(self, first, instruments):
        assert len(first) == len(instruments)
        self.instruments = instruments
        self.pictures = [list(first)]
        self.counts = []

    def move(self, spots, counts, keep_sections=False):
        """Send everybody to the nearest sensible spot.

        Squared distances, not plain ones: with plain ones a single marcher may
        have to sprint across the field so that the others can stand still.
        """
        here = self.pictures[-1]
        n = len(here)
        if len(spots) != n:
            raise ValueError('%d spots for %d marchers' % (len(spots), n))
        cost = [[(x - a) ** 2 + (y - b) ** 2 for a, b in spots] for x, y in here]
        if keep_sections:
            # neighbours in the list of spots belong to one section
            order = sorted(set(self.instruments))
            size = dict((s, self.instruments.count(s)) for s in order)
            owner = list(itertools.chain(*[[s] * size[s] for s in order]))
            for i in xrange(n):
                for j in xrange(n):
                    if owner[j] != self.instruments[i]:
                        cost[i][j] += 1e6
        p = hungarian(cost)
        there = [spots[p[i]] for i in xrange(n)]
        longest = max(math.hypot(a[0] - b[0], a[1] - b[1]) for a, b in zip(here, there))
        if longest / counts > self.max_step:
            raise ValueError('somebody has to march %.1f m in %d counts' % (longest, counts))
        self.pictures.append(there)
        self.counts.append(counts)
        return self

    def at(self, count):
        for k, c in enumerate(self.counts):
            if count <= c:
                t = count / c
                return [((1 - t) * x + t * a, (1 - t) * y + t * b)
                        for (x, y), (a, b) in zip(self.pictures[k], self.pictures[k + 1])]
            count -= c
        return self.pictures[-1]

    def collisions(self, distance=0.6):
        for count in xrange(sum(self.counts) + 1):
            spots = self.at(count)
            for (i, p), (j, q) in itertools.combinations(enumerate(spots), 2):
                if math.hypot(p[0] - q[0], p[1] - q[1]) < distance:
                    yield count, i, j


if __name__ == '__main__':
    rnd = random.Random(4)
    band = ['clarinet'] * 8 + ['trumpet'] * 6 + ['trombone'] * 4 + ['drum'] * 2
    rnd.shuffle(band)
    show = Drill(block(4, 5), band)
    show.move(ring(20, 5.0, centre=(3.0, 2.2)), counts=16)
    show.move(block(2, 10), counts=24, keep_sections=True)
    bumps = list(show.collisions())
    print('%d counts, %d near misses' % (sum(show.counts), len(bumps)))
    for count, i, j in bumps[:5]:
        print('  count %2d: %s %d and %s %d' % (count, band[i], i, band[j], j))
