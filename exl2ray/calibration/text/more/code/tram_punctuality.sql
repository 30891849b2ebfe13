-- Punctuality of the tram network, PostgreSQL 15.
-- Loaded nightly from the on-board computers; reports are refreshed at 04:00.

BEGIN;

CREATE SCHEMA IF NOT EXISTS tram;
SET LOCAL search_path = tram, public;

CREATE TYPE day_kind AS ENUM ('weekday', 'saturday', 'sunday');

CREATE TABLE stop (
    code        char(4) PRIMARY KEY,
    name        text NOT NULL,
    timing      boolean NOT NULL DEFAULT false,   -- trams wait here when early
    position    point
);

CREATE TABLE trip (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    line        smallint NOT NULL CHECK (line BETWEEN 1 AND 24),
    direction   char(1) NOT NULL CHECK (direction IN ('A', 'B')),
    service_day date NOT NULL,
    depot       text NOT NULL,
    vehicle     integer,
    UNIQUE (id, service_day)
);

CREATE TABLE passing (
    trip_id     bigint NOT NULL,
    service_day date NOT NULL,
    seq         smallint NOT NULL,
    stop        char(4) NOT NULL REFERENCES stop,
    planned     interval NOT NULL,   -- since midnight of the service day; may exceed 24 hours
    actual      interval,
    doors_s     smallint CHECK (doors_s >= 0),
    PRIMARY KEY (service_day, trip_id, seq),
    FOREIGN KEY (trip_id, service_day) REFERENCES trip (id, service_day) ON DELETE CASCADE
) PARTITION BY RANGE (service_day);

CREATE TABLE passing_2024q1 PARTITION OF passing FOR VALUES FROM ('2024-01-01') TO ('2024-04-01');
CREATE TABLE passing_2024q2 PARTITION OF passing FOR VALUES FROM ('2024-04-01') TO ('2024-07-01');

CREATE INDEX ON passing (stop, service_day) INCLUDE (planned, actual);

CREATE TABLE holiday (day date PRIMARY KEY, runs_as day_kind NOT NULL DEFAULT 'sunday');

CREATE FUNCTION kind_of(d date) RETURNS day_kind
LANGUAGE sql STABLE PARALLEL SAFE
RETURN COALESCE(
    (SELECT runs_as FROM tram.holiday h WHERE h.day = d),
    CASE extract(isodow FROM d) WHEN 6 THEN 'saturday' WHEN 7 THEN 'sunday' ELSE 'weekday' END::tram.day_kind
);

-- Early counts as bad as late: the passenger who arrives on time sees the tail lamps.
CREATE VIEW verdict AS
SELECT p.*, t.line, t.direction,
       extract(epoch FROM p.actual - p.planned)::int AS late_s,
       CASE
           WHEN p.actual IS NULL                              THEN 'missing'
           WHEN p.actual < p.planned - interval '30 seconds'  THEN 'early'
           WHEN p.actual <= p.planned + interval '3 minutes'  THEN 'punctual'
           ELSE 'late'
       END AS verdict
  FROM passing p
  JOIN trip t ON t.id = p.trip_id AND t.service_day = p.service_day;

-- Where do the minutes get lost? Change of delay from one stop to the next, by line and hour.
CREATE MATERIALIZED VIEW lost_minutes AS
WITH leg AS (
    SELECT line, direction, service_day, stop AS to_stop,
           lag(stop)   OVER trip_order AS from_stop,
           late_s - lag(late_s) OVER trip_order AS gained_s,
           extract(hour FROM planned)::int % 24 AS hour,
           doors_s
      FROM verdict
     WHERE actual IS NOT NULL
    WINDOW trip_order AS (PARTITION BY service_day, trip_id ORDER BY seq)
)
SELECT line, direction, from_stop, to_stop, hour, tram.kind_of(service_day) AS kind,
       count(*)                                                    AS runs,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY gained_s)       AS median_s,
       percentile_cont(0.9) WITHIN GROUP (ORDER BY gained_s)       AS p90_s,
       avg(doors_s)                                                AS doors_s
  FROM leg
 WHERE from_stop IS NOT NULL
 GROUP BY line, direction, from_stop, to_stop, hour, kind
HAVING count(*) >= 20
WITH NO DATA;

CREATE UNIQUE INDEX ON lost_minutes (line, direction, from_stop, to_stop, hour, kind);

-- Bunching: two trams of a line within a minute and a half, where the timetable has at least six.
CREATE FUNCTION bunches(from_day date, to_day date)
RETURNS TABLE (line smallint, stop char(4), day date, at interval, gap interval, planned_gap interval)
LANGUAGE sql STABLE AS $$
    SELECT line, stop, service_day, actual, actual - before_actual, planned - before_planned
      FROM (
        SELECT v.line, v.stop, v.service_day, v.planned, v.actual,
               lag(v.actual)  OVER w AS before_actual,
               lag(v.planned) OVER w AS before_planned
          FROM tram.verdict v
         WHERE v.service_day BETWEEN from_day AND to_day
           AND v.actual IS NOT NULL
        WINDOW w AS (PARTITION BY v.line, v.direction, v.stop, v.service_day ORDER BY v.actual)
      ) AS pairs
     WHERE actual - before_actual < interval '90 seconds'
       AND abs(extract(epoch FROM planned - before_planned)) >= 360
     ORDER BY service_day, actual;
$$;

COMMIT;

-- The monthly letter to the council: one line per tram line, with last year beside it.
SELECT line,
       round(100.0 * count(*) FILTER (WHERE verdict = 'punctual' AND service_day >= '2024-05-01')
             / nullif(count(*) FILTER (WHERE verdict <> 'missing' AND service_day >= '2024-05-01'), 0), 1) AS may_2024,
       round(100.0 * count(*) FILTER (WHERE verdict = 'punctual' AND service_day < '2023-06-01')
             / nullif(count(*) FILTER (WHERE verdict <> 'missing' AND service_day < '2023-06-01'), 0), 1) AS may_2023,
       string_agg(DISTINCT stop, ' ' ORDER BY stop) FILTER (WHERE late_s > 900) AS very_late_at
  FROM tram.verdict
 WHERE service_day BETWEEN '2024-05-01' AND '2024-05-31'
    OR service_day BETWEEN '2023-05-01' AND '2023-05-31'
 GROUP BY ROLLUP (line)
 ORDER BY line NULLS LAST;
