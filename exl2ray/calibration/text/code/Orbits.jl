"""
Integrators for small gravitational systems, chosen by dispatch.

The point of the module is the comparison in `energy_drift`: a fourth-order Runge-Kutta method is
more accurate per step, but the symplectic leapfrog keeps the energy bounded for ever.
"""
module Orbits

using LinearAlgebra

export Body, Leapfrog, RungeKutta4, simulate!, energy

const G = 6.674_30e-11

mutable struct Body{T<:AbstractFloat}
    mass::T
    position::Vector{T}
    velocity::Vector{T}
end

abstract type Integrator end

"Kick-drift-kick leapfrog, second order, symplectic, one force evaluation per step."
struct Leapfrog <: Integrator end

"The classical four-stage method. Loses energy slowly and systematically."
struct RungeKutta4 <: Integrator end

function accelerations(masses, positions)
    acc = [zero(p) for p in positions]
    for i in eachindex(positions), j in (i + 1):lastindex(positions)
        r = positions[j] - positions[i]
        pull = G / norm(r)^3 * r
        # Newton's third law halves the work: each pair is visited once.
        @. acc[i] += masses[j] * pull
        @. acc[j] -= masses[i] * pull
    end
    return acc
end

accelerations(bodies::Vector{<:Body}) =
    accelerations([b.mass for b in bodies], [b.position for b in bodies])

function step!(::Leapfrog, bodies, dt, acc)
    for (b, a) in zip(bodies, acc)
        @. b.velocity += dt / 2 * a
        @. b.position += dt * b.velocity
    end
    # The force at the end of this step is the force at the start of the next one.
    acc = accelerations(bodies)
    for (b, a) in zip(bodies, acc)
        @. b.velocity += dt / 2 * a
    end
    return acc
end

function step!(::RungeKutta4, bodies, dt, acc)
    m = [b.mass for b in bodies]
    x = [copy(b.position) for b in bodies]
    v = [copy(b.velocity) for b in bodies]

    k1x, k1v = v, acc
    k2x = v .+ dt / 2 .* k1v
    k2v = accelerations(m, x .+ dt / 2 .* k1x)
    k3x = v .+ dt / 2 .* k2v
    k3v = accelerations(m, x .+ dt / 2 .* k2x)
    k4x = v .+ dt .* k3v
    k4v = accelerations(m, x .+ dt .* k3x)

    for (i, b) in enumerate(bodies)
        @. b.position = x[i] + dt / 6 * (k1x[i] + 2k2x[i] + 2k3x[i] + k4x[i])
        @. b.velocity = v[i] + dt / 6 * (k1v[i] + 2k2v[i] + 2k3v[i] + k4v[i])
    end
    return accelerations(bodies)
end

function energy(bodies)
    kinetic = sum(b.mass * dot(b.velocity, b.velocity) / 2 for b in bodies)
    potential = 0.0
    for i in eachindex(bodies), j in (i + 1):lastindex(bodies)
        potential -= G * bodies[i].mass * bodies[j].mass / norm(bodies[i].position - bodies[j].position)
    end
    return kinetic + potential
end

"""
    simulate!(observe, method, bodies; dt, steps)

Advance `bodies` in place and call `observe(step, bodies)` after each step. The observer comes first
so that callers can use a `do` block.
"""
function simulate!(observe, method::Integrator, bodies; dt, steps)
    dt > 0 || throw(ArgumentError("dt must be positive, got $dt"))
    acc = accelerations(bodies)
    for n in 1:steps
        acc = step!(method, bodies, dt, acc)
        observe(n, bodies)
    end
    return bodies
end

earth_and_moon() = [
    Body(5.972e24, [0.0, 0.0], [0.0, -12.6]),
    Body(7.342e22, [3.844e8, 0.0], [0.0, 1.022e3]),
]

"Largest relative deviation of the energy during ten years of lunar orbits, in steps of six hours."
function energy_drift(method)
    bodies = earth_and_moon()
    start = energy(bodies)
    worst = 0.0
    simulate!(method, bodies; dt = 21_600.0, steps = 14_610) do _, now
        worst = max(worst, abs(energy(now) / start - 1))
    end
    return worst
end

end # module

using .Orbits

for method in (Leapfrog(), RungeKutta4())
    println(rpad(nameof(typeof(method)), 12), " ", Orbits.energy_drift(method))
end
