/// Post-processing of drip logger files from show caves.
///
/// Every logger writes a line per drip: milliseconds since it was switched on. Clocks drift, batteries are
/// changed, and now and then a bat lands on the plate. This module turns that into drips per hour with a
/// confidence band.
module cave.drips;

import std.algorithm;
import std.array;
import std.conv : ConvException, to;
import std.datetime;
import std.exception : enforce;
import std.format;
import std.math;
import std.range;
import std.stdio;
import std.typecons : Nullable, nullable, Tuple, tuple;

struct Drip
{
    SysTime at;
    ushort amplitude;
}

/// How a logger's clock compares with the truth; two readings are taken at every visit.
struct Drift
{
    SysTime started;
    double factor = 1.0;

    SysTime toWall(long ms) const pure @safe
    {
        return started + dur!"msecs"(cast(long)(ms * factor));
    }

    static Drift between(SysTime started, long loggerMs, SysTime checked) @safe
    {
        immutable trueMs = (checked - started).total!"msecs";
        enforce(loggerMs > 0 && trueMs > 0, "the second reading must come after the first");
        immutable f = cast(double) trueMs / loggerMs;
        // Quartz in a damp box at nine degrees is off by some parts in 10^5. More than 10^-3 is a typing error.
        enforce(abs(f - 1) < 1e-3, format!"clock factor %.6f is not believable"(f));
        return Drift(started, f);
    }

    unittest
    {
        auto t0 = SysTime(DateTime(2019, 3, 2, 10, 0, 0), UTC());
        auto d = Drift.between(t0, 86_400_000, t0 + 1.days + 2.seconds);
        assert(d.toWall(86_400_000) == t0 + 1.days + 2.seconds);
    }
}

class LogFormatException : Exception
{
    const size_t line;
    this(string msg, size_t line, string file = __FILE__, size_t l = __LINE__) pure @safe
    {
        super(format!"line %d: %s"(line, msg), file, l);
        this.line = line;
    }
}

/// Lazily parses `ms;amplitude` lines. Blank lines and comments are allowed anywhere.
auto parseLog(R)(R lines, Drift drift)
if (isInputRange!R && is(ElementType!R : const(char)[]))
{
    return lines
        .enumerate(1)
        .filter!(t => t.value.length && t.value[0] != '#')
        .map!((t) {
            auto f = t.value.splitter(';');
            try
            {
                immutable ms = f.front.to!long;
                f.popFront();
                return Drip(drift.toWall(ms), f.empty ? ushort(0) : f.front.to!ushort);
            }
            catch (ConvException e)
                throw new LogFormatException(e.msg, t.index);
        });
}

/// Removes what is not a drip: echoes within `deadTime` of the drip before, and bats.
auto clean(R)(R drips, Duration deadTime = 80.msecs, ushort loud = 3000)
if (isInputRange!R && is(ElementType!R == Drip))
{
    static struct Clean
    {
        R src;
        Duration dead;
        ushort loud;
        Nullable!SysTime last;

        void skip()
        {
            while (!src.empty && (src.front.amplitude >= loud
                    || (!last.isNull && src.front.at - last.get < dead)))
                src.popFront();
        }

        bool empty() { return src.empty; }
        Drip front() { return src.front; }
        void popFront()
        {
            last = src.front.at.nullable;
            src.popFront();
            skip();
        }
    }

    auto c = Clean(drips, deadTime, loud);
    c.skip();
    return c;
}

struct Hour
{
    SysTime start;
    size_t drips;
    double low, high;

    void toString(scope void delegate(const(char)[]) sink) const
    {
        sink.formattedWrite!"%s %5d [%.1f .. %.1f]"(start.toISOExtString()[0 .. 16], drips, low, high);
    }
}

/// 95 % band of a Poisson count. Wilson-Hilferty's cube-root approximation, good to a per cent from three on.
Tuple!(double, "low", double, "high") poissonBand(size_t k) pure @safe @nogc nothrow
{
    enum z = 1.959964;
    immutable n = cast(double) k;
    immutable m = n + 1;
    immutable lo = k == 0 ? 0.0 : n * (1 - 1 / (9 * n) - z / (3 * sqrt(n))) ^^ 3;
    immutable hi = m * (1 - 1 / (9 * m) + z / (3 * sqrt(m))) ^^ 3;
    return typeof(return)(lo, hi);
}

///
unittest
{
    assert(poissonBand(0).low == 0);
    assert(poissonBand(0).high.isClose(3.69, 0.02));
    assert(poissonBand(100).low.isClose(81.4, 0.01));
}

Hour[] hourly(R)(R drips)
if (isInputRange!R && is(ElementType!R == Drip))
{
    size_t[SysTime] counts;
    foreach (d; drips)
    {
        auto h = d.at;
        h.fracSecs = Duration.zero;
        h.minute = 0;
        h.second = 0;
        ++counts[h];
    }
    if (counts.length == 0)
        return null;

    // Hours without a drip are data too; in a dry August they are most of it.
    auto first = counts.byKey.minElement, last = counts.byKey.maxElement;
    Appender!(Hour[]) hours;
    for (auto h = first; h <= last; h += 1.hours)
    {
        immutable k = counts.get(h, 0);
        immutable band = poissonBand(k);
        hours ~= Hour(h, k, band.low, band.high);
    }
    return hours[];
}

/// Rain arrives at the drip after a lag; the one with the best correlation tells the thickness of the roof.
size_t bestLag(const double[] rain, const double[] drips, size_t maxLag) pure @safe
in (rain.length == drips.length && maxLag < rain.length / 2)
{
    double corr(size_t lag)
    {
        auto a = rain[0 .. $ - lag], b = drips[lag .. $];
        immutable ma = a.sum / a.length, mb = b.sum / b.length;
        double ab = 0, aa = 0, bb = 0;
        foreach (x, y; zip(a, b))
        {
            ab += (x - ma) * (y - mb);
            aa += (x - ma) ^^ 2;
            bb += (y - mb) ^^ 2;
        }
        return aa == 0 || bb == 0 ? 0 : ab / sqrt(aa * bb);
    }

    return iota(maxLag + 1).map!corr.maxIndex;
}

void main(string[] args)
{
    enforce(args.length == 3, "usage: drips LOG START");
    auto drift = Drift(SysTime.fromISOExtString(args[2]));
    File(args[1]).byLine.parseLog(drift).clean.hourly.each!writeln;
}
