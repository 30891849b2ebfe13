#nullable enable
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Channels;
using System.Threading.Tasks;
using Microsoft.Extensions.Logging;

namespace Drovers.Fleet.Fuel;

public readonly record struct Litres(decimal Value)
{
    public static Litres operator +(Litres a, Litres b) => new(a.Value + b.Value);
    public static Litres operator -(Litres a, Litres b) => new(a.Value - b.Value);
    public override string ToString() => Value.ToString("0.00 l", CultureInfo.InvariantCulture);
}

public sealed record CardSwipe(string CardNo, DateTimeOffset At, string Station, Litres Volume, string Grade);

public sealed record TankReading(string Vehicle, DateTimeOffset At, Litres Level, int OdometerKm);

public enum Verdict { Plausible, NoRise, RiseTooSmall, ExceedsTank, WrongGrade, UnknownCard }

public sealed record Finding(CardSwipe Swipe, string? Vehicle, Verdict Verdict, Litres Unexplained);

public interface IVehicleRegister
{
    /// <returns>null when the card was never issued or has been handed back.</returns>
    Vehicle? HolderOf(string cardNo, DateOnly on);
}

public sealed record Vehicle(string Plate, Litres TankSize, string Grade, TimeSpan ClockSkew);

/// <summary>
/// Compares what the filling station says went into a lorry with what the tank sensor saw arrive.
/// </summary>
/// <remarks>
/// The float sensor is slow and sloshes: a reading is only trusted if the vehicle stood still, which
/// shows as an unchanged odometer in two successive readings.
/// </remarks>
public sealed class FuelCardReconciler(
    IVehicleRegister register,
    ITankHistory history,
    ILogger<FuelCardReconciler> log)
{
    private static readonly TimeSpan Before = TimeSpan.FromMinutes(40);
    private static readonly TimeSpan After = TimeSpan.FromMinutes(25);
    private const decimal SensorError = 0.04m;      // of tank size
    private const int Workers = 4;

    public async IAsyncEnumerable<Finding> RunAsync(
        IAsyncEnumerable<CardSwipe> swipes,
        [EnumeratorCancellation] CancellationToken ct = default)
    {
        var todo = Channel.CreateBounded<CardSwipe>(64);
        var done = Channel.CreateUnbounded<Finding>(new UnboundedChannelOptions { SingleReader = true });

        var feeder = Task.Run(async () =>
        {
            try
            {
                await foreach (var s in swipes.WithCancellation(ct).ConfigureAwait(false))
                    await todo.Writer.WriteAsync(s, ct).ConfigureAwait(false);
                todo.Writer.Complete();
            }
            catch (Exception e)
            {
                todo.Writer.Complete(e);
            }
        }, CancellationToken.None);

        var workers = Enumerable.Range(0, Workers).Select(_ => Task.Run(async () =>
        {
            await foreach (var s in todo.Reader.ReadAllAsync(ct).ConfigureAwait(false))
                await done.Writer.WriteAsync(await JudgeAsync(s, ct).ConfigureAwait(false), ct).ConfigureAwait(false);
        }, CancellationToken.None)).ToArray();

        _ = Task.WhenAll(workers.Append(feeder))
            .ContinueWith(t => done.Writer.Complete(t.Exception?.GetBaseException()), TaskScheduler.Default);

        await foreach (var f in done.Reader.ReadAllAsync(ct).ConfigureAwait(false))
            yield return f;
    }

    internal async Task<Finding> JudgeAsync(CardSwipe swipe, CancellationToken ct)
    {
        if (register.HolderOf(swipe.CardNo, DateOnly.FromDateTime(swipe.At.DateTime)) is not { } lorry)
            return new(swipe, null, Verdict.UnknownCard, swipe.Volume);

        if (!string.Equals(lorry.Grade, swipe.Grade, StringComparison.OrdinalIgnoreCase))
            return new(swipe, lorry.Plate, Verdict.WrongGrade, swipe.Volume);

        // Pumps print local time without an offset; some on-board clocks were never set at all.
        var at = swipe.At + lorry.ClockSkew;
        var readings = await history.BetweenAsync(lorry.Plate, at - Before, at + After, ct).ConfigureAwait(false);
        var resting = Resting(readings).ToList();

        var low = resting.Where(r => r.At <= at + TimeSpan.FromMinutes(3)).MinBy(r => r.Level.Value);
        var high = resting.Where(r => r.At > at).MaxBy(r => r.Level.Value);
        if (low is null || high is null)
        {
            log.LogInformation("{Plate}: no resting readings around {At:g}, cannot judge", lorry.Plate, at);
            return new(swipe, lorry.Plate, Verdict.Plausible, default);
        }

        var rise = high.Level - low.Level;
        var tolerance = lorry.TankSize.Value * SensorError;
        var missing = swipe.Volume - rise;

        var verdict = swipe.Volume.Value > lorry.TankSize.Value - low.Level.Value + tolerance ? Verdict.ExceedsTank
            : rise.Value < tolerance ? Verdict.NoRise
            : missing.Value > 2 * tolerance ? Verdict.RiseTooSmall
            : Verdict.Plausible;

        if (verdict is Verdict.ExceedsTank)
            log.LogWarning("{Plate}: {Volume} into a tank with room for {Room}",
                lorry.Plate, swipe.Volume, lorry.TankSize - low.Level);

        return new(swipe, lorry.Plate, verdict, verdict is Verdict.Plausible ? default : missing);
    }

    private static IEnumerable<TankReading> Resting(IReadOnlyList<TankReading> all)
    {
        for (var i = 1; i < all.Count; i++)
            if (all[i].OdometerKm == all[i - 1].OdometerKm)
                yield return all[i];
    }
}

public interface ITankHistory
{
    Task<IReadOnlyList<TankReading>> BetweenAsync(
        string plate, DateTimeOffset from, DateTimeOffset to, CancellationToken ct);
}

public static class SwipeFile
{
    /// <summary>Semicolons, decimal comma, times in the zone of the station: the oil company's monthly export.</summary>
    public static async IAsyncEnumerable<CardSwipe> ReadAsync(
        TextReader reader, TimeZoneInfo zone, [EnumeratorCancellation] CancellationToken ct = default)
    {
        var comma = CultureInfo.GetCultureInfo("de-DE");
        for (var no = 1; await reader.ReadLineAsync(ct).ConfigureAwait(false) is { } line; no++)
        {
            if (line.Length == 0 || line.StartsWith("KARTE;", StringComparison.Ordinal))
                continue;
            var f = line.Split(';');
            if (f.Length < 5
                || !DateTime.TryParseExact(f[1], "dd.MM.yyyy HH:mm", comma, DateTimeStyles.None, out var local)
                || !decimal.TryParse(f[3], NumberStyles.Number, comma, out var volume))
                throw new InvalidDataException($"line {no}: \"{line}\"");

            // The hour that happens twice in October: take the first, both are equally wrong.
            yield return new CardSwipe(f[0].Trim(), new DateTimeOffset(local, zone.GetUtcOffset(local)),
                f[2].Trim(), new Litres(volume), f[4].Trim());
        }
    }
}
