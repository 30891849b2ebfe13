package refectory.menu

import java.time.DayOfWeek
import java.time.LocalDate
import java.time.temporal.ChronoUnit
import kotlin.math.roundToInt
import kotlin.random.Random

@JvmInline
value class Cents(val value: Int) : Comparable<Cents> {
    override fun compareTo(other: Cents) = value.compareTo(other.value)
    operator fun plus(other: Cents) = Cents(value + other.value)
    operator fun div(n: Int) = Cents((value.toDouble() / n).roundToInt())
    override fun toString() = "%d.%02d".format(value / 100, value % 100)
}

enum class Allergen { GLUTEN, EGG, FISH, NUTS, MILK, CELERY, MUSTARD, SESAME }

sealed interface Dish {
    val name: String
    val cost: Cents
    val allergens: Set<Allergen>

    data class Main(
        override val name: String,
        override val cost: Cents,
        override val allergens: Set<Allergen> = emptySet(),
        val vegetarian: Boolean = false,
        val oven: Boolean = false,
    ) : Dish

    data class Soup(
        override val name: String,
        override val cost: Cents,
        override val allergens: Set<Allergen> = emptySet(),
    ) : Dish
}

data class DayMenu(val date: LocalDate, val soup: Dish.Soup, val mains: List<Dish.Main>) {
    val cost: Cents get() = (mains + soup).map { it.cost }.reduce(Cents::plus) / (mains.size + 1)
}

fun interface Rule {
    /** Penalty of [plan], zero when all is well. */
    fun penalty(plan: List<DayMenu>): Int
}

class Weighted(val label: String, val weight: Int, private val rule: Rule) : Rule {
    override fun penalty(plan: List<DayMenu>) = weight * rule.penalty(plan)
}

object Rules {
    val vegetarianEveryDay = Weighted("a vegetarian main every day", 1000) { plan ->
        plan.count { day -> day.mains.none { it.vegetarian } }
    }

    // The second oven has been out of order since the spring.
    val oneOvenDish = Weighted("one oven dish a day", 400) { plan ->
        plan.sumOf { day -> (day.mains.count { it.oven } - 1).coerceAtLeast(0) }
    }

    val fishOnFriday = Weighted("fish on Friday", 60) { plan ->
        plan.count { day ->
            day.date.dayOfWeek == DayOfWeek.FRIDAY && day.mains.none { Allergen.FISH in it.allergens }
        }
    }

    fun noRepeatWithin(days: Long) = Weighted("no repeats within $days days", 120) { plan ->
        plan.flatMap { day -> day.mains.map { it.name to day.date } }
            .groupBy({ it.first }, { it.second })
            .values
            .sumOf { dates ->
                dates.sorted().zipWithNext().count { (a, b) -> ChronoUnit.DAYS.between(a, b) < days }
            }
    }

    /** Whoever avoids [allergen] must find at least one main every day. */
    fun wayAround(allergen: Allergen) = Weighted("something without ${allergen.name.lowercase()}", 250) { plan ->
        plan.count { day -> day.mains.all { allergen in it.allergens } }
    }

    fun budget(perPortion: Cents) = Weighted("average below $perPortion", 3) { plan ->
        val mean = plan.map { it.cost }.reduce(Cents::plus) / plan.size
        (mean.value - perPortion.value).coerceAtLeast(0)
    }
}

class Planner(
    private val soups: List<Dish.Soup>,
    private val mains: List<Dish.Main>,
    private val rules: List<Weighted>,
    private val random: Random = Random.Default,
) {
    init {
        require(soups.isNotEmpty()) { "no soups" }
        require(mains.size >= 3) { "three mains a day need at least three mains, got ${mains.size}" }
    }

    fun plan(from: LocalDate, days: Int, steps: Int = 20_000): Result {
        var current = generateSequence(from) { it.plusDays(1) }
            .filter { it.dayOfWeek !in setOf(DayOfWeek.SATURDAY, DayOfWeek.SUNDAY) }
            .take(days)
            .map { DayMenu(it, soups.random(random), mains.shuffled(random).take(3)) }
            .toList()
        var score = total(current)
        var best = current to score

        for (step in 0 until steps) {
            val temperature = 200.0 * (1 - step.toDouble() / steps)
            val next = mutate(current)
            val nextScore = total(next)
            val worse = nextScore - score
            if (worse <= 0 || random.nextDouble() < Math.exp(-worse / temperature)) {
                current = next
                score = nextScore
                if (score < best.second) best = current to score
            }
            if (best.second == 0) break
        }
        return Result(best.first, rules.associate { it.label to it.penalty(best.first) }.filterValues { it > 0 })
    }

    private fun total(plan: List<DayMenu>) = rules.sumOf { it.penalty(plan) }

    private fun mutate(plan: List<DayMenu>): List<DayMenu> {
        val i = random.nextInt(plan.size)
        return plan.toMutableList().also { copy ->
            copy[i] = when (random.nextInt(4)) {
                0 -> copy[i].copy(soup = soups.random(random))
                1 -> {
                    val j = random.nextInt(plan.size)
                    copy[j] = plan[j].copy(mains = plan[i].mains)
                    plan[i].copy(mains = plan[j].mains)
                }
                else -> {
                    val fresh = (mains - plan[i].mains.toSet()).random(random)
                    plan[i].copy(mains = plan[i].mains.shuffled(random).drop(1) + fresh)
                }
            }
        }
    }

    data class Result(val menu: List<DayMenu>, val complaints: Map<String, Int>) {
        override fun toString() = buildString {
            for (day in menu) {
                appendLine("${day.date.dayOfWeek.name.take(3)} ${day.date}  ${day.soup.name}")
                day.mains.forEach { main ->
                    val codes = main.allergens.sorted().joinToString("") { it.name.take(1).lowercase() }
                    appendLine("      ${if (main.vegetarian) "v" else " "} ${main.name}${if (codes.isEmpty()) "" else " ($codes)"}")
                }
            }
            complaints.forEach { (label, points) -> appendLine("! $label: $points") }
        }
    }
}
