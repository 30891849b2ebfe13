<?php

declare(strict_types=1);

namespace Town\Directory;

use DateTimeImmutable;
use InvalidArgumentException;

enum Day: int
{
    case Mo = 1;
    case Tu = 2;
    case We = 3;
    case Th = 4;
    case Fr = 5;
    case Sa = 6;
    case Su = 7;

    public static function named(string $name): self
    {
        foreach (self::cases() as $day) {
            if ($day->name === $name) {
                return $day;
            }
        }
        throw new InvalidArgumentException("unknown day '$name'");
    }
}

/**
 * Opening hours in the compact notation used on shop doors: "Mo-Fr 09:00-12:30,14:00-18:00; Sa 10:00-02:00".
 *
 * Every span is stored as minutes since Monday 00:00, so a bar that closes at two in the morning
 * is one span crossing midnight and not two that have to be kept together. Later rules add to
 * earlier ones; "We off" removes what was said about Wednesday.
 */
final class OpeningHours
{
    private const WEEK = 7 * 1440;

    /** @param list<array{int, int}> $spans start and end, sorted, the end possibly beyond one week */
    private function __construct(private readonly array $spans)
    {
    }

    public static function parse(string $text): self
    {
        $spans = [];
        foreach (array_filter(array_map(trim(...), explode(';', $text))) as $rule) {
            if (!preg_match('/^(?<days>[A-Z][a-z](?:[-,][A-Z][a-z])*)\s+(?<hours>off|[\d:,\s-]+)$/', $rule, $m)) {
                throw new InvalidArgumentException("cannot read '$rule'");
            }
            foreach (self::days($m['days']) as $day) {
                $midnight = ($day->value - 1) * 1440;
                if ($m['hours'] === 'off') {
                    $spans = array_filter($spans, fn (array $s) => intdiv($s[0], 1440) !== $day->value - 1);
                    continue;
                }
                foreach (explode(',', $m['hours']) as $pair) {
                    [$from, $to] = self::minutes($pair);
                    $spans[] = [$midnight + $from, $midnight + $to + ($to <= $from ? 1440 : 0)];
                }
            }
        }
        sort($spans);

        return new self(array_values($spans));
    }

    public function isOpen(DateTimeImmutable $when): bool
    {
        $minute = self::minuteOfWeek($when);
        foreach ($this->spans as [$from, $to]) {
            // The second comparison catches Sunday night spilling into Monday morning.
            if (($from <= $minute && $minute < $to) || $minute + self::WEEK < $to) {
                return true;
            }
        }

        return false;
    }

    /** The next moment the door opens, or null for a place that never does. */
    public function nextOpening(DateTimeImmutable $after): ?DateTimeImmutable
    {
        $minute = self::minuteOfWeek($after);
        $waits = array_map(
            fn (array $span): int => (($span[0] - $minute - 1) % self::WEEK + self::WEEK) % self::WEEK + 1,
            $this->spans,
        );

        // Adding minutes, not a wall-clock time: at a change to summer time this is an hour off,
        // which is why callers format the result together with the rule text.
        return $waits === [] ? null : $after->setTime((int) $after->format('H'), (int) $after->format('i'))
            ->modify('+' . min($waits) . ' minutes');
    }

    /** @return list<Day> */
    private static function days(string $text): array
    {
        $days = [];
        foreach (explode(',', $text) as $part) {
            $ends = array_map(Day::named(...), explode('-', $part));
            $last = end($ends)->value;
            for ($d = $ends[0]->value; ; $d = $d % 7 + 1) {
                $days[] = Day::from($d);
                if ($d === $last) {
                    break; // "Fr-Mo" wraps around the weekend
                }
            }
        }

        return $days;
    }

    /** @return array{int, int} */
    private static function minutes(string $pair): array
    {
        if (!preg_match('/^\s*(\d\d):([0-5]\d)-(\d\d):([0-5]\d)\s*$/', $pair, $m) || max($m[1], $m[3]) > 24) {
            throw new InvalidArgumentException("'$pair' is not a pair of times");
        }

        return [(int) $m[1] * 60 + (int) $m[2], (int) $m[3] * 60 + (int) $m[4]];
    }

    private static function minuteOfWeek(DateTimeImmutable $when): int
    {
        return ((int) $when->format('N') - 1) * 1440 + (int) $when->format('G') * 60 + (int) $when->format('i');
    }
}
