-- 2031_04_graves_to_plots.sql
-- The cemetery office used one row per burial, with the plot spelt out in it ("B-14 left", "B14 l.", "B 14/L").
-- From now on plots are rows of their own and a burial points to one. PostgreSQL 15. Takes about nine seconds on the
-- copy of the data; the office is shut at lunch, do it then. Everything or nothing:

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '5s';
SET LOCAL search_path = cemetery, public;

CREATE TYPE side AS ENUM ('whole', 'left', 'middle', 'right');

CREATE TABLE plot (
    id          integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    field       text NOT NULL CHECK (field ~ '^[A-Z]{1,2}$'),
    number      integer NOT NULL CHECK (number > 0),
    side        side NOT NULL DEFAULT 'whole',
    lease_until date,
    protected   boolean NOT NULL DEFAULT false,
    UNIQUE (field, number, side)
);
COMMENT ON COLUMN plot.protected IS 'War graves and the two abbots: the lease never ends.';

-- 1. Read the old spellings. What this function cannot read it returns as null, and step 2 stops.
CREATE FUNCTION pg_temp.read_plot(t text, OUT field text, OUT number integer, OUT s side)
LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
    m text[];
BEGIN
    m := regexp_match(upper(t), '^\s*(?:FIELD\s*)?([A-Z]{1,2})\s*[-/. ]?\s*0*(\d{1,3})\s*[-/., ]*\s*(L|LEFT|LI|R|RIGHT|RE|M|MID|MIDDLE)?\.?\s*$');
    IF m IS NULL THEN
        RETURN;
    END IF;
    field := m[1];
    number := m[2]::integer;
    s := CASE left(m[3], 1) WHEN 'L' THEN 'left' WHEN 'R' THEN 'right' WHEN 'M' THEN 'middle' ELSE 'whole' END::side;
END
$$;

CREATE TEMP TABLE reading ON COMMIT DROP AS
SELECT b.id AS burial, b.plot_text, r.*
FROM burial b
LEFT JOIN plot_correction c ON c.burial_id = b.id       -- 31 cards the sexton looked at himself
CROSS JOIN LATERAL pg_temp.read_plot(coalesce(c.correct, b.plot_text)) AS r;

-- 2. Anything unread?
DO $$
DECLARE
    bad text;
    n integer;
BEGIN
    SELECT count(*), string_agg(format('%s: %L', burial, plot_text), E'\n' ORDER BY burial)
      INTO n, bad
      FROM reading WHERE field IS NULL;
    IF n > 0 THEN
        RAISE EXCEPTION '% burials with an unreadable plot', n
            USING DETAIL = bad, HINT = 'Look at the card index and add them to plot_correction.';
    END IF;
END
$$;

-- 3. A whole plot and halves of the same plot cannot both exist, except where the family bought the other half later.
CREATE TEMP TABLE mixed ON COMMIT DROP AS
SELECT field, number
FROM reading
GROUP BY field, number
HAVING bool_or(s = 'whole') AND bool_or(s <> 'whole');

UPDATE reading r
SET s = 'left'
FROM mixed m
WHERE (r.field, r.number) = (m.field, m.number) AND r.s = 'whole'
  AND EXISTS (SELECT FROM burial b WHERE b.id = r.burial AND b.buried < DATE '1952-01-01');

-- 4. Fill the table. The lease that ends last is the one in force.
INSERT INTO plot (field, number, side, lease_until, protected)
SELECT r.field, r.number, r.s,
       CASE WHEN bool_or(b.kind IN ('war', 'abbot')) THEN NULL ELSE max(b.lease_until) END,
       bool_or(b.kind IN ('war', 'abbot'))
FROM reading r JOIN burial b ON b.id = r.burial
GROUP BY r.field, r.number, r.s;

ALTER TABLE burial ADD COLUMN plot_id integer REFERENCES plot;

UPDATE burial b
SET plot_id = p.id
FROM reading r JOIN plot p ON (p.field, p.number, p.side) = (r.field, r.number, r.s)
WHERE r.burial = b.id;

ALTER TABLE burial
    ALTER COLUMN plot_id SET NOT NULL,
    DROP COLUMN lease_until;
ALTER TABLE burial RENAME COLUMN plot_text TO plot_text_old;
CREATE INDEX ON burial (plot_id, buried DESC);

-- 5. What the office asks for every January.
CREATE VIEW expiring AS
SELECT p.field || '-' || p.number || CASE p.side WHEN 'whole' THEN '' ELSE ' ' || p.side END AS plot,
       p.lease_until,
       last.name AS last_burial,
       last.buried + INTERVAL '20 years' > p.lease_until AS rest_period_runs_longer,
       count(*) FILTER (WHERE p.lease_until < CURRENT_DATE) OVER (PARTITION BY p.field) AS overdue_in_field
FROM plot p
CROSS JOIN LATERAL (
    SELECT b.name, b.buried FROM burial b WHERE b.plot_id = p.id ORDER BY b.buried DESC LIMIT 1
) AS last
WHERE NOT p.protected AND p.lease_until < CURRENT_DATE + INTERVAL '1 year';

SELECT count(*) AS plots, count(*) FILTER (WHERE side <> 'whole') AS parts, min(lease_until), max(lease_until) FROM plot;
COMMIT;
