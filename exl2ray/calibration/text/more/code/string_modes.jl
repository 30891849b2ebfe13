"""
    StringModes

A plucked, stiff, damped string by modal synthesis. Each mode is one complex number that turns and shrinks from
sample to sample, so a note costs one multiplication per mode and sample, and nothing is ever unstable.
"""
module StringModes

export PluckedString, pluck!, render!, inharmonicity

struct PluckedString{T<:AbstractFloat}
    rotor::Vector{Complex{T}}   # factor per sample
    state::Vector{Complex{T}}
    bridge::Vector{T}           # how strongly a mode pulls at the bridge
    rate::T
end

"""
    inharmonicity(d, L, E, F)

The constant B of a round steel string: partial n lies at n f₀ √(1 + B n²). Diameter and length in metres, Young's
modulus in pascal, tension in newton.
"""
inharmonicity(d, L, E, F) = π^3 * E * d^4 / (64 * F * L^2)

function PluckedString(f0::Real; B=1e-4, rate=48_000.0, t60=4.0, bright=0.35, T=Float64)
    f0 > 0 || throw(DomainError(f0, "a string needs a positive frequency"))
    partial(n) = n * f0 * sqrt(1 + B * n^2)

    # Partials above the Nyquist frequency would fold back as wrong notes; B makes their number finite anyway.
    count = something(findfirst(n -> partial(n) >= 0.48rate, 1:10_000), 10_001) - 1
    count > 0 || throw(DomainError(f0, "above the Nyquist frequency"))

    rotor = map(1:count) do n
        # Air friction takes all modes down alike, internal friction grows with the square of the frequency.
        decay = log(1000) / t60 * (1 + bright * (partial(n) / 1000)^2)
        exp(complex(-decay, 2π * partial(n)) / rate)
    end
    bridge = [(-1)^(n + 1) * T(n) for n in 1:count]
    PluckedString{T}(rotor, zeros(Complex{T}, count), bridge ./ count, rate)
end

"""
    pluck!(s, where; height=1.0, width=0.01)

Lift the string at the fraction `where` of its length and let go. A string that is still sounding goes on sounding:
the new shape is added to the old one. `width` is the width of the plectrum, also as a fraction.
"""
function pluck!(s::PluckedString, place::Real; height=1.0, width=0.01)
    0 < place < 1 || throw(ArgumentError("the finger must be between nut and bridge"))
    for n in eachindex(s.state)
        triangle = 2height * sinpi(n * place) / (π^2 * n^2 * place * (1 - place))
        s.state[n] += triangle * sinc(n * width / 2)
    end
    return s
end

function render!(out::AbstractVector, s::PluckedString)
    @inbounds for i in eachindex(out)
        y = zero(real(eltype(s.state)))
        @simd for n in eachindex(s.state)
            s.state[n] *= s.rotor[n]
            y += s.bridge[n] * real(s.state[n])
        end
        out[i] = y
    end
    return out
end

render!(s::PluckedString, seconds::Real) = render!(zeros(round(Int, seconds * s.rate)), s)

# An octave too high when touched in the middle: kill the modes that move at the touched point.
function touch!(s::PluckedString, place::Real; firmness=0.98)
    for n in eachindex(s.state)
        s.state[n] *= 1 - firmness * sinpi(n * place)^2
    end
    return s
end

end # module

if abspath(PROGRAM_FILE) == @__FILE__
    using .StringModes
    low_e = PluckedString(82.41; B=inharmonicity(1.17e-3, 0.648, 2.0e11, 78.0) / 8)   # wound: the core is thinner
    pluck!(low_e, 0.21)
    y = render!(low_e, 1.5)
    println("peak ", round(maximum(abs, y); sigdigits=4), " with ", length(low_e.state), " modes")
end
