-- Seed library: members borrow seeds in spring and return some of their own harvest in autumn.
-- SQLite 3.35 or later. Results are shown as the shell prints them in box mode.

PRAGMA foreign_keys = ON;

CREATE TABLE variety (
    id       INTEGER PRIMARY KEY,
    crop     TEXT NOT NULL,
    name     TEXT NOT NULL,
    origin   TEXT,
    UNIQUE (crop, name)
);

CREATE TABLE loan (
    id       INTEGER PRIMARY KEY,
    member   TEXT NOT NULL,
    variety  INTEGER NOT NULL REFERENCES variety,
    taken    TEXT NOT NULL CHECK (taken GLOB '20[0-9][0-9]-[01][0-9]-[0-3][0-9]'),
    grams    REAL NOT NULL CHECK (grams > 0)
);

CREATE TABLE harvest (
    loan     INTEGER NOT NULL REFERENCES loan ON DELETE CASCADE,
    returned TEXT NOT NULL,
    grams    REAL NOT NULL CHECK (grams > 0),
    viable   REAL CHECK (viable BETWEEN 0 AND 1)   -- germination test; NULL: not tested yet
);

CREATE INDEX loan_by_variety ON loan (variety, taken);

INSERT INTO variety (id, crop, name, origin) VALUES
    (1, 'bean',   'Tiger''s Eye', 'Chile'),
    (2, 'bean',   'Monstrance',   'Bohemia'),
    (3, 'tomato', 'Black Plum',   NULL),
    (4, 'lettuce', 'Trout Back',  'Austria');

INSERT INTO loan (id, member, variety, taken, grams) VALUES
    (1, 'Abena', 1, '2022-03-12', 40), (2, 'Rolf', 1, '2022-04-02', 25),
    (3, 'Abena', 3, '2022-03-12', 0.5), (4, 'Yuki', 2, '2023-03-25', 30),
    (5, 'Rolf',  3, '2023-03-25', 0.4), (6, 'Yuki', 1, '2023-04-01', 20);

INSERT INTO harvest (loan, returned, grams, viable) VALUES
    (1, '2022-10-01', 150, 0.94), (1, '2022-10-20', 35, 0.71),
    (3, '2022-09-18', 2.2, 0.88), (4, '2023-10-07', 55, NULL), (6, '2023-10-07', 90, 0.97);

-- How much came back for each gram that left? Harvests are summed first: joining both tables
-- directly would count a loan twice when it was returned in two batches.
WITH back AS (
    SELECT loan, sum(grams) AS grams, sum(grams * viable) / sum(grams) FILTER (WHERE viable IS NOT NULL) AS viable
    FROM harvest
    GROUP BY loan
)
SELECT v.crop, v.name,
       count(*)                                          AS loans,
       round(total(b.grams) / sum(l.grams), 2)           AS ratio,
       -- not printf('%.0f'): it turns NULL, "never tested", into 0
       CAST(round(100 * avg(b.viable)) AS INTEGER) || ' %' AS viable
FROM loan AS l
JOIN variety AS v ON v.id = l.variety
LEFT JOIN back AS b ON b.loan = l.id
GROUP BY v.id
ORDER BY ratio DESC;
-- ┌────────┬─────────────┬───────┬───────┬────────┐
-- │  crop  │    name     │ loans │ ratio │ viable │
-- ├────────┼─────────────┼───────┼───────┼────────┤
-- │ bean   │ Tiger's Eye │ 3     │ 3.24  │ 93 %   │
-- │ tomato │ Black Plum  │ 2     │ 2.44  │ 88 %   │
-- │ bean   │ Monstrance  │ 1     │ 1.83  │        │
-- └────────┴─────────────┴───────┴───────┴────────┘

-- Varieties nobody has borrowed, and members who still owe seeds from 2022.
SELECT 'never borrowed' AS what, crop || ' ' || name AS who
FROM variety WHERE id NOT IN (SELECT variety FROM loan)
UNION ALL
SELECT 'owes since ' || l.taken, l.member
FROM loan AS l
WHERE l.taken < '2023' AND NOT EXISTS (SELECT 1 FROM harvest AS h WHERE h.loan = l.id);
-- ┌───────────────────────┬────────────────────┐
-- │         what          │        who         │
-- ├───────────────────────┼────────────────────┤
-- │ never borrowed        │ lettuce Trout Back │
-- │ owes since 2022-04-02 │ Rolf               │
-- └───────────────────────┴────────────────────┘

-- Running total of bean seeds on loan, per year.
SELECT taken, member, grams,
       sum(grams) OVER (PARTITION BY substr(taken, 1, 4) ORDER BY taken, id) AS year_so_far
FROM loan WHERE variety IN (1, 2)
ORDER BY taken, id;
-- ┌────────────┬────────┬───────┬─────────────┐
-- │   taken    │ member │ grams │ year_so_far │
-- ├────────────┼────────┼───────┼─────────────┤
-- │ 2022-03-12 │ Abena  │ 40.0  │ 40.0        │
-- │ 2022-04-02 │ Rolf   │ 25.0  │ 65.0        │
-- │ 2023-03-25 │ Yuki   │ 30.0  │ 30.0        │
-- │ 2023-04-01 │ Yuki   │ 20.0  │ 50.0        │
-- └────────────┴────────┴───────┴─────────────┘

INSERT INTO loan (member, variety, taken, grams) VALUES ('Abena', 9, '2024-03-16', 10);
-- Runtime error near line 1: FOREIGN KEY constraint failed (19)
