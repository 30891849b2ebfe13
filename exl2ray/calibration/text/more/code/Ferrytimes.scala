package isles.timetable

import java.time.{DayOfWeek, Duration, LocalDate, LocalTime}
import scala.annotation.tailrec
import scala.collection.mutable

/** Journey planning over a published ferry timetable.
  *
  * The algorithm is a connection scan: all departures of the day sorted by time, looked at exactly once. A
  * departure is usable if we can be on its quay before it leaves, or if we sit on the same ship already.
  */
object Ferrytimes:

  opaque type Quay = String
  object Quay:
    def apply(code: String): Quay =
      require(code.matches("[A-Z]{3}"), s"a quay code is three capitals, not '$code'")
      code
    extension (q: Quay) def code: String = q

  final case class Hop(sailing: Int, from: Quay, to: Quay, departs: LocalTime, arrives: LocalTime):
    require(!arrives.isBefore(departs), s"sailing $sailing arrives at $to before it leaves $from")

  enum Season:
    case Winter, Shoulder, Summer

    def covers(d: LocalDate): Boolean = (this, d.getMonthValue) match
      case (Winter, m)   => m <= 3 || m >= 11
      case (Summer, m)   => m >= 6 && m <= 8
      case (Shoulder, m) => (m >= 4 && m <= 5) || (m >= 9 && m <= 10)

  final case class Calendar(season: Season, days: Set[DayOfWeek], except: Set[LocalDate] = Set.empty):
    def runs(d: LocalDate): Boolean =
      season.covers(d) && days(d.getDayOfWeek) && !except(d)

  enum Problem(val text: String):
    case Unknown(q: Quay)           extends Problem(s"no ship has ever called at ${q.code}")
    case Unreachable(from: Quay, to: Quay, d: LocalDate)
        extends Problem(s"${to.code} cannot be reached from ${from.code} on $d; the last boat may have gone")

  final case class Leg(sailing: Int, from: Quay, to: Quay, departs: LocalTime, arrives: LocalTime)

  final case class Journey(legs: List[Leg]):
    def departs: LocalTime  = legs.head.departs
    def arrives: LocalTime  = legs.last.arrives
    def changes: Int        = legs.size - 1
    def waiting: Duration =
      legs.zip(legs.drop(1)).foldLeft(Duration.ZERO) { case (sum, (a, b)) =>
        sum.plus(Duration.between(a.arrives, b.departs))
      }

class Planner(sailings: Map[Int, (Ferrytimes.Calendar, List[Ferrytimes.Hop])],
              changeTime: Ferrytimes.Quay => Duration):
  import Ferrytimes.*

  private val quays: Set[Quay] =
    sailings.values.flatMap(_._2).flatMap(h => List(h.from, h.to)).toSet

  private def hopsOn(d: LocalDate): Vector[Hop] =
    sailings.valuesIterator
      .collect { case (cal, hops) if cal.runs(d) => hops }
      .flatten
      .toVector
      .sortBy(h => (h.departs, h.arrives))

  /** The journey that arrives first, among those leaving at `after` or later. */
  def earliest(from: Quay, to: Quay, d: LocalDate, after: LocalTime): Either[Problem, Journey] =
    for
      _ <- Either.cond(quays(from), (), Problem.Unknown(from))
      _ <- Either.cond(quays(to), (), Problem.Unknown(to))
      j <- scan(from, to, hopsOn(d), after).toRight(Problem.Unreachable(from, to, d))
    yield j

  private def scan(from: Quay, to: Quay, hops: Vector[Hop], after: LocalTime): Option[Journey] =
    val best    = mutable.Map[Quay, LocalTime](from -> after)
    val arrival = mutable.Map.empty[Quay, (Hop, Hop)] // where we boarded, where we got off
    val aboard  = mutable.Map.empty[Int, Hop]

    def ready(q: Quay): Option[LocalTime] =
      best.get(q).map(t => if q == from then t else plus(t, changeTime(q)))

    for h <- hops.iterator.takeWhile(h => best.get(to).forall(!_.isBefore(h.departs))) do
      val canBoard = aboard.contains(h.sailing) || ready(h.from).exists(!_.isAfter(h.departs))
      if canBoard then
        val boarded = aboard.getOrElseUpdate(h.sailing, h)
        if best.get(h.to).forall(_.isAfter(h.arrives)) then
          best(h.to) = h.arrives
          arrival(h.to) = (boarded, h)

    @tailrec
    def unwind(q: Quay, acc: List[Leg]): List[Leg] = arrival.get(q) match
      case None => acc
      case Some((on, off)) =>
        unwind(on.from, Leg(on.sailing, on.from, off.to, on.departs, off.arrives) :: acc)

    Option.when(arrival.contains(to))(Journey(unwind(to, Nil)))

  /** All journeys of the day of which no other leaves later and arrives earlier. */
  def profile(from: Quay, to: Quay, d: LocalDate): LazyList[Journey] =
    LazyList.unfold(LocalTime.MIN) { t =>
      earliest(from, to, d, t).toOption.map { j =>
        val later = latestStart(j, from, to, d)
        (later, later.departs.plusMinutes(1))
      }
    }

  // The first boat is not always the right one: there may be a later boat that catches the same connection.
  private def latestStart(j: Journey, from: Quay, to: Quay, d: LocalDate): Journey =
    earliest(from, to, d, j.departs.plusMinutes(1)) match
      case Right(k) if k.arrives == j.arrives => latestStart(k, from, to, d)
      case _                                  => j

  // LocalTime wraps round at midnight, and nobody changes ships at that hour.
  private def plus(t: LocalTime, d: Duration): LocalTime =
    val moved = t.plus(d)
    if moved.isBefore(t) then LocalTime.MAX else moved
