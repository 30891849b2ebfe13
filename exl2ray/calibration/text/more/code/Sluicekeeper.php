<?php

declare(strict_types=1);

namespace Millpond\Sluice;

use DateTimeImmutable;
use DateTimeZone;
use PDO;
use Psr\Clock\ClockInterface;
use Psr\Log\LoggerInterface;

/** What a mill owner asked for, as typed into the form at the lock-keeper's window. */
final readonly class Request
{
    public function __construct(
        public int $mill,
        public DateTimeImmutable $from,
        public int $minutes,
        public int $litresPerSecond,
    ) {
        if ($minutes < 15 || $minutes > 600) {
            throw new \InvalidArgumentException('Water is let for a quarter of an hour at least and ten hours at most.');
        }
        if ($litresPerSecond <= 0) {
            throw new \InvalidArgumentException('Nobody can return water to the pond.');
        }
    }

    public function until(): DateTimeImmutable
    {
        return $this->from->modify("+{$this->minutes} minutes");
    }

    public function cubicMetres(): float
    {
        return $this->litresPerSecond * $this->minutes * 60 / 1000;
    }
}

enum Refusal: string
{
    case TooMuchAtOnce = 'The channel carries no more than 900 l/s.';
    case PondTooLow = 'The pond would fall below the fish mark.';
    case OlderRight = 'A mill with an older right has booked this time.';
    case Sunday = 'On Sundays only mills with a licence from before 1874 may grind.';

    public function httpStatus(): int
    {
        return match ($this) {
            self::OlderRight => 409,
            self::Sunday => 403,
            default => 422,
        };
    }
}

final class Sluicekeeper
{
    private const CHANNEL = 900;
    private const FISH_MARK = 41_000.0;

    public function __construct(
        private readonly PDO $db,
        private readonly ClockInterface $clock,
        private readonly LoggerInterface $log,
        private readonly DateTimeZone $zone = new DateTimeZone('Europe/Vienna'),
    ) {
        $db->setAttribute(PDO::ATTR_ERRMODE, PDO::ERRMODE_EXCEPTION);
        $db->setAttribute(PDO::ATTR_EMULATE_PREPARES, false);
    }

    /** @return int|Refusal the number of the booking, or why there is none */
    public function book(Request $r): int|Refusal
    {
        $this->db->beginTransaction();
        try {
            $this->db->exec('SELECT pg_advisory_xact_lock(1874)');
            $refusal = $this->refuse($r);
            if ($refusal !== null) {
                $this->db->rollBack();
                $this->log->notice('refused', ['mill' => $r->mill, 'why' => $refusal->name]);
                return $refusal;
            }
            $insert = $this->db->prepare(<<<'SQL'
                INSERT INTO booking (mill, during, flow)
                VALUES (:mill, tstzrange(:from, :until, '[)'), :flow)
                RETURNING id
                SQL);
            $insert->execute([
                'mill' => $r->mill,
                'from' => $r->from->format(DATE_ATOM),
                'until' => $r->until()->format(DATE_ATOM),
                'flow' => $r->litresPerSecond,
            ]);
            $id = (int) $insert->fetchColumn();
            $this->db->commit();
            return $id;
        } catch (\Throwable $e) {
            if ($this->db->inTransaction()) {
                $this->db->rollBack();
            }
            throw $e;
        }
    }

    private function refuse(Request $r): ?Refusal
    {
        $seniority = $this->seniority($r->mill);
        if ($r->from->setTimezone($this->zone)->format('N') === '7' && $seniority >= 1874) {
            return Refusal::Sunday;
        }

        $overlapping = $this->db->prepare(<<<'SQL'
            SELECT b.flow, m.right_since
            FROM booking b JOIN mill m ON m.id = b.mill
            WHERE b.during && tstzrange(?, ?, '[)') AND b.mill <> ? AND b.cancelled_at IS NULL
            SQL);
        $overlapping->execute([$r->from->format(DATE_ATOM), $r->until()->format(DATE_ATOM), $r->mill]);
        $others = $overlapping->fetchAll(PDO::FETCH_OBJ);

        $taken = array_sum(array_map(static fn (object $b): int => (int) $b->flow, $others));
        if ($taken + $r->litresPerSecond > self::CHANNEL) {
            $older = array_filter($others, static fn (object $b): bool => (int) $b->right_since < $seniority);
            return $older === [] ? Refusal::TooMuchAtOnce : Refusal::OlderRight;
        }

        return $this->pondAt($r->until()) - $r->cubicMetres() < self::FISH_MARK ? Refusal::PondTooLow : null;
    }

    private function seniority(int $mill): int
    {
        $q = $this->db->prepare('SELECT right_since FROM mill WHERE id = ?');
        $q->execute([$mill]);
        $year = $q->fetchColumn();
        return $year === false ? throw new \OutOfBoundsException("There is no mill {$mill} on this stream.") : (int) $year;
    }

    /** Content of the pond at some later time, with the inflow as it is now and everything that is booked until then. */
    private function pondAt(DateTimeImmutable $when): float
    {
        ['m3' => $now, 'inflow' => $inflow] = $this->db
            ->query('SELECT m3, inflow FROM gauge ORDER BY read_at DESC LIMIT 1')
            ->fetch(PDO::FETCH_ASSOC);
        $seconds = max(0, $when->getTimestamp() - $this->clock->now()->getTimestamp());

        $booked = $this->db->prepare(<<<'SQL'
            SELECT coalesce(sum(flow * extract(epoch FROM upper(part) - lower(part))) / 1000, 0)
            FROM (SELECT flow, during * tstzrange(now(), ?, '[)') AS part
                  FROM booking WHERE cancelled_at IS NULL) AS b
            WHERE NOT isempty(part)
            SQL);
        $booked->execute([$when->format(DATE_ATOM)]);

        return (float) $now + (float) $inflow * $seconds / 1000 - (float) $booked->fetchColumn();
    }
}
