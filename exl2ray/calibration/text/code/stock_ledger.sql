-- stock_ledger.sql (PostgreSQL): stock is never updated, only booked.
--
-- Each movement is a row; the balance table is a cache that a trigger keeps in step and that a
-- nightly job can compare with the sum of all movements.

CREATE TABLE item (
    sku        text PRIMARY KEY CHECK (sku ~ '^[A-Z]{3}-[0-9]{4}$'),
    unit       text NOT NULL DEFAULT 'piece',
    -- what it costs us to run out, used to choose the order in which shortages are reported
    priority   smallint NOT NULL DEFAULT 5 CHECK (priority BETWEEN 1 AND 9)
);

CREATE TABLE movement (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sku        text NOT NULL REFERENCES item,
    warehouse  text NOT NULL,
    quantity   integer NOT NULL CHECK (quantity <> 0),   -- negative: leaves the warehouse
    reason     text NOT NULL CHECK (reason IN ('purchase', 'sale', 'transfer', 'count')),
    booked_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    reverses   bigint UNIQUE REFERENCES movement         -- UNIQUE: undo something once
);

CREATE TABLE balance (
    sku        text NOT NULL REFERENCES item,
    warehouse  text NOT NULL,
    on_hand    integer NOT NULL,
    PRIMARY KEY (sku, warehouse),
    CONSTRAINT no_negative_stock CHECK (on_hand >= 0)
);

CREATE FUNCTION apply_movement() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        RAISE EXCEPTION 'movement % is history; book a reversal instead', OLD.id
            USING ERRCODE = 'restrict_violation';
    END IF;

    -- Not an upsert: the row proposed by INSERT ... ON CONFLICT is checked against
    -- no_negative_stock before the conflict is noticed, so every sale would be refused.
    UPDATE balance
       SET on_hand = on_hand + NEW.quantity
     WHERE sku = NEW.sku AND warehouse = NEW.warehouse;
    IF NOT FOUND THEN
        INSERT INTO balance VALUES (NEW.sku, NEW.warehouse, NEW.quantity);
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER movement_booked
    AFTER INSERT OR UPDATE OR DELETE ON movement
    FOR EACH ROW EXECUTE FUNCTION apply_movement();

-- Moves goods between two warehouses. Both halves are booked or none.
CREATE PROCEDURE transfer(p_sku text, p_from text, p_to text, p_quantity integer)
LANGUAGE plpgsql AS $$
DECLARE
    v_available integer;
BEGIN
    IF p_from = p_to OR p_quantity <= 0 THEN
        RAISE EXCEPTION 'cannot transfer % of % from % to %', p_quantity, p_sku, p_from, p_to;
    END IF;

    -- Lock both balances in alphabetical order: two opposite transfers would otherwise each hold
    -- the row the other one needs.
    PERFORM 1 FROM balance
      WHERE sku = p_sku AND warehouse IN (p_from, p_to)
      ORDER BY warehouse FOR UPDATE;

    SELECT on_hand INTO v_available FROM balance WHERE sku = p_sku AND warehouse = p_from;
    IF coalesce(v_available, 0) < p_quantity THEN
        RAISE EXCEPTION 'only % of % left in %', coalesce(v_available, 0), p_sku, p_from
            USING HINT = 'Check for open purchase orders.';
    END IF;

    INSERT INTO movement (sku, warehouse, quantity, reason)
    VALUES (p_sku, p_from, -p_quantity, 'transfer'),
           (p_sku, p_to,    p_quantity, 'transfer');
END $$;

-- Days until each item runs out at the pace of the last four weeks.
CREATE VIEW days_of_cover AS
WITH pace AS (
    SELECT sku, -sum(quantity) / 28.0 AS per_day
      FROM movement
     WHERE reason = 'sale' AND booked_at > now() - interval '28 days'
     GROUP BY sku
), stock AS (
    SELECT sku, sum(on_hand) AS on_hand FROM balance GROUP BY sku
)
SELECT i.sku,
       coalesce(s.on_hand, 0)                                     AS on_hand,
       round(coalesce(s.on_hand, 0) / nullif(p.per_day, 0), 1)    AS days,
       rank() OVER (ORDER BY s.on_hand / nullif(p.per_day, 0), i.priority) AS urgency
  FROM item i
  LEFT JOIN stock s USING (sku)
  LEFT JOIN pace  p USING (sku);
