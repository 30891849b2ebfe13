"""
    SeaIce

One-dimensional thermodynamic growth of sea ice: a slab of ice under snow, heated from below by the
ocean and cooled from above by the air. Meant for teaching; the three layers are enough to see why
snow in November makes thinner ice in April.
"""
module SeaIce

using Printf
using Statistics: mean

export Column, Forcing, simulate!, thickness

const k_ice, k_snow = 2.03, 0.31        # W m⁻¹ K⁻¹
const ρ_ice, L_fusion = 910.0, 3.34e5   # kg m⁻³, J kg⁻¹
const T_freeze = -1.8                   # °C
const σ = 5.67e-8
const day = 86_400.0

Base.@kwdef mutable struct Column{T<:Real}
    ice::T = 0.05
    snow::T = 0.0
    surface::T = T_freeze
    ocean_flux::T = 2.0                 # W m⁻²
end

thickness(c::Column) = c.ice + c.snow

"""
Weather as functions of the day since 1 October. `snowfall` is in metres of snow per day.
"""
struct Forcing{A,B,C}
    air::A
    sunlight::B
    snowfall::C
end

Forcing(; air = t -> -14 - 16sin(2π * (t - 45) / 365),
          sunlight = t -> max(0, 280sin(2π * (t - 170) / 365)),
          snowfall = t -> t < 60 ? 0.0035 : t < 210 ? 0.0007 : 0.0) = Forcing(air, sunlight, snowfall)

albedo(c::Column) = c.snow > 0.02 ? 0.83 : c.ice > 0.5 ? 0.64 : 0.4

conductance(c::Column) = 1 / (c.ice / k_ice + c.snow / k_snow)

"""
Heat balance at the surface, positive when the surface gains heat.
"""
function balance(c::Column, Ts, air, sun)
    Ta, K = air + 273.15, Ts + 273.15
    longwave_in = 0.78σ * Ta^4
    longwave_out = 0.98σ * K^4
    sensible = 12.0 * (air - Ts)
    conductive = conductance(c) * (T_freeze - Ts)
    return (1 - albedo(c)) * sun + longwave_in - longwave_out + sensible + conductive
end

"Newton's method; the derivative is simple enough to write down."
function surface_temperature(c::Column, air, sun; tol = 1e-6, maxiter = 50)
    Ts = c.surface
    for _ in 1:maxiter
        f = balance(c, Ts, air, sun)
        f′ = -4 * 0.98σ * (Ts + 273.15)^3 - 12.0 - conductance(c)
        step = f / f′
        Ts -= step
        abs(step) < tol && return Ts
    end
    error("surface temperature did not settle, last value $(round(Ts; digits = 2)) °C")
end

function step!(c::Column, f::Forcing, t, Δt)
    air, sun = f.air(t), f.sunlight(t)
    c.snow += f.snowfall(t) * Δt / day

    Ts = surface_temperature(c, air, sun)
    if Ts > 0
        # Held at the melting point; what is left over melts snow first, then ice.
        excess = balance(c, 0.0, air, sun) * Δt
        ρ_snow = 330.0
        melt = min(c.snow, excess / (ρ_snow * L_fusion))
        c.snow -= melt
        excess -= melt * ρ_snow * L_fusion
        c.ice -= max(0.0, excess) / (ρ_ice * L_fusion)
        Ts = 0.0
    end
    c.surface = Ts

    conducted = conductance(c) * (T_freeze - Ts)
    c.ice += (conducted - c.ocean_flux) * Δt / (ρ_ice * L_fusion)

    # Too much snow pushes the ice under water; the flooded part freezes to snow ice.
    freeboard = c.ice * (1 - ρ_ice / 1025) - c.snow * 330 / 1025
    if freeboard < 0
        flooded = min(-freeboard, c.snow)
        c.snow -= flooded
        c.ice += flooded
    end
    c.ice = max(c.ice, 0.01)
    return c
end

function simulate!(c::Column, f::Forcing = Forcing(); days = 365, Δt = day / 4)
    record = NamedTuple{(:t, :ice, :snow, :Ts),NTuple{4,Float64}}[]
    for n in 0:round(Int, days * day / Δt)-1
        t = n * Δt / day
        step!(c, f, t, Δt)
        isinteger(t) && push!(record, (; t, ice = c.ice, snow = c.snow, Ts = c.surface))
    end
    return record
end

function report(record; every = 30, io = stdout)
    for r in record[1:every:end]
        bar = repeat('█', round(Int, 20r.ice)) * repeat('░', round(Int, 20r.snow))
        @printf(io, "day %3d  %6.1f °C  ice %.2f m  snow %.2f m  %s\n", r.t, r.Ts, r.ice, r.snow, bar)
    end
end

end # module

using .SeaIce

if abspath(PROGRAM_FILE) == @__FILE__
    early = simulate!(Column())
    SeaIce.report(early)

    late = simulate!(Column(), Forcing(snowfall = t -> 120 ≤ t < 210 ? 0.0035 : 0.0))
    gain = maximum(r.ice for r in late) - maximum(r.ice for r in early)
    println("the same kind of snow, but after January: ", round(100gain; digits = 1), " cm more ice")
end
