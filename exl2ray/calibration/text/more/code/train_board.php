<?php

declare(strict_types=1);

namespace Halt\Board;

use DateInterval;
use DateTimeImmutable;
use DateTimeZone;
use InvalidArgumentException;
use JsonSerializable;
use PDO;

enum Status: string
{
    case OnTime = 'on time';
    case Late = 'late';
    case Cancelled = 'cancelled';
    case Replacement = 'bus';

    public function colour(): string
    {
        return match ($this) {
            self::OnTime => '#d8e6d0',
            self::Late => '#f4dc9a',
            self::Cancelled => '#e8a798',
            self::Replacement => '#b9cde6',
        };
    }
}

final readonly class Departure implements JsonSerializable
{
    public function __construct(
        public string $line,
        public string $destination,
        public DateTimeImmutable $planned,
        public ?int $delay = 0,
        public ?string $platform = null,
        public bool $byRoad = false,
        /** @var list<string> */
        public array $via = [],
    ) {
        if ($delay !== null && $delay < -5) {
            throw new InvalidArgumentException("{$line}: trains do not leave {$delay} minutes early");
        }
    }

    public function status(): Status
    {
        return match (true) {
            $this->delay === null => Status::Cancelled,
            $this->byRoad => Status::Replacement,
            $this->delay >= 3 => Status::Late,
            default => Status::OnTime,
        };
    }

    public function expected(): DateTimeImmutable
    {
        return $this->planned->add(new DateInterval('PT' . max(0, $this->delay ?? 0) . 'M'));
    }

    public function jsonSerialize(): array
    {
        return [
            'line' => $this->line,
            'to' => $this->destination,
            'at' => $this->planned->format('H:i'),
            'expected' => $this->delay ? $this->expected()->format('H:i') : null,
            'platform' => $this->platform,
            'status' => $this->status()->value,
        ];
    }
}

final class Board
{
    private const SQL = <<<'SQL'
        SELECT d.line, s.name AS destination, d.planned_utc, d.delay_min, d.cancelled, d.platform, d.by_road,
               (SELECT GROUP_CONCAT(v.name, '|')
                  FROM (SELECT st.name
                          FROM calls c JOIN stations st ON st.id = c.station_id
                         WHERE c.departure_id = d.id AND c.important
                         ORDER BY c.seq) AS v) AS via
          FROM departures d
          JOIN stations s ON s.id = d.destination_id
         WHERE d.station_id = :station
           AND d.planned_utc BETWEEN :from AND :until
         ORDER BY d.planned_utc
         LIMIT :rows
        SQL;

    public function __construct(
        private readonly PDO $db,
        private readonly DateTimeZone $zone = new DateTimeZone('Europe/Brussels'),
    ) {
    }

    /** @return iterable<Departure> */
    public function at(int $station, DateTimeImmutable $now, int $rows = 12): iterable
    {
        $utc = new DateTimeZone('UTC');
        $statement = $this->db->prepare(self::SQL);
        $statement->bindValue('station', $station, PDO::PARAM_INT);
        // late trains stay on the board until they have really gone
        $statement->bindValue('from', $now->setTimezone($utc)->modify('-90 minutes')->format('Y-m-d H:i'));
        $statement->bindValue('until', $now->setTimezone($utc)->modify('+4 hours')->format('Y-m-d H:i'));
        $statement->bindValue('rows', $rows * 3, PDO::PARAM_INT);
        $statement->execute();

        $shown = 0;
        while ($shown < $rows && $row = $statement->fetch(PDO::FETCH_ASSOC)) {
            $departure = new Departure(
                line: $row['line'],
                destination: $row['destination'],
                planned: (new DateTimeImmutable($row['planned_utc'], $utc))->setTimezone($this->zone),
                delay: $row['cancelled'] ? null : (int) $row['delay_min'],
                platform: $row['platform'] ?: null,
                byRoad: (bool) $row['by_road'],
                via: array_filter(explode('|', (string) $row['via'])),
            );
            if ($departure->expected() < $now) {
                continue;
            }
            $shown++;
            yield $departure;
        }
    }
}

function render(iterable $departures): string
{
    $e = static fn (?string $text): string => htmlspecialchars($text ?? '', ENT_QUOTES | ENT_SUBSTITUTE);
    $rows = '';
    foreach ($departures as $d) {
        $via = $d->via === [] ? '' : sprintf('<br><small>via %s</small>', $e(implode(' – ', $d->via)));
        $time = $d->planned->format('H:i');
        if ($d->status() === Status::Late) {
            $time = "<s>{$time}</s> " . $d->expected()->format('H:i');
        }
        $rows .= <<<HTML
            <tr style="background: {$d->status()->colour()}">
              <td>{$time}</td><td>{$e($d->line)}</td><td>{$e($d->destination)}{$via}</td>
              <td>{$e($d->platform)}</td><td>{$d->status()->value}</td>
            </tr>

            HTML;
    }
    return $rows !== '' ? "<table>\n{$rows}</table>\n" : "<p>No more trains tonight.</p>\n";
}
