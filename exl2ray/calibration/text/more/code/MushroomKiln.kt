package forage.drying

import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.channels.awaitClose
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.callbackFlow
import kotlinx.coroutines.flow.catch
import kotlinx.coroutines.flow.conflate
import kotlinx.coroutines.flow.runningFold
import kotlinx.coroutines.flow.transformWhile
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlin.math.exp
import kotlin.time.Duration
import kotlin.time.Duration.Companion.hours
import kotlin.time.Duration.Companion.minutes
import kotlin.time.Duration.Companion.seconds
import kotlin.time.TimeSource

@JvmInline
value class Grams(val value: Double) : Comparable<Grams> {
    override fun compareTo(other: Grams) = value.compareTo(other.value)
    operator fun minus(other: Grams) = Grams(value - other.value)
    operator fun div(other: Grams) = value / other.value
    override fun toString() = if (value < 1000) "%.0f g".format(value) else "%.2f kg".format(value / 1000)
}

/** What lies on the trays. Water shares are of the fresh weight. */
enum class Mushroom(val water: Double, val gentle: Int, val finish: Int) {
    CEP(0.89, gentle = 40, finish = 50),
    CHANTERELLE(0.91, gentle = 38, finish = 45),
    BLACK_TRUMPET(0.90, gentle = 35, finish = 45),
    PARASOL(0.92, gentle = 40, finish = 55),
}

@Serializable
sealed interface Phase {
    @Serializable @SerialName("weighing") data object Weighing : Phase
    @Serializable @SerialName("gentle") data class Gentle(val target: Int) : Phase
    @Serializable @SerialName("finish") data class Finish(val target: Int) : Phase
    @Serializable @SerialName("done") data class Done(val yieldPercent: Double) : Phase
    @Serializable @SerialName("failed") data class Failed(val reason: String) : Phase
}

data class Reading(val weight: Grams, val celsius: Double, val humidity: Double)

interface Cabinet {
    /** Calls back about once a second until the returned handle is closed. */
    fun listen(onReading: (Reading) -> Unit, onFault: (Exception) -> Unit): AutoCloseable
    suspend fun heat(share: Double)
    suspend fun fan(share: Double)
}

fun Cabinet.readings(): Flow<Reading> = callbackFlow {
    val handle = listen(
        onReading = { trySend(it) },
        onFault = { close(it) },
    )
    awaitClose { handle.close() }
}.conflate()

/** Moving state of one batch. [moisture] is water per dry matter, which is what drying curves are drawn in. */
private data class Track(
    val fresh: Grams? = null,
    val smooth: Double = 0.0,
    val slope: Double = 0.0,      // grams per minute, negative while drying
    val samples: Int = 0,
) {
    fun next(r: Reading, dt: Duration): Track {
        if (samples == 0) return copy(smooth = r.weight.value, samples = 1)
        val k = 1 - exp(-(dt / 30.seconds))
        val s = smooth + k * (r.weight.value - smooth)
        val rate = (s - smooth) / (dt / 1.minutes)
        return copy(smooth = s, slope = slope + k / 4 * (rate - slope), samples = samples + 1)
    }

    fun moisture(kind: Mushroom): Double {
        val dry = requireNotNull(fresh).value * (1 - kind.water)
        return (smooth - dry) / dry
    }
}

class DryingBatch(
    private val kind: Mushroom,
    private val cabinet: Cabinet,
    private val clock: TimeSource = TimeSource.Monotonic,
    private val patience: Duration = 36.hours,
) {
    private val _phase = MutableStateFlow<Phase>(Phase.Weighing)
    val phase: StateFlow<Phase> = _phase.asStateFlow()

    fun start(scope: CoroutineScope) = scope.launch {
        try {
            dry()
        } catch (e: CancellationException) {
            throw e
        } catch (e: Exception) {
            _phase.value = Phase.Failed(e.message ?: e::class.simpleName.orEmpty())
        } finally {
            // Also when cancelled: a hot cabinet with a dead controller is how barns burn down.
            withContext(NonCancellable) {
                cabinet.heat(0.0)
                cabinet.fan(1.0)
                delay(5.minutes)
                cabinet.fan(0.0)
            }
        }
    }

    private suspend fun dry() {
        val begun = clock.markNow()
        var last = begun

        cabinet.readings()
            .catch { throw IllegalStateException("the cabinet does not answer: ${it.message}", it) }
            .runningFold(Track() to null as Reading?) { (track, _), reading ->
                val now = clock.markNow()
                val dt = now - last
                last = now
                track.next(reading, dt).let { t ->
                    // Half a minute for the scales to settle, then that is the fresh weight.
                    if (t.fresh == null && t.samples == 30) t.copy(fresh = Grams(t.smooth)) else t
                } to reading
            }
            .transformWhile { step ->
                emit(step)
                _phase.value !is Phase.Done && begun.elapsedNow() < patience
            }
            .collect { (track, reading) -> if (reading != null) control(track, reading) }

        check(_phase.value is Phase.Done) { "not dry after $patience; is the door open?" }
    }

    private suspend fun control(track: Track, r: Reading) {
        check(r.celsius < 75) { "cabinet at ${r.celsius.toInt()} degrees" }
        val fresh = track.fresh ?: return

        _phase.update { now ->
            when (now) {
                is Phase.Weighing -> Phase.Gentle(kind.gentle)
                // Raise the heat only when the surface is dry, or the caps cook in their own juice.
                is Phase.Gentle -> if (track.moisture(kind) < 2.0) Phase.Finish(kind.finish) else now
                is Phase.Finish ->
                    if (track.moisture(kind) < 0.12 || (track.samples > 7200 && track.slope > -0.02)) {
                        Phase.Done(100 * track.smooth / fresh.value)
                    } else {
                        now
                    }
                is Phase.Done, is Phase.Failed -> now
            }
        }

        val target = when (val p = _phase.value) {
            is Phase.Gentle -> p.target
            is Phase.Finish -> p.target
            else -> return
        }
        cabinet.heat(((target - r.celsius) * 0.15).coerceIn(0.0, 1.0))
        cabinet.fan(if (r.humidity > 0.35) 1.0 else 0.4)
    }
}

fun Phase.describe(): String = when (this) {
    Phase.Weighing -> "weighing the fresh mushrooms"
    is Phase.Gentle -> "drying gently at $target °C"
    is Phase.Finish -> "finishing at $target °C"
    is Phase.Done -> "done, ${"%.1f".format(yieldPercent)} % of the fresh weight is left"
    is Phase.Failed -> "stopped: $reason"
}
