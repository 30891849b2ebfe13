using System.Collections.Immutable;
using System.Globalization;
using System.Numerics;
using System.Text;
using System.Xml.Linq;

namespace Selvedge.Drafting;

/// <summary>Lengths on paper, in tenths of a millimetre. Tailors say centimetres, printers say points.</summary>
public readonly record struct Length(int Tenths) : IComparable<Length>, IAdditionOperators<Length, Length, Length>
{
    public static Length Cm(double cm) => new((int)Math.Round(cm * 100));
    public double Millimetres => Tenths / 10.0;
    public static Length operator +(Length a, Length b) => new(a.Tenths + b.Tenths);
    public static Length operator -(Length a, Length b) => new(a.Tenths - b.Tenths);
    public static Length operator *(Length a, double k) => new((int)Math.Round(a.Tenths * k));
    public static Length operator /(Length a, int n) => a * (1.0 / n);
    public int CompareTo(Length other) => Tenths.CompareTo(other.Tenths);
    public override string ToString() => (Tenths / 100.0).ToString("0.##", CultureInfo.InvariantCulture) + " cm";
}

public readonly record struct Point(Length X, Length Y)
{
    public Point Move(Length dx, Length dy) => new(X + dx, Y + dy);
    public double DistanceTo(Point o) => Math.Sqrt(Sq(X - o.X) + Sq(Y - o.Y));
    private static double Sq(Length l) => l.Millimetres * l.Millimetres;
}

public abstract record Segment(Point From, Point To)
{
    public sealed record Line(Point From, Point To) : Segment(From, To);
    public sealed record Curve(Point From, Point C1, Point C2, Point To) : Segment(From, To);

    /// <summary>Length along the segment in millimetres. The walking of seams against each other depends on it.</summary>
    public double Measure() => this switch
    {
        Line l => l.From.DistanceTo(l.To),
        Curve c => Subdivide(c, 0),
        _ => throw new InvalidOperationException($"no rule for {GetType().Name}"),
    };

    private static double Subdivide(Curve c, int depth)
    {
        var chord = c.From.DistanceTo(c.To);
        var hull = c.From.DistanceTo(c.C1) + c.C1.DistanceTo(c.C2) + c.C2.DistanceTo(c.To);
        if (depth == 12 || hull - chord < 0.02)
            return (chord + hull) / 2;
        var (a, b) = c.Halve();
        return Subdivide(a, depth + 1) + Subdivide(b, depth + 1);
    }
}

internal static class CurveMath
{
    private static Point Mid(Point a, Point b) => new((a.X + b.X) / 2, (a.Y + b.Y) / 2);

    public static (Segment.Curve, Segment.Curve) Halve(this Segment.Curve c)
    {
        Point ab = Mid(c.From, c.C1), bc = Mid(c.C1, c.C2), cd = Mid(c.C2, c.To);
        Point abc = Mid(ab, bc), bcd = Mid(bc, cd), m = Mid(abc, bcd);
        return (new(c.From, ab, abc, m), new(m, bcd, cd, c.To));
    }
}

public sealed record Measurements(Length Waist, Length Hip, Length HipDepth, Length SkirtLength)
{
    public IEnumerable<string> Problems()
    {
        if (Hip.CompareTo(Waist) < 0) yield return "The hip is narrower than the waist; were the two swapped?";
        if (HipDepth.Tenths is < 1500 or > 2600) yield return $"A hip depth of {HipDepth} is unusual.";
        if (SkirtLength.CompareTo(HipDepth) <= 0) yield return "The skirt ends above the hip.";
    }
}

public sealed record Dart(Length Width, Length Depth, Length FromCentre);

public sealed record Panel(string Name, ImmutableArray<Segment> Outline, ImmutableArray<Dart> Darts, bool CutOnFold)
{
    public double SideSeam => Outline.Where(s => s is Segment.Curve).Sum(s => s.Measure());
}

/// <summary>A straight two-panel skirt, drafted by the usual block: what the hip has more than the waist goes into
/// darts and the side seam.</summary>
public sealed class SkirtDraft(Measurements m)
{
    private static readonly Length Ease = Length.Cm(2), WaistEase = Length.Cm(1);

    public (Panel Front, Panel Back) Build()
    {
        if (m.Problems().ToList() is { Count: > 0 } problems)
            throw new DraftException(problems);

        var halfHip = (m.Hip + Ease) / 2;
        var halfWaist = (m.Waist + WaistEase) / 2;
        var surplus = halfHip - halfWaist;

        // Half goes into the side seam, but a side seam that bends more than 3.5 cm will not press flat.
        var perSide = Min(surplus / 4, Length.Cm(3.5));
        var dartTotal = surplus - perSide * 2;

        var front = Draft("front", halfHip / 2 + Length.Cm(0.5), perSide, SplitDarts(dartTotal * 0.4, Length.Cm(9)));
        var back = Draft("back", halfHip / 2 - Length.Cm(0.5), perSide, SplitDarts(dartTotal * 0.6, Length.Cm(13)));
        return (front, MatchSeam(back, front));
    }

    private static Length Min(Length a, Length b) => a.CompareTo(b) < 0 ? a : b;

    private static ImmutableArray<Dart> SplitDarts(Length total, Length depth) => total.Tenths switch
    {
        < 50 => [],
        <= 350 => [new Dart(total, depth, Length.Cm(8.5))],
        _ => [new Dart(total * 0.55, depth, Length.Cm(7.5)), new Dart(total * 0.45, depth - Length.Cm(1.5), Length.Cm(14))],
    };

    private Panel Draft(string name, Length width, Length side, ImmutableArray<Dart> darts)
    {
        Length zero = default, rise = Length.Cm(1.2);
        Point waistCentre = new(zero, zero);
        Point waistSide = new(width - side, zero - rise);
        Point hipSide = new(width, m.HipDepth);
        Point hemSide = new(width, m.SkirtLength);
        Point hemCentre = new(zero, m.SkirtLength);

        return new Panel(name,
        [
            new Segment.Line(waistCentre, waistSide),
            new Segment.Curve(waistSide, waistSide.Move(side * 0.7, m.HipDepth / 3), hipSide.Move(zero, zero - m.HipDepth / 3), hipSide),
            new Segment.Line(hipSide, hemSide),
            new Segment.Line(hemSide, hemCentre),
            new Segment.Line(hemCentre, waistCentre),
        ], darts, CutOnFold: name == "front");
    }

    /// Both side seams are sewn together, so the longer one gives way at the waist.
    private static Panel MatchSeam(Panel panel, Panel other)
    {
        var diff = panel.SideSeam - other.SideSeam;
        if (Math.Abs(diff) < 0.5)
            return panel;
        return panel with
        {
            Outline = [.. panel.Outline.Select(s => s switch
            {
                Segment.Line { From.X.Tenths: 0, To.Y.Tenths: < 0 } l => l with { To = l.To.Move(default, new((int)(diff * 10))) },
                Segment.Curve c => c with { From = c.From.Move(default, new((int)(diff * 10))) },
                _ => s,
            })],
        };
    }
}

public sealed class DraftException(IReadOnlyList<string> problems) : Exception(string.Join(' ', problems))
{
    public IReadOnlyList<string> Problems { get; } = problems;
}

public static class SvgWriter
{
    private static readonly XNamespace Svg = "http://www.w3.org/2000/svg";

    public static XDocument Write(params ReadOnlySpan<Panel> panels)
    {
        var root = new XElement(Svg + "svg", new XAttribute("version", "1.1"));
        double x = 20;
        foreach (var p in panels)
        {
            var width = p.Outline.Max(s => s.To.X.Millimetres);
            root.Add(new XElement(Svg + "g",
                new XAttribute("transform", FormattableString.Invariant($"translate({x:0.0} 40)")),
                new XElement(Svg + "path",
                    new XAttribute("d", PathData(p)),
                    new XAttribute("fill", "none"),
                    new XAttribute("stroke", "black"),
                    new XAttribute("stroke-width", "0.4")),
                new XElement(Svg + "text", new XAttribute("y", 300), p.CutOnFold ? $"{p.Name}, cut 1 on the fold" : $"{p.Name}, cut 2"),
                p.Darts.Select(d => new XElement(Svg + "polyline",
                    new XAttribute("points", FormattableString.Invariant(
                        $"{(d.FromCentre - d.Width / 2).Millimetres},0 {d.FromCentre.Millimetres},{d.Depth.Millimetres} {(d.FromCentre + d.Width / 2).Millimetres},0"))))));
            x += width + 30;
        }
        root.SetAttributeValue("width", FormattableString.Invariant($"{x:0}mm"));
        return new XDocument(root);
    }

    private static string PathData(Panel p)
    {
        var d = new StringBuilder();
        foreach (var (s, first) in p.Outline.Select((s, i) => (s, i == 0)))
        {
            if (first) d.Append('M').Append(At(s.From));
            d.Append(s switch
            {
                Segment.Curve c => $"C{At(c.C1)} {At(c.C2)} {At(c.To)}",
                _ => $"L{At(s.To)}",
            });
        }
        return d.Append('Z').ToString();

        static string At(Point q) => FormattableString.Invariant($"{q.X.Millimetres:0.#},{q.Y.Millimetres:0.#}");
    }
}
