using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Text.RegularExpressions;

namespace Ledger.Matching;

/// <summary>An unpaid invoice. Amounts are decimals: binary floating point cannot hold 0.10.</summary>
public sealed record Invoice(string Number, string Customer, decimal Amount, DateOnly Due);

/// <summary>One line of a bank statement, with the remittance text as the customer typed it.</summary>
public sealed record Payment(string Id, DateOnly Booked, decimal Amount, string Payer, string Text);

public enum Confidence
{
    /// <summary>Number and amount agree; may be posted without a human.</summary>
    Certain,

    /// <summary>Only one of the two agrees; a bookkeeper has to confirm.</summary>
    Likely,
}

public sealed record Match(Payment Payment, IReadOnlyList<Invoice> Invoices, Confidence Confidence, string Reason);

public sealed partial class InvoiceMatcher
{
    private const int MaxCombined = 4;

    private readonly Dictionary<string, Invoice> _open;
    private readonly decimal _discount;

    /// <param name="open">Invoices that are still unpaid.</param>
    /// <param name="discount">Prompt-payment discount customers may deduct, for example 0.02.</param>
    public InvoiceMatcher(IEnumerable<Invoice> open, decimal discount = 0.02m)
    {
        if (discount is < 0 or >= 1)
            throw new ArgumentOutOfRangeException(nameof(discount), discount, "must be a fraction below 1");
        _open = open.ToDictionary(i => i.Number, StringComparer.OrdinalIgnoreCase);
        _discount = discount;
    }

    // Customers write "INV 2024/0173", "inv2024-173" or just "2024-0173".
    [GeneratedRegex(@"(?:inv\W*)?(?<year>20\d\d)\W?(?<serial>\d{1,5})\b", RegexOptions.IgnoreCase)]
    private static partial Regex NumberPattern();

    public static IEnumerable<string> NumbersIn(string text) =>
        NumberPattern().Matches(text)
            .Select(m => $"INV-{m.Groups["year"].Value}-{m.Groups["serial"].Value.PadLeft(5, '0')}")
            .Distinct();

    public IEnumerable<Match> Run(IEnumerable<Payment> payments)
    {
        // Oldest first, so that when two payments could settle an invoice the earlier one gets it.
        foreach (var payment in payments.OrderBy(p => p.Booked).ThenBy(p => p.Id))
        {
            var match = ByNumber(payment) ?? ByAmount(payment);
            if (match is null)
                continue;
            // Likely matches are reserved as well: offering one invoice to two bookkeepers
            // is how invoices get paid twice.
            foreach (var invoice in match.Invoices)
                _open.Remove(invoice.Number);
            yield return match;
        }
    }

    private Match? ByNumber(Payment payment)
    {
        var named = NumbersIn(payment.Text)
            .Select(n => _open.GetValueOrDefault(n))
            .OfType<Invoice>()
            .ToList();
        if (named.Count == 0)
            return null;

        var total = named.Sum(i => i.Amount);
        if (total == payment.Amount)
            return new Match(payment, named, Confidence.Certain, "number and amount");

        var deadline = named.Min(i => i.Due);
        var reduced = named.Sum(Discounted);
        if (reduced == payment.Amount && payment.Booked <= deadline)
            return new Match(payment, named, Confidence.Certain, "number and discounted amount");

        var difference = (payment.Amount - total).ToString("+0.00;-0.00", CultureInfo.InvariantCulture);
        return new Match(payment, named, Confidence.Likely, $"number agrees, amount differs by {difference}");
    }

    private Match? ByAmount(Payment payment)
    {
        var candidates = _open.Values
            .Where(i => SameName(i.Customer, payment.Payer))
            .OrderBy(i => i.Due)
            .Take(16) // 16 choose 1..4 stays below 2600 subsets
            .ToList();

        // A unique answer is worth proposing; two different subsets with the same sum are not.
        var solutions = Subsets(candidates, MaxCombined)
            .Where(s => s.Sum(i => i.Amount) == payment.Amount)
            .Take(2)
            .ToList();
        return solutions is [var only]
            ? new Match(payment, only, Confidence.Likely, $"{only.Count} open item(s) add up to the amount")
            : null;
    }

    private decimal Discounted(Invoice invoice) =>
        Math.Round(invoice.Amount * (1 - _discount), 2, MidpointRounding.AwayFromZero);

    private static bool SameName(string a, string b)
    {
        static string Normalise(string s) =>
            new(s.Where(char.IsLetterOrDigit).Select(char.ToUpperInvariant).ToArray());
        return Normalise(a) == Normalise(b);
    }

    private static IEnumerable<IReadOnlyList<T>> Subsets<T>(IReadOnlyList<T> items, int most)
    {
        var stack = new Stack<(int Next, T[] Chosen)>();
        stack.Push((0, Array.Empty<T>()));
        while (stack.TryPop(out var state))
        {
            if (state.Chosen.Length > 0)
                yield return state.Chosen;
            if (state.Chosen.Length == most)
                continue;
            for (var i = state.Next; i < items.Count; i++)
                stack.Push((i + 1, [.. state.Chosen, items[i]]));
        }
    }
}
