package orchard.frost

import kotlin.math.exp
import kotlin.math.ln
import kotlin.time.Duration
import kotlin.time.Duration.Companion.minutes
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.catch
import kotlinx.coroutines.flow.distinctUntilChanged
import kotlinx.coroutines.flow.filter
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.flow.retryWhen
import kotlinx.coroutines.flow.scan
import kotlinx.coroutines.flow.transform

/**
 * Decides when the sprinklers of an orchard have to run against spring frost.
 *
 * What damages blossoms is the wet-bulb temperature, not the air temperature: in dry air, water
 * evaporating from the petals cools them by several degrees. Sprinkling too late is useless and
 * sprinkling all night wastes a pond, hence the hysteresis in [Controller].
 */
@JvmInline
value class Celsius(val degrees: Double) : Comparable<Celsius> {
    override fun compareTo(other: Celsius) = degrees.compareTo(other.degrees)
    override fun toString() = "%.1f °C".format(degrees)
}

val Double.celsius get() = Celsius(this)

data class Reading(val sensor: String, val air: Celsius, val humidityPercent: Double)

sealed interface Command {
    data class Start(val because: Celsius) : Command
    data class Stop(val because: Celsius) : Command
    data class Alarm(val message: String) : Command
}

/** Dew point after Magnus, then the one-third rule; good to half a degree near freezing. */
fun Reading.wetBulb(): Celsius {
    require(humidityPercent in 1.0..100.0) { "$sensor reports $humidityPercent % humidity" }
    val gamma = ln(humidityPercent / 100) + 17.62 * air.degrees / (243.12 + air.degrees)
    val dewPoint = 243.12 * gamma / (17.62 - gamma)
    return (air.degrees - (air.degrees - dewPoint) / 3).celsius
}

/** Saturation vapour pressure in hectopascal, for the log book. */
fun Celsius.vapourPressure() = 6.112 * exp(17.62 * degrees / (243.12 + degrees))

/**
 * Replaces each value by the median of the last [size] ones. A single absurd reading, typical of a
 * wet connector, never reaches the pump; a real change does after (size + 1) / 2 samples.
 */
fun <T : Comparable<T>> Flow<T>.runningMedian(size: Int): Flow<T> {
    require(size % 2 == 1) { "an even window of $size has no middle element" }
    return flow {
        val window = ArrayDeque<T>(size)
        collect { value ->
            if (window.size == size) window.removeFirst()
            window.addLast(value)
            if (window.size == size) emit(window.sorted()[size / 2])
        }
    }
}

class Controller(
    private val startBelow: Celsius = 0.5.celsius,
    private val stopAbove: Celsius = 2.0.celsius,
) {
    init {
        require(startBelow < stopAbove) { "start at $startBelow and stop at $stopAbove would flutter" }
    }

    private data class Step(val running: Boolean, val cause: Celsius?)

    fun commands(wetBulb: Flow<Celsius>): Flow<Command> =
        wetBulb
            .scan(Step(running = false, cause = null)) { last, now ->
                when {
                    !last.running && now < startBelow -> Step(true, now)
                    last.running && now > stopAbove -> Step(false, now)
                    else -> last
                }
            }
            .distinctUntilChanged()
            .transform { step ->
                // The initial step has no cause: at start-up the valves are left as they are.
                val cause = step.cause ?: return@transform
                emit(if (step.running) Command.Start(cause) else Command.Stop(cause))
            }
}

/**
 * Polls [read] for ever. A failing sensor is retried with growing pauses; after [patience] failures
 * in a row the orchard keeper is woken up, because silence on a frost night is an emergency.
 */
fun watch(
    every: Duration = 1.minutes,
    patience: Int = 5,
    controller: Controller = Controller(),
    read: suspend () -> Reading,
): Flow<Command> {
    var failures = 0
    val readings = flow {
        while (true) {
            emit(read())
            failures = 0
            delay(every)
        }
    }.retryWhen { _, _ ->
        // Our own counter rather than the `attempt` parameter: that one is never reset, and two
        // hiccups a night would add up to an alarm within days.
        failures += 1
        delay(every * failures)
        failures < patience
    }
    return controller
        .commands(readings.map(Reading::wetBulb).filter { it > (-40.0).celsius }.runningMedian(3))
        .catch { error -> emit(Command.Alarm("no readings: ${error.message}")) }
}
