<?php

declare(strict_types=1);

namespace Postbus\Fare;

use DomainException;
use IteratorAggregate;
use Traversable;

/** A stop on a line and the fare stages passed since the terminus. */
final readonly class Stop
{
    public function __construct(public string $code, public string $name, public int $stage) {}
}

enum Concession: string
{
    case None = 'adult';
    case Child = 'child';
    case Dog = 'dog';

    /** Percent of the full fare. */
    public function share(): int
    {
        return match ($this) {
            self::None => 100,
            self::Child, self::Dog => 50,
        };
    }
}

/**
 * Fares along one line, in cents.
 *
 * The tariff is degressive: each stage costs less than the one before it until a floor is reached. Concessions are
 * rounded up to five cents, because the ticket machine has no smaller coin.
 *
 * @implements IteratorAggregate<string, Stop>
 */
final class RouteBook implements IteratorAggregate
{
    /** @var array<string, Stop> */
    private array $stops = [];

    public function __construct(
        public readonly string $line,
        private readonly int $firstStage = 210,
        private readonly int $step = 25,
        private readonly int $floor = 60,
    ) {}

    public function with(Stop ...$stops): static
    {
        $copy = clone $this;
        foreach ($stops as $stop) {
            if (isset($copy->stops[$stop->code])) {
                throw new DomainException("Line {$this->line} calls at {$stop->name} twice; give the second call its own code.");
            }
            $copy->stops[$stop->code] = $stop;
        }
        uasort($copy->stops, static fn (Stop $a, Stop $b): int => $a->stage <=> $b->stage);

        return $copy;
    }

    public function fare(string $from, string $to, Concession $concession = Concession::None): int
    {
        // A ride within one stage still costs one stage.
        $stages = max(1, abs($this->stop($from)->stage - $this->stop($to)->stage));

        $full = 0;
        for ($i = 0, $price = $this->firstStage; $i < $stages; $i++) {
            $full += $price;
            $price = max($this->floor, $price - $this->step);
        }

        return intdiv($full * $concession->share() + 499, 500) * 5;
    }

    /** The triangular table that hangs in the bus, as rows of strings. */
    public function chart(): array
    {
        $rows = [];
        $passed = [];
        foreach ($this->stops as $stop) {
            $row = array_map(fn (Stop $s): string => self::euros($this->fare($s->code, $stop->code)), $passed);
            $rows[] = [...$row, $stop->name];
            $passed[] = $stop;
        }

        return $rows;
    }

    public static function euros(int $cents): string
    {
        return sprintf('%d.%02d', intdiv($cents, 100), $cents % 100);
    }

    public function getIterator(): Traversable
    {
        yield from $this->stops;
    }

    private function stop(string $code): Stop
    {
        return $this->stops[$code] ?? throw new DomainException("Line {$this->line} does not call at {$code}.");
    }
}
