# How many hoppers does the sweets line need?
#
# A multihead weigher has n small hoppers with a random charge in each. Every cycle a computer picks the subset whose sum
# is nearest above the nominal weight; the chosen hoppers empty into the bag and are refilled. Overfill is money given
# away, a bag below nominal is an offence. Simpy-free: the cycle time is fixed, only weights are random.

import argparse
import math
import random
from bisect import bisect_left
from itertools import combinations
from statistics import fmean, quantiles


def pieces(rng, mean_charge, piece, cv):
    """One hopper charge: a whole number of toffees, each with its own weight."""
    n = max(0, round(rng.gauss(mean_charge / piece, 1.3)))
    return math.fsum(rng.gauss(piece, cv * piece) for _ in range(n))


def best_subset(weights, nominal, max_open):
    """Smallest sum >= nominal with at most max_open hoppers. Meet in the middle; exact up to 24 hoppers."""
    half = len(weights) // 2
    left, right = list(enumerate(weights[:half])), list(enumerate(weights[half:], half))

    def sums(part):
        out = []
        for k in range(min(len(part), max_open) + 1):
            for combo in combinations(part, k):
                out.append((math.fsum(w for _, w in combo), tuple(i for i, _ in combo)))
        out.sort()
        return out

    a, b = sums(left), sums(right)
    keys = [s for s, _ in b]
    best = None
    for s, chosen in a:
        j = bisect_left(keys, nominal - s)
        while j < len(b):
            total = s + keys[j]
            if best is not None and total >= best[0]:
                break
            if len(chosen) + len(b[j][1]) <= max_open:
                best = (total, chosen + b[j][1])
                break
            j += 1
    return best


def simulate(hoppers, nominal, open_target, bags, piece, cv, stale_after, seed):
    rng = random.Random(seed)
    charge = nominal / open_target
    weights = [pieces(rng, charge, piece, cv) for _ in range(hoppers)]
    waiting = [0] * hoppers
    over, failed, dumped = [], 0, 0
    while len(over) < bags:
        # A hopper nobody wants is emptied by force: toffee sticks to the walls after a while.
        for i, w in enumerate(waiting):
            if w > stale_after:
                weights[i], waiting[i], dumped = pieces(rng, charge, piece, cv), 0, dumped + 1
        choice = best_subset(weights, nominal, open_target + 2)
        if choice is None:
            failed += 1
            fullest = min(range(hoppers), key=weights.__getitem__)
            weights[fullest] += pieces(rng, charge / 2, piece, cv)
            continue
        total, chosen = choice
        over.append(total - nominal)
        for i in range(hoppers):
            waiting[i] += 1
        for i in chosen:
            weights[i], waiting[i] = pieces(rng, charge, piece, cv), 0
    return over, failed, dumped


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--nominal", type=float, default=250.0)
    p.add_argument("--piece", type=float, default=7.2, help="grams a toffee")
    p.add_argument("--cv", type=float, default=0.04)
    p.add_argument("--bags", type=int, default=400)
    p.add_argument("--price", type=float, default=6.90, help="euros a kilogram")
    a = p.parse_args()
    print(f"{'hoppers':>7} {'open':>4} {'mean over':>9} {'p95':>6} {'failed':>6} {'dumped':>6} {'EUR / 10 000 bags':>18}")
    for hoppers in (8, 10, 12, 14, 16):
        for open_target in (3, 4, 5):
            over, failed, dumped = simulate(hoppers, a.nominal, open_target, a.bags, a.piece, a.cv, 40, seed=hoppers * 10 + open_target)
            cost = fmean(over) / 1000 * a.price * 10_000
            print(f"{hoppers:7} {open_target:4} {fmean(over):8.2f}g {quantiles(over, n=20)[-1]:5.2f}g {failed:6} {dumped:6} {cost:18.2f}")


if __name__ == "__main__":
    main()
