package net.kelpline.tides.ui

import androidx.lifecycle.SavedStateHandle
import androidx.lifecycle.ViewModel
import androidx.lifecycle.viewModelScope
import kotlinx.coroutines.ExperimentalCoroutinesApi
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.*
import net.kelpline.tides.data.Extreme
import net.kelpline.tides.data.Port
import net.kelpline.tides.data.TideRepository
import java.time.Clock
import java.time.Duration
import java.time.Instant
import kotlin.math.PI
import kotlin.math.cos

/** What the clock face shows. [Loading] appears only on the very first start; later the old picture stays up. */
sealed interface TideUi {
    data object Loading : TideUi

    data class Face(
        val portName: String,
        val heightMetres: Double,
        val trend: Trend,
        val next: Extreme,
        val untilNext: Duration,
        /** 0 at high water, 0.5 at low water, back to 1 at the following high: the angle of the hand. */
        val phase: Float,
        val stale: Boolean,
    ) : TideUi

    data class Failed(val reason: Reason) : TideUi

    enum class Trend { RISING, FALLING, SLACK }
    enum class Reason { NO_PREDICTIONS, OFFLINE }
}

@OptIn(ExperimentalCoroutinesApi::class)
class TideClockViewModel(
    private val repository: TideRepository,
    private val clock: Clock,
    private val saved: SavedStateHandle,
) : ViewModel() {

    private val portId: StateFlow<String> = saved.getStateFlow(KEY_PORT, repository.defaultPortId)

    private val ticks: Flow<Instant> = flow {
        while (true) {
            val now = clock.instant()
            emit(now)
            // Wake at the full minute, so that "in 3 h 12 min" does not change at odd seconds.
            delay(60_000 - now.toEpochMilli() % 60_000)
        }
    }

    val ui: StateFlow<TideUi> = portId
        .flatMapLatest { id ->
            combine(repository.port(id), repository.extremes(id), ticks, ::face)
        }
        .catch { emit(TideUi.Failed(TideUi.Reason.OFFLINE)) }
        .stateIn(viewModelScope, SharingStarted.WhileSubscribed(stopTimeoutMillis = 5_000), TideUi.Loading)

    fun choosePort(id: String) {
        saved[KEY_PORT] = id
    }

    private fun face(port: Port, extremes: List<Extreme>, now: Instant): TideUi {
        val i = extremes.indexOfFirst { it.time > now }
        // Index 0 would mean that there is nothing before now to interpolate from.
        if (i < 1) return TideUi.Failed(TideUi.Reason.NO_PREDICTIONS)
        val before = extremes[i - 1]
        val after = extremes[i]

        val span = Duration.between(before.time, after.time).toMillis().toDouble()
        val x = Duration.between(before.time, now).toMillis() / span
        val height = interpolate(before.height, after.height, x)
        val half = if (before.isHigh) 0.0 else 0.5

        return TideUi.Face(
            portName = port.name,
            heightMetres = height,
            trend = when {
                x < SLACK_SHARE || x > 1 - SLACK_SHARE -> TideUi.Trend.SLACK
                before.isHigh -> TideUi.Trend.FALLING
                else -> TideUi.Trend.RISING
            },
            next = after,
            untilNext = Duration.between(now, after.time),
            phase = (half + x / 2).toFloat(),
            stale = Duration.between(port.fetched, now) > MAX_AGE,
        )
    }

    companion object {
        private const val KEY_PORT = "port"
        private const val SLACK_SHARE = 0.06
        private val MAX_AGE: Duration = Duration.ofDays(20)

        /** Half a cosine between two extremes: flat at both ends, steepest half-way, like the rule of twelfths. */
        internal fun interpolate(from: Double, to: Double, x: Double): Double =
            from + (to - from) * (1 - cos(PI * x)) / 2
    }
}
