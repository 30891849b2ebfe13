using System.Globalization;
using System.Runtime.CompilerServices;
using System.Text.RegularExpressions;
using Microsoft.EntityFrameworkCore;
using Microsoft.Extensions.Logging;

namespace Hedgerow.Nursery.Import;

/// <summary>A line of a supplier's price list that could be understood.</summary>
public readonly record struct SeedOffer(string Article, string Species, string? Cultivar, int SeedsPerPacket, decimal Price);

/// <summary>The outcome of one import, shown to the buyer before anything is ordered.</summary>
public sealed record ImportReport(int Added, int Repriced, int Unchanged, IReadOnlyList<(int Line, string Problem)> Rejected);

/// <summary>
/// Reads the semicolon-separated price lists that wholesalers mail out each autumn. Every wholesaler swears to
/// the same column order; what differs is the notation: "1 gr", "0,5g", "250 S." and "ca. 250 Korn" all occur.
/// </summary>
public sealed partial class SeedCatalogueImporter(NurseryContext db, ILogger<SeedCatalogueImporter> log)
{
    private static readonly CultureInfo German = CultureInfo.GetCultureInfo("de-DE");

    // Botanical name, then optionally a cultivar in single quotes (straight or typographic).
    [GeneratedRegex(@"^(?<sp>[A-Z][a-z]+(?: x)? [a-z-]+(?: (?:subsp|var)\. [a-z]+)?)(?: ['‘’](?<cv>[^'‘’]+)['’])?$")]
    private static partial Regex BotanicalName();

    [GeneratedRegex(@"^(?:ca\.?\s*)?(?<n>[\d.,]+)\s*(?<unit>gr?|kg|S\.?|Korn|seeds?)$", RegexOptions.IgnoreCase)]
    private static partial Regex Quantity();

    public async Task<ImportReport> ImportAsync(int supplierId, TextReader list, CancellationToken cancel = default)
    {
        var known = await db.Articles
            .Where(a => a.SupplierId == supplierId)
            .ToDictionaryAsync(a => a.Number, StringComparer.OrdinalIgnoreCase, cancel);
        var grainWeights = await db.Species.ToDictionaryAsync(s => s.Name, s => s.SeedsPerGram, cancel);

        int added = 0, repriced = 0, unchanged = 0;
        var rejected = new List<(int, string)>();
        var seen = new HashSet<string>(StringComparer.OrdinalIgnoreCase);

        await foreach (var (number, line) in LinesAsync(list, cancel))
        {
            if (!TryParse(line, grainWeights, out var offer, out var problem))
            {
                rejected.Add((number, problem));
                continue;
            }
            if (!seen.Add(offer.Article))
            {
                rejected.Add((number, $"article {offer.Article} is listed twice"));
                continue;
            }

            switch (known.GetValueOrDefault(offer.Article))
            {
                case null:
                    db.Articles.Add(Article.From(supplierId, offer));
                    added++;
                    break;
                case { Price: var old } article when old != offer.Price:
                    log.LogInformation("{Article}: {Old} -> {New}", offer.Article, old, offer.Price);
                    article.Reprice(offer.Price);
                    repriced++;
                    break;
                default:
                    unchanged++;
                    break;
            }
        }

        // A list with more than a tenth of bad lines is probably in a new format. Better to import nothing than half.
        if (rejected.Count * 10 > seen.Count + rejected.Count)
        {
            db.ChangeTracker.Clear();
            return new ImportReport(0, 0, 0, rejected);
        }
        await db.SaveChangesAsync(cancel);
        return new ImportReport(added, repriced, unchanged, rejected);
    }

    internal static bool TryParse(string line, IReadOnlyDictionary<string, int?> grainWeights, out SeedOffer offer, out string problem)
    {
        offer = default;
        var cells = line.Split(';', StringSplitOptions.TrimEntries);
        if (cells is not [var article, var name, var quantity, var price, ..] || article.Length == 0)
        {
            problem = "fewer than four columns";
            return false;
        }
        if (BotanicalName().Match(name) is not { Success: true } plant)
        {
            problem = $"not a botanical name: {name}";
            return false;
        }
        var species = plant.Groups["sp"].Value;
        if (!decimal.TryParse(price.TrimEnd('€', ' '), NumberStyles.Number, German, out var euros) || euros <= 0)
        {
            problem = $"price: {price}";
            return false;
        }
        if (SeedCount(quantity, grainWeights.GetValueOrDefault(species)) is not { } seeds)
        {
            problem = $"quantity: {quantity}";
            return false;
        }

        var cultivar = plant.Groups["cv"] is { Success: true } cv ? cv.Value : null;
        offer = new SeedOffer(article, species, cultivar, seeds, euros);
        problem = "";
        return true;
    }

    private static int? SeedCount(string text, int? seedsPerGram)
    {
        if (Quantity().Match(text) is not { Success: true } m || !decimal.TryParse(m.Groups["n"].Value, NumberStyles.Number, German, out var n))
            return null;
        return m.Groups["unit"].Value.ToLowerInvariant() switch
        {
            "g" or "gr" => seedsPerGram is { } per ? (int)(n * per) : null,
            "kg" => seedsPerGram is { } per ? (int)(n * 1000 * per) : null,
            _ => (int)n,
        };
    }

    private static async IAsyncEnumerable<(int Number, string Line)> LinesAsync(TextReader reader, [EnumeratorCancellation] CancellationToken cancel)
    {
        for (var number = 1; await reader.ReadLineAsync(cancel) is { } line; number++)
        {
            if (number == 1 && line.StartsWith("Art", StringComparison.OrdinalIgnoreCase)) continue;
            if (!string.IsNullOrWhiteSpace(line)) yield return (number, line);
        }
    }
}
