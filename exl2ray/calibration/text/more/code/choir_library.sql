-- Sheet music library of a choir: who has which copy, and what can be sung with what is on the shelf.
-- PostgreSQL 15.

begin;

create type voice as enum ('soprano', 'alto', 'tenor', 'bass');

create table singer (
    singer_id   integer generated always as identity primary key,
    name        text not null,
    voice       voice not null,
    joined      date not null default current_date,
    left_on     date,
    check (left_on is null or left_on >= joined)
);

create table piece (
    piece_id    integer generated always as identity primary key,
    composer    text not null,
    title       text not null,
    minutes     numeric(4, 1) not null check (minutes > 0),
    a_cappella  boolean not null default false,
    unique (composer, title)
);

create table copy (
    piece_id    integer not null references piece,
    number      smallint not null check (number > 0),
    withdrawn   date,
    primary key (piece_id, number)
);

create table loan (
    loan_id     bigint generated always as identity primary key,
    piece_id    integer not null,
    number      smallint not null,
    singer_id   integer not null references singer,
    lent        daterange not null,
    foreign key (piece_id, number) references copy,
    check (not isempty(lent) and not lower_inf(lent))
);

-- A copy can only be in one place at a time. An open-ended range is a loan that has not come back.
create extension if not exists btree_gist;
alter table loan add constraint one_borrower_at_a_time
    exclude using gist (piece_id with =, number with =, lent with &&);

create index loan_open on loan (singer_id) where upper_inf(lent);

commit;

-- Lend the lowest-numbered free copy. Two librarians at two desks must not pick the same one, hence the lock
-- that skips rows the other desk is just looking at.
create function lend(p_piece integer, p_singer integer) returns smallint
language plpgsql as $$
declare
    chosen smallint;
begin
    select c.number into chosen
    from copy c
    where c.piece_id = p_piece
      and c.withdrawn is null
      and not exists (
            select from loan l
            where l.piece_id = c.piece_id and l.number = c.number and upper_inf(l.lent))
    order by c.number
    limit 1
    for update of c skip locked;

    if chosen is null then
        raise exception 'no copy of piece % on the shelf', p_piece using errcode = 'no_data_found';
    end if;

    insert into loan (piece_id, number, singer_id, lent)
    values (p_piece, chosen, p_singer, daterange(current_date, null));
    return chosen;
end
$$;

-- Former members who still have music at home, the worst case first.
select s.name,
       s.left_on,
       count(*) as copies,
       string_agg(format('%s: %s (no. %s)', p.composer, p.title, l.number), '; ' order by p.composer, p.title) as music
from singer s
join loan l using (singer_id)
join piece p using (piece_id)
where upper_inf(l.lent)
  and s.left_on < current_date
group by s.singer_id
order by s.left_on;

-- Pieces for which there are enough copies for the whole choir, two singers of a voice sharing one if need be.
with needed as (
    select sum(ceil(n / 2.0)) as shared, sum(n) as comfortable
    from (select voice, count(*) as n from singer where left_on is null group by voice) v
),
owned as (
    select piece_id, count(*) filter (where withdrawn is null) as usable
    from copy
    group by piece_id
)
select p.composer, p.title, p.minutes, o.usable,
       case when o.usable >= n.comfortable then 'one each'
            when o.usable >= n.shared then 'two to a copy'
            else format('buy %s', n.shared - o.usable) end as verdict
from piece p
join owned o using (piece_id)
cross join needed n
order by o.usable >= n.comfortable desc, o.usable >= n.shared desc, p.composer, p.title;
