"""
    Carillonneur

Which notes sound sour on a set of bells? Partial tones of bells, their roughness against each other, and a tuner's
list: how much to turn off which bell to make a given piece sound best.
"""
module Carillonneur

using LinearAlgebra: norm
using Printf: @printf

export Bell, partials, roughness, sourest, tune!

# Hum, prime, tierce (a minor third!), quint, nominal and what lies above, relative to the nominal / 2.
const IDEAL = (hum = 0.5, prime = 1.0, tierce = 1.2, quint = 1.5, nominal = 2.0, deciem = 2.5, duodecime = 3.0)

struct Bell{T<:AbstractFloat}
    name::Symbol
    ratios::NTuple{7,T}
    strike::T            # Hz
    mass::T              # kg
end

Bell(name, strike; mass = 4.2e8 / strike^3, cents = ntuple(zero, 7)) =
    Bell{Float64}(Symbol(name), ntuple(i -> values(IDEAL)[i] * exp2(cents[i] / 1200), 7), strike, mass)

partials(b::Bell) = b.strike .* b.ratios

"Loudness of the partials a moment after the stroke; the hum outlives the others but starts softly."
amplitudes(::Bell, t) = (0.35, 0.6, 0.8, 0.3, 1.0, 0.4, 0.5) .* exp.(-t ./ (9.0, 4.0, 3.5, 1.2, 1.6, 0.7, 0.8))

# Two pure tones grate when they lie within a critical band of each other, most of all at a quarter of it.
bark_width(f) = 24.7 * (4.37f / 1000 + 1)

function roughness(f₁, a₁, f₂, a₂)
    x = abs(f₂ - f₁) / bark_width((f₁ + f₂) / 2)
    x > 1.2 && return zero(x)
    return a₁ * a₂ * (4x * exp(1 - 4x))^2
end

function roughness(a::Bell, b::Bell; t = 0.3)
    pa, pb = partials(a), partials(b)
    xa, xb = amplitudes(a, t), amplitudes(b, t)
    return sum(roughness(pa[i], xa[i], pb[j], xb[j]) for i in 1:7, j in 1:7)
end

"How often each pair of bells sounds together within `window` seconds, from a list of (time, bell) strokes."
function together(strokes; window = 1.0)
    count = Dict{Tuple{Symbol,Symbol},Float64}()
    for (i, (t, a)) in pairs(strokes)
        for j in i+1:lastindex(strokes)
            s, b = strokes[j]
            s - t > window && break
            a === b && continue
            key = minmax(a, b)
            count[key] = get(count, key, 0.0) + exp(-(s - t) / window)
        end
    end
    return count
end

function sourest(bells::Dict{Symbol,<:Bell}, strokes; n = 10)
    weights = together(strokes)
    list = [(w * roughness(bells[a], bells[b]), a, b) for ((a, b), w) in weights]
    partialsort!(list, 1:min(n, length(list)), rev = true)
    return first(list, n)
end

"""
    tune!(bells, strokes; passes = 4, deepest = 30)

Lowers single partials, bell by bell, as a lathe can: metal comes off and never goes back, so cents are negative only.
Returns the turned amounts as `(bell, partial) => cents`.
"""
function tune!(bells::Dict{Symbol,Bell{T}}, strokes; passes = 4, deepest = 30) where {T}
    turned = Dict{Tuple{Symbol,Symbol},Int}()
    weights = together(strokes)
    cost(name, bell) = sum(weights; init = 0.0) do ((a, b), w)
        a === name ? w * roughness(bell, bells[b]) : b === name ? w * roughness(bells[a], bell) : 0.0
    end
    for pass in 1:passes
        changed = false
        for name in sort!(collect(keys(bells)), by = k -> bells[k].strike)
            bell = bells[name]
            best, best_cost = nothing, cost(name, bell) - 1e-6
            for (k, partial) in enumerate(keys(IDEAL)), cents in -1:-1:-6
                already = get(turned, (name, partial), 0)
                already + cents < -deepest && break
                trial = Bell{T}(name, Base.setindex(bell.ratios, bell.ratios[k] * exp2(cents / 1200), k), bell.strike, bell.mass)
                # Off the true nominal the strike note itself wanders, and the ear forgives that least of all.
                c = cost(name, trial) + 0.002 * (1200log2(trial.ratios[5] / 2))^2
                c < best_cost && ((best, best_cost) = ((trial, partial, cents), c))
            end
            best === nothing && continue
            trial, partial, cents = best
            bells[name] = trial
            turned[name, partial] = get(turned, (name, partial), 0) + cents
            changed = true
        end
        @printf("pass %d: %s\n", pass, changed ? "turned something" : "nothing left to gain")
        changed || break
    end
    return turned
end

end # module
