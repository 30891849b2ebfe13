// React hook and helpers for "when may my keel cross the bar?", used by the harbour page and the widget.
import { useCallback, useEffect, useMemo, useSyncExternalStore } from "react";

export interface TidePoint {
  readonly at: number; // ms since the epoch
  readonly metres: number; // above chart datum
}

export interface Boat {
  draught: number;
  /** Water the skipper wants under the keel. Waves eat it, so it grows with the swell. */
  margin: number;
}

export type Window =
  | { kind: "open"; until: number; least: number }
  | { kind: "closed"; opens: number }
  | { kind: "never"; missing: number };

/** Cosine between two turning points: what the almanac's "rule of twelfths" approximates. */
export function heightAt(points: readonly TidePoint[], t: number): number | undefined {
  let lo = 0;
  let hi = points.length - 1;
  if (hi < 1 || t < points[0]!.at || t > points[hi]!.at) return undefined;
  while (hi - lo > 1) {
    const mid = (lo + hi) >> 1;
    if (points[mid]!.at <= t) lo = mid;
    else hi = mid;
  }
  const a = points[lo]!;
  const b = points[hi]!;
  const phase = (Math.PI * (t - a.at)) / (b.at - a.at);
  return (a.metres + b.metres) / 2 + ((a.metres - b.metres) / 2) * Math.cos(phase);
}

/** The moment between two turning points when the water stands at `level`, if it ever does. */
function crossing(a: TidePoint, b: TidePoint, level: number): number | undefined {
  const mean = (a.metres + b.metres) / 2;
  const amplitude = (a.metres - b.metres) / 2;
  if (Math.abs(level - mean) > Math.abs(amplitude)) return undefined;
  return a.at + ((b.at - a.at) * Math.acos((level - mean) / amplitude)) / Math.PI;
}

export function tideWindow(points: readonly TidePoint[], sill: number, boat: Boat, swell: number, now: number): Window {
  const need = boat.draught + boat.margin + swell / 2 - sill;
  const here = heightAt(points, now);
  const rest = points.slice(Math.max(0, points.findIndex((p) => p.at > now) - 1));
  if (here === undefined || rest.length < 2) return { kind: "never", missing: NaN };

  const open = here >= need;
  for (let i = 0; i + 1 < rest.length; i++) {
    const t = crossing(rest[i]!, rest[i + 1]!, need);
    if (t === undefined || t <= now) continue;
    if (open) return { kind: "open", until: t, least: here - need };
    return { kind: "closed", opens: t };
  }
  if (open) return { kind: "open", until: rest.at(-1)!.at, least: here - need };
  return { kind: "never", missing: need - Math.max(...rest.map((p) => p.metres)) };
}

// One clock for all components: ten widgets must not set ten timers.
const listeners = new Set<() => void>();
let minute = Math.floor(Date.now() / 60_000);
let timer: ReturnType<typeof setTimeout> | undefined;

function arm() {
  timer = setTimeout(() => {
    minute = Math.floor(Date.now() / 60_000);
    listeners.forEach((l) => l());
    arm();
  }, 60_000 - (Date.now() % 60_000));
}

function subscribe(listener: () => void) {
  listeners.add(listener);
  if (listeners.size === 1) arm();
  return () => {
    listeners.delete(listener);
    if (listeners.size === 0) clearTimeout(timer);
  };
}

export function useMinute(): number {
  return useSyncExternalStore(subscribe, () => minute, () => minute) * 60_000;
}

export function useTideWindow(points: readonly TidePoint[], sill: number, boat: Boat, swell = 0) {
  const now = useMinute();
  const state = useMemo(
    () => tideWindow(points, sill, boat, swell, now),
    // The boat is often an object literal in the caller's render, hence its fields and not itself.
    [points, sill, boat.draught, boat.margin, swell, now],
  );
  const describe = useCallback(
    (locale: string) => {
      const clock = new Intl.DateTimeFormat(locale, { hour: "2-digit", minute: "2-digit" });
      switch (state.kind) {
        case "open":
          return `open until ${clock.format(state.until)} (${state.least.toFixed(1)} m to spare)`;
        case "closed":
          return `opens at ${clock.format(state.opens)}`;
        case "never":
          return Number.isNaN(state.missing) ? "no tide table for today" : `${state.missing.toFixed(1)} m short, even at high water`;
        default:
          return state satisfies never;
      }
    },
    [state],
  );
  useEffect(() => {
    if (state.kind === "open" && state.until - now < 15 * 60_000) navigator.vibrate?.([200, 100, 200]);
  }, [state, now]);
  return { state, describe };
}
